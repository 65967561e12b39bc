"""The judge finds every planted fault, and acquits what is lawful."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from history import History, count_kinds, record

SENT = {"a": [0, 1, 2]}


class Script:
    """Writes a synthetic history; the clock ticks with every event."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def _event(self, event: str, seq: int, tag: str, **fields: Any) -> Script:
        line = {
            "event": event,
            "tag": tag,
            "seq": seq,
            "task_id": f"{tag}-{seq}",
            "epoch": 1,
            "attempt": 1,
            "worker": "w1",
            "pid": 11,
            "thread": 1,
            "t": len(self.lines),
            **fields,
        }
        self.lines.append(json.dumps(line))
        return self

    def submit(self, seq: int, tag: str = "a", **fields: Any) -> Script:
        return self._event("submit", seq, tag, **fields)

    def start(self, seq: int, tag: str = "a", **fields: Any) -> Script:
        return self._event("start", seq, tag, **fields)

    def end(self, seq: int, tag: str = "a", **fields: Any) -> Script:
        return self._event("end", seq, tag, **fields)

    def run(self, seq: int, tag: str = "a", **fields: Any) -> Script:
        return self.start(seq, tag, **fields).end(seq, tag, **fields)

    def history(self) -> History:
        return History.parse(self.lines)


def kinds(history: History, expected: Any = SENT, **options: Any) -> dict[str, int]:
    return dict(count_kinds(history.violations(expected, **options)))


def test_a_lawful_history_has_no_violation() -> None:
    history = (
        Script()
        .run(0)
        .run(7, "b", epoch=2, worker="w2")
        .run(1)
        .run(2, epoch=3, worker="w2", pid=22)
        .history()
    )
    assert history.violations({**SENT, "b": [7]}, batch_limit=2) == []
    history.assert_lawful({**SENT, "b": [7]}, batch_limit=2)


def test_a_task_that_never_started_is_lost() -> None:
    [violation] = Script().run(0).run(2).history().violations(SENT)
    assert (violation.kind, violation.tag, violation.detail) == ("loss", "a", "seq 1 never started")


def test_a_task_that_never_ended_is_lost() -> None:
    assert kinds(Script().run(0).run(1).start(2).history()) == {"loss": 1}


def test_an_empty_history_has_lost_everything() -> None:
    assert kinds(History()) == {"loss": 3}


def test_a_tag_that_never_ran_is_lost() -> None:
    assert kinds(Script().run(0).run(1).run(2).history(), {**SENT, "b": [0]}) == {"loss": 1}


def test_a_task_that_only_asked_for_a_retry_is_lost() -> None:
    history = Script().start(0).end(0, outcome="retry").history()
    assert kinds(history, {"a": [0]}) == {"loss": 1}


def test_a_retry_that_ran_is_neither_lost_nor_doubled_nor_out_of_order() -> None:
    script = Script().start(0).end(0, outcome="retry").run(1).run(0, retries=1).run(2)
    assert kinds(script.history()) == {}


def test_an_aborted_run_does_not_do_its_task() -> None:
    script = Script().run(0).start(1).end(1, outcome="aborted").run(2)
    assert kinds(script.history()) == {"loss": 1}
    script = Script().run(0).start(1).end(1, outcome="aborted").run(1).run(2)
    assert kinds(script.history()) == {}


def test_a_failed_task_is_done() -> None:
    script = Script().run(0).start(1).end(1, outcome="failed").run(2)
    assert kinds(script.history()) == {}


def test_a_task_that_ended_twice_is_doubled() -> None:
    script = Script().run(0).run(1).run(1, attempt=2).run(2)
    assert kinds(script.history()) == {"doubled": 1}
    assert kinds(script.history(), allow_rerun=True) == {}
    assert script.history().reruns() == 1


def test_a_retry_that_ended_twice_is_doubled() -> None:
    script = Script().start(0).end(0, outcome="retry").run(0, retries=1).run(0, retries=1)
    assert kinds(script.history(), {"a": [0]}) == {"doubled": 1}


def test_two_tasks_of_a_tag_at_once_overlap() -> None:
    script = Script().start(0).start(1, pid=12).end(0).end(1, pid=12).run(2)
    assert kinds(script.history(), lease_within="worker") == {"overlap": 1}


def test_two_copies_of_one_task_overlap() -> None:
    script = Script().start(0).start(0, pid=12).end(0, pid=12).end(0).run(1).run(2)
    assert kinds(script.history(), lease_within="worker") == {"overlap": 1, "doubled": 1}


def test_tasks_of_different_tags_do_not_overlap() -> None:
    script = Script().start(0).start(0, "b").end(0).end(0, "b")
    assert kinds(script.history(), {"a": [0], "b": [0]}) == {}


def test_an_end_and_a_start_at_the_same_moment_do_not_overlap() -> None:
    script = Script().start(0, t=0).end(0, t=5).start(1, t=5).end(1, t=9)
    assert kinds(script.history(), {"a": [0, 1]}) == {}


