"""Laws of batch tasks: one call for what waits, and everything of Celery's for each entry.

One worker of each pool for all of them; each law has tags of its own. `Line.hold` keeps a tag busy
until all that is to be taken together waits behind it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded
from celery.result import AsyncResult

from acceptance.apps import batches
from acceptance.apps.affinity_app import make_app
from acceptance.support import LEAN, QUICK, EventLog
from celery_affinity import Affinity, BatchResultError, BuriedError
from celery_affinity.embedded import Server
from harness import BROKER_VARIABLE, RESULTS_VARIABLE, Cluster, Node, wait_until
from history import HISTORY_VARIABLE, History, record

pytestmark = pytest.mark.acceptance

APP = "acceptance.apps.batches"
_numbers = count()


class Line:
    """Tasks of one tag that wait behind one that holds it."""

    def __init__(self, app: Celery, affinity: Affinity, directory: Path) -> None:
        self.app, self.affinity = app, affinity
        self.tag = f"tag-{next(_numbers)}"
        self._gate = directory / f"{self.tag}.open"
        self._seqs = count()
        self.hold()

    def hold(self) -> None:
        """Occupy the tag."""
        self._gate.unlink(missing_ok=True)
        self.sent = [self.send("hold", str(self._gate))]
        # Not before it holds its slot: what the ledger has is what waits behind it.
        wait_until(lambda: self.runs() and self.runs()[-1].end is None, what="the holding task")

    def send(self, task: str, *args: Any, **options: Any) -> AsyncResult:
        """Send the next task of the tag."""
        seq = next(self._seqs)
        record("submit", tag=self.tag, seq=seq)
        signature = self.app.tasks[f"batch.{task}"].s(self.tag, seq, *args)
        return signature.apply_async(**options)

    def release(self) -> None:
        """Let go, once all that was sent is in the ledger."""
        wait_until(lambda: self.affinity.stats("jobs").pending == 0, what="the intake")
        self._gate.touch()

    def calls(self) -> list[list[int]]:
        """Which tasks each call got, in the order of the calls."""
        return [note["seqs"] for note in batches.notes("call") if note["tag"] == self.tag]

    def noted(self, name: str) -> list[dict[str, Any]]:
        """What hooks noted of this tag."""
        return [note for note in batches.notes(name) if note["tag"] == self.tag]

    def runs(self) -> list[Any]:
        """What has started of the tag, in order."""
        path = Path(os.environ[HISTORY_VARIABLE])
        return History.load(path).by_tag().get(self.tag, []) if path.exists() else []

    def lawful(self) -> None:
        """Judge the tag's runs: order, exclusion, nothing lost or doubled."""
        history = History.load(Path(os.environ[HISTORY_VARIABLE]))
        own = [v for v in history.violations() if self.tag in str(v)]
        assert not own, own


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("batches") / "history.jsonl"
        patch.setenv(HISTORY_VARIABLE, str(path))
        patch.setenv(RESULTS_VARIABLE, "1")
        yield path


def work(server: Server, environment: Path, pool: str) -> Iterator[Node]:
    """A worker of its own server until the caller is done with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(BROKER_VARIABLE, server.url())
        nodes = Cluster(server.url(), environment.parent, environment)
        node = nodes.worker(
            APP, pool, queues="jobs,ordinary", concurrency=4, pool=pool, environ=QUICK,
            extra=(*LEAN, "-E"),
        )
        try:
            node.wait_ready()
            # From the first call on the ledger knows the task, and sends no message that joins on its way.
            make_app(server.url())[0].tasks["batch.bulk"].delay("first", 0).get(timeout=20)
            yield node
        finally:
            nodes.destroy()


@pytest.fixture(scope="module", params=["prefork", "threads"])
def worker(shared_server: Server, environment: Path, request: pytest.FixtureRequest) -> Iterator[Node]:
    yield from work(shared_server, environment, request.param)


@pytest.fixture
def line(shared_server: Server, environment: Path, worker: Node) -> Iterator[Line]:
    before = len(worker.log_text())
    yield Line(*make_app(shared_server.url()), environment.parent)
    print(worker.log_text()[before:][-8000:])  # shown with a failure


on_prefork = pytest.mark.parametrize("worker", ["prefork"], indirect=True)


def failure(result: AsyncResult) -> BaseException:
    """The error that is a task's result."""
    found = result.get(timeout=20, propagate=False)
    assert isinstance(found, BaseException), (result.state, found)
    return found


