"""Going back to plain Celery: what waits in the ledger returns to the pending queue.

Crash windows: after any of its steps the queue stays stopped and every message is in exactly one
of ledger, stage and pending queue; a repeat goes on
(test_an_evacuation_cut_off_half_way_is_finished_by_the_next).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from celery_affinity.scripts import Scripts
from celery_affinity.types import EvacuationRecord

__all__ = ("evacuate", "resume")

#: Entries that one script moves at most: a few milliseconds of Redis.
BATCH = 200
#: Seconds between two looks at tasks that still run.
PAUSE_SECONDS = 0.1


def evacuate(
    scripts: Scripts,
    state: str,
    pending: str,
    waiting: Callable[[], list[int]],
    timeout_seconds: float,
) -> EvacuationRecord:
    """Stop dispatch, wait for running tasks, write the rest back in the order of admission.

    Arguments:
        pending: The pending queue's main list.
        waiting: Reads the entries that are in the ledger.
        timeout_seconds: How long to wait for running tasks.
    """
    deadline = time.monotonic() + timeout_seconds
    moved = 0
    entries: list[int] = []
    while True:
        held, left, now_moved, done = scripts.evacuate(state, pending, entries[:BATCH])
        moved += now_moved
        if done or (held and time.monotonic() > deadline):
            return EvacuationRecord(moved=moved, running=held, waiting=left, done=done)
        if held:
            time.sleep(PAUSE_SECONDS)
        entries = [] if held else entries[BATCH:] or sorted(waiting())


def resume(scripts: Scripts, state: str, pending: str, waiting: Callable[[], list[int]]) -> None:
    """Let the queue work again, after an evacuation or in the middle of one."""
    while not scripts.resume(state):
        evacuate(scripts, state, pending, waiting, 0.0)
