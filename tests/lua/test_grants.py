"""Laws of granted starts: a settle may start the entry that follows, for the process that settles."""

from __future__ import annotations

import pytest

from celery_affinity.held import Held
from celery_affinity.message import Stamp
from celery_affinity.operator_scripts import OperatorScripts

from .conftest import Bench, Copy, Node

GRANT = "granted?"


def two_out(bench: Bench, **limits: int) -> tuple[Node, Copy, Copy]:
    """A node of which one message runs and a second one waits, with more behind them."""
    bench.lead(**limits)
    node = bench.node("n", depth=2)
    bench.send("a", *range(4))
    bench.admit()
    first, second = node.take(), node.take()
    assert first.start() == 1
    return node, first, second


def granted(bench: Bench, **limits: int) -> tuple[Node, Copy]:
    """The second message of such a node, whose start was granted."""
    node, first, second = two_out(bench, **limits)
    assert first.settle(grant=GRANT) == f"held {second.stamp.entry}"
    second.token = GRANT
    return node, second


def attempts(bench: Bench, copy: Copy) -> int:
    """How many starts of its entry did not settle."""
    return int(bench.client.hget(bench.queue_key("att"), copy.stamp.entry) or 0)


def test_a_granted_entry_settles_with_its_token_and_the_order_holds(bench: Bench) -> None:
    node, second = granted(bench)
    third = node.take()
    assert second.settle(grant="next?") == f"held {third.stamp.entry}"
    third.token = "next?"
    fourth = node.take()
    assert third.settle(grant="last?") == f"held {fourth.stamp.entry}"
    fourth.token = "last?"
    assert fourth.settle(grant="none?") == "empty"
    assert [second.id, third.id, fourth.id] == ["a-1", "a-2", "a-3"]


def test_a_repeated_settle_grants_the_same_start_once(bench: Bench) -> None:
    _, first, second = two_out(bench)
    assert {first.settle(grant=GRANT) for _ in range(3)} == {f"held {second.stamp.entry}"}
    assert second.start("another") == -3
    assert [second.start(GRANT), second.start(GRANT)] == [1, 1], "who asks with the token may start"


def test_no_start_is_granted_to_what_was_revoked_after_its_dispatch(bench: Bench) -> None:
    """The process has its copy without the note already; the one with it is on its way."""
    node, first, second = two_out(bench)
    OperatorScripts(bench.client, bench.scripts.keys).revoke_tag("q", "a")
    assert first.settle(grant=GRANT) == "held"
    assert second.start("own") != 1, "the ledger does not know the old copy any more"
    noted = node.take()
    assert noted.id == second.id
    assert noted.stamp.send != second.stamp.send
    assert noted.discard("settle") == 1


