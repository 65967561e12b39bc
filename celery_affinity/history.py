"""The judge: what tasks wrote down while they ran, and which promises that breaks.

Every task appends one line at its start and one at its end, each with a single write to a file
opened with O_APPEND, so that the history depends on neither Redis nor Celery. Times are
CLOCK_MONOTONIC, which all processes of a machine share. A recorded interval lies inside of the
real one: an overlap that is found did happen.

Does not: know of Celery or Redis. celery_affinity/testing.py writes histories of a user's tasks.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from celery_affinity.judge import (
    Kind,
    Place,
    Run,
    Violation,
    disorder,
    doubles,
    falling_epochs,
    overlaps,
)

__all__ = (
    "HISTORY_VARIABLE",
    "Expected",
    "History",
    "Kind",
    "Place",
    "Run",
    "Violation",
    "count_kinds",
    "record",
)

#: Names the file that `record` appends to.
HISTORY_VARIABLE = "AFFINITY_HISTORY"

Expected = Mapping[str, Sequence[int]] | Iterable[tuple[str, int]]


def record(event: str, *, path: str | Path | None = None, **fields: Any) -> None:
    """Append one event: 'submit', 'start' or 'end'.

    Arguments:
        event: What happened.
        path: The history; default: where AFFINITY_HISTORY points.
        fields: tag, seq, and as far as known task_id, epoch, attempt, retries, worker, outcome.
    """
    line = {
        "event": event,
        **fields,
        "pid": os.getpid(),
        "thread": threading.get_ident(),
        "t": time.monotonic_ns(),
    }
    data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
    file = os.open(
        path or os.environ[HISTORY_VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644
    )
    try:
        written = os.write(file, data)
    finally:
        os.close(file)
    if written != len(data):
        raise OSError(f"only {written} of {len(data)} bytes were recorded")


@dataclass
class History:
    """A history, and its judgement.

    Does not: know of queues. Where two affinity queues share a tag, give it two names.
    """

    #: In the order of their starts.
    runs: list[Run] = field(default_factory=list)
    #: (tag, seq) of 'submit' events -> time, in the order of submission.
    submits: dict[tuple[str, int], int] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read a history file; one that does not exist is empty."""
        if not Path(path).exists():
            return cls()
        text = Path(path).read_bytes()
        # A line that is just being written may be there in part.
        return cls.parse(text[: text.rfind(b"\n") + 1].splitlines())

    @classmethod
    def parse(cls, lines: Iterable[str | bytes]) -> History:
        """Pair starts and ends.

        Raises:
            ValueError: For a line that is no event, or an end without its start.
        """
        events = [json.loads(line) for line in lines]
        history = cls()
        opened: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
        for event in sorted(events, key=lambda event: int(event["t"])):
            kind, tag, seq = event["event"], event["tag"], event["seq"]
            key = (tag, seq, event.get("task_id"), event["pid"], event["thread"])
            if kind == "submit":
                history.submits.setdefault((tag, seq), event["t"])
            elif kind == "start":
                run = _run(event)
                history.runs.append(run)
                opened[key].append(run)
            elif kind == "end" and opened[key]:
                run = opened[key].pop()
                run.end, run.outcome = event["t"], event.get("outcome", "ok")
            else:
                raise ValueError(
                    f"{kind} of {tag!r} {seq} has no start or is no known event: {event}"
                )
        return history

    def by_tag(self) -> dict[str, list[Run]]:
        """The runs of each tag, in the order of their starts."""
        tags: dict[str, list[Run]] = defaultdict(list)
        for run in self.runs:
            tags[run.tag].append(run)
        return dict(tags)

    def submitted(self) -> dict[str, list[int]]:
        """What 'submit' events say was sent, by tag, in order."""
        return _expected(list(self.submits))

    def violations(
        self,
        expected: Expected | None = None,
        batch_limit: int | None = None,
        allow_rerun: bool = False,
        concurrency: int | Mapping[str, int] = 1,
        lease_within: Place = "process",
    ) -> list[Violation]:
        """Every promise that this history breaks; empty if none.

        Arguments:
            expected: What was sent, by tag in order, or as (tag, seq) pairs in order; default:
                the recorded 'submit' events.
            batch_limit: Longest lease, where other tags always waited; None: any.
            allow_rerun: Whether processes were killed: a task may run again, and one without an
                end is over when its tag starts next.
            concurrency: Tasks of a tag that may run at once; a mapping by tag with a "default".
            lease_within: How narrow a place a lease must stay in.
        """
        sent = self.submitted() if expected is None else _expected(expected)
        runs = self.by_tag()
        found = list(self._losses(sent))
        for tag, of_tag in runs.items():
            limit = (
                concurrency
                if isinstance(concurrency, int)
                else concurrency.get(tag, concurrency.get("default", 1))
            )
            found += doubles(of_tag, allow_rerun)
            found += overlaps(of_tag, limit, allow_rerun)
            found += disorder(of_tag, sent.get(tag, []), limit)
            if limit == 1:
                found += falling_epochs(of_tag)
        found += self._long_leases(batch_limit)
        found += self._moved_leases(lease_within)
        return found

    def assert_lawful(self, expected: Expected | None = None, **options: Any) -> None:
        """Fail with the first of the `violations`, if there are any; arguments as there."""
        found = self.violations(expected, **options)
        if found:
            counts = ", ".join(f"{n} {kind}" for kind, n in count_kinds(found).most_common())
            lines = "\n  ".join(str(violation) for violation in found[:20])
            raise AssertionError(f"{len(self.runs)} runs broke promises: {counts}\n  {lines}")

    def lease_lengths(self) -> dict[tuple[str, int], int]:
        """Tasks ended under each lease, in the order of the leases' first starts."""
        lengths = {(run.tag, run.epoch): 0 for run in self.runs if run.epoch is not None}
        for run in self.runs:
            if run.epoch is not None and run.end is not None:
                lengths[run.tag, run.epoch] += 1
        return lengths

    def lease_processes(
        self, within: Place = "thread"
    ) -> dict[tuple[str, int], set[tuple[Any, ...]]]:
        """The (worker, pid, thread) in which tasks of each lease started."""
        places: dict[tuple[str, int], set[tuple[Any, ...]]] = defaultdict(set)
        for run in self.runs:
            if run.epoch is not None:
                places[run.tag, run.epoch].add(run.place(within))
        return dict(places)

    def owner_switches(self, within: Place = "process") -> dict[str, int]:
        """How often each tag's next task started in another place than the one before."""
        return {
            tag: sum(a.place(within) != b.place(within) for a, b in pairwise(runs))
            for tag, runs in self.by_tag().items()
        }

    def waits(self) -> dict[str, list[float]]:
        """Seconds from the recorded submit to the first start of each task, by tag."""
        firsts: dict[tuple[str, int], Run] = {}
        for run in self.runs:
            firsts.setdefault((run.tag, run.seq), run)
        waits: dict[str, list[float]] = defaultdict(list)
        for (tag, seq), run in firsts.items():
            if (tag, seq) in self.submits:
                waits[tag].append((run.start - self.submits[tag, seq]) / 1e9)
        return dict(waits)

    def reruns(self) -> int:
        """Starts of a task beyond its first, its own retries not counted."""
        return len(self.runs) - len({(run.tag, run.seq, run.retries) for run in self.runs})

    def _losses(self, sent: Mapping[str, Sequence[int]]) -> Iterator[Violation]:
        done = {(run.tag, run.seq) for run in self.runs if run.is_done}
        started = {(run.tag, run.seq) for run in self.runs}
        for tag, seqs in sent.items():
            for seq in seqs:
                if (tag, seq) not in done:
                    what = "started and was not done" if (tag, seq) in started else "never started"
                    yield Violation("loss", tag, f"seq {seq} {what}")

    def _long_leases(self, batch_limit: int | None) -> Iterator[Violation]:
        for (tag, epoch), length in self.lease_lengths().items():
            if batch_limit is not None and length > batch_limit:
                yield Violation(
                    "batch", tag, f"epoch {epoch} has {length} tasks, not {batch_limit}"
                )

    def _moved_leases(self, within: Place) -> Iterator[Violation]:
        for (tag, epoch), places in self.lease_processes(within).items():
            if len({worker for worker, *_ in places}) > 1:
                yield Violation("owner", tag, f"epoch {epoch} on several workers: {sorted(places)}")
            elif len(places) > 1:
                yield Violation(
                    "process", tag, f"epoch {epoch} in several places: {sorted(places)}"
                )


def count_kinds(violations: Iterable[Violation]) -> Counter[str]:
    """How many violations of each kind."""
    return Counter(violation.kind for violation in violations)


def _run(event: Mapping[str, Any]) -> Run:
    return Run(
        tag=event["tag"],
        seq=event["seq"],
        task_id=event.get("task_id", ""),
        start=event["t"],
        worker=event.get("worker", ""),
        pid=event["pid"],
        thread=event["thread"],
        epoch=event.get("epoch"),
        attempt=event.get("attempt"),
        retries=event.get("retries") or 0,
    )


def _expected(expected: Expected) -> dict[str, list[int]]:
    if isinstance(expected, Mapping):
        return {tag: list(seqs) for tag, seqs in expected.items()}
    tags: dict[str, list[int]] = defaultdict(list)
    for tag, seq in expected:
        tags[tag].append(seq)
    return dict(tags)
