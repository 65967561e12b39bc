"""The judge of chaos convicts what is a violation, and excuses the declared limit only."""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import replace
from typing import Any

from celery_affinity.types import DeadLetter
from chaos.faults import Fault
from chaos.judge import judge_history, long_leases
from history import History

S = 1_000_000_000
#: Frozen from second 10 to second 20.
FROZEN = Fault("freeze_tree", "w1@test", 10.0, 20.0)


def history(*events: tuple[Any, ...]) -> History:
    """(event, second, tag, seq[, worker, epoch[, outcome]])."""
    lines = []
    for event, second, tag, seq, *rest in events:
        line = {"event": event, "t": int(second * S), "tag": tag, "seq": seq, "pid": 1, "thread": 1}
        if rest:
            line |= {"worker": rest[0], "epoch": rest[1], "pid": hash(rest[0]) % 1000}
        if len(rest) > 2:
            line["outcome"] = rest[2]
        lines.append(json.dumps(line))
    return History.parse(lines)


def moved_on() -> History:
    """A run in w1 over 9..21, whose task ran again in w2 over 15..16."""
    return history(
        ("submit", 1, "a", 0), ("start", 9, "a", 0, "w1@test", 1), ("start", 15, "a", 0, "w2@test", 2),
        ("end", 16, "a", 0, "w2@test", 2), ("end", 21, "a", 0, "w1@test", 1),
    )


def test_a_run_that_a_freeze_outlived_is_excused_if_its_task_ran_again_under_a_later_epoch() -> None:
    found, seen = judge_history(moved_on(), [FROZEN])
    assert not found
    assert seen["excused"] == 1


def test_the_same_overlap_without_a_freeze_of_that_worker_in_that_time_is_a_violation() -> None:
    for faults in (
        [], [replace(FROZEN, target="w2@test")], [replace(FROZEN, verb="kill_redis")],
        [replace(FROZEN, end=11.0)], [replace(FROZEN, begin=22.0, end=30.0)],
    ):
        found, seen = judge_history(moved_on(), faults)
        assert any(line.startswith("overlap") for line in found), (faults, found)
        assert not seen["excused"]


def late_run(start: float) -> History:
    """A run in w1 that starts then and ends at 24, whose task ran again in w2 before that."""
    return history(
        ("submit", 1, "a", 0), ("start", start, "a", 0, "w1@test", 1),
        ("start", 23, "a", 0, "w2@test", 2), ("end", 23.5, "a", 0, "w2@test", 2),
        ("end", 24, "a", 0, "w1@test", 1),
    )


def test_a_run_that_starts_when_half_of_the_lease_is_over_is_not_excused() -> None:
    cut = replace(FROZEN, verb="blackhole")
    for fault in (FROZEN, cut, replace(FROZEN, verb="freeze_parent")):
        assert not judge_history(late_run(11.4), [fault])[0], "half a lease from the last beat"
        for late in (12.1, 19.9, 20.6, 22.0):
            found, seen = judge_history(late_run(late), [fault])
            assert any(line.startswith("overlap") for line in found), (late, fault, found)
            assert not seen["excused"]


def test_only_of_a_process_that_was_frozen_itself_a_start_may_be_noted_when_it_wakes() -> None:
    assert not judge_history(late_run(20.2), [FROZEN])[0]
    for verb in ("blackhole", "drop_replies", "freeze_parent"):
        assert judge_history(late_run(20.2), [replace(FROZEN, verb=verb)])[0], verb


def test_a_freeze_excuses_no_loss() -> None:
    cut = history(("submit", 1, "a", 0), ("start", 9, "a", 0, "w1@test", 1))
    found, _ = judge_history(cut, [FROZEN])
    assert [line.split()[0] for line in found] == ["loss"]


def test_a_task_that_runs_again_after_its_end_needs_a_cause() -> None:
    twice = history(
        ("submit", 1, "a", 0), ("start", 2, "a", 0, "w1@test", 1), ("end", 3, "a", 0, "w1@test", 1),
        ("start", 6, "a", 0, "w2@test", 2), ("end", 7, "a", 0, "w2@test", 2),
    )
    assert [line.split()[0] for line in judge_history(twice, [])[0]] == ["doubled"]
    killed = Fault("kill_worker", "w1@test", 3.0, 4.0)
    assert not judge_history(twice, [killed])[0]
    assert judge_history(twice, [replace(killed, target="w2@test")])[0]
    assert judge_history(twice, [replace(killed, begin=30.0, end=31.0)])[0]


def test_a_dead_letter_excuses_a_loss_only_after_its_last_delivery() -> None:
    lost = history(("submit", 1, "a", 7), ("start", 9, "a", 7, "w1@test", 1))
    body = b64encode(json.dumps([["a", 7, 0], {}, {}]).encode()).decode()
    letter = DeadLetter(
        1, "a", "started 3 times without an end (max_deliveries)", 3, 0.0,
        json.dumps({"body": body}).encode(),
    )
    assert not judge_history(lost, [], [letter])[0]
    assert judge_history(lost, [], [replace(letter, attempts=2)])[0]
    assert judge_history(lost, [], [replace(letter, reason="no tag")])[0]


def test_a_lease_past_its_batch_is_convicted_where_many_other_tags_wait() -> None:
    def burst(tags: int, hot: int) -> History:
        events: list[tuple[Any, ...]] = [("submit", 1 + seq / 1000, "hot", seq) for seq in range(hot)]
        events += [("submit", 2, f"t{k}", seq) for k in range(tags) for seq in range(2)]
        # One task of the last tag shows that all before it are admitted.
        events += [("start", 3, f"t{tags - 1}", 1, "w2@test", 1), ("end", 3, f"t{tags - 1}", 1, "w2@test", 1)]
        for seq in range(hot):
            events += [(what, 4 + seq + more, "hot", seq, "w1@test", 2) for what, more in (("start", 0), ("end", 0.5))]
        return history(*events)

    assert not long_leases(burst(30, 10), 10)
    assert long_leases(burst(30, 11), 10)
    assert not long_leases(burst(5, 11), 10), "few tags: lost workers may hold them all"