def test_what_waits_has_one_call_in_order_and_a_result_each(line: Line) -> None:
    sent = [line.send("bulk") for _ in range(6)]
    line.release()
    assert [result.get(timeout=20) for result in sent] == [1, 2, 3, 4, 5, 6]
    assert line.calls() == [[1, 2, 3, 4, 5, 6]]
    wait_until(lambda: len(line.noted("on_success")) == 6, what="the hook of each")
    assert [note["retval"] for note in line.noted("on_success")] == [1, 2, 3, 4, 5, 6]
    line.lawful()


def test_a_call_gets_no_more_than_a_batch(line: Line) -> None:
    sent = [line.send("bulk") for _ in range(25)]
    line.release()
    assert [result.get(timeout=20) for result in sent] == list(range(1, 26))
    assert line.calls() == [list(range(1, 11)), list(range(11, 21)), list(range(21, 26))]
    line.lawful()


def test_other_tasks_of_the_tag_keep_their_places(line: Line) -> None:
    names = ["bulk", "bulk", "single", "bulk", "whole", "whole", "bulk"]
    sent = [line.send(name) for name in names]
    line.release()
    assert [result.get(timeout=20) for result in sent] == [1, 2, 3, 4, 5, 6, 7]
    assert line.calls() == [[1, 2], [4], [5, 6], [7]]
    line.lawful()


def test_one_that_fails_fails_alone(line: Line) -> None:
    first, bad, last = line.send("bulk"), line.send("bulk", "fail"), line.send("bulk")
    line.release()
    assert str(failure(bad)) == "failed 2"
    assert (first.get(timeout=20), last.get(timeout=20)) == (1, 3)
    assert (first.state, bad.state, last.state) == ("SUCCESS", "FAILURE", "SUCCESS")
    assert [note["seq"] for note in line.noted("on_failure")] == [2]
    line.lawful()


@pytest.mark.parametrize("place", [0, 1])
def test_one_that_is_retried_is_retried_alone(line: Line, place: int) -> None:
    admitted = line.affinity.stats("jobs").admitted
    sent = [line.send("bulk", *(["retry"] if number == place else [])) for number in range(3)]
    line.release()
    assert [result.get(timeout=20) for result in sent] == [1, 2, 3]
    assert line.calls() == [[1, 2, 3], [place + 1]]
    assert [note["seq"] for note in line.noted("on_retry")] == [place + 1]
    # The retry is a part of the settle: it was never published.
    assert line.affinity.stats("jobs").admitted - admitted == 3


def test_past_its_retries_one_fails_with_what_it_was_given(line: Line) -> None:
    bad, good = line.send("bulk", "retry too often"), line.send("bulk")
    line.release()
    assert isinstance(failure(bad), LookupError)
    assert good.get(timeout=20) == 2
    assert line.calls() == [[1, 2], [1]]


def test_one_that_is_ignored_or_rejected_ends_as_celery_ends_it(line: Line) -> None:
    ignored, rejected, good = line.send("bulk", "ignore"), line.send("bulk", "reject"), line.send("bulk")
    line.release()
    assert good.get(timeout=20) == 3
    wait_until(lambda: [2] in line.calls(), what="the rejected one's next run")
    assert ignored.state == "PENDING"
    line.app.control.revoke(rejected.id)


def test_one_that_cannot_be_read_is_buried_alone(line: Line) -> None:
    first, bad, last = line.send("bulk"), line.send("bulk", serializer="pickle"), line.send("bulk")
    line.release()
    assert (first.get(timeout=20), last.get(timeout=20)) == (1, 3)
    error = failure(bad)
    assert isinstance(error, BuriedError) and "ContentDisallowed" in str(error)
    assert line.calls() == [[1, 3]]
    line.affinity.purge_dead("jobs", tag=line.tag)


