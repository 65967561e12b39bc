"""Redis that is full, refuses, forgets or lies about the time, and leaders whose passes fail."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import RedisError, ResponseError

from acceptance.support import (
    APP,
    HEARTBEAT_TIMEOUT_SECONDS,
    LEAN,
    QUICK,
    WORKER_ONLY,
    Producer,
    finished,
    runs,
    wait_for_nodes,
    wait_for_run,
)
from celery_affinity.embedded import Server, start_server
from chaos.proxy import Proxy
from harness import BROKER_VARIABLE, Cluster, Node, wait_until
from history import HISTORY_VARIABLE, History

pytestmark = pytest.mark.acceptance

TAGS = [f"tag-{number}" for number in range(6)]
#: Longer than any lease and any term.
LONG_SECONDS = 1.5 * HEARTBEAT_TIMEOUT_SECONDS


def redis_with_a_clock(directory: Path, ahead: Path) -> Server:
    """A server whose wall clock is as many seconds ahead as the file says."""
    shim = directory / "clockshim.so"
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return start_server()
    source = Path(__file__).with_name("clockshim.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("LD_PRELOAD", str(shim))
        environ.setenv("CLOCK_AHEAD", str(ahead))
        return start_server()


@dataclass
class System:
    """A worker with two slots, a beat that schedules, and their server; shared by the laws here."""

    server: Server
    cluster: Cluster
    producer: Producer
    worker: Node
    beat: Node
    history: Path
    ahead: Path

    @property
    def client(self) -> Redis:
        return self.server.client()

    def long_task(self, tag: str, seconds: float = LONG_SECONDS + 1.5) -> None:
        """One that runs on through the trouble; wait until it does."""
        self.producer.send(tag, task="long", ms=1000 * seconds)
        wait_for_run(self.history, lambda run: run.tag == tag)

    def move_clock(self, seconds: int) -> None:
        """The server's, from here on."""
        ahead = int(self.ahead.read_text()) if self.ahead.exists() else 0
        self.ahead.with_suffix(".new").write_text(str(ahead + seconds))
        os.replace(self.ahead.with_suffix(".new"), self.ahead)

    def check(self, tag: str) -> None:
        """Everything goes on, and nothing was lost or run twice."""
        self.producer.send(tag, 3)
        found = finished(self.history)
        assert found.reruns() == 0
        assert self.worker.alive and self.beat.alive
        wait_until(lambda: self.producer.affinity.stats("jobs").entries == 0, what="all settled")
        found.assert_lawful()

    def lines(self, node: Node, text: str) -> list[str]:
        return [line for line in node.log_text().splitlines() if text in line]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, server_binary: Path) -> Iterator[System]:
    directory = tmp_path_factory.mktemp("redis-trouble")
    history, ahead = directory / "history.jsonl", directory / "ahead"
    with (
        redis_with_a_clock(directory, ahead) as server,
        pytest.MonkeyPatch.context() as environ,
    ):
        environ.setenv(HISTORY_VARIABLE, str(history))
        environ.setenv(BROKER_VARIABLE, server.url())
        cluster = Cluster(server.url(), directory, history)
        worker = cluster.worker(
            APP, queues="jobs", concurrency=2, environ={**QUICK, **WORKER_ONLY}, extra=LEAN
        )
        beat = cluster.beat(APP, environ=QUICK)
        try:
            yield System(server, cluster, Producer(server.url()), worker, beat, history, ahead)
        finally:
            cluster.destroy()


@pytest.fixture
def system(shared: System, monkeypatch: pytest.MonkeyPatch) -> System:
    monkeypatch.setenv(HISTORY_VARIABLE, str(shared.history))
    shared.history.write_text("")  # each law answers for its own tasks
    wait_for_nodes(shared.producer.affinity, 1)
    wait_until(lambda: shared.producer.affinity.leader("jobs"), what="a leader")
    return shared


