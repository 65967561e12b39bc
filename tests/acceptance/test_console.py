"""Laws of `celery affinity`: what it says of a working system, and what it does to it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.bin.celery import celery as celery_command
from celery.result import AsyncResult
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result
from pydantic import TypeAdapter

import acceptance.apps.gated  # noqa: F401  (the test's producer knows its tasks)
from acceptance.apps.gated import GATES_VARIABLE
from acceptance.support import LEAN, QUICK, Producer, slots, wait_for_nodes
from celery_affinity import Affinity, AffinityQueue
from celery_affinity.cli import affinity as command
from celery_affinity.embedded import start_server
from celery_affinity.pulse import folder
from celery_affinity.types import (
    ChangeRecord,
    DeadLetter,
    EvacuationRecord,
    Finding,
    LeaderRecord,
    PulseRecord,
    QueueStats,
    StatusRecord,
    TagExplanation,
    TagRecord,
    TaskExplanation,
    WorkerRecord,
)
from harness import BROKER_VARIABLE, RESULTS_VARIABLE, Cluster, Node, wait_until
from history import HISTORY_VARIABLE, History

pytestmark = pytest.mark.acceptance

APP = "acceptance.apps.gated"


class Console:
    """Two workers with a slot each, and the command line beside them."""

    def __init__(self, cluster: Cluster, gates: Path, history: Path) -> None:
        self.cluster = cluster
        self.gates = gates
        self.history = history
        self.producer = Producer(cluster.broker_url)
        self.affinity = self.producer.affinity
        self._held: set[str] = set()

    def worker(self, name: str) -> Node:
        return self.cluster.worker(APP, name, queues="jobs", environ=QUICK, extra=LEAN)

    def run(self, *arguments: str, code: int = 0, text: str | None = None) -> str:
        done: Result = CliRunner().invoke(
            command, list(arguments), obj=SimpleNamespace(app=self.producer.app), input=text
        )
        assert done.exit_code == code, (arguments, done.output, done.exception)
        return done.output

    def ask(self, kind: Any, *arguments: str, code: int = 0) -> Any:
        """A command's JSON as the record that it is."""
        return TypeAdapter(kind).validate_json(self.run(*arguments, "--json", code=code))

    def open(self, *tags: str) -> None:
        for tag in tags:
            (self.gates / tag).touch()

    def hold(self, tag: str, count: int = 1) -> list[Any]:
        """Send tasks that run until the gate is open, and wait for the first to run."""
        self._held.add(tag)
        found = self.producer.send(tag, count, task="gated")
        self.wait_held(tag)
        wait_until(lambda: self.affinity.stats("jobs").pending == 0, what="the intake")
        return found

    def wait_held(self, tag: str) -> None:
        def runs() -> bool:
            return any(h.running_seconds is not None for h in self.affinity.explain(tag).holds)

        wait_until(runs, what=f"{tag} to run")

    def quiet(self) -> None:
        wait_until(lambda: self.affinity.stats("jobs").entries == 0, 30, "an empty ledger")
        wait_until(lambda: self.affinity.stats("jobs").pending == 0, 30, "an empty queue")

    def slot_of(self, tag: str) -> str:
        """The worker that ran the last task of a tag."""
        found = [run for run in History.load(self.history).runs if run.tag == tag]
        return str(found[-1].worker)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(1, id="one-shard"),
        pytest.param(3, id="three-shards", marks=pytest.mark.long),
    ],
)
def console(
    request: pytest.FixtureRequest, server_binary: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Console]:
    where = tmp_path_factory.mktemp("console")
    gates = where / "gates"
    gates.mkdir()
    with start_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in (
            (BROKER_VARIABLE, server.url()), (RESULTS_VARIABLE, "1"), (GATES_VARIABLE, str(gates)),
            (HISTORY_VARIABLE, str(where / "history.jsonl")), ("TMPDIR", str(where)), *QUICK.items(),
            ("AFFINITY_TEST_QUEUE", json.dumps({"shards": request.param})),
        ):  # fmt: skip
            patch.setenv(name, value)
        patch.setattr(tempfile, "tempdir", str(where))
        cluster = Cluster(server.url(), where, where / "history.jsonl")
        console = Console(cluster, gates, where / "history.jsonl")
        try:
            console.worker("w1")
            console.worker("w2")
            wait_for_nodes(console.affinity, 2)
            cluster.wait_ready()
            wait_until(lambda: console.affinity.leader("jobs"), what="a leader")
            yield console
        finally:
            for node in cluster.nodes:
                print(node.log_tail(15))
            cluster.destroy()