def test_what_the_call_raises_is_the_result_of_all(line: Line) -> None:
    sent = [line.send("whole", "raise") for _ in range(3)]
    line.release()
    assert [str(failure(result)) for result in sent] == ["the call failed"] * 3
    assert all("in whole" in (result.traceback or "") for result in sent)
    assert line.calls() == [[1, 2, 3]]


def test_self_retry_in_the_call_retries_each(line: Line) -> None:
    sent = [line.send("whole", "self.retry") for _ in range(3)]
    line.release()
    assert [result.get(timeout=20) for result in sent] == [1, 2, 3]
    assert line.calls() == [[1, 2, 3], [1, 2, 3]]


def test_a_call_without_a_result_for_each_fails_them_all(line: Line) -> None:
    sent = [line.send("whole", "one short") for _ in range(3)]
    line.release()
    found = [failure(result) for result in sent]
    assert all(isinstance(error, BatchResultError) for error in found)
    assert "2 results, expected a list of 3" in str(found[0])


def test_automatic_retries_take_those_that_had_no_result_yet(line: Line) -> None:
    sent = [line.send("automatic"), line.send("automatic", "raise"), line.send("automatic")]
    line.release()
    assert [result.get(timeout=20) for result in sent] == [1, 2, 3]
    assert line.calls() == [[1, 2, 3], [2, 3]]


def test_revoked_and_expired_ones_are_left_out(line: Line) -> None:
    first, revoked, expired, last = (
        line.send("bulk"), line.send("bulk"), line.send("bulk", expires=0.3), line.send("bulk"),
    )
    revoked.revoke()
    time.sleep(0.4)  # its time is over
    line.release()
    assert (first.get(timeout=20), last.get(timeout=20)) == (1, 4)
    assert isinstance(failure(revoked), TaskRevokedError)
    assert isinstance(failure(expired), TaskRevokedError)
    assert line.calls() == [[1], [4]]


def test_links_errbacks_chains_and_chords_follow_each_entry(line: Line) -> None:
    follow, errback = line.app.tasks["batch.follow"], line.app.tasks["batch.errback"]
    bulk = line.app.tasks["batch.bulk"]
    linked = line.send("bulk", link=follow.s("link"))
    failing = line.send("bulk", "fail", link_error=errback.s())
    chained = chain(bulk.s(line.tag, 3), follow.s("chain")).apply_async()
    joined = chord([bulk.s(line.tag, 4), bulk.s(line.tag, 5)], follow.s("chord")).apply_async()
    line.release()
    assert linked.get(timeout=20) == 1
    assert (chained.get(timeout=20), joined.get(timeout=20)) == (3, [4, 5])
    wait_until(
        lambda: [n["id"] for n in batches.notes("errback") if n["id"] == failing.id], what="the errback"
    )
    wait_until(
        lambda: any(n["result"] == 1 and n["rest"] == ["link"] for n in batches.notes("follow")),
        what="the link",
    )
    assert line.calls() == [[1, 2, 3, 4, 5]]


def test_a_delayed_one_joins_when_it_is_due(line: Line) -> None:
    delayed, prompt = line.send("bulk", countdown=0.2), line.send("bulk")
    wait_until(lambda: line.affinity.stats("jobs").scheduled == 0, what="the due time")
    line.release()
    assert (delayed.get(timeout=20), prompt.get(timeout=20)) == (1, 2)
    assert line.calls() == [[2, 1]]


@on_prefork
def test_a_soft_limit_is_that_of_the_call(line: Line) -> None:
    sent = [line.send("limited"), line.send("limited", "", 5_000), line.send("limited")]
    line.release()
    assert sent[0].get(timeout=20) == 1
    assert all(isinstance(failure(result), SoftTimeLimitExceeded) for result in sent[1:])


@on_prefork
def test_what_a_hard_limit_cuts_off_runs_one_by_one(line: Line) -> None:
    sent = [line.send("cut"), line.send("cut", "", 30_000), line.send("cut")]
    line.release()
    assert isinstance(failure(sent[1]), TimeLimitExceeded)
    assert (sent[0].get(timeout=20), sent[2].get(timeout=20)) == (1, 3)
    assert line.calls() == [[1, 2, 3], [1], [2], [3]]


