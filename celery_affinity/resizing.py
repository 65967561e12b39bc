"""A prefork pool that grows and shrinks at its upper end, so that its slots stay 0 to n - 1.

The stock pool takes away whichever processes look idle to it: slots would have gaps, and a job on
its way into the pipe of such a process would be struck by its end. Here a pool that shrinks gives
up its highest slots; each of their processes ends when it has nothing to do any more, a busy one
after its task. The ledger is told by the node (reporter.py), which needs no order between the
two: what is dispatched to a slot that went is refused here and goes back to the head of its tag.

Builds on billiard's Pool and `AsynPool`; internals.py says which versions, and probes them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery.concurrency.asynpool import AsynPool

__all__ = ("ResizablePool", "call_after_resizing")

logger = logging.getLogger(__name__)


class ResizablePool(AsynPool):  # type: ignore[misc]
    """See above. `target` is the number of slots; retiring processes are not counted in it."""

    target: int
    #: With autoscale: the most slots. A process is started when its slot gets a job, so there may
    #: be none at all.
    most: Callable[[], int] | None = None
    _processes: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.target = self._processes

    def grow(self, n: int = 1) -> None:
        """Add `n` slots; a process that was about to retire stays instead."""
        self.target += n
        self._count()
        for _ in range(n):
            if self._putlock:
                self._putlock.grow()
        self.on_grow(n)
        self.maintain_pool()

    def shrink(self, n: int = 1) -> None:
        """Give up the `n` highest slots.

        Raises:
            ValueError: If no slot would be left.
        """
        if n > self.target - (0 if self.most else 1):
            raise ValueError(
                f"cannot shrink {self.target} pool processes by {n}: a worker of affinity queues "
                "keeps one; stop the worker, or cancel_consumer its queues"
            )
        self.target -= n
        for _ in range(n):
            if self._putlock:
                self._putlock.shrink()
        self.retire()

    def retire(self, done: int | None = None) -> None:
        """End the processes of slots that were given up, as far as they are idle.

        Arguments:
            done: A job that has just ended and is not taken off the books yet.
        """
        for proc in list(self._pool):
            if self._retires(proc) and self._is_idle(proc, done):
                proc.affinity_retired = True
                # It gets no job any more, also before its end is noticed.
                self._all_inqueues.discard(proc.inqW_fd)
                proc.terminate_controlled()
                logger.info(
                    "Pool process %d (slot %d) retires.",
                    proc.pid,
                    proc.index,
                    extra={"action": "retire", "slot": proc.index},
                )
        self._count()

    def _retires(self, proc: Any) -> bool:
        return proc.index >= self.target and not getattr(proc, "affinity_retired", False)

    def _is_idle(self, proc: Any, done: int | None) -> bool:
        fd = proc.inqW_fd
        if fd not in self._all_inqueues or self._fileno_to_inq.get(fd) is not proc:
            return False  # not up yet, or gone
        return fd not in self._active_writes and not any(
            number != done
            and not job.ready()
            and (proc in (job._write_to, job._scheduled_for) or proc.pid in job.worker_pids())
            for number, job in list(self._cache.items())
        )

    def _count(self) -> None:
        """How many processes billiard is to keep up: the slots', and those that still retire."""
        self._processes = self.target + sum(map(self._retires, self._pool))

    def _repopulate_pool(self, exitcodes: Any) -> None:
        self._count()
        super()._repopulate_pool(exitcodes)


def call_after_resizing(pool: Any, resized: Callable[[], None]) -> None:
    """Have `resized` called whenever the pool has been told to grow or shrink."""
    for name in ("grow", "shrink"):
        stock = getattr(pool, name, None)
        if stock is not None and not hasattr(stock, "celery_affinity"):
            setattr(pool, name, _then(stock, resized))


def _then(stock: Callable[..., Any], resized: Callable[[], None]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return stock(*args, **kwargs)
        finally:
            resized()

    call.celery_affinity = True  # type: ignore[attr-defined]
    return call
