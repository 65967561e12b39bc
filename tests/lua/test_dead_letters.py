"""Laws of the dead letters: list, requeue, purge; what a failure means for the tag (on_failure)."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from celery_affinity.dead import DeadLetters
from celery_affinity.delivery import SameRedisDelivery
from celery_affinity.intake import Intake, no_tag
from celery_affinity.ledger import Ledger
from celery_affinity.operator_scripts import OperatorScripts
from celery_affinity.settings import AffinityQueue
from celery_affinity.tag_lists import tags
from celery_affinity.topology import RedisNames
from harness import wait_until

from .conftest import Bench, Copy

QUEUE = AffinityQueue("q")
BLOCK, PARK = 1, 2


def ledger(bench: Bench) -> Ledger:
    names = RedisNames.from_transport_options({})
    return Ledger(bench.client, bench.scripts.keys, SameRedisDelivery(names))


def letters(bench: Bench, tag_of: Any = no_tag) -> DeadLetters:
    intake = Intake(bench.scripts, "q", [bench.pending], tag_of)
    return DeadLetters(
        bench.scripts, "q", intake.judge, lambda tag: ledger(bench).dead_entries(QUEUE, tag)
    )


def entries(bench: Bench) -> list[int]:
    return list(ledger(bench).dead_entries(QUEUE, None))


def fail(copy: Copy) -> str:
    """Run a task into an error that nobody retries."""
    assert copy.start() == 1
    return copy.settle("failed", "ValueError: no", "Traceback: here")


def bury_tasks(bench: Bench, tag: str, *ids: object) -> None:
    """Have tasks of a tag buried after their admission."""
    node = bench.node(f"burying-{tag}")
    bench.send(tag, *ids)
    bench.admit_all()
    for _ in ids:
        copy = node.take()
        copy.start()
        assert copy.settle("bury", "poisonous") in ("held", "empty", "batch")
    bench.scripts.leave(node.name)


def tell_all(bench: Bench) -> None:
    bench.scripts.told("q", bench.fence, [e for e, _, _ in bench.scripts.untold("q", 10_000)])


def leftovers(bench: Bench) -> list[str]:
    names = ("dead", "deadm", "deadz", "untold", "halted", "hold", "m", "ring")
    return [name for name in names if bench.client.exists(bench.queue_key(name))]


# List


def test_letters_are_listed_by_entry_a_page_at_a_time(bench: Bench) -> None:
    bench.lead()
    for n in range(1200):
        bench.push(json.dumps({"headers": {"id": str(n), "task": 7}}))
    bench.admit_all()
    read = ledger(bench)
    pages, after = [], 0
    while page := read.dead_letters(QUEUE, 500, after, None):
        pages.append([json.loads(letter.message)["headers"]["id"] for letter in page])
        after = page[-1].entry
    assert [len(page) for page in pages] == [500, 500, 200]
    assert [n for page in pages for n in page] == [str(n) for n in range(1200)]
    assert len(read.dead_letters(QUEUE, 5000, 0, None)) == 1200


def test_letters_of_one_tag_are_listed_alone(bench: Bench) -> None:
    bench.lead()
    bury_tasks(bench, "a", 1, 2)
    bury_tasks(bench, "b", 1)
    bench.send(1.5, 1)
    bench.admit_all()
    read = ledger(bench)
    assert [x.tag for x in read.dead_letters(QUEUE, 10, 0, "a")] == ["a", "a"]
    assert [x.tag for x in read.dead_letters(QUEUE, 1, 0, "a")] == ["a"]
    assert len(read.dead_letters(QUEUE, 10, 0, "")) == 1, "one without a tag"


# Requeue


def test_requeued_letters_run_at_the_end_of_their_tag_in_their_order(bench: Bench) -> None:
    bench.lead()
    bury_tasks(bench, "a", 1, 2, 3)
    bench.send("a", 4)
    bench.admit_all()
    assert letters(bench).requeue(None, None) == 3
    assert bench.node("n").drain_all() == ["a-4", "a-1", "a-2", "a-3"]
    assert bench.scripts.untold("q", 10) == [], "nobody is told that they failed"
    assert leftovers(bench) == []


def test_single_letters_and_those_of_a_tag_are_requeued_alone(bench: Bench) -> None:
    bench.lead()
    bury_tasks(bench, "a", 1, 2)
    bury_tasks(bench, "b", 1, 2)
    dead = letters(bench)
    chosen = entries(bench)[1]
    assert dead.requeue([chosen, 10**9], None) == 1
    assert dead.requeue(None, "b") == 2
    assert dead.requeue([], None) == 0
    assert bench.node("n").drain_all() == ["a-2", "b-1", "b-2"]
    assert len(entries(bench)) == 1
    with pytest.raises(ValueError, match="both entries and a tag"):
        dead.requeue([1], "a")


def test_a_letter_that_still_cannot_be_used_stays_and_one_that_now_can_goes(bench: Bench) -> None:
    bench.lead()
    bench.send_untagged("x")
    bench.push(b"\xff no message")
    bench.admit_all()
    assert letters(bench).requeue(None, None) == 0
    assert len(entries(bench)) == 2
    assert letters(bench, lambda message: "found").requeue(None, None) == 1
    copy = bench.node("n").take()
    assert (copy.id, copy.tag) == ("x", "found")
    assert len(entries(bench)) == 1


def test_a_requeued_letter_that_is_due_later_waits(bench: Bench) -> None:
    bench.lead()
    bench.send(1.5, 1, eta="9999-01-01T00:00:00+00:00")
    bench.admit_all()
    dead = letters(bench, lambda message: "a")
    (entry,) = entries(bench)
    raw = bench.scripts.buried_message("q", entry)
    assert raw
    message = json.loads(raw)
    del message["headers"]["identify_tag"]
    bench.client.hset(bench.queue_key("deadm"), str(entry), json.dumps(message))
    assert dead.requeue(None, None) == 1
    assert bench.client.zcard(bench.queue_key("eta")) == 1
    assert bench.node("n").receive() is None


def test_a_repeated_request_moves_nothing_and_answers_the_same(bench: Bench) -> None:
    """The reply of a script was lost, and the client sends it again."""
    bench.lead()
    bury_tasks(bench, "a", 1, 2, 3)
    first, second, third = entries(bench)
    assert bench.scripts.requeue("q", "token-1", [first]) == (1, [])
    assert bench.scripts.requeue("q", "token-1", [first]) == (1, [])
    assert bench.scripts.requeue("q", "token-2", [first]) == (0, [])
    tell_all(bench)
    assert bench.scripts.purge("q", "token-3", [second]) == 1
    assert bench.scripts.purge("q", "token-3", [second]) == 1
    assert bench.scripts.purge("q", "token-4", [second]) == 0
    assert bench.node("n").drain_all() == ["a-1"]
    assert entries(bench) == [third]
    assert 0 < bench.client.ttl(bench.queue_key("done:token-1")) <= 60


def test_two_callers_requeue_each_letter_once(bench: Bench) -> None:
    bench.lead()
    for n in range(400):
        bench.push(json.dumps({"headers": {"id": f"m-{n}", "task": "t", "identify_tag": 1.5}}))
    bench.admit_all()
    for entry in entries(bench):  # what was wrong with them has been mended
        raw = json.loads(bench.scripts.buried_message("q", entry) or b"")
        raw["headers"]["identify_tag"] = "a"
        raw.update({"body": "W10=", "properties": {"delivery_tag": "x"}, "content-type": "j"})
        bench.client.hset(bench.queue_key("deadm"), str(entry), json.dumps(raw))
    counts: list[int] = []
    callers = [
        threading.Thread(target=lambda: counts.append(letters(bench).requeue(None, None)))
        for _ in range(3)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sum(counts) == 400
    assert sorted(bench.node("n").drain_all()) == sorted(f"m-{n}" for n in range(400))
    assert leftovers(bench) == []


# Purge


def test_purged_letters_are_gone_and_others_stay(bench: Bench) -> None:
    bench.lead()
    bury_tasks(bench, "a", 1, 2)
    bury_tasks(bench, "b", 1, 2)
    tell_all(bench)
    dead = letters(bench)
    assert dead.purge(None, "a") == 2
    (first, second) = entries(bench)
    assert dead.purge([second], None) == 1
    assert entries(bench) == [first]
    assert dead.purge(None, None) == 1
    assert leftovers(bench) == []


def test_a_letter_whose_caller_was_not_told_is_not_purged(bench: Bench) -> None:
    bench.lead()
    bury_tasks(bench, "a", 1, 2)
    first, second = entries(bench)
    bench.scripts.told("q", bench.fence, [first])
    assert letters(bench).purge(None, None) == 1
    assert entries(bench) == [second]
    assert [entry for entry, _, _ in bench.scripts.untold("q", 10)] == [second]


# on_failure


def test_by_default_a_failed_task_is_settled_and_nothing_is_buried(bench: Bench) -> None:
    node = bench.opening(1, 2)
    assert fail(node.take()) == "held"
    assert node.drain_all() == ["a-2"]
    assert leftovers(bench) == []


@pytest.mark.parametrize("policy", [BLOCK, PARK])
@pytest.mark.parametrize("depth, ordered", [(1, 0), (2, 0), (2, 60_000)])
def test_a_failed_task_halts_its_tag_and_no_other(
    bench: Bench, policy: int, depth: int, ordered: int
) -> None:
    bench.lead(failure=policy, ordered=ordered)
    node = bench.node("n", depth=depth)
    bench.send("a", 1, 2, 3)
    bench.send("b", 1)
    bench.admit_all()
    first = node.take()
    behind = node.receive() if depth == 2 else None
    assert fail(first) == "halted"
    assert first.settle("failed", "x", "y") == "halted", "a repeat gets the same answer"
    assert behind is None or behind.start() < 0, "what was on its way behind it is given back"
    bench.send("a", 4)
    bench.admit_all()
    bench.promote()
    assert node.drain_all() == ["b-1"]
    (letter,) = ledger(bench).dead_letters(QUEUE, 10, 0, None)
    assert (letter.tag, letter.reason, letter.attempts) == ("a", "ValueError: no", 1)
    assert letter.traceback == "Traceback: here" and b'"a-1"' in letter.message
    assert bench.scripts.untold("q", 10) == [], "its caller knows"
    (record,) = tags([(ledger(bench), QUEUE)], 10)
    word = "block" if policy == BLOCK else "park"
    assert (record.tag, record.waiting, record.halted) == ("a", 3, (f"{word}:{letter.entry}",))
    assert ledger(bench).stats(QUEUE).halted_tags == 1
    assert bench.promote()[1] == -1, "a leader does not wake up for it"


def halted(bench: Bench, policy: int) -> int:
    """A halted tag a with two more tasks; the entry that halts it."""
    bench.lead(failure=policy)
    node = bench.node("failing")
    bench.send("a", 1, 2, 3)
    bench.admit_all()
    assert fail(node.take()) == "halted"
    bench.scripts.leave("failing")
    return entries(bench)[0]


def test_a_blocked_tag_goes_on_with_its_failed_task_when_that_is_requeued(bench: Bench) -> None:
    halted(bench, BLOCK)
    node = bench.node("n")
    assert letters(bench).requeue(None, "a") == 1
    assert node.drain_all() == ["a-1", "a-2", "a-3"]
    assert leftovers(bench) == []


def test_a_blocked_tag_goes_on_without_its_failed_task_when_that_is_purged(bench: Bench) -> None:
    halted(bench, BLOCK)
    node = bench.node("n")
    assert letters(bench).purge(None, "a") == 1
    assert node.drain_all() == ["a-2", "a-3"]
    assert leftovers(bench) == []


def test_a_blocked_tag_can_be_resumed_past_its_failed_task(bench: Bench) -> None:
    entry = halted(bench, BLOCK)
    node = bench.node("n")
    assert bench.scripts.resume_tag("q", "a")
    assert not bench.scripts.resume_tag("q", "a"), "a repeat changes nothing"
    assert node.drain_all() == ["a-2", "a-3"]
    assert entries(bench) == [entry]
    assert letters(bench).requeue(None, None) == 1
    assert node.drain_all() == ["a-1"]
    assert leftovers(bench) == []


@pytest.mark.parametrize("treatment", ["requeue", "purge"])
def test_a_parked_tag_waits_for_its_resumption_whatever_becomes_of_its_failed_task(
    bench: Bench, treatment: str
) -> None:
    halted(bench, PARK)
    node = bench.node("n")
    assert getattr(letters(bench), treatment)(None, None) == 1
    bench.promote()
    assert node.receive() is None
    assert bench.scripts.resume_tag("q", "a")
    assert node.drain_all() == (["a-1"] if treatment == "requeue" else []) + ["a-2", "a-3"]
    assert leftovers(bench) == []


def test_other_letters_of_a_blocked_tag_do_not_unblock_it(bench: Bench) -> None:
    bench.lead()
    bury_tasks(bench, "a", 0)
    tell_all(bench)
    (old,) = entries(bench)
    halted(bench, BLOCK)
    node = bench.node("n")
    assert letters(bench).requeue([old], None) == 1
    assert node.receive() is None
    assert letters(bench).requeue(None, None) == 1
    assert node.drain_all() == ["a-1", "a-2", "a-3", "a-0"]


def test_with_more_concurrency_a_tag_is_blocked_until_each_of_its_failures_is_dealt_with(
    bench: Bench,
) -> None:
    node = bench.opening(1, 2, 3, 4, 5, slots=3, concurrency=3, failure=BLOCK)
    running = []
    for _ in range(3):
        running.append(node.take())
        running[-1].start()
    for copy in running[:2]:
        assert copy.settle("failed", "no", "") == "halted"
    assert running[2].settle() == "halted"
    assert node.receive() is None
    first, second = entries(bench)
    assert letters(bench).requeue([second], None) == 1
    assert node.receive() is None
    assert letters(bench).requeue([first], None) == 1
    assert node.drain_all() == ["a-1", "a-2", "a-4", "a-5"]
    assert leftovers(bench) == []


def settle_call(copy: Copy) -> None:
    s = copy.stamp
    end = (s.entry, "failed", ("no", ""))
    copy.node.bench.scripts.settle_batch(s.incarnation, s.slot, s.entry, s.epoch, copy.token, [end])


def miss_beats(copy: Copy) -> None:
    """Two heartbeats that do not hold it, a tenth of the timeout apart."""
    bench = copy.node.bench
    bench.client.hset(bench.scripts.keys.worker(copy.node.name, "info"), "timeout", 1)
    copy.node.beat(1)
    time.sleep(0.005)
    copy.node.beat(2)


def rescue(copy: Copy) -> None:
    bench = copy.node.bench
    bench.overdue(copy.node.name)
    while bench.scripts.rescue("q", bench.fence, 1)[0] == 1:
        pass


FAILURES: dict[str, Callable[[Copy], Any]] = {
    "failed": lambda copy: copy.settle("failed", "no", ""),
    "buried": lambda copy: copy.settle("bury", "no"),
    "failed in a call": settle_call,
    "lost process": Copy.lost,
    "new process": lambda copy: copy.node.bench.scripts.process_up("n", copy.stamp.slot),
    "missed": miss_beats,
    "lost worker": rescue,
    "left": lambda copy: copy.node.bench.scripts.leave("n"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_takes_back_what_is_dispatched_to_other_slots_of_its_tag(
    bench: Bench, failure: str
) -> None:
    bench.lead(concurrency=2, failure=BLOCK, deliveries=1)
    node = bench.node("n")
    bench.send("a", 1, 2, 3)
    bench.admit_all()
    first = node.take()
    assert first.start() == 1
    other = bench.node("other")
    second = other.take()
    bench.send("b", 1)
    bench.admit_all()
    FAILURES[failure](first)
    assert second.start() != 1, "its tag waits for an operator"
    assert bench.backlog("a") == [2, 3]
    assert [*node.drain_all(), *other.drain_all()] == ["b-1"], "the slot is free for others"
    assert OperatorScripts(bench.client, bench.scripts.keys).resume_tag("q", "a")
    assert [copy.id for n in (node, other) if (copy := n.receive())] == ["a-2"]


def test_a_lost_worker_whose_task_halts_its_tag_is_given_nothing_in_its_other_slots(
    bench: Bench,
) -> None:
    node = bench.opening(1, 2, 3, slots=2, concurrency=2, failure=BLOCK, deliveries=1)
    first = node.take()
    first.start()
    node.take()
    bench.send("b", 1)
    bench.admit_all()
    rescue(first)
    assert bench.client.hget(bench.queue_key("c"), "leases") == b"2", "b was not given to it"
    assert bench.backlog("a") == [2, 3] and bench.backlog("b") == [4]
    assert not bench.client.exists(bench.queue_key("held"), bench.queue_key("idle"))
    assert bench.node("alive").drain_all() == ["b-1"]


def test_a_task_that_is_buried_for_another_reason_halts_its_tag_too(bench: Bench) -> None:
    bench.lead(failure=BLOCK, deliveries=1)
    node = bench.node("n", depth=2)
    bench.send("a", 1, 2)
    bench.send("b", 1, 2)
    bench.admit_all()
    lost = node.take()
    lost.start()
    assert lost.lost() == "buried"
    undecodable = next(copy for copy in iter(node.receive, None) if copy.tag == "b")
    assert undecodable.discard("bury", "not readable") == 1
    bench.send(1.5, 1)
    bench.admit_all()
    assert all(copy.start() < 0 for copy in iter(node.receive, None)), "only stale copies"
    assert {r.tag: r.waiting for r in tags([(ledger(bench), QUEUE)], 10)} == {"a": 1, "b": 1}


def test_a_task_that_ran_into_its_time_limit_halts_its_tag(bench: Bench) -> None:
    node = bench.opening(1, 2, failure=BLOCK)
    copy = node.take()
    copy.start()
    s = copy.stamp
    assert bench.scripts.finish(s.incarnation, s.slot, s.entry, s.epoch, "failed")
    assert bench.scripts.process_up("n", 0)
    assert node.receive() is None
    assert "time limit" in bench.dead()[0]["reason"]
    bench.lead(failure=0)
    letters(bench).requeue(None, None)
    again = node.take()
    again.start()
    s = again.stamp
    assert bench.scripts.finish(s.incarnation, s.slot, s.entry, s.epoch, "failed")
    assert bench.scripts.process_up("n", 0)
    assert node.drain_all() == ["a-2"], "without the policy it is settled"


def test_a_halted_tag_stays_so_when_the_policy_is_given_up_until_it_is_resumed(
    bench: Bench,
) -> None:
    halted(bench, PARK)
    bench.lead(failure=0)
    node = bench.node("n")
    assert node.receive() is None
    assert bench.scripts.resume_tag("q", "a")
    assert node.drain_all() == ["a-2", "a-3"]
    bench.lead(failure=0)
    assert not bench.client.hexists(bench.queue_key("conf"), "halts"), "and costs nothing any more"


def test_an_ordered_retry_of_another_lease_does_not_end_a_halt(bench: Bench) -> None:
    node = bench.opening(1, 2, 3, slots=2, concurrency=2, failure=BLOCK, ordered=60_000)
    failing = node.take()
    failing.start()
    retrying = node.take()
    retrying.start()
    assert failing.settle("failed", "no", "") == "halted"
    due = bench.now_ms() + 1
    assert retrying.settle("done", bench.retry_of(retrying), due) == "halted"
    wait_until(lambda: bench.now_ms() > due, what="the retry's time")
    assert bench.promote()[1] < 0, "nothing is due"
    assert node.receive() is None
    letters(bench).requeue(None, None)
    assert node.drain_all() == ["a-1", "a-2", "a-3"]


def test_evacuation_ends_a_halt(bench: Bench) -> None:
    halted(bench, BLOCK)
    assert bench.scripts.evacuate("q", bench.pending, [2, 3]) == (0, 0, 2, True)
    assert not {"halted", "hold", "ring", "m"} & set(leftovers(bench))
