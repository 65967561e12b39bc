"""Laws of start and settle: one copy runs, in order, and says once that it has ended."""

from __future__ import annotations

import pytest

from celery_affinity.scripts import Scripts

from .conftest import Bench


def test_a_started_entry_refuses_a_second_token(bench: Bench) -> None:
    node = bench.opening(1)
    copy = node.take()
    assert copy.start("one") == 1
    assert copy.start("two") == -3


@pytest.mark.proves(
    "28: the reply to a start is lost",
    "the repeat gets the same answer",
)
def test_a_repeated_start_gets_the_same_answer(bench: Bench) -> None:
    node = bench.opening(1)
    copy = node.take()
    assert [copy.start("one") for _ in range(3)] == [1, 1, 1]
    assert copy.settle() == "empty"


def test_a_stale_epoch_or_send_number_is_refused(bench: Bench) -> None:
    node = bench.opening(1)
    copy = node.take()
    assert copy.start(epoch="1") == -1
    assert copy.start(send="0") == -2
    assert copy.start() == 1


def test_a_refused_copy_changes_nothing(bench: Bench) -> None:
    node = bench.opening(1, 2)
    copy = node.take()
    copy.start("one")
    before = _state(bench)
    assert copy.start("two") == -3
    assert copy.settle(token="two") == "stale"
    assert _state(bench) == before
    assert copy.settle(token="one") == "held"


@pytest.mark.proves(
    "28: the reply to a settle is lost",
    "the repeat gets the same answer, and counts once",
)
def test_a_repeated_settle_gets_the_same_answer_and_counts_once(bench: Bench) -> None:
    node = bench.opening(1, 2)
    first = node.take()
    first.start()
    assert [first.settle() for _ in range(3)] == ["held"] * 3
    assert node.take().id == "a-2"
    assert node.receive() is None
    assert bench.client.hget(bench.queue_key("c"), "settled") == b"1"


def test_settle_hands_the_slot_its_next_message(bench: Bench) -> None:
    node = bench.opening(*range(5))
    assert node.drain_all() == [f"a-{n}" for n in range(5)]


def test_the_second_message_of_a_lease_cannot_start_before_the_first_is_settled(
    bench: Bench,
) -> None:
    node = bench.opening(1, 2, 3, depth=2)
    first, second = node.take(), node.take()
    assert second.start() == -4
    assert first.start() == 1
    assert first.settle() == "held"
    again = node.take()
    assert (again.id, again.start()) == ("a-2", 1), "the refused one comes again, before a-3"


def test_a_retry_is_part_of_settle_and_goes_to_the_back(bench: Bench) -> None:
    node = bench.opening(1, 2)
    copy = node.take()
    copy.start()
    raw = bench.client.hget(bench.queue_key("m"), copy.stamp.entry)
    assert copy.settle("done", raw, "") == "held"
    assert node.drain_all() == ["a-2", "a-1"]


def test_a_rejected_message_goes_to_the_back(bench: Bench) -> None:
    node = bench.opening(1, 2)
    copy = node.take()
    copy.start()
    copy.settle("again")
    assert node.drain_all() == ["a-2", "a-1"]


def test_a_retry_with_a_due_time_waits_outside_the_backlog(bench: Bench) -> None:
    node = bench.opening(1)
    copy = node.take()
    copy.start()
    raw = bench.client.hget(bench.queue_key("m"), copy.stamp.entry)
    seconds, _ = bench.client.time()
    assert copy.settle("done", raw, (seconds + 600) * 1000) == "empty"
    assert bench.client.zcard(bench.queue_key("eta")) == 1
    assert bench.client.llen(bench.queue_key("wake")) == 1, "the leader must learn of it"
    assert node.receive() is None


def test_a_discarded_message_frees_its_slot_for_the_next(bench: Bench) -> None:
    node = bench.opening(1, 2)
    s = node.take().stamp
    args = (s.incarnation, s.slot, s.entry, s.epoch, s.send)
    assert bench.scripts.discard(*args, "bury", "unknown task")
    assert [d["reason"] for d in bench.dead()] == ["unknown task"]
    assert node.drain_all() == ["a-2"]