@pytest.fixture(autouse=True)
def no_law_hangs_the_next(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a law that has failed held is let go."""
    yield
    if "console" in request.fixturenames:
        one: Console = request.getfixturevalue("console")
        one.open(*one._held)


def test_every_look_is_a_record_in_json_and_a_table_in_text(console: Console) -> None:
    console.hold("seen", 3)
    (stats,) = console.ask(list[QueueStats], "queues")
    assert (stats.queue, stats.held_tags, stats.idle_slots, stats.paused) == ("jobs", 1, 1, False)
    status = console.ask(StatusRecord, "status")
    assert (status.queues[0].workers, status.queues[0].busy_slots) == (2, 1)
    workers = console.ask(list[WorkerRecord], "workers")
    assert [worker.name for worker in workers] == ["w1@test", "w2@test"]
    assert "seen" in [slot.current_identify_tag for w in workers for slot in w.slots]
    (tag,) = console.ask(list[TagRecord], "tags")
    assert (tag.tag, len(tag.slots)) == ("seen", 1)
    assert console.ask(list[TagRecord], "tags", "--top", "5")[0].tag == "seen"
    leader = console.ask(LeaderRecord, "leader")
    assert console.run("leader").startswith(f"{leader.leader}, term {leader.term}, ")
    assert console.run("queues").split()[-1] == "on"
    assert re.search(r"^w[12]@test +0  running  jobs +seen +[12]  +\d+ ", console.run("workers"), re.M)
    assert re.search(r"^seen +[12] +-  w[12]@test slot 0$", console.run("tags", "--top", "3"), re.M)
    console.open("seen")
    console.quiet()


def masked(text: str) -> str:
    """The text without what differs from run to run."""
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", re.sub(r"epoch \d+", "epoch N", text))
    return re.sub(r"w[12]@test", "WORKER", re.sub(r"\d+\.\d s", "TIME", text))


def test_explain_says_who_holds_what_waits_and_whose_turn_it_is(console: Console) -> None:
    # All of one shard, where there are three: each has a ring of its own.
    first = console.hold("hot", 4)
    console.hold("other")
    console.producer.send("following", task="gated")
    later = console.producer.send("neighbour", 2, task="gated")
    wait_until(lambda: console.affinity.explain("neighbour").place == 2, what="its place")
    wait_until(lambda: console.affinity.explain("hot").waiting == 2, what="its backlog")
    for tag in ("hot", "neighbour"):
        wait_until(lambda tag=tag: console.affinity.explain(tag).oldest_seconds, what="a second")
    assert masked(console.run("explain", "hot")) == (
        "holds: WORKER slot 0, epoch N, 2 of 10 of its batch, running jobs.gated TIME\n"
        "waiting: 2, oldest TIME\n"
        "why: as many of its tasks run as may at once\n"
    )
    told = re.sub(r", about \d+ (s|min|h)", ", about TIME", masked(console.run("explain", "neighbour")))
    assert told.replace(", about TIME", "") == (
        "holds: no slot\nwaiting: 2, oldest TIME\nturn: second in the ring of 2\n"
        "why: no slot is free\n"
    )
    assert console.run("explain", "nothing", code=1) == (
        "nothing: no tag and no task of that name in 'jobs': it has ended, or was never sent there\n"
    )
    # The same of tasks
    assert masked(console.run("explain", first[0].id)).startswith("jobs.gated ID: runs\ntag: hot\n")
    assert masked(console.run("explain", first[1].id)).startswith("jobs.gated ID: sent to its slot")
    found = console.ask(TaskExplanation, "explain", later[1].id)
    assert (found.state, found.ahead, found.tag.tag) == ("waiting", 1, "neighbour")
    (due,) = console.producer.send("due", countdown=600)
    wait_until(lambda: console.affinity.stats("jobs").scheduled == 1, what="its intake")
    assert masked(console.run("explain", due.id)).startswith("jobs.work ID: due in 10 min\n")
    assert console.ask(TaskExplanation, "explain", "no-such-id", code=1).state == "unknown"
    console.run("purge", "due", "--yes")
    console.open("hot", "other", "following", "neighbour")
    console.quiet()


def test_a_paused_tag_says_by_whom_and_goes_on_where_it_was(console: Console) -> None:
    results = console.hold("paused", 3)
    console.run("pause", "paused")
    console.open("paused")
    assert results[0].get(timeout=10) == 0, "what ran ended"
    wait_until(lambda: not console.affinity.explain("paused").holds, what="its slot to be free")
    told = console.ask(TagExplanation, "explain", "paused")
    assert told.waiting == 2
    (change, *_) = console.ask(StatusRecord, "status").changes
    assert (change.what, change.queue, change.target) == ("pause", "jobs", "paused")
    assert "@" in change.who
    assert told.obstacles == (
        f"paused by {change.who}; `celery affinity resume paused --queue jobs`",
    )
    assert any("1 tag is paused or halted" in line for line in console.run("status").splitlines())
    said = json.loads(console.run("resume", "paused", "--json"))
    assert said == {"queue": "jobs", "tag": "paused", "paused": False, "changed": True}
    assert "'jobs' was neither paused nor halted" in console.run("resume", "jobs", code=1)
    assert [result.get(timeout=10) for result in results] == [0, 1, 2]
    TypeAdapter(list[ChangeRecord]).validate_python(console.affinity.changes())


def test_a_paused_queue_runs_nothing_until_it_is_resumed(console: Console) -> None:
    assert "name a TAG" in console.run("pause", code=2)
    console.run("pause", "--queue", "jobs")
    results = console.producer.send("queued", 3)
    wait_until(lambda: console.affinity.explain("queued").waiting == 3, what="the intake")
    assert "jobs: paused;" in console.run("status")
    assert "why: queue paused by " in console.run("explain", "queued")
    assert all(slot.status == "idle" for slot in slots(console.affinity))
    console.run("resume", "--queue", "jobs")
    assert [result.get(timeout=10) for result in results] == [0, 1, 2]


def test_a_moved_tag_runs_on_in_the_other_worker(console: Console) -> None:
    results = console.hold("moved", 3)
    (here,) = (hold.worker for hold in console.affinity.explain("moved").holds)
    there = "w2" if here == "w1@test" else "w1"
    console.run("move", "moved", "--to", there)
    assert f"on its way to {there}@test (move)" in console.run("explain", "moved")
    console.open("moved")
    assert [result.get(timeout=10) for result in results] == [0, 1, 2]
    ran = [run.worker for run in History.load(console.history).runs if run.tag == "moved"]
    assert ran == [here, f"{there}@test", f"{there}@test"]
    assert "names no single worker" in console.run("move", "moved", "--to", "w9", code=1)


def test_a_limit_lets_two_workers_run_one_tag_and_is_taken_back(console: Console) -> None:
    console.hold("limited", 4)
    console.run("limit", "limited", "--concurrency", "2")
    wait_until(lambda: len(console.affinity.explain("limited").holds) == 2, what="two holders")
    console.run("limit", "limited", "--declared")
    assert "--declared" in console.run("limit", "limited", code=2)
    console.open("limited")
    console.quiet()
    found = [run for run in History.load(console.history).runs if run.tag == "limited"]
    assert [run.seq for run in found] == [0, 1, 2, 3]
    assert found[2].start > max(run.end or 0 for run in found[:2]), "lowered: both ended first"


def test_destructive_commands_ask_or_take_yes(console: Console) -> None:
    console.hold("doomed", 5)
    assert "Aborted" in console.run("purge", "doomed", code=1, text="n\n")
    assert len([run for run in History.load(console.history).runs if run.tag == "doomed"]) == 1
    assert console.run("purge", "doomed", "--yes") == "4 tasks of doomed deleted.\n"
    console.open("doomed")
    console.quiet()
    assert len([run for run in History.load(console.history).runs if run.tag == "doomed"]) == 1


def test_a_revoked_tag_ends_as_revoked(console: Console) -> None:
    results = console.hold("revoked", 3)
    due = console.producer.send("revoked", countdown=2, task="gated")
    wait_until(lambda: console.affinity.stats("jobs").scheduled == 1, what="the intake")
    assert "3 tasks of revoked" in console.run("revoke", "--tag", "revoked", "--yes")
    console.open("revoked")
    assert results[0].get(timeout=10) == 0
    for result in [*results[1:], *due]:
        wait_until(lambda one=result: AsyncResult(one.id, app=console.producer.app).state == "REVOKED")
    assert console.producer.send("revoked")[0].get(timeout=10) == 4, "what comes later runs"
    console.quiet()


def test_dead_letters_are_listed_shown_requeued_and_purged(console: Console) -> None:
    app = console.producer.app
    for number in range(3):
        app.send_task("jobs.nobody-knows", (number,), queue="jobs", headers={"identify_tag": "odd"})
    letters = wait_until(
        lambda: len(found := console.affinity.dead_letters("jobs")) == 3 and found, what="3 burials"
    )
    found = console.ask(list[DeadLetter], "dead", "list")
    assert [letter.entry for letter in found] == [letter.entry for letter in letters]
    entry = str(found[0].entry)
    assert re.search(rf"^ *{entry}  odd .*unknown task jobs.nobody-knows$", console.run("dead", "list"), re.M)
    assert "reason:  unknown task jobs.nobody-knows" in console.run("dead", "show", entry)
    assert "args:    (0,) {}" in console.run("dead", "show", entry)
    assert "see `dead list --tag`" in console.run("explain", "odd", code=1)
    assert f"no dead letter {entry}000;" in console.run("dead", "show", f"{entry}000", code=1)
    assert "ENTRIES, or --tag" in console.run("dead", "purge", code=2)
    wait_until(lambda: "1 dead" in console.run("dead", "requeue", entry, code=0), what="a requeue")
    wait_until(lambda: len(console.affinity.dead_letters("jobs")) == 3, what="its burial")
    wait_until(
        lambda: "deleted" in console.run("dead", "purge", "--all", "--yes")
        and not console.affinity.dead_letters("jobs"),
        what="the purge of what was told",
    )
    console.quiet()


def test_top_shows_queues_slots_and_backlogs_as_often_as_asked(console: Console) -> None:
    console.hold("top", 2)
    text = console.run("top", "-n", "2", "--interval", "0.1")
    assert text.count("beat left") == text.count("tasks/s") == 2
    assert "top" in text
    console.open("top")
    console.quiet()


def test_completion_knows_commands_queues_and_workers(console: Console) -> None:
    def complete(*arguments: str, incomplete: str = "") -> list[str]:
        shell = ShellComplete(celery_command, {}, "celery", "_CELERY_COMPLETE")
        found = shell.get_completions(["-A", f"{APP}:app", "affinity", *arguments], incomplete)
        return [item.value for item in found]

    assert {"status", "explain", "dead", "doctor"} <= set(complete())
    assert complete("evacuate") == ["jobs"]
    assert complete("pause", "x", "--queue", incomplete="j") == ["jobs"]
    done = subprocess.run(
        [Path(sys.executable).with_name("celery")], capture_output=True, text=True, timeout=60,
        env={
            **console.cluster.environ, "_CELERY_COMPLETE": "bash_complete", "COMP_CWORD": "5",
            "COMP_WORDS": f"celery -A {APP} affinity drain w",
        },
    )  # fmt: skip
    assert done.stdout.split() == ["plain,w1@test", "plain,w2@test"], done.stderr


def outside(console: Console, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "celery", "-A", APP, "affinity", *arguments],
        env={**console.cluster.environ, **environ}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_on_a_terminal_tables_are_richs(console: Console) -> None:
    for arguments in (["workers"], ["top", "-n", "1"]):
        ours, theirs = pty.openpty()
        done = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", APP, "affinity", *arguments],
            env={**console.cluster.environ, "TERM": "xterm", "COLUMNS": "160"}, stdout=theirs,
        )  # fmt: skip
        os.close(theirs)
        text = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(ours, 65536):
                text += part
        os.close(ours)
        assert done.wait(30) == 0
        assert "w1@test" in text.decode() and "\u2500\u2500\u2500" in text.decode(), text


def test_alive_asks_no_redis_and_knows_a_killed_worker(console: Console) -> None:
    done = outside(console, "alive", "--json", **{BROKER_VARIABLE: "redis://127.0.0.1:1/0"})
    assert done.returncode == 0, done.stderr
    found = TypeAdapter(list[PulseRecord]).validate_json(done.stdout)
    assert [record.node for record in found] == ["w1@test", "w2@test"]
    node = console.worker("w3")
    wait_until(lambda: console.affinity.alive("w3@test"), 40, "its first sign of life")
    node.wait_ready()
    node.kill9()
    assert "DOES NOT LIVE" in console.run("alive", code=1)
    assert console.run("alive", "--node", "w1@test").startswith("w1@test (pid ")
    again = console.worker("w4")
    again.wait_ready()
    assert not console.affinity.alive("w3@test"), "whoever starts there takes it away"
    again.term()
    again.wait()
    assert len(os.listdir(folder())) == 2, "a stopped worker takes its own away"
    wait_for_nodes(console.affinity, 2)


def test_doctor_finds_nothing_wrong_where_nothing_is(console: Console) -> None:
    found = console.ask(list[Finding], "doctor")
    assert {f.about: f.verdict for f in found if f.verdict != "ok"} == {
        "Redis persistence": "warning", "result backend": "warning"
    }
    assert any(f.found == "none among the 2 workers that answered" for f in found)
    assert "-> CONFIG SET appendonly yes" in console.run("doctor")


def test_doctor_names_each_fault_with_its_fix(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AFFINITY_HEARTBEAT_TIMEOUT")
    app = Celery("other", broker=console.cluster.broker_url, set_as_current=False)
    app.conf.task_default_queue = "jobs"
    client = console.affinity._scripts.client
    client.set("taken", "x")
    Affinity(
        app, heartbeat_timeout=7,
        queues=[AffinityQueue("jobs", max_batch_size=3), AffinityQueue("taken")],
    )  # fmt: skip
    done = CliRunner().invoke(command, ["doctor"], obj=SimpleNamespace(app=app))
    assert done.exit_code == 1, done.output
    for line in (
        "WARNING names: the app's default queue is 'jobs'",
        "WARNING heartbeat_timeout: 'w1@test' has 2 s, this app 7 s",
        "WARNING queue 'jobs': its leader goes by max_batch_size 10, this app declares 3",
        "ERROR   queue 'taken': its key 'taken' is a string",
        "ERROR   queue 'taken': nobody schedules it",
        "ERROR   queue 'taken': no worker serves it",
    ):
        assert line in done.output, done.output
    assert done.output.count("-> ") >= 6
    client.delete("taken")


def test_doctor_says_what_to_do_without_redis() -> None:
    app = Celery("nowhere", broker="redis://127.0.0.1:1/0", set_as_current=False)
    Affinity(app, queues=[AffinityQueue("jobs")])
    done = CliRunner().invoke(command, ["doctor"], obj=SimpleNamespace(app=app))
    assert done.exit_code == 1
    assert "ERROR   Redis: does not tell what it is" in done.output
    asked = CliRunner().invoke(command, ["status"], obj=SimpleNamespace(app=app))
    assert (asked.exit_code, asked.output[:35]) == (1, "Error: Redis does not answer: Error")


def test_a_drained_worker_gets_nothing_more_and_its_tags_go_elsewhere(console: Console) -> None:
    results = console.hold("drained", 3)
    (here,) = (hold.worker for hold in console.affinity.explain("drained").holds)
    console.run("drain", here)
    assert "draining" in console.run("workers")
    console.open("drained")
    assert [result.get(timeout=10) for result in results] == [0, 1, 2]
    console.quiet()
    assert console.slot_of("drained") != here


def test_evacuate_answers_with_its_record_from_the_real_command_line(console: Console) -> None:
    done = outside(console, "evacuate", "jobs", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    assert TypeAdapter(EvacuationRecord).validate_python(json.loads(done.stdout)).done
    console.run("resume", "--queue", "jobs")
    console.producer.send("back")[0].get(timeout=10)
