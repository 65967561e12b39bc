"""Laws of take and settle_batch: what waits behind a started entry joins it, and ends with it."""

from __future__ import annotations

import pytest
from celery import Celery

from celery_affinity import Affinity, AffinityQueue
from celery_affinity.embedded import Server
from celery_affinity.message import envelope
from celery_affinity.operator_scripts import OperatorScripts

from .conftest import Bench, Copy

MOST_BYTES = 1_000_000


def take(copy: Copy, task: str = "t", token: str | None = None, most_bytes: int = MOST_BYTES) -> tuple[int, list[int]]:
    """Code and entries."""
    s = copy.stamp
    code, found = copy.node.bench.scripts.take(
        s.incarnation, s.slot, s.entry, s.epoch, token or copy.token, 0, task, most_bytes
    )
    return code, [int(entry) for entry, _ in found]


def settle(copy: Copy, *ends: tuple[object, str, list[object]], token: str | None = None) -> str:
    s = copy.stamp
    return copy.node.bench.scripts.settle_batch(
        s.incarnation, s.slot, s.entry, s.epoch, token or copy.token,
        [(str(entry), outcome, words) for entry, outcome, words in ends],
    )


def done(*entries: int) -> list[tuple[object, str, list[object]]]:
    return [(entry, "done", []) for entry in entries]


def send_task(bench: Bench, tag: str, one: int, task: str = "t", **headers: object) -> None:
    bench.push(
        envelope(
            [[], {}, {}], {"id": f"{tag}-{one}", "task": task, "identify_tag": tag, "eta": None, **headers},
            {}, serializer="json", compression=None, routing_key="q",
        )
    )


def started(bench: Bench, count: int, depth: int = 1, **limits: int) -> Copy:
    """The first of so many entries, 1 to `count`, of tag "a": it has started."""
    bench.lead(**limits)
    node = bench.node("n", depth=depth)
    bench.send("a", *range(1, count + 1))
    bench.admit_all()
    copy = node.take()
    assert copy.start() == 1
    return copy


def entries(bench: Bench) -> list[int]:
    return sorted(int(e) for e in bench.client.hkeys(bench.queue_key("m")))


@pytest.fixture
def operator(bench: Bench) -> OperatorScripts:
    return OperatorScripts(bench.client, bench.scripts.keys)


def settled(bench: Bench) -> int:
    return int(bench.client.hget(bench.queue_key("c"), "settled") or 0)


@pytest.mark.parametrize("depth", [1, 2])
def test_what_waits_joins_in_order_and_ends_in_one_step(bench: Bench, depth: int) -> None:
    first = started(bench, 4, depth)
    assert take(first) == (1, [2, 3, 4])
    assert bench.backlog("a") == []
    assert settle(first, *done(1, 2, 3, 4)) == "empty"
    assert (entries(bench), settled(bench)) == ([], 4)
    stale = first.node.receive()
    assert (stale is None) if depth == 1 else (stale is not None and stale.start() < 0)


def test_a_repeated_take_gets_the_same_and_a_repeated_settle_counts_once(bench: Bench) -> None:
    first = started(bench, 3)
    assert [take(first) for _ in range(3)] == [(1, [2, 3])] * 3
    bench.send("a", 4)
    bench.admit()
    assert take(first) == (1, [2, 3]), "what came meanwhile waits for the next call"
    assert [settle(first, *done(1, 2, 3)) for _ in range(3)] == ["held"] * 3
    assert settled(bench) == 3
    assert first.node.take().id == "a-4"


def test_only_the_holder_of_the_lease_takes_and_settles(bench: Bench) -> None:
    first = started(bench, 3)
    assert take(first, token="another") == (-1, [])
    assert take(first) == (1, [2, 3])
    assert settle(first, *done(1, 2, 3), token="another") == "stale"
    assert settle(first, *done(1, 2)) == "stale", "it is one entry short"
    assert settle(first, *done(1, 3, 2)) == "stale"
    bench.overdue("n")
    bench.scripts.rescue("q", bench.fence, 10)
    assert take(first) == (-1, [])
    assert settle(first, *done(1, 2, 3)) == "stale"
    assert bench.backlog("a") == [1, 2, 3]