@on_prefork
def test_a_killed_process_gives_back_its_whole_call_in_order(line: Line) -> None:
    sent = [line.send("bulk", "", 400) for _ in range(4)]
    line.release()
    call = wait_until(lambda: line.noted("call"), what="the call")[0]
    wait_until(lambda: len(line.runs()) >= 3, what="the second entry's run")
    os.kill(call["pid"], signal.SIGKILL)
    assert [result.get(timeout=30) for result in sent] == [1, 2, 3, 4]
    assert line.calls() == [[1, 2, 3, 4], [1], [2], [3], [4]]


@on_prefork
def test_what_kills_its_process_is_buried_without_its_mates(line: Line) -> None:
    sent = [line.send("bulk"), line.send("bulk", "kill"), line.send("bulk")]
    line.release()
    assert (sent[0].get(timeout=30), sent[2].get(timeout=30)) == (1, 3)
    assert type(failure(sent[1])).__name__ in ("WorkerLostError", BuriedError.__name__)
    assert line.calls() == [[1, 2, 3], [1], [2], [2], [3]]
    (letter,) = line.affinity.dead_letters("jobs", tag=line.tag)
    assert letter.attempts == 3
    line.affinity.purge_dead("jobs", tag=line.tag)


def processed(line: Line) -> int:
    """Batch tasks that its worker has run, as `celery inspect stats` says."""
    (stats,) = line.app.control.inspect().stats().values()
    return int(stats["total"].get("batch.bulk", 0))


def test_events_tell_of_each_entry(line: Line) -> None:
    with EventLog(line.app) as log:
        wait_until(lambda: log.events, what="the first heartbeat: it listens")
        before = processed(line)
        sent = [line.send("bulk", *wish) for wish in (["fail"], ["retry"], ["fail"], [])]
        line.release()
        last = ["task-failed", "task-retried", "task-failed", "task-succeeded"]
        for result, end in zip(sent, last, strict=True):
            expected = ["task-received", "task-started", end]
            if end == "task-retried":
                expected += ["task-received", "task-started", "task-succeeded"]
            wait_until(lambda: len(log.of(result.id)) == len(expected), what=f"{expected}")  # noqa: B023
            # (Of a retry the next reception may be told of first, as in plain Celery.)
            in_order = sorted if end == "task-retried" else list
            assert in_order(log.of(result.id)) == in_order(expected)
    assert line.calls() == [[1, 2, 3, 4], [2]]
    assert processed(line) - before == 5


@pytest.mark.parametrize("pool", ["solo", "gevent"])
def test_other_pools_make_one_call_too(server: Server, environment: Path, pool: str) -> None:
    for node in work(server, environment, pool):
        app, affinity = make_app(server.url())
        sent = [app.tasks["batch.bulk"].delay(f"{pool}-tag", seq) for seq in range(12)]
        assert [result.get(timeout=30) for result in sent] == list(range(12)), node.log_tail()
        assert sum(len(n["seqs"]) for n in batches.notes("call") if n["tag"] == f"{pool}-tag") == 12
        assert len([n for n in batches.notes("call") if n["tag"] == f"{pool}-tag"]) < 12
        assert affinity.stats("jobs").entries == 0


def test_a_warm_stop_ends_the_call_and_takes_no_other(server: Server, environment: Path) -> None:
    workers = work(server, environment, "prefork")
    node = next(workers)
    line = Line(*make_app(server.url()), environment.parent)
    sent = [line.send("bulk", "", 100) for _ in range(15)]
    line.release()
    wait_until(lambda: len(line.runs()) >= 3, what="the second entry's run")
    node.term()
    assert node.wait(30) == 0
    assert [result.get(timeout=5) for result in sent[:10]] == list(range(1, 11))
    assert line.calls() == [list(range(1, 11))]
    assert line.affinity.stats("jobs").entries == 5
    workers.close()
    for _ in work(server, environment, "prefork"):
        assert [result.get(timeout=30) for result in sent[10:]] == list(range(11, 16))
    line.lawful()
