"""What a run is, and what of a tag's runs breaks a promise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

__all__ = (
    "Kind",
    "Place",
    "Run",
    "Violation",
    "disorder",
    "doubles",
    "falling_epochs",
    "overlaps",
)

Kind = Literal["loss", "doubled", "overlap", "order", "batch", "epoch", "owner", "process"]
#: How narrow a place one lease must stay in. A thread is a greenlet on gevent.
Place = Literal["worker", "process", "thread"]


@dataclass(frozen=True)
class Violation:
    """One broken promise."""

    kind: Kind
    tag: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind} of {self.tag!r}: {self.detail}"


@dataclass
class Run:
    """One execution of a task; `end` is None if its process did not live to record it."""

    tag: str
    seq: int
    task_id: str
    start: int
    worker: str
    pid: int
    thread: int
    epoch: int | None = None
    attempt: int | None = None
    retries: int = 0
    end: int | None = None
    #: "ok", "failed"; "retry" if the task asked to be run again; "aborted" if it was cut short.
    outcome: str = "ok"

    @property
    def is_done(self) -> bool:
        """Whether the task's work is over with this run, for good or ill."""
        return self.end is not None and self.outcome in ("ok", "failed")

    def place(self, within: Place) -> tuple[Any, ...]:
        """Where it ran."""
        full = (self.worker, self.pid, self.thread)
        return full[: {"worker": 1, "process": 2, "thread": 3}[within]]

    def __str__(self) -> str:
        where = f"{self.worker} pid {self.pid}"
        return f"seq {self.seq} (epoch {self.epoch}, attempt {self.attempt}, on {where})"


def doubles(runs: Sequence[Run], allow_rerun: bool) -> Iterator[Violation]:
    """A task ends once for each of its retries."""
    ends = Counter(
        (run.seq, run.retries) for run in runs if run.end is not None and run.outcome != "aborted"
    )
    for (seq, retries), times in ends.items():
        if times > 1 and not allow_rerun:
            yield Violation(
                "doubled", runs[0].tag, f"seq {seq} (retry {retries}) ended {times} times"
            )


def overlaps(runs: Sequence[Run], limit: int, allow_rerun: bool) -> Iterator[Violation]:
    """No more than the limit of a tag's tasks run at once."""
    running: list[Run] = []
    for run in runs:
        running = [
            other
            for other in running
            if (not allow_rerun if other.end is None else other.end > run.start)
        ]
        if len(running) >= limit:
            beside = " and ".join(str(other) for other in running)
            yield Violation("overlap", run.tag, f"{run} started beside {beside}")
        running.append(run)


def disorder(runs: Sequence[Run], sent: Sequence[int], limit: int) -> Iterator[Violation]:
    """First starts must follow the order of submission.

    With a concurrency of one so must the starts of tasks that run again after a crash: they come
    from the head. A task's own retries may come at any place.
    """
    places = {seq: place for place, seq in enumerate(sent)}
    seen: set[int] = set()
    latest: Run | None = None
    for run in runs:
        again = run.seq in seen
        seen.add(run.seq)
        if run.retries or run.seq not in places or (again and limit > 1):
            continue
        if latest is not None and places[run.seq] < places[latest.seq]:
            word = "again " if again else ""
            yield Violation("order", run.tag, f"{run} started {word}after {latest}")
        else:
            latest = run


def falling_epochs(runs: Sequence[Run]) -> Iterator[Violation]:
    """Epochs never fall from one start to the next."""
    with_epoch = [run for run in runs if run.epoch is not None]
    for before, after in pairwise(with_epoch):
        if (after.epoch or 0) < (before.epoch or 0):
            yield Violation("epoch", after.tag, f"{after} started after {before}")