def test_nothing_joins_while_the_heartbeat_is_late(bench: Bench) -> None:
    first = started(bench, 3)
    bench.overdue("n", 500)
    s = first.stamp
    found = bench.scripts.take(s.incarnation, s.slot, s.entry, s.epoch, first.token, 1000, "t", MOST_BYTES)
    assert found == (-5, [])
    assert bench.backlog("a") == [2, 3]


def test_a_lost_call_goes_back_in_order_and_then_runs_one_by_one(bench: Bench) -> None:
    first = started(bench, 3)
    take(first)
    bench.send("a", 4)
    bench.admit()
    assert first.lost() == "requeued"
    again = first.node.take()
    assert (again.id, again.stamp.attempt) == ("a-1", 2)
    assert bench.backlog("a") == [2, 3, 4]
    assert again.start() == 1
    assert take(again) == (1, []), "what was started before has a call of its own"
    again.settle()
    assert first.node.drain_all() == ["a-2", "a-3", "a-4"]
    assert bench.client.hlen(bench.queue_key("att")) == 0


def test_to_what_was_started_before_nobody_joins(bench: Bench) -> None:
    first = started(bench, 3)
    first.lost()
    again = first.node.take()
    assert (again.id, again.start(), take(again)) == ("a-1", 1, (1, []))
    again.settle()
    second = first.node.take()
    second.start()
    assert take(second) == (1, [3]), "these never were"


def test_what_was_started_before_joins_nobody(bench: Bench) -> None:
    first = started(bench, 3, ordered=60_000)
    take(first)
    first.lost()
    again = first.node.take()
    again.start()
    again.settle("done", bench.retry_of(again), "")  # it keeps its place, as one that never ran
    fresh = first.node.take()
    assert (fresh.id, fresh.start(), take(fresh)) == ("a-1", 1, (1, []))


def test_a_beat_that_misses_the_first_takes_back_the_whole_call(bench: Bench) -> None:
    first = started(bench, 3)
    take(first)
    first.node.beat(1, [first])
    assert first.node.beat(2, [])[2] == 0
    bench.client.hset(bench.scripts.keys.slot("n", 0), "miss", 1)
    assert first.node.beat(3, [])[2] == 3
    assert first.node.take().id == "a-1"
    assert bench.backlog("a") == [2, 3]


def test_the_last_delivery_of_a_call_is_that_of_all_and_their_callers_are_told(bench: Bench) -> None:
    first = started(bench, 3, bury_lost=1)
    take(first)
    assert first.lost() == "buried"
    assert sorted(int(e) for e in bench.client.hkeys(bench.queue_key("dead"))) == [1, 2, 3]
    untold = bench.client.lrange(bench.queue_key("untold"), 0, -1)
    assert sorted(untold) == [b"2", b"3"], "the parent tells of the first, the leader of the others"