@pytest.mark.proves("22: maxmemory reached, noeviction", "sending raises, what is there is worked off, nobody spins")
def test_a_full_redis_is_worked_off_and_everything_goes_on(system: System) -> None:
    client = system.client
    system.long_task("full-long")
    system.producer.send_each([f"full-{tag}" for tag in TAGS], 8, ms=40)
    client.config_set("maxmemory", 1)
    try:
        before = system.producer.affinity.stats("jobs")
        assert before.pending + before.entries > 20, "it is full of tasks"
        with pytest.raises((RedisError, OperationalError), match="maxmemory"):
            system.producer.app.tasks["jobs.work"].apply_async(("full", 0, 0))
        finished(system.history)
        wait_until(lambda: system.producer.affinity.stats("jobs").entries == 0, what="all settled")
        assert [worker.status for worker in system.producer.affinity.workers()] == ["idle"]
        sent = commands(client)
        time.sleep(HEARTBEAT_TIMEOUT_SECONDS)  # the length of the trouble: past every lease
        sent = commands(client) - sent
    finally:
        client.config_set("maxmemory", 0)
    each_second = sent / HEARTBEAT_TIMEOUT_SECONDS
    print(f"{each_second:.0f} commands a second while nothing is to do")
    assert each_second < 300
    system.check("full-after")
    assert not system.lines(system.beat, "is lost (no heartbeat)")


def commands(client: Redis) -> int:
    return int(client.info("stats")["total_commands_processed"])  # type: ignore[index]


@pytest.mark.proves("24: the disk is full (MISCONF)", "sending raises, all waits, nobody alive is rescued")
def test_a_redis_that_refuses_all_writes_is_waited_for(system: System) -> None:
    client = system.client
    blocker = system.server.directory / "dump.rdb"
    blocker.mkdir()
    client.config_set("save", "3600 1")
    system.producer.send_each([f"disk-{tag}" for tag in TAGS], 10, ms=20)
    system.long_task("disk-long")
    client.bgsave()
    restarts = len(system.lines(system.worker, "Connected to redis"))
    wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")  # type: ignore[index]
    with pytest.raises((RedisError, OperationalError), match="MISCONF"):
        system.producer.app.tasks["jobs.work"].apply_async(("disk", 0, 0))
    wait_until(lambda: system.lines(system.beat, "answers with an error (MISCONF"), what="a word")
    time.sleep(LONG_SECONDS)  # the length of the trouble: past every lease and term
    client.config_set("save", "")  # there is room again
    blocker.rmdir()
    print(len(system.lines(system.worker, "Connected to redis")) - restarts, "reconnects")
    system.check("disk-after")
    assert not system.lines(system.beat, "is lost (no heartbeat)")


@pytest.mark.proves("an error in each pass of the leader", "it concedes and says so; beat runs on")
def test_an_error_in_a_pass_concedes_the_term_and_never_ends_beat(system: System) -> None:
    client = system.client
    (key,) = client.keys("*q:jobs:c")
    broken = key.removesuffix(b":c") + b":eta"
    said = len(system.lines(system.beat, "answers with an error (WRONGTYPE"))
    client.set(broken, "no sorted set")
    wait_until(
        lambda: len(system.lines(system.beat, "answers with an error (WRONGTYPE")) > said,
        what="what is wrong",
    )
    system.producer.send("broken", 2)
    time.sleep(2)  # several tries
    assert len(system.lines(system.beat, "answers with an error (WRONGTYPE")) == said + 1
    client.delete(broken)
    system.check("broken")


@pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("cc")), reason="needs a C compiler")
@pytest.mark.parametrize("hours", [1, -1])
@pytest.mark.proves("39: Redis' wall clock jumps by an hour", "nobody alive is rescued, nothing runs twice")
def test_a_jump_of_the_wall_clock_rescues_nobody_alive(system: System, hours: int) -> None:
    before = int(system.client.time()[0])
    tag = f"jump{hours}"
    system.long_task(tag)
    system.producer.send(tag, 3)
    system.move_clock(hours * 3600)
    moved = int(system.client.time()[0]) - before
    assert 3500 < hours * moved < 3700, "the clock has jumped"
    wait_until(lambda: system.lines(system.beat, "changed its clock by"), what="that it noticed")
    system.producer.send_each([f"{tag}-{one}" for one in TAGS], 3)
    system.check(f"{tag}-after")
    assert not system.lines(system.beat, "is lost (no heartbeat)")
    assert not system.lines(system.worker, "registers anew")


@pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("cc")), reason="needs a C compiler")
@pytest.mark.proves("40: Redis' wall clock jumps to and fro, 40 times in 4 s", "nobody alive is rescued, nothing runs twice")
def test_a_clock_that_jumps_to_and_fro_rescues_nobody_alive(system: System) -> None:
    given_up = len(system.lines(system.beat, "is lost (no heartbeat)"))
    system.long_task("strobe")
    system.producer.send("strobe", 3)
    for jump in range(40):
        system.move_clock(3600 if jump % 2 == 0 else -3600)
        system.producer.send(f"strobe-{jump % 3}")
        time.sleep(0.1)  # the length of a jump
    system.check("strobe-after")
    assert len(system.lines(system.beat, "is lost (no heartbeat)")) == given_up
    assert not system.lines(system.worker, "registers anew")


@pytest.mark.proves("49: maxclients reached", "backoff, no crash, goes on when there are connections again")
def test_a_redis_without_free_connections_is_waited_for(system: System) -> None:
    client = system.client
    system.long_task("crowd-long")
    system.producer.send_each([f"crowd-{tag}" for tag in TAGS], 5, ms=5)
    # The crowd is there first, so that neither beat nor worker gets a connection before the other:
    # a worker that is cut off alone is lost, as it should be.
    crowd = [system.server.client() for _ in range(20)]
    for one in crowd:
        one.ping()
    ours = {one.client_id() for one in (client, *crowd)}
    client.config_set("maxclients", len(ours))
    for found in client.client_list():
        if int(found["id"]) not in ours:
            with contextlib.suppress(ResponseError):  # it has gone by itself
                client.client_kill(found["addr"])
    time.sleep(LONG_SECONDS)  # the length of the trouble: past every lease and term
    with pytest.raises(RedisError, match="max number of clients"):
        system.server.client().ping()
    client.config_set("maxclients", 10_000)
    for one in crowd:
        one.close()
    system.check("crowd-after")
    assert not system.lines(system.beat, "is lost (no heartbeat)")


@pytest.mark.proves("20: a foreign script keeps Redis busy", "it is waited for; no worker ends, nobody is rescued")
def test_a_busy_redis_is_waited_for(system: System) -> None:
    client = system.client
    client.config_set("lua-time-limit", 100)
    system.long_task("busy-long")
    system.producer.send_each([f"busy-{tag}" for tag in TAGS], 5, ms=5)
    foreign = threading.Thread(target=endless_script, args=(system.server.client(),))
    foreign.start()
    wait_until(lambda: system.lines(system.beat, "answers with an error (BUSY"), what="a word")
    time.sleep(LONG_SECONDS)  # the length of the trouble: past every lease and term
    client.script_kill()
    foreign.join(10)
    system.check("busy-after")
    assert not system.lines(system.beat, "is lost (no heartbeat)")


def endless_script(client: Redis) -> None:
    with contextlib.suppress(RedisError):
        client.eval("while true do end", 0)


@pytest.mark.proves("19, 27, 28: a worker's connections are slow, mute or half-open for less than a lease", "nothing lost or doubled")
def test_a_worker_whose_connections_are_slow_mute_or_half_open_goes_on(system: System) -> None:
    proxy = Proxy(system.server.port)
    remote = system.cluster.worker(
        APP, "remote", queues="jobs", concurrency=2, extra=LEAN,
        environ={**QUICK, **WORKER_ONLY, BROKER_VARIABLE: proxy.url()},
    )  # fmt: skip
    try:
        wait_for_nodes(system.producer.affinity, 2)
        for verb in ("delay", "drop_replies", "blackhole"):
            system.producer.send_each([f"{verb}-{tag}" for tag in TAGS], 5, ms=10)
            system.long_task(f"{verb}-more", 0.5)
            proxy.delay(0.1) if verb == "delay" else getattr(proxy, verb)()
            time.sleep(0.4 * HEARTBEAT_TIMEOUT_SECONDS)  # the length of the trouble
            proxy.heal()
            finished(system.history)
        remote.term()
        assert remote.wait(30) == 0
        assert {run.worker for run in runs(system.history)} >= {"remote@test"}
    finally:
        proxy.close()
        remote.destroy()
    system.check("proxied")


