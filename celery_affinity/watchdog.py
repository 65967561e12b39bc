"""Ends what runs when its lease may pass on without it: ``on_ledger_lost="stop"``.

A worker's leases last for `heartbeat_timeout` from its last heartbeat. The heartbeat's thread
writes down, in memory that the pool's processes share, when the last beat that was answered had
been sent; each process that runs dispatched tasks watches that time from a native thread of its
own. (A node that serves several shards beats in each; a task needs the lease of its own one only.)
So the task ends before its lease does when the worker is cut off from Redis, and also when its
parent is stopped or hangs while its pool processes run on.

Crash windows: none of its own; a killed process is one more lost process
(test_a_task_ends_before_its_lease_when_the_worker_is_cut_off,
test_a_task_ends_before_its_lease_when_its_parent_is_stopped).

Does not help where the thread cannot run: the whole process is frozen, or C code keeps the GIL.
"""

from __future__ import annotations

import logging
import mmap
import os
import signal
import struct
import time
from collections.abc import Callable, Mapping

__all__ = ("Lifeline", "Watchdog", "seconds")

logger = logging.getLogger(__name__)

_TIMES = struct.Struct("dd")


def seconds() -> float:
    """A clock that also runs while the machine is suspended, where there is one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Lifeline:
    """Two times that a worker's parent writes and its processes read: made before they fork."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _TIMES.size)
        self._beat, self._doom = seconds(), 0.0
        self._write()

    def answered(self, sent: float) -> None:
        """A heartbeat that was sent then was answered."""
        self._beat = sent
        self._write()

    def given_up(self) -> None:
        """The ledger has taken this worker's leases: what runs now runs without one."""
        self._doom = seconds()
        self._write()

    @property
    def times(self) -> tuple[float, float]:
        """When the last answered beat was sent; runs that began before the second must end."""
        beat, doom = _TIMES.unpack(self._memory[:])
        return float(beat), float(doom)

    def _write(self) -> None:
        self._memory[:] = _TIMES.pack(self._beat, self._doom)


class Watchdog:
    """One process' watch over the tasks that it runs.

    Arguments:
        lifelines: The worker's, by its name in each shard.
        began: For each running dispatched task that name, and when it began.
        lease_seconds: How long leases last after a heartbeat; half as long at least after a start
            (start.lua).
        end: Ends the process.
    """

    #: Share of the lease after which a task without heartbeats is ended.
    SHARE = 0.85

    def __init__(
        self,
        lifelines: Mapping[str, Lifeline],
        began: Callable[[], list[tuple[str, float]]],
        lease_seconds: float,
        end: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGKILL),
    ) -> None:
        self._lifelines = lifelines
        self._began = began
        self._lease_seconds = lease_seconds
        self._end = end

    def run(self) -> None:
        """Watch for as long as the process lives."""
        while True:
            time.sleep(self._lease_seconds / 20)
            self.look()

    def look(self) -> None:
        """End the process if a task runs that has no lease, or may have none soon."""
        runs: dict[str, list[float]] = {}
        for incarnation, began in self._began():
            runs.setdefault(incarnation, []).append(began)
        for incarnation, times in runs.items():
            self._look_at(self._lifelines[incarnation], times)

    def _look_at(self, lifeline: Lifeline, began: list[float]) -> None:
        beat, doom = lifeline.times
        silent = seconds() - max(beat, max(began) - self._lease_seconds / 2)
        if min(began) < doom:
            why = "the ledger does not know this worker's leases any more"
        elif silent > self._lease_seconds * self.SHARE:
            why = f"no heartbeat for {silent:.1f} s"
        else:
            return
        logger.critical(
            "Ending process %d: its task runs without a lease (%s, on_ledger_lost is 'stop').",
            os.getpid(),
            why,
            extra={"action": "ledger_lost", "silent_seconds": silent},
        )
        self._end()
