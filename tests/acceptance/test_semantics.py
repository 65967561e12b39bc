"""It stays Celery: each law is that of plain Celery, and where both are run the affinity task's too.

One worker for all of them; each law has tags of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from itertools import count, pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery, chain, chord, group, states
from celery.exceptions import TaskRevokedError, TimeLimitExceeded, WorkerLostError
from celery.result import AsyncResult

from acceptance.apps.affinity_app import make_app, release_held
from acceptance.apps.semantics import Order, Tenant, notes
from acceptance.support import LEAN, QUICK
from celery_affinity import Affinity, AffinityQueue, BuriedError
from celery_affinity.embedded import Server
from harness import BROKER_VARIABLE, RESULTS_VARIABLE, Cluster, Node, wait_until
from history import HISTORY_VARIABLE, History, Run

pytestmark = pytest.mark.acceptance

APP = "acceptance.apps.semantics"
MAX_DELIVERIES = 2
_numbers = count()


class Twins:
    """The tasks of one kind, and their runs."""

    def __init__(self, app: Celery, affinity: Affinity, kind: str, history: Path) -> None:
        self.app, self.affinity, self.kind = app, affinity, kind
        self._history = history

    def __getattr__(self, name: str) -> Any:
        return self.app.tasks[f"{self.kind}.{name}"]

    def tag(self) -> str:
        """One that no other law uses."""
        return f"{self.kind}-{next(_numbers)}"

    def runs(self, tag: str) -> list[Run]:
        """What has started of a tag, in order."""
        return History.load(self._history).by_tag().get(tag, [])

    def wait_for_run(self, tag: str, number: int = 1) -> Run:
        """Wait until so many tasks of the tag have started; that one."""
        wait_until(lambda: len(self.runs(tag)) >= number, what=f"run {number} of {tag}")
        return self.runs(tag)[number - 1]

    def goes_on(self, tag: str) -> None:
        """A later task of the tag runs."""
        assert self.add.delay(20, 3, tag=tag).get(timeout=20) == 23


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("semantics") / "history.jsonl"
        patch.setenv(HISTORY_VARIABLE, str(path))
        patch.setenv(RESULTS_VARIABLE, "1")
        yield path


@pytest.fixture(scope="module")
def worker(shared_server: Server, environment: Path) -> Iterator[Node]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(BROKER_VARIABLE, shared_server.url())
        nodes = Cluster(shared_server.url(), environment.parent, environment)
        # In no zone that Celery would take a time for by itself.
        environ = {**QUICK, "TZ": "Asia/Tokyo", "AFFINITY_TEST_QUEUE": f'{{"max_deliveries": {MAX_DELIVERIES}}}'}
        node = nodes.worker(APP, queues="jobs,ordinary", concurrency=2, environ=environ, extra=LEAN)
        try:
            yield node.wait_ready()
            # A new pool process must not wait for anything of its parent's (kombu closes in it the
            # connections of the app's pool: one in the middle of a read would hold it up for good).
            assert "Timed out waiting for UP message" not in node.log_text()
        finally:
            nodes.destroy()


@pytest.fixture(scope="module")
def apps(shared_server: Server, worker: Node) -> tuple[Celery, Affinity]:
    return make_app(shared_server.url())


@pytest.fixture
def log_of_the_worker(worker: Node) -> Iterator[None]:
    before = len(worker.log_text())
    yield
    print(worker.log_text()[before:][-8000:])  # shown with a failure


@pytest.fixture
def tagged(apps: tuple[Celery, Affinity], environment: Path, log_of_the_worker: None) -> Twins:
    return Twins(*apps, "tagged", environment)


@pytest.fixture(params=["plain", "tagged"])
def twins(
    apps: tuple[Celery, Affinity], environment: Path, log_of_the_worker: None,
    request: pytest.FixtureRequest,
) -> Twins:
    return Twins(*apps, request.param, environment)


def one_after_another(runs: list[Run]) -> bool:
    """Whether none started before the one before had ended."""
    return all(a.end is not None and a.end < b.start for a, b in pairwise(runs))


def stored(result: AsyncResult) -> Any:
    """The result as it is now: an AsyncResult keeps the first one that it sees."""
    return AsyncResult(result.id, app=result.app).result


# Calling


def test_every_way_to_call_gives_the_callers_id_and_the_result(twins: Twins) -> None:
    add, tag = twins.add, twins.tag()
    queue = "jobs" if twins.kind == "tagged" else "ordinary"
    by_name = lambda **options: twins.app.send_task(  # noqa: E731
        f"{twins.kind}.add", (1, 2), {"tag": tag}, queue=queue, **options
    )
    own = f"own-{tag}"
    results = {
        "delay": add.delay(1, 2, tag=tag),
        "apply_async": add.apply_async((1, 2), {"tag": tag}),
        "task_id": add.apply_async((1, 2), {"tag": tag}, task_id=own),
        "s": add.s(1, 2, tag=tag).apply_async(),
        "s, partial": add.s(2, tag=tag).apply_async((1,)),
        "si": add.si(1, 2, tag=tag).apply_async((5,)),
        "signature": add.signature((1, 2), {"tag": tag}, countdown=0.1).delay(),
        "send_task, header": by_name(headers={"identify_tag": tag}),
        "send_task, option": by_name(identify_tag=tag),
        "send_task, neither": by_name(),
    }
    assert {how: result.get(timeout=20) for how, result in results.items()} == dict.fromkeys(results, 3)
    assert results["task_id"].id == own
    assert {run.task_id for run in twins.runs(tag)} == {result.id for result in results.values()}
    for result in results.values():
        again = AsyncResult(result.id, app=twins.app)
        assert (again.state, again.result, again.children) == (states.SUCCESS, 3, [])
    if twins.kind == "tagged":
        assert one_after_another(twins.runs(tag))


def test_a_due_time_without_an_offset_is_utc(twins: Twins) -> None:
    tag = twins.tag()
    due, begin = datetime.now(timezone.utc) + timedelta(seconds=1.5), time.monotonic()
    for eta in (due.replace(tzinfo=None), due):
        assert twins.add.apply_async((1, 2), {"tag": tag}, eta=eta).get(timeout=20) == 3
    starts = [run.start / 1e9 - begin for run in twins.runs(tag)]
    assert all(1.4 < after < 10 for after in starts), starts


def test_an_eager_call_has_its_id_and_result_and_no_lease(twins: Twins) -> None:
    result = twins.headers.apply(kwargs={"tag": "eager"}, task_id="eager-id")
    assert (result.id, result.state) == ("eager-id", states.SUCCESS)
    assert result.get()["lease"] == ("eager" if twins.kind == "tagged" else None)


def test_an_id_that_a_producer_sends_twice_runs_twice_and_the_first_success_stands(
    twins: Twins,
) -> None:
    tag = twins.tag()
    for number in (1, 2):
        result = twins.nap.apply_async((0.3 * number,), {"tag": tag}, task_id=f"twice-{tag}")
    wait_until(lambda: sum(run.end is not None for run in twins.runs(tag)) == 2, what="two ends")
    # A success is never overwritten, says Celery.
    assert result.get(timeout=20) == stored(result) == 0.3
    first, second = twins.runs(tag)
    assert first.task_id == second.task_id
    if twins.kind == "tagged":
        assert one_after_another([first, second])


def test_a_model_is_taken_returned_and_gives_the_tag_as_an_instance_and_as_a_dict(
    tagged: Twins,
) -> None:
    order = Order(number=1, tenant=Tenant(id=next(_numbers)))
    as_dict = order.model_dump()
    results = [
        tagged.take_order.delay(order),
        tagged.take_order.delay(as_dict),
        tagged.app.send_task("tagged.take_order", (as_dict,), queue="jobs"),
    ]
    assert [result.get(timeout=20) for result in results] == [{**as_dict, "number": 2}] * 3
    runs = tagged.runs(str(order.tenant.id))
    assert len(runs) == 3 and one_after_another(runs)


# Canvas


def test_a_chain_hands_results_on_over_tags(twins: Twins) -> None:
    add = twins.add
    tags = [twins.tag() for _ in range(2)]
    result = chain(
        add.s(1, 2, tag=tags[0]), add.s(3, tag=tags[1]), add.si(4, tag=tags[0]), add.s(5, tag=tags[1])
    )()
    assert result.get(timeout=20) == 9
    before = result.parent
    assert (before.get(), before.parent.get(), before.parent.parent.get()) == (4, 6, 3)
    assert [child.id for child in before.children] == [result.id]
    assert {run.task_id for run in twins.runs(tags[1])} == {result.id, before.parent.id}


@pytest.mark.parametrize("tags", ["one tag", "own tags"])
def test_a_group_and_a_chord_run_their_members_and_the_body(twins: Twins, tags: str) -> None:
    only = twins.tag()
    each = [only if tags == "one tag" else twins.tag() for _ in range(5)]
    members = group(twins.add.s(n, 1, tag=tag) for n, tag in enumerate(each))
    result = members()
    assert result.get(timeout=20) == [1, 2, 3, 4, 5]
    body = twins.total.s(tag=only)
    parts = chord((twins.add.s(n, 1, tag=tag) for n, tag in enumerate(each)), body)()
    assert parts.get(timeout=20) == 15
    assert parts.parent.get(timeout=20) == [1, 2, 3, 4, 5]
    mixed = chain(twins.add.s(1, tag=only), members, twins.total.s(tag=each[-1]))()
    assert mixed.get(timeout=20) == 20
    if twins.kind == "tagged" and tags == "one tag":
        runs = twins.runs(only)
        assert one_after_another(runs)
        sent = [member.id for member in result] + [member.id for member in parts.parent]
        assert [run.task_id for run in runs[:10]] == sent, "in the order of the header"


def test_a_failed_chord_member_fails_the_body(twins: Twins) -> None:
    tag = twins.tag()
    result = chord([twins.add.s(1, tag=tag), twins.fail.s(tag=tag)], twins.total.s(tag=tag))()
    with pytest.raises(Exception, match="failed with"):
        result.get(timeout=20)
    twins.goes_on(tag)


def test_links_run_after_success_and_errbacks_after_failure(twins: Twins) -> None:
    tag = twins.tag()
    result = twins.add.apply_async((1, 2), {"tag": tag}, link=twins.add.s(10, tag=f"{tag}/linked"))
    assert result.get(timeout=20) == 3
    wait_until(lambda: result.children, what="the link")
    assert result.children[0].get(timeout=20) == 13
    errbacks = [twins.app.signature("semantics.errback", (tag,)), twins.app.signature("semantics.called_errback")]
    failed = twins.fail.apply_async((), {"tag": tag}, link_error=errbacks)
    with pytest.raises(ValueError, match="failed with"):
        failed.get(timeout=20)
    assert errbacks_of(failed.id, 2) == sorted([tag, "ValueError"])
    twins.goes_on(tag)


def errbacks_of(task_id: str, number: int) -> list[str]:
    """What the errbacks of a task were given, once so many were called."""

    def found() -> list[str]:
        return sorted(note["about"] for note in notes("errback") if note["task_id"] == task_id)

    wait_until(lambda: len(found()) >= number, what=f"{number} errbacks")
    return found()


@pytest.mark.parametrize("how, gives", [("one", 3), ("group", [0, 1, 2]), ("chord", 3)])
def test_what_replaces_a_task_has_its_id_and_its_place_in_the_chain(
    twins: Twins, how: str, gives: object
) -> None:
    tag = twins.tag()
    result = twins.replaced.delay(how, tag=tag)
    assert result.get(timeout=20) == gives
    chained = chain(twins.replaced.s("one", tag=tag), twins.add.s(10, tag=tag))()
    assert chained.get(timeout=20) == 13
    assert chained.parent.get(timeout=20) == 3
    twins.goes_on(tag)
    if twins.kind == "tagged":
        assert one_after_another(twins.runs(tag))


# Results and states


def test_an_ignored_result_is_not_stored(twins: Twins) -> None:
    tag = twins.tag()
    ignored = [twins.quiet.delay(tag=tag), twins.add.apply_async((1,), {"tag": tag}, ignore_result=True)]
    kept = twins.quiet.apply_async((), {"tag": tag}, ignore_result=False)
    assert kept.get(timeout=20) == 7
    wait_until(lambda: all(run.end for run in twins.runs(tag)) and len(twins.runs(tag)) == 3)
    assert [result.get(timeout=1) for result in ignored] == [None, None]
    assert [twins.app.AsyncResult(result.id).state for result in ignored] == [states.PENDING] * 2


def test_started_is_seen_from_the_start_on_and_not_before(twins: Twins) -> None:
    tag = twins.tag()
    running, waiting = (twins.tracked.delay(0.6, tag=tag) for _ in range(2))
    wait_until(lambda: running.state == states.STARTED, what="STARTED")
    if twins.kind == "tagged":
        assert waiting.state == states.PENDING and not running.ready()
    assert (running.get(timeout=20), waiting.get(timeout=20)) == (0.6, 0.6)
    assert running.state == states.SUCCESS


def test_a_child_has_its_parents_ids_and_not_its_tag(twins: Twins) -> None:
    tag = twins.tag()
    result = twins.parent.delay(tag=tag)
    own, plain = (twins.app.AsyncResult(one).get(timeout=20) for one in result.get(timeout=20))
    assert [child.id for child in result.children] == result.get()
    assert own["parent"] == own["root"] == plain["parent"] == plain["root"] == result.id
    assert (plain["lease"], plain["header"]) == (None, None)
    if twins.kind == "tagged":
        assert own["lease"] == own["header"] == f"{tag}/child"


def test_a_message_keeps_its_priority(twins: Twins) -> None:
    result = twins.headers.apply_async((), {"tag": twins.tag()}, priority=6)
    assert result.get(timeout=20)["priority"] == 6


def test_a_later_urgent_task_does_not_overtake_its_own_tag(tagged: Twins) -> None:
    tag = tagged.tag()
    first = tagged.nap.apply_async((0.5,), {"tag": tag}, priority=9)
    tagged.wait_for_run(tag)
    sent = [first.id]
    for priority in (9, 5, 0):
        sent.append(tagged.add.apply_async((1,), {"tag": tag}, priority=priority).id)
        wait_until(lambda: tagged.affinity.stats("jobs").pending == 0, what="its admission")
    tagged.wait_for_run(tag, 4)
    assert [run.task_id for run in tagged.runs(tag)] == sent


# Retries


@pytest.mark.parametrize(
    "how, gives",
    [("countdown", "countdown 1"), ("eta", "eta 1"), ("throw=False", "first"), ("arguments", "other 1")],
)
def test_a_retry_keeps_the_id_and_ends_with_its_result(
    twins: Twins, how: str, gives: str
) -> None:
    tag = twins.tag()
    result = twins.again.delay(how, tag=tag)
    twins.wait_for_run(tag, 2)
    either = {gives, f"{how} 1"} if (twins.kind, how) == ("plain", "throw=False") else {gives}
    # Of two successes the first one stays; plain Celery may run both at once, in any order.
    assert result.get(timeout=20) in either
    first, second = twins.runs(tag)
    assert first.task_id == second.task_id == result.id
    assert (first.retries, second.retries) == (0, 1)
    pause = (second.start - first.start) / 1e9
    assert pause > (0.45 if how in ("countdown", "eta") else 0)
    twins.goes_on(tag)


def test_retries_are_counted_asked_for_or_automatic(twins: Twins) -> None:
    tag = twins.tag()
    spent = twins.again.delay("too often", tag=tag)
    with pytest.raises(LookupError, match="gave up"):
        spent.get(timeout=20)
    assert [run.retries for run in twins.runs(tag)] == [0, 1, 2]
    assert twins.automatic.delay(tag=tag).get(timeout=20) == 2
    twins.goes_on(tag)


# Times


def test_what_has_expired_ends_revoked_and_its_tag_goes_on(twins: Twins) -> None:
    tag = twins.tag()
    for _ in range(4):  # keeps both of the worker's slots busy, or the tag
        twins.nap.delay(0.6, tag=tag)
    waiting = twins.add.apply_async((1,), {"tag": tag}, expires=0.3)
    scheduled = twins.add.apply_async((1,), {"tag": tag}, expires=0.3, countdown=0.6)
    twins.goes_on(tag)
    for result in (waiting, scheduled):
        with pytest.raises(TaskRevokedError, match="expired"):
            result.get(timeout=20)
        assert result.state == states.REVOKED
    assert not {waiting.id, scheduled.id} & {run.task_id for run in twins.runs(tag)}


def test_a_soft_limit_is_raised_in_the_task_and_a_hard_one_ends_its_process(twins: Twins) -> None:
    tag = twins.tag()
    assert twins.softly_limited.delay(tag=tag).get(timeout=20) == "noticed"
    result = twins.nap.apply_async((30,), {"tag": tag}, time_limit=0.5)
    if twins.kind == "tagged":
        after = twins.add.delay(1, tag=tag)
    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=20)
    assert result.state == states.FAILURE
    twins.goes_on(tag)
    if twins.kind == "tagged":
        assert after.get(timeout=20) == 1
        _, killed, *later = twins.runs(tag)
        assert killed.pid not in {run.pid for run in later}
        assert len(later) == 2, "the one that was ended does not run again"


def test_a_retry_keeps_the_types_of_its_headers(twins: Twins) -> None:
    mine = {"my_id": uuid4(), "my_time": datetime.now(), "my_sum": Decimal("1.5"), "my_bytes": b"\x00\xff"}
    result = twins.typed.apply_async(kwargs={"tag": twins.tag()}, headers=mine, expires=300)
    assert result.get(timeout=20) == {name: type(value).__name__ for name, value in mine.items()}


# Revokes


@pytest.mark.proves(
    "47: revoked by a stamp while it is dispatched behind a running task",
    "REVOKED is stored; it never runs",
)
def test_what_is_revoked_by_its_stamp_never_runs(tagged: Twins) -> None:
    tag = tagged.tag()
    tagged.nap.delay(2, tag=tag)
    tagged.wait_for_run(tag)
    stamped = tagged.add.s(1, tag=tag)
    stamped.stamp(mid=tag)
    dispatched, waiting = stamped.apply_async(), stamped.clone().apply_async()
    last = tagged.add.delay(99, tag=tag)
    wait_until(lambda: tagged.affinity.explain_task(dispatched.id).state == "dispatched", what="its place")
    assert tagged.app.control.revoke_by_stamped_headers({"mid": [tag]}, reply=True, timeout=5)
    for result in (dispatched, waiting):
        with pytest.raises(TaskRevokedError):
            result.get(timeout=20)
    assert last.get(timeout=20) == 99
    assert len(tagged.runs(tag)) == 2


@pytest.mark.proves(
    "47: revoked in the backlog, dispatched or due later, by every way to revoke",
    "REVOKED is stored; it never runs",
)
def test_what_is_revoked_while_it_waits_never_runs(
    tagged: Twins, worker: Node, shared_server: Server
) -> None:
    tag = tagged.tag()
    tagged.app.tasks["jobs.hold"].delay(tag, 0)
    dispatched, *waiting = (tagged.add.delay(n, tag=tag) for n in range(5))
    scheduled = tagged.add.apply_async((1,), {"tag": tag}, countdown=3)
    last = tagged.add.delay(99, tag=tag)
    tagged.wait_for_run(tag)
    by_result, *by_list, by_command = waiting
    dispatched.revoke()
    by_result.revoke(terminate=True)
    tagged.app.control.revoke([one.id for one in by_list])
    tagged.app.control.terminate(scheduled.id)
    from_another_process(shared_server, "control", "revoke", by_command.id)
    release_held()

    assert last.get(timeout=20) == 99
    revoked = [dispatched, *waiting, scheduled]
    for result in revoked:
        with pytest.raises(TaskRevokedError, match="revoked"):
            result.get(timeout=20)
    tagged.goes_on(tag)
    assert not {result.id for result in revoked} & {run.task_id for run in tagged.runs(tag)}
    noted = shared_server.client().zrange("{affinity:default}:revoked", 0, -1)
    assert {result.id for result in revoked} <= {one.decode() for one in noted}


def from_another_process(server: Server, *command: str) -> None:
    """Run `celery` with the app."""
    subprocess.run(
        [sys.executable, "-m", "celery", "-A", APP, *command], check=True, timeout=60,
        capture_output=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), BROKER_VARIABLE: server.url()},
    )


@pytest.mark.proves(
    "46: terminated, it cleans up for 0.7 s",
    "REVOKED is stored; the next task of the tag starts when its process is gone",
)
@pytest.mark.parametrize("signal", ["SIGTERM", "SIGKILL"])
def test_a_terminated_task_is_revoked_and_its_tag_waits_for_its_process(
    tagged: Twins, signal: str
) -> None:
    tag = tagged.tag()
    result = tagged.nap.delay(30, 700, tag=tag)  # takes its time to clean up
    killed = tagged.wait_for_run(tag)
    after = tagged.add.delay(1, tag=tag)
    result.revoke(terminate=True, signal=signal)
    with pytest.raises(TaskRevokedError, match="terminated"):
        result.get(timeout=20)
    assert after.get(timeout=20) == 1
    first, second = tagged.runs(tag)
    assert second.pid != killed.pid
    if signal == "SIGTERM":
        assert one_after_another([first, second]), "what cleans up still has its tag"


def test_a_second_task_of_an_id_can_be_terminated(tagged: Twins) -> None:
    tag = tagged.tag()
    for seconds in (0.5, 30):
        result = tagged.nap.apply_async((seconds,), {"tag": tag}, task_id=f"second-{tag}")
    tagged.wait_for_run(tag, 2)
    time.sleep(0.3)  # the worker's parent reads the first one's end
    result.revoke(terminate=True)
    tagged.goes_on(tag)  # sooner than in 30 s; the state is the first one's SUCCESS


# Burials


@pytest.mark.proves(
    "outcome: process lost each time, with acks_late, reject_on_worker_lost and retry_on_worker_lost",
    "buried after max_deliveries; FAILURE is stored, the errback runs once",
)
def test_a_task_that_kills_its_process_each_time_fails_and_its_errback_runs(tagged: Twins) -> None:
    """Also one for which Celery would give the message back, or send it again."""
    tag = tagged.tag()
    errback = tagged.app.signature("semantics.errback", (tag,))
    result = tagged.dying.apply_async((), {"tag": tag}, link_error=errback)
    with pytest.raises(WorkerLostError):
        result.get(timeout=40)
    assert errbacks_of(result.id, 1) == [tag]
    assert len(tagged.runs(tag)) == MAX_DELIVERIES
    tagged.goes_on(tag)
    assert len(tagged.runs(tag)) == MAX_DELIVERIES + 1


def test_a_task_whose_result_was_stored_before_its_process_died_does_not_run_again(
    tagged: Twins,
) -> None:
    tag = tagged.tag()
    result = tagged.done_and_dead.delay(tag=tag)
    assert result.get(timeout=20) == 5
    tagged.goes_on(tag)
    assert len(tagged.runs(tag)) == 2
    assert stored(result) == 5


@pytest.mark.proves(
    "outcome: message without a usable tag",
    "buried; FAILURE is stored, errbacks run, its chord fails",
)
def test_whoever_waits_for_an_unusable_message_learns_of_its_failure(tagged: Twins) -> None:
    errback = tagged.app.signature("semantics.errback", ("no tag",))
    result = tagged.app.send_task(
        "tagged.total", ([1],), {"tag": None}, queue="jobs", link_error=[errback]
    )
    with pytest.raises(BuriedError, match="yields None"):
        result.get(timeout=20)
    assert errbacks_of(result.id, 1) == ["no tag"]
    # A chord that it is part of fails with it.
    part = tagged.app.signature("nobody.knows", queue="jobs")
    body = chord([part, tagged.add.s(1, tag=tagged.tag())], tagged.total.s(tag=tagged.tag()))()
    with pytest.raises(Exception, match="came without the header"):
        body.get(timeout=20)


# Waiting for one's own tag


@pytest.mark.parametrize("how", ["result", "by id", "send_task", "group", "set", "chain", "chord"])
def test_waiting_for_a_task_of_ones_own_tag_is_refused(tagged: Twins, how: str) -> None:
    tag = tagged.tag()
    result = tagged.waiting.delay(how, tag=tag)
    with pytest.raises(Exception, match=f"waits for .*own tag '{tag}'"):
        result.get(timeout=20)
    tagged.goes_on(tag)


@pytest.mark.parametrize("how, gives", [("other tag", 3), ("ready", states.PENDING)])
def test_waiting_for_another_tag_and_looking_at_ones_own_are_not(
    tagged: Twins, how: str, gives: object
) -> None:
    assert tagged.waiting.delay(how, tag=tagged.tag()).get(timeout=20) == gives


# Limits of the worker


def test_a_rate_limit_holds(twins: Twins) -> None:
    tag = twins.tag()
    results = [twins.limited.delay(tag=tag) for _ in range(4)]
    assert [result.get(timeout=20) for result in results] == [None] * 4
    runs = twins.runs(tag)
    assert (runs[-1].start - runs[0].start) / 1e9 > 0.7
    twins.goes_on(tag)


def test_a_hard_limit_ends_a_greenlets_task_and_its_tag_goes_on(
    server: Server, history_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes, twins = own_worker(server, history_path, tmp_path, monkeypatch)
    try:
        nodes.worker(
            APP, queues="jobs", pool="gevent", concurrency=4, environ=QUICK, extra=LEAN
        ).wait_ready()
        for end in ("limit", "terminate"):
            tag = twins.tag()
            limit = {"time_limit": 0.5} if end == "limit" else {}
            result = twins.nap.apply_async((30,), {"tag": tag}, **limit)
            twins.wait_for_run(tag)
            if end == "terminate":
                result.revoke(terminate=True)
            with pytest.raises(TimeLimitExceeded if end == "limit" else TaskRevokedError):
                result.get(timeout=20)
            twins.goes_on(tag)
            assert len(twins.runs(tag)) == 2, f"{end}: the one that was ended does not run again"
            wait_until(lambda: twins.affinity.stats("jobs").entries == 0, what="the last settle")
    finally:
        nodes.destroy()


def own_worker(
    server: Server, history_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Cluster, Twins]:
    """Nodes and a producer on a server of their own."""
    monkeypatch.setenv(BROKER_VARIABLE, server.url())
    monkeypatch.setenv(RESULTS_VARIABLE, "1")
    return (
        Cluster(server.url(), tmp_path, history_path),
        Twins(*make_app(server.url()), "tagged", history_path),
    )


@pytest.mark.proves(
    "47: revoked with no worker up",
    "the next worker stores REVOKED; it never runs",
)
def test_what_is_revoked_with_no_worker_up_is_ended_by_the_next_one(
    server: Server, history_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes, twins = own_worker(server, history_path, tmp_path, monkeypatch)
    tag = twins.tag()
    try:
        beat = nodes.beat(APP, environ=QUICK).wait_ready()
        backlog = [twins.add.delay(n, tag=tag) for n in range(3)]
        scheduled = twins.add.apply_async((1,), {"tag": tag}, countdown=1)
        wait_until(lambda: twins.affinity.stats("jobs").entries == 4, what="the admission")
        beat.destroy()
        pending = [twins.add.delay(n, tag=tag) for n in range(2)]
        for result in (backlog[1], scheduled, pending[0]):
            result.revoke()
        nodes.worker(APP, queues="jobs", environ=QUICK, extra=LEAN)
        for result in (backlog[1], scheduled, pending[0]):
            with pytest.raises(TaskRevokedError, match="revoked"):
                result.get(timeout=40)
        for result in (backlog[0], backlog[2], pending[1]):
            assert result.get(timeout=40) in (0, 1, 2)
        assert len(twins.runs(tag)) == 3
        wait_until(lambda: twins.affinity.stats("jobs").entries == 0, what="the last settle")
    finally:
        nodes.destroy()


def test_a_revoke_fails_as_celerys_does_while_redis_is_away() -> None:
    plain = Celery("plain", broker="redis://127.0.0.1:1/0", set_as_current=False)
    affine = Celery("affine", broker="redis://127.0.0.1:1/0", set_as_current=False)
    Affinity(affine, queues=[AffinityQueue("jobs")])
    errors = []
    for app in (plain, affine):
        app.conf.broker_transport_options = {"max_retries": 1}
        with pytest.raises(Exception) as raised:
            app.control.revoke("some-id")
        errors.append(raised.value)
    assert type(errors[0]) is type(errors[1]) and str(errors[0]) == str(errors[1])