def test_a_call_ends_at_a_task_of_another_name(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n", depth=2)
    for number, task in enumerate("ttxt", 1):
        send_task(bench, "a", number, task)
    bench.admit()
    first = node.take()
    first.start()
    assert take(first) == (1, [2])
    node.take()
    assert settle(first, *done(1, 2)) == "held"
    assert node.drain_all() == ["a-3", "a-4"]


def test_the_shape_that_celery_writes_is_known_without_parsing(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n")
    for number, name in enumerate(("x.t", "x.t", "x_t"), 1):
        headers = {"lang": "py", "task": name, "id": f"a-{number}", "shadow": None, "eta": None,
                   "expires": None, "identify_tag": "a"}
        bench.push(envelope([[], {}, {}], headers, {}, serializer="json", compression=None, routing_key="q"))
    bench.admit()
    first = node.take()
    first.start()
    assert take(first, task="x.t") == (1, [2]), "the name is no pattern"


@pytest.mark.parametrize(
    ("expires", "joins"),
    [("2020-01-01T00:00:00+00:00", False), ("2999-01-01T00:00:00+00:00", True), ("soon", False), (None, True)],
)
def test_what_has_expired_is_left_to_its_parent(bench: Bench, expires: str | None, joins: bool) -> None:
    bench.lead()
    node = bench.node("n")
    send_task(bench, "a", 1)
    send_task(bench, "a", 2, expires=expires)
    bench.admit()
    first = node.take()
    first.start()
    assert take(first) == (1, [2] if joins else [])


def test_what_is_revoked_is_left_to_its_parent(bench: Bench) -> None:
    first = started(bench, 4)
    bench.scripts.revoke(["q"], ["a-3"])
    assert take(first) == (1, [2])


def test_a_call_has_a_bounded_size(bench: Bench) -> None:
    first = started(bench, 4)
    size = int(bench.client.execute_command("HSTRLEN", bench.queue_key("m"), 2))
    assert take(first, most_bytes=2 * size) == (1, [2, 3])


def test_a_call_counts_towards_the_batch_while_another_tag_waits(bench: Bench) -> None:
    first = started(bench, 8, batch=5)
    assert first.settle() == "held"
    second = first.node.take()
    second.start()
    bench.send("b", 1)
    bench.admit()
    assert take(second) == (1, [3, 4, 5])
    assert settle(second, *done(2, 3, 4, 5)) == "batch"
    assert first.node.take().id == "b-1"


def test_a_lease_that_nobody_waits_for_has_calls_of_a_whole_batch(bench: Bench) -> None:
    first = started(bench, 12, batch=5)
    assert take(first) == (1, [2, 3, 4, 5])
    assert settle(first, *done(1, 2, 3, 4, 5)) == "held"
    second = first.node.take()
    second.start()
    assert take(second) == (1, [7, 8, 9, 10])


def test_behind_a_batch_task_no_second_message_is_sent(bench: Bench) -> None:
    first = started(bench, 12, depth=2, batch=5)
    assert take(first) == (1, [2, 3, 4, 5])
    first.node.take()
    settle(first, *done(1, 2, 3, 4, 5))
    assert first.node.take().id == "a-6"
    assert first.node.receive() is None
    for number in (1, 2, 3):
        send_task(bench, "b", number, "another")
    bench.admit()
    node = bench.node("m", depth=2)
    assert [node.take().id, node.take().id] == ["b-1", "b-2"], "another task's come by twos"


def test_of_a_stopping_worker_nothing_joins(bench: Bench) -> None:
    first = started(bench, 3)
    bench.scripts.drain("n")
    assert take(first) == (1, [])
    assert first.settle() == "drained"
    assert bench.backlog("a") == [2, 3]


def test_a_call_that_runs_is_not_given_back_by_a_drain(bench: Bench) -> None:
    first = started(bench, 3)
    take(first)
    assert bench.scripts.drain("n") == 0
    assert settle(first, *done(1, 2, 3)) == "drained"
    assert entries(bench) == []


def test_each_entry_has_an_outcome_of_its_own(bench: Bench) -> None:
    first = started(bench, 5, failure=1)
    take(first)
    assert settle(
        first, (1, "done", []), (2, "done", [bench.retry_of(first), ""]), (3, "again", []),
        (4, "failed", ["it failed", "traceback"]), (5, "bury", ["unreadable"]),
    ) == "halted"
    assert sorted(int(e) for e in bench.client.hkeys(bench.queue_key("dead"))) == [4, 5]
    assert bench.client.lrange(bench.queue_key("untold"), 0, -1) == [b"5"]
    assert bench.backlog("a") == [6, 7], "the retry and the rejected one, at the end"
    assert (entries(bench), settled(bench)) == ([6, 7], 4)


def test_ordered_retries_of_one_call_keep_their_places_and_wait_for_the_last_of_them(bench: Bench) -> None:
    first = started(bench, 4, ordered=60_000)
    take(first)
    now = bench.now_ms()
    bench.send("a", 5)
    bench.admit()
    assert settle(
        first, (1, "done", [bench.retry_of(first), now + 9_000]), *done(2),
        (3, "done", [bench.retry_of(first), now + 5_000]), *done(4),
    ) == "retry"
    assert bench.backlog("a") == [1, 3, 5]
    assert bench.client.zscore(bench.queue_key("hold"), "a") == now + 9_000


@pytest.mark.parametrize("later_first", [False, True])
def test_two_lost_calls_of_one_tag_go_back_in_order_whichever_comes_first(
    bench: Bench, later_first: bool
) -> None:
    bench.lead(batch=8, concurrency=2)
    one, two = bench.node("one"), bench.node("two")
    bench.send("a", *range(1, 19))
    bench.admit_all()
    first = one.receive() or two.take()
    assert first.start() == 1
    second = one.receive() or two.take()
    assert second.start() == 1
    assert take(second) == (1, [3, 4, 5, 6, 7, 8, 9])
    assert first.settle() == "held"
    third = first.node.take()
    assert third.start() == 1
    assert take(third) == (1, [11, 12, 13, 14, 15, 16, 17])
    nodes = [third.node, second.node] if later_first else [second.node, third.node]
    for node in nodes:
        bench.scripts.leave(node.name)
    assert bench.backlog("a") == list(range(2, 19))


def test_a_tag_with_several_leases_starts_in_order(bench: Bench) -> None:
    bench.lead(concurrency=2)
    one, two = bench.node("one"), bench.node("two")
    bench.send("a", *range(1, 6))
    bench.admit()
    first = one.receive() or two.take()
    assert first.start() == 1
    assert take(first) == (1, []), "2 was dispatched and has not started"
    second = one.receive() or two.take()
    assert second.start() == 1
    assert take(second) == (1, [3, 4, 5])
    assert settle(second, *done(2, 3, 4, 5)) == "empty"


# Under a start that a settle has granted


def granted(bench: Bench, token: str = "granted?") -> Copy:
    """The second of six entries: its start was granted, and three more have joined it."""
    first = started(bench, 6, depth=2, batch=4)
    second = first.node.take()
    assert first.settle(grant=token) == f"held {second.stamp.entry}"
    second.token = token
    assert first.node.take().id == "a-3", "this one was on its way already"
    assert take(second) == (1, [3, 4, 5])
    return second


def test_a_call_under_a_granted_start_has_begun_for_everybody(bench: Bench) -> None:
    second = granted(bench)
    node = second.node
    assert node.beat(1)[:2] == (True, 0), "not sent again"
    assert node.receive() is None
    assert second.discard("settle", "expired", alone=True) == 0
    assert not second.decline(second.token)
    assert bench.scripts.drain("n") == 0
    assert settle(second, *done(2, 3, 4, 5)) == "drained"
    assert entries(bench) == [6]


def test_a_lost_call_under_a_granted_start_counts_for_each_of_its_entries(bench: Bench) -> None:
    second = granted(bench)
    assert bench.scripts.process_up("n", 0)
    assert bench.client.hgetall(bench.queue_key("att")) == {str(e).encode(): b"1" for e in range(2, 6)}
    again = second.node.take()
    assert (again.id, again.stamp.attempt, bench.backlog("a")[:3]) == ("a-2", 2, [3, 4, 5])


def test_a_repeated_question_for_a_granted_start_changes_nothing_of_its_call(bench: Bench) -> None:
    second = granted(bench)
    assert second.start(second.token) == 1
    assert take(second) == (1, [3, 4, 5])
    assert settle(second, *done(2, 3, 4, 5)) == "held"


def test_a_call_that_runs_in_an_older_copy_of_its_first_message_is_not_taken_back(
    bench: Bench,
) -> None:
    first = started(bench, 6, depth=2, batch=4)
    second = first.node.take()
    assert first.settle(grant="granted?") == f"held {second.stamp.entry}"
    second.token = "granted?"
    first.node.take()
    assert first.node.beat(1)[:2] == (True, 2), "both are late, and sent again"
    assert take(second) == (1, [3, 4, 5])
    for number in (2, 3):
        assert first.node.beat(number, [second]) == (True, 0, 0)
        bench.client.hincrby(bench.scripts.keys.slot("n", 0), "miss", -6_000)
    assert settle(second, *done(2, 3, 4, 5)) == "held"


# Operators


def test_nothing_joins_while_the_queue_is_paused(bench: Bench, operator: OperatorScripts) -> None:
    first = started(bench, 3)
    operator.pause("q")
    assert take(first) == (1, [])
    assert first.settle() == "batch"
    assert first.node.receive() is None
    bench.scripts.resume("q")
    assert first.node.drain_all() == ["a-2", "a-3"]


def test_nothing_joins_while_the_tag_is_paused(bench: Bench, operator: OperatorScripts) -> None:
    first = started(bench, 3)
    operator.pause_tag("q", "a")
    assert take(first) == (1, [])
    assert first.settle() == "halted"
    operator.resume_tag("q", "a")
    assert first.node.drain_all() == ["a-2", "a-3"]


def test_nothing_of_a_tag_that_is_on_its_way_elsewhere_joins(
    bench: Bench, operator: OperatorScripts
) -> None:
    first = started(bench, 3)
    other = bench.node("m")
    assert operator.move("q", "a", "m", 60) == 1
    assert take(first) == (1, [])
    assert first.settle() == "batch"
    second = other.take()
    assert (second.id, second.start(), take(second)) == ("a-2", 1, (1, [3]))


def test_a_lease_of_more_than_the_tag_may_have_now_takes_nothing(
    bench: Bench, operator: OperatorScripts
) -> None:
    bench.lead(concurrency=2)
    one, two = bench.node("one"), bench.node("two")
    bench.send("a", *range(1, 6))
    bench.admit()
    first = one.receive() or two.take()
    first.start()
    second = one.receive() or two.take()
    second.start()
    operator.limit("q", "a", 1, "set")
    assert [take(first), take(second)] == [(1, []), (1, [])]
    assert first.settle() == "batch"
    assert second.settle() == "batch"
    node = next(node for node in (one, two) if bench.client.exists(node.list))
    third = node.take()
    third.start()
    assert take(third) == (1, [4, 5])


def test_a_call_that_runs_is_not_reached_by_operators_and_the_tag_stands_behind_it(
    bench: Bench, operator: OperatorScripts
) -> None:
    first = started(bench, 5, batch=3)
    assert take(first) == (1, [2, 3])
    assert operator.pause_tag("q", "a")
    assert operator.purge_tag("q", "token", "a", 4, 100, []) == (1, False), "4 has waited"
    assert entries(bench) == [1, 2, 3, 5]
    assert operator.limit("q", "a", 3, "set")[0]
    assert take(first) == (1, [2, 3])
    assert settle(first, *done(1, 2, 3)) == "halted"
    assert (entries(bench), first.node.receive()) == ([5], None)
    operator.resume_tag("q", "a")
    assert first.node.drain_all() == ["a-5"]


def test_of_a_revoked_tag_nothing_joins_but_what_came_later(
    bench: Bench, operator: OperatorScripts
) -> None:
    first = started(bench, 3)
    assert operator.revoke_tag("q", "a") == (2, [1])
    bench.send("a", 4, 5)
    bench.admit_all()
    assert take(first) == (1, [])
    first.settle()
    for name in ("a-2", "a-3"):
        told = first.node.take()
        assert (told.id, told.discard("settle", "revoked")) == (name, 1)
    fourth = first.node.take()
    fourth.start()
    assert take(fourth) == (1, [5])


def test_a_revoke_of_a_tag_names_all_that_runs(bench: Bench, operator: OperatorScripts) -> None:
    """So that none of it is retried."""
    first = started(bench, 5, batch=3)
    take(first)
    assert operator.revoke_tag("q", "a") == (2, [1, 2, 3])


def test_ordered_retries_of_a_call_whose_tag_was_paused_wait_for_the_last_of_them(
    bench: Bench, operator: OperatorScripts
) -> None:
    first = started(bench, 3, ordered=60_000)
    take(first)
    now = bench.now_ms()
    operator.pause_tag("q", "a")
    assert settle(
        first, (1, "done", [bench.retry_of(first), now + 9_000]),
        (2, "done", [bench.retry_of(first), now + 5_000]), *done(3),
    ) == "halted"
    assert operator.resume_tag("q", "a")
    assert bench.client.zscore(bench.queue_key("hold"), "a") == now + 9_000


def test_all_of_a_call_are_explained_as_running(
    bench: Bench, shared_server: Server, namespace: str
) -> None:
    take(started(bench, 5, batch=3))
    app = Celery("reads", broker=shared_server.url(), set_as_current=False)
    affinity = Affinity(app, queues=[AffinityQueue("q")], namespace=namespace)
    states = [affinity.explain_task(f"a-{number}").state for number in range(1, 5)]
    assert states == ["running", "running", "running", "waiting"]
