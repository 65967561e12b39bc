"""Going back to plain Celery: what waits in the ledger returns to the pending queue.

Of a queue with several shards the first one is stopped first and resumed last: its leader takes
messages in for all of them, and looks at its own ledger to see whether it may.

Crash windows: after any of its steps the queue stays stopped and every message is in exactly one
of ledger, stage and pending queue; a repeat goes on
(test_an_evacuation_cut_off_half_way_is_finished_by_the_next).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from celery_affinity.scripts import Scripts
from celery_affinity.types import EvacuationRecord

__all__ = ("Part", "evacuate", "resume")

#: Entries that one script moves at most: a few milliseconds of Redis.
BATCH = 200
#: Seconds between two looks at tasks that still run.
PAUSE_SECONDS = 0.1


class Part(NamedTuple):
    """A shard of the queue; of a queue with one, all of it."""

    scripts: Scripts
    state: str
    #: The main list of the pending queue, or what stands for it in that ledger.
    pending: str
    #: Reads the entries that are in the ledger.
    waiting: Callable[[], list[int]]


def evacuate(parts: Sequence[Part], timeout_seconds: float) -> EvacuationRecord:
    """Stop dispatch, wait for running tasks, write the rest back in the order of admission.

    Nothing is moved before nothing runs in any part.

    Arguments:
        parts: The first shard's first.
        timeout_seconds: How long to wait for running tasks.
    """
    deadline = time.monotonic() + timeout_seconds
    moved = 0
    while True:
        stopped = [part.scripts.evacuate(part.state, part.pending, []) for part in parts]
        running, left = sum(one[0] for one in stopped), sum(one[1] for one in stopped)
        if not running:
            ends = [
                (0, True) if one[3] else _move(part)
                for part, one in zip(parts, stopped, strict=True)
            ]
            moved += sum(count for count, _ in ends)
            if all(done for _, done in ends):
                return EvacuationRecord(moved=moved, running=0, waiting=0, done=True)
        elif time.monotonic() > deadline:
            return EvacuationRecord(moved=moved, running=running, waiting=left, done=False)
        else:
            time.sleep(PAUSE_SECONDS)


def _move(part: Part) -> tuple[int, bool]:
    """Write back what waits in a part. Returns how many, and whether that was all: not so if
    somebody has resumed it meanwhile, and tasks run.
    """
    moved = 0
    entries: list[int] = []
    while True:
        entries = entries[BATCH:] or sorted(part.waiting())
        held, _, now, done = part.scripts.evacuate(part.state, part.pending, entries[:BATCH])
        moved += now
        if done or held:
            return moved, done


def resume(parts: Sequence[Part]) -> None:
    """Let the queue work again, after an evacuation or in the middle of one.

    Arguments:
        parts: The first shard's first.
    """
    for part in reversed(parts):
        while not part.scripts.resume(part.state):
            _move(part)