def test_only_what_was_dispatched_before_is_granted(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n", depth=2)
    bench.send("a", 0)
    bench.admit()
    first = node.take()
    first.start()
    bench.send("a", 1)
    # It waits in the pending queue: nothing is out behind the first.
    assert first.settle(grant=GRANT) == "empty"
    bench.admit()
    assert node.take().start("own") == 1


def test_nothing_is_granted_on_a_node_with_one_message_out(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n")
    bench.send("a", 0, 1)
    bench.admit()
    first = node.take()
    first.start()
    assert first.settle(grant=GRANT) == "held", "its next message has only now gone out"
    assert node.take().start("own") == 1


@pytest.mark.parametrize("limits", [{"bury_lost": 1}, {"deliveries": 1}])
def test_no_start_is_granted_that_a_loss_could_bury(bench: Bench, limits: dict[str, int]) -> None:
    _, first, second = two_out(bench, **limits)
    assert first.settle(grant=GRANT) == "held"
    assert second.start("own") == 1


def test_an_entry_whose_process_was_lost_is_granted_no_start(bench: Bench) -> None:
    """A task that kills its process is counted each time: after a grant it has to ask."""
    node, first, second = two_out(bench, deliveries=2)
    first.settle(grant=GRANT)
    assert second.lost() == "requeued"
    ran = []
    while copy := node.receive():
        if copy.start("own") != 1:
            continue
        ran.append(copy.id)
        if copy.id == second.id:
            assert copy.lost() == "buried"
        else:
            copy.settle(grant="more?")
    assert ran[0] == second.id and len(bench.dead()) == 1


def test_behind_another_task_too_it_has_to_ask(bench: Bench) -> None:
    node, second = granted(bench)
    bench.client.hset(bench.queue_key("att"), str(int(second.stamp.entry) + 1), 1)
    third = node.take()
    assert second.settle(grant="more?") == "held"
    assert third.start("own") == 1


def test_nothing_is_granted_while_the_heartbeat_is_late(bench: Bench) -> None:
    _, first, second = two_out(bench)
    bench.overdue("n", 29_000)
    assert first.settle(grant=GRANT, least_ms=30_000) == "held"
    assert second.start("own", least_ms=30_000) == -5


def test_nothing_is_granted_behind_a_retry_or_a_requeue(bench: Bench) -> None:
    _, first, second = two_out(bench)
    assert first.settle("done", bench.retry_of(first), "", grant=GRANT) == "held"
    assert second.start("own") == 1
    assert second.settle("again", grant=GRANT) == "held"


def test_a_granted_start_counts_when_its_process_is_lost(bench: Bench) -> None:
    node, second = granted(bench)
    assert second.lost() == "requeued"
    assert attempts(bench, second) == 1
    again = next(copy for copy in iter(node.take, None) if copy.start("own") == 1)
    assert (again.id, again.stamp.attempt) == (second.id, 2)


def test_a_new_process_gives_back_what_its_predecessor_was_granted(bench: Bench) -> None:
    node, second = granted(bench)
    assert bench.scripts.process_up("n", 0)
    assert second.start(GRANT) == -1
    assert attempts(bench, second) == 1
    assert next(copy for copy in iter(node.take, None) if copy.start("own") == 1).id == second.id


def test_a_lost_message_whose_start_was_granted_comes_again_and_counts_no_delivery(
    bench: Bench,
) -> None:
    node, second = granted(bench)
    third = node.take()
    assert node.beat(1, held=[third]) == (True, 1, 0)
    again = node.take()
    assert (again.stamp.entry, again.stamp.epoch) == (second.stamp.entry, second.stamp.epoch)
    assert node.beat(2, held=[again, third]) == (True, 0, 0)
    assert again.start("another") == -3, "whoever holds the grant may have begun"
    assert again.start(GRANT) == 1
    assert second.start("another") == -3
    assert attempts(bench, second) == 0
    assert again.settle(token=GRANT) == "held"


def test_a_declined_start_is_none(bench: Bench) -> None:
    node, second = granted(bench)
    assert not second.decline("another")
    assert second.decline(GRANT)
    assert not second.decline(GRANT)
    third = node.take()
    assert third.start("third") == -4, "the order holds"
    assert second.start("own") == 1
    assert not second.decline("own"[:-1])
    assert attempts(bench, second) == 0
    assert second.settle() == "held"


def test_what_a_draining_node_declines_goes_back_to_the_head_and_counts_no_delivery(
    bench: Bench,
) -> None:
    _, second = granted(bench)
    other = bench.node("m")
    assert bench.scripts.drain("n") == 1, "the granted one may run: it stays"
    assert other.receive() is None
    assert second.decline(GRANT)
    assert second.start(GRANT) == -1
    assert attempts(bench, second) == 0
    assert other.drain_all() == ["a-1", "a-2", "a-3"]
    assert bench.scripts.leave("n") == 0


def test_a_granted_entry_on_a_queue_that_is_served_no_more_runs_or_goes_back(bench: Bench) -> None:
    node, second = granted(bench)
    other = bench.node("m")
    assert bench.scripts.serve("n", 1, slots=1, queues=[], junk=[]) == 1
    assert other.receive() is None
    for beat, age_ms in ((1, 0), (2, 6_000)):  # its message is nowhere, and cannot be sent again
        bench.client.hincrby(bench.scripts.keys.slot("n", 0), "miss", -age_ms)
        node.beat(beat)
    assert attempts(bench, second) == 1, "nobody knows whether it had begun"
    assert other.drain_all() == ["a-1", "a-2", "a-3"]


def test_a_granted_entry_that_expired_is_ended_if_no_copy_of_it_can_run(bench: Bench) -> None:
    node, second = granted(bench)
    assert second.discard("settle", "expired") == 0, "another copy may run"
    assert second.discard("settle", "expired", alone=True) == 1
    assert second.start(GRANT) == -1
    assert node.drain_all() == ["a-2", "a-3"]


def test_a_start_that_was_asked_for_is_never_discarded(bench: Bench) -> None:
    _, first, _ = two_out(bench)
    assert first.discard("settle", "expired", alone=True) == 0
    assert first.settle() == "held"


def test_a_dead_workers_granted_entry_goes_back_to_the_head(bench: Bench) -> None:
    _, second = granted(bench)
    bench.overdue("n")
    other = bench.node("m")
    assert bench.scripts.rescue("q", bench.fence, 100)[0] == 1
    assert other.drain_all() == ["a-1", "a-2", "a-3"]
    assert second.settle(token=GRANT) == "stale"


def test_a_granted_task_that_was_given_its_end_is_neither_sent_again_nor_discarded(
    bench: Bench,
) -> None:
    """It was revoked or ran past its limit, so it has begun; its process may still clean up."""
    node, second = granted(bench)
    s = second.stamp
    assert bench.scripts.finish(s.incarnation, s.slot, s.entry, s.epoch)
    assert node.beat(1)[:2] == (True, 0), "not sent again"
    assert second.discard("settle", "revoked", alone=True) == 0


def test_a_granted_start_that_nobody_knows_of_is_taken_back_after_one_more_message(
    bench: Bench,
) -> None:
    """So it is in a ledger that was restored: the process has long ended what it was granted."""
    node, second = granted(bench)
    held = [node.take()]
    assert node.beat(1, held) == (True, 1, 0)
    assert node.take().start("own") == -3, "the process that got it holds no grant"
    assert node.beat(2, held) == (True, 0, 0)
    bench.client.hincrby(bench.scripts.keys.slot("n", 0), "miss", -6_000)
    assert node.beat(3, held) == (True, 0, 2)
    assert node.take().id == second.id and attempts(bench, second) == 1


def test_a_granted_task_that_runs_in_an_older_copy_is_not_taken_back(bench: Bench) -> None:
    """Found by simulation (seed 900747): the copy that was sent again came to its end, and so not the
    one that ran; its node had reconnected to its broker, and said that it may run.
    """
    node, second = granted(bench)
    third = node.take()
    assert node.beat(1, [third]) == (True, 1, 0)
    assert node.take().start("own") == -3
    for maybe in ("", ":?"):
        held = [third.stamp.held, second.stamp.held + maybe]
        for number in (2, 3):
            alive, again, back, _ = bench.scripts.heartbeat("n", f"{number}{maybe}", 0, held)
            # One more may be sent where nobody knows whether any is there: its process refuses it.
            assert (alive, back) == (True, 0) and again <= len(maybe)
            bench.client.hincrby(bench.scripts.keys.slot("n", 0), "miss", -6_000)
    assert second.settle(token=GRANT) == "held"


def test_a_granted_start_whose_second_message_never_came_comes_again_where_the_first_was_flushed(bench: Bench) -> None:
    """Found by simulation (seed 71017626): nobody knew of the second, and the first held its tag for ever."""
    node, second = granted(bench)
    third = node.take()
    node.beat(1, [third])
    assert node.take().stamp.resent, "it is lost on the way: the connection goes once more"
    maybe = f"{second.stamp.held}:?"
    assert bench.scripts.heartbeat("n", "2", 0, [third.stamp.held, maybe])[:3] == (True, 1, 0)
    assert node.take().start(GRANT) == 1


def test_a_granted_start_whose_second_message_was_flushed_too_comes_a_third_time(bench: Bench) -> None:
    """Found by simulation (seed 1330): its node had reconnected to its broker twice."""
    node, second = granted(bench)
    third = node.take()
    node.beat(1, [third])
    again = node.take()
    maybe = [f"{copy.stamp.held}:?" for copy in (second, again)]
    assert bench.scripts.heartbeat("n", "2", 0, [third.stamp.held, *maybe])[:3] == (True, 1, 0)
    assert node.take().start(GRANT) == 1


def test_a_grant_that_only_a_restored_ledger_knows_of_ends_although_its_message_was_flushed(bench: Bench) -> None:
    """It was sent again with each heartbeat, and refused, and its tag stood still until its worker stopped."""
    node, second = granted(bench)
    third, held = node.take(), Held(in_turn=True)
    held.arrived(second.stamp, "thrown away by a reconnect")
    held.flushed()
    held.arrived(third.stamp, "behind it")

    def beat(number: int) -> tuple[bool, int, int]:
        return bench.scripts.heartbeat("n", str(number), 0, held.names())[:3]

    assert beat(1) == (True, 1, 0)
    again = node.take()
    held.arrived(again.stamp, "again")
    held.accepted(again.stamp, "again")
    assert again.start("own") == -3, "its process knows of no grant any more"
    held.ended(again.stamp, "again")
    assert beat(2) == (True, 0, 0)
    bench.client.hincrby(bench.scripts.keys.slot("n", 0), "miss", -6_000)
    assert beat(3) == (True, 0, 2)
    assert node.take().id == second.id and attempts(bench, second) == 1


def test_on_threads_a_copy_that_runs_beside_a_later_one_is_held_after_a_reconnect() -> None:
    stamp, later = (Stamp("7", "1", send, "n", 0, 1, 1, "q") for send in ("1", "2"))
    for in_turn, names in ((False, ["0:7:1:2", "0:7:1:1:?"]), (True, ["0:7:1:2"])):
        held = Held(in_turn)
        held.arrived(stamp, "may run in another thread")
        held.flushed()
        held.arrived(later, "later")
        assert held.names() == ["0:7:1:2", "0:7:1:1:?"]
        held.accepted(later, "later")
        assert held.names() == names


@pytest.mark.parametrize("how", ["pause_tag", "pause", "move", "limit"])
def test_a_declined_grant_obeys_what_an_operator_did_meanwhile(bench: Bench, how: str) -> None:
    node, second = granted(bench)
    third, other = node.take(), bench.node("m", slots=1)
    operator = OperatorScripts(bench.client, bench.scripts.keys)
    {
        "pause_tag": lambda: operator.pause_tag("q", "a"),
        "pause": lambda: operator.pause("q"),
        "move": lambda: operator.move("q", "a", "m", 3600),
        "limit": lambda: operator.limit("q", "a", 2, "set"),
    }[how]()  # type: ignore[no-untyped-call]
    assert other.receive() is None, "nothing overtakes what may have begun"
    assert second.decline(GRANT)
    assert third.start("third") != 1
    if how == "limit":
        assert second.start("again") == 1, "it is the oldest of its tag"
        return
    assert second.start("again") != 1
    moved = other.receive()
    assert (moved and moved.id) == (second.id if how == "move" else None)