def test_a_repeated_discard_is_answered_as_before(bench: Bench) -> None:
    """Its reply was lost. A "no" would send the message on to its process, which may have a grant."""
    node = bench.opening(1, 2)
    s = node.take().stamp
    args = (s.incarnation, s.slot, s.entry, s.epoch, s.send)
    answers = [bench.scripts.discard(*args, "settle", "revoked") for _ in range(2)]
    assert answers == [1, 1]
    assert bench.scripts.discard(*args[:3], "1", args[4], "settle") == 0, "of an older lease"
    assert node.drain_all() == ["a-2"]
    assert bench.scripts.discard(*args, "settle", "revoked") == 1, "also when the slot has gone on"
    assert bench.client.hget(bench.queue_key("c"), "settled") == b"2"


def test_a_started_message_cannot_be_discarded(bench: Bench) -> None:
    node = bench.opening(1)
    copy = node.take()
    copy.start()
    s = copy.stamp
    assert not bench.scripts.discard(s.incarnation, s.slot, s.entry, s.epoch, s.send, "settle")
    assert copy.settle() == "empty"


def test_an_entry_whose_process_is_lost_too_often_is_buried_and_its_tag_goes_on(
    bench: Bench,
) -> None:
    node = bench.opening(1, 2, deliveries=2)
    verdicts = []
    for _ in range(2):
        copy = node.take()
        assert copy.id == "a-1"
        copy.start()
        s = copy.stamp
        verdicts.append(bench.scripts.lost(s.incarnation, s.slot, s.entry, s.epoch, "q"))
    assert verdicts == ["requeued", "buried"]
    assert node.drain_all() == ["a-2"]


def test_a_lost_process_whose_task_had_settled_changes_nothing(bench: Bench) -> None:
    node = bench.opening(1)
    copy = node.take()
    copy.run()
    s = copy.stamp
    assert bench.scripts.lost(s.incarnation, s.slot, s.entry, s.epoch, "q") == "settled"
    assert node.receive() is None


def test_a_task_that_its_parent_ended_settles_when_its_process_is_replaced(bench: Bench) -> None:
    node = bench.opening(1, 2)
    copy = node.take()
    copy.start()
    s = copy.stamp
    assert bench.scripts.finish(s.incarnation, s.slot, s.entry, s.epoch)
    assert node.receive() is None, "the tag is not released on the parent's word"
    assert bench.scripts.process_up(s.incarnation, s.slot)
    assert node.drain_all() == ["a-2"]


def _state(bench: Bench) -> dict[bytes, object]:
    prefix = bench.scripts.keys.prefix
    return {k: bench.client.dump(k) for k in bench.client.scan_iter(match=f"{prefix}*")}


def test_calls_over_an_own_connection_survive_its_loss_and_an_emptied_script_cache(
    bench: Bench,
) -> None:
    bench.scripts = Scripts(bench.client, bench.scripts.keys, single_threaded=True)
    node = bench.opening(*range(3))
    ran = []
    for trouble in (lambda: None, bench.client.script_flush, bench.scripts._connection.disconnect):
        copy = node.take()
        trouble()
        assert copy.start() == 1
        trouble()
        copy.settle()
        ran.append(copy.id)
    assert ran == ["a-0", "a-1", "a-2"]


def test_nothing_starts_while_the_heartbeat_is_late(bench: Bench) -> None:
    node = bench.opening(1, timeout_ms=60_000)
    copy = node.take()
    bench.overdue("n", 29_000)
    assert copy.start("token", least_ms=30_000) == -5
    bench.overdue("n", 31_000)
    assert copy.start("token", least_ms=30_000) == 1
    bench.overdue("n", 29_000)
    assert copy.start("token", least_ms=30_000) == -5, "nor does a repeat: its answer may have been long on the way"
    assert copy.settle() == "empty"