# What Redis forgets, each on servers of its own


@pytest.fixture
def server(aof_server: Server) -> Server:
    return aof_server


def start_two(cluster: Cluster, producer: Producer) -> tuple[Node, Node]:
    worker = cluster.worker(
        APP, queues="jobs", concurrency=2, environ={**QUICK, **WORKER_ONLY}, extra=LEAN
    )
    beat = cluster.beat(APP, environ=QUICK)
    wait_for_nodes(producer.affinity, 1)
    wait_until(lambda: producer.affinity.leader("jobs"), what="a leader")
    return worker, beat


def epochs_grow(history: History) -> None:
    for tag, of_tag in history.by_tag().items():
        epochs = [run.epoch or 0 for run in of_tag]
        assert epochs == sorted(epochs), tag


@pytest.mark.proves("16: FLUSHALL while tasks run", "told as CRITICAL; what runs is not doubled; all goes on")
def test_an_emptied_redis_is_told_of_and_what_runs_is_not_doubled(
    cluster: Cluster, server: Server, history_path: Path, producer: Producer
) -> None:
    worker, beat = start_two(cluster, producer)
    producer.send("before", 3)
    finished(history_path)
    producer.send("long", task="long", ms=2500)
    running = wait_for_run(history_path, lambda run: run.tag == "long")
    time.sleep(0.6)  # for the schedulers to have looked

    server.client().flushall()

    wait_until(lambda: "was emptied" in beat.log_text(), what="a loud word")
    assert beat.log_text().count("was emptied") == 1
    assert "CRITICAL" in next(x for x in beat.log_text().splitlines() if "was emptied" in x)
    wait_for_nodes(producer.affinity, 1)
    producer.send("before", 3)
    wait_until(lambda: len(runs(history_path)) == 7, what="other tags go on beside it")
    assert not running.end and not runs(history_path)[3].is_done
    wait_until(lambda: runs(history_path)[3].is_done, what="its end")
    producer.send("long", 2)
    history = finished(history_path)
    assert worker.alive and beat.alive
    assert history.reruns() == 0
    epochs_grow(history)
    wait_until(lambda: producer.affinity.stats("jobs").idle_slots == 2, what="two free slots")


@pytest.mark.proves("17: an older AOF is put back while workers run", "told as CRITICAL; what it holds is done; epochs grow")
def test_an_older_redis_is_told_of_and_everything_in_it_is_done(
    cluster: Cluster, server: Server, history_path: Path, producer: Producer, tmp_path: Path
) -> None:
    worker, beat = start_two(cluster, producer)
    producer.send_each(TAGS[:3], 10, ms=40)
    wait_until(lambda: len(runs(history_path)) >= 4, what="some starts")
    files, copy = server.directory / "appendonlydir", tmp_path / "older"
    shutil.copytree(files, copy)
    finished(history_path)
    producer.send("since", 3)
    finished(history_path)
    time.sleep(0.6)  # for the schedulers to have looked

    server.kill()
    shutil.rmtree(files)
    shutil.copytree(copy, files)
    server.start()

    wait_until(lambda: "is an older copy of itself" in beat.log_text(), what="a loud word")
    producer.send("after", 3)
    wait_until(
        lambda: not (stats := producer.affinity.stats("jobs")).entries and stats.settled > 30,
        30, "the end of all that the copy held",
    )  # fmt: skip
    history = History.load(history_path)
    print(f"{history.reruns()} tasks were done twice, as declared")
    found = {violation.kind for violation in history.violations(allow_rerun=True)}
    assert found <= {"order"}, "what had been done since the copy comes again, and no more than that"
    epochs_grow(history)
    assert worker.alive and beat.alive
    wait_until(lambda: producer.affinity.stats("jobs").idle_slots == 2, what="two free slots")