def test_overlap_counts_from_the_concurrency_on() -> None:
    script = Script()
    for seq in range(3):
        script.start(seq, pid=seq, epoch=seq)
    for seq in range(3):
        script.end(seq, pid=seq)
    assert kinds(script.history(), concurrency=3) == {}
    assert kinds(script.history(), concurrency=2) == {"overlap": 1}
    assert kinds(script.history(), concurrency={"default": 1, "a": 3}) == {}
    assert kinds(script.history(), concurrency={"default": 1, "b": 3}) == {"overlap": 2}


def test_a_killed_run_is_over_at_the_next_start_only_where_processes_are_killed() -> None:
    script = Script().run(0).start(1).run(1, pid=12, epoch=2, attempt=2).run(2, pid=12, epoch=2)
    assert kinds(script.history(), allow_rerun=True) == {}
    assert kinds(script.history()) == {"overlap": 2}


def test_a_run_that_outlives_its_worker_overlaps_its_rerun() -> None:
    script = Script().start(0).start(0, pid=12, epoch=2).end(0, pid=12, epoch=2).end(0)
    assert kinds(script.history(), {"a": [0]}, allow_rerun=True) == {"overlap": 1}


def test_first_starts_that_are_swapped_are_out_of_order() -> None:
    [violation] = Script().run(0).run(2).run(1).history().violations(SENT)
    assert violation.kind == "order"
    assert violation.detail.startswith("seq 1 ")


def test_order_is_that_of_submission_not_of_numbers() -> None:
    script = Script().run(2).run(0).run(1)
    assert kinds(script.history(), [("a", 2), ("b", 9), ("a", 0), ("a", 1)]) == {"loss": 1}
    assert kinds(script.history()) == {"order": 2}


def test_a_lost_task_that_does_not_come_back_at_the_head_is_out_of_order() -> None:
    script = Script().run(0).start(1).run(2, epoch=2).run(1, epoch=2)
    assert kinds(script.history(), allow_rerun=True) == {"order": 1}


def test_a_rerun_may_be_overtaken_where_several_run_at_once() -> None:
    script = Script().run(0).start(1).run(2, pid=12, epoch=2).run(1, pid=12, epoch=2)
    assert kinds(script.history(), allow_rerun=True, concurrency=2) == {}


def test_a_lease_over_its_limit_is_a_long_batch() -> None:
    script = Script().run(0).run(1).run(2)
    assert kinds(script.history(), batch_limit=3) == {}
    assert kinds(script.history(), batch_limit=2) == {"batch": 1}
    assert script.history().lease_lengths() == {("a", 1): 3}


def test_epochs_of_a_tag_that_fall_are_found() -> None:
    script = Script().run(0, epoch=5).run(1, epoch=4, pid=12).run(2, epoch=4, pid=12)
    assert kinds(script.history()) == {"epoch": 1}


def test_an_owner_that_changes_within_an_epoch_is_found() -> None:
    script = Script().run(0).run(1, worker="w2").run(2, epoch=2, worker="w2")
    assert kinds(script.history()) == {"owner": 1}
    assert script.history().owner_switches() == {"a": 1}


def test_a_process_that_changes_within_an_epoch_is_found() -> None:
    script = Script().run(0).run(1, pid=12).run(2, pid=12)
    assert kinds(script.history()) == {"process": 1}
    assert kinds(script.history(), lease_within="worker") == {}
    assert script.history().lease_processes() == {("a", 1): {("w1", 11, 1), ("w1", 12, 1)}}


def test_a_thread_that_changes_within_an_epoch_is_found_on_request() -> None:
    script = Script().run(0).run(1, thread=2).run(2, thread=2)
    assert kinds(script.history()) == {}
    assert kinds(script.history(), lease_within="thread") == {"process": 1}


def test_runs_without_an_epoch_belong_to_no_lease() -> None:
    script = Script().run(0, epoch=None).run(1, epoch=None, worker="w2").run(2, epoch=None)
    assert kinds(script.history(), batch_limit=1) == {}
    assert script.history().lease_lengths() == {}
    assert script.history().owner_switches() == {"a": 2}


def test_submits_are_what_is_expected_and_what_waits_are_counted_from() -> None:
    script = Script().submit(0, t=0).submit(1, t=int(1e9)).start(0, t=int(2e9)).end(0, t=int(3e9))
    history = script.history()
    assert history.submitted() == {"a": [0, 1]}
    assert kinds(history, None) == {"loss": 1}
    assert history.waits() == {"a": [2.0]}


def test_the_verdict_names_what_was_broken() -> None:
    with pytest.raises(
        AssertionError, match="2 runs broke promises: 2 loss, 1 order\n  loss of 'a'"
    ):
        Script().run(2).run(1).history().assert_lawful({"a": [0, 1, 2, 3]})


def test_an_end_without_a_start_is_refused() -> None:
    with pytest.raises(ValueError, match="has no start"):
        Script().end(0).history()


def _record_some(path: Path, worker: int) -> None:
    for seq in range(200):
        for event in ("start", "end"):
            record(event, path=path, tag=f"{worker}", seq=seq, worker=f"w{worker}", pad="x" * 300)


def test_what_processes_record_at_once_is_read_back_whole(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    assert History.load(path).runs == []
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_record_some, args=(path, n)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    History.load(path).assert_lawful({str(n): range(200) for n in range(3)})
