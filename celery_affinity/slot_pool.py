"""A prefork pool in which a slot is a process: all tasks of a lease run in one, caches stay warm.

Builds on `AsynPool` of Celery and `Pool` of billiard. `slots_are_processes` probes what it uses; a
Celery that differs gets its stock pool and a warning (versions: internals.py).
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

from billiard.pool import RUN
from billiard.process import current_process
from celery.concurrency import get_implementation
from celery.concurrency.asynpool import AsynPool
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.worker import state as worker_state

from celery_affinity.gate import REFUSED
from celery_affinity.message import STAMP_HEADER, Stamp
from celery_affinity.resizing import ResizablePool, call_after_resizing

__all__ = ("SlotTaskPool", "follow_size", "pool_process_index", "slots_are_processes")

logger = logging.getLogger(__name__)


class SlotPool(ResizablePool):
    """A prefork pool in which a dispatched job runs in the process of its slot.

    A job whose process is busy (or being replaced) waits in a buffer of its slot, outside of
    `outbound_buffer`: with jobs in there that no ready process may take, the event loop would
    spin. Ordinary jobs go the stock way, and have their turn after some dispatched ones.

    Celery's cold stop joins the pool inside its signal handler, so in the middle of whatever step
    the signal struck. A job half written then, or a result half read, would leave a process
    waiting for ever, or the parent for its own lock; `in_step` tells of such a step.
    """

    #: Dispatched jobs that a process runs in a row while ordinary ones wait.
    ROW = 10

    _quick_put: Any
    _put_back: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.slot_buffers: dict[int, deque[Any]] = {}
        self._rows: Counter[int] = Counter()
        #: Writes and reads under way (they can nest): not the moment to join the pool.
        self.in_step = 0
        super().__init__(*args, **kwargs)

    def create_result_handler(self) -> Any:
        """The stock one, its reading marked, and read on after the event loop was reset.

        A message that has not come whole is read on by the event loop, turn by turn. Where the
        broker connection is lost between two, the loop forgets it, and the stock pool takes the
        rest of the message for the next one: nothing of that process is ever heard again
        (test_a_connection_that_is_lost_while_a_result_is_read_does_not_wedge_the_slot).
        """
        handler = super().create_result_handler()
        receive = handler._recv_message
        begun: dict[int, tuple[Any, Callable[[], Any]]] = {}

        def marked(add_reader: Any, fd: int, *args: Any, **kwargs: Any) -> Iterator[None]:
            proc = self._fileno_to_outq.get(fd)  # a new process may have the file of an old one
            owner, turn = begun.pop(fd, (None, None))
            if turn is None or owner is not proc:
                turn = self._step(receive(add_reader, fd, *args, **kwargs).__next__)
            while True:
                try:
                    turn()
                except StopIteration:
                    begun.pop(fd, None)
                    return
                except BaseException:
                    begun.pop(fd, None)
                    raise
                begun[fd] = proc, turn
                yield

        handler._recv_message = marked
        return handler

    def _step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            self.in_step += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.in_step -= 1

        return step

    def _create_write_handlers(self, hub: Any, **kwargs: Any) -> None:
        super()._create_write_handlers(hub, **kwargs)
        stock_put, stock_put_back = self._quick_put, self._put_back
        hub.consolidate_callback = self._step(hub.consolidate_callback)
        self._schedule_writes = hub.consolidate_callback

        def put(tup: Any) -> None:
            stamp = _stamp_of(tup)
            stock_put(tup)
            if stamp is not None:
                job = self.outbound_buffer.pop()
                job.affinity_stamp = stamp
                self.slot_buffers.setdefault(stamp.slot, deque()).append(job)
                self._feed(stamp.slot)

        def put_back(job: Any) -> None:
            stock_put_back(job)
            stamp = getattr(job, "affinity_stamp", None)
            if stamp is not None and self.outbound_buffer and self.outbound_buffer[0] is job:
                self.outbound_buffer.popleft()
                waiting = self.slot_buffers.setdefault(stamp.slot, deque())
                # A process that is gone is met more than once, by a write and by the timer.
                if job not in waiting:
                    waiting.appendleft(job)

        self._quick_put = put
        self._put_back = put_back

    def _feed(self, slot: int) -> None:
        """Write the slot's next job to its process, if that is up and idle."""
        if worker_state.should_stop is not None or worker_state.should_terminate is not None:
            return  # the drain gives it back
        waiting = self.slot_buffers.get(slot)
        if waiting and slot >= self.target:
            if self.most is None or slot >= self.most():
                self._refuse(slot, lambda job: True)
                return
            self.grow(slot + 1 - self.target)
        while waiting and (waiting[0]._accepted or _is_revoked(waiting[0])):
            job = waiting.popleft()
            if not job._accepted:  # else a process has it, whose answer has to find it
                job.discard()
        if not waiting:
            return
        proc = next((p for p in self._pool if p.index == slot), None)
        fd = proc and proc.inqW_fd
        if proc is None or fd not in self._all_inqueues or self._fileno_to_inq.get(fd) is not proc:
            return
        if fd in self._busy_workers or fd in self._active_writes:
            return
        if self.outbound_buffer and self._rows[slot] >= self.ROW:
            self._rows[slot] = 0
        else:
            self._rows[slot] += 1
            self.outbound_buffer.appendleft(waiting.popleft())
        self._schedule_writes([fd])

    def on_job_ready(self, job: Any, i: Any, obj: Any, inqW_fd: int) -> None:
        """A process has finished a job: its slot's next one follows."""
        super().on_job_ready(job, i, obj, inqW_fd)
        self.retire(done=job)
        proc = self._fileno_to_inq.get(inqW_fd)
        if proc is not None and self.slot_buffers.get(proc.index):
            self._feed(proc.index)

    def _event_process_exit(self, hub: Any, proc: Any) -> None:
        """A process' sentinel is readable: it is ending, or has ended.

        The stock pool looks once, and where the process cannot be reaped yet, again by its timer,
        up to 5 s later: so long the tag of its task would wait.
        """
        super()._event_process_exit(hub, proc)
        self._reap_soon(hub, proc, 100)

    def _reap_soon(self, hub: Any, proc: Any, tries: int) -> None:
        if proc in self._pool and tries and self._state == RUN:
            hub.call_later(0.02, self._reap, hub, proc, tries - 1)

    def _reap(self, hub: Any, proc: Any, tries: int) -> None:
        self.maintain_pool()
        self._reap_soon(hub, proc, tries)

    def on_process_alive(self, pid: int) -> None:
        """A new process is up and takes over the jobs that wait for its slot."""
        super().on_process_alive(pid)
        self.retire()
        proc = next((p for p in self._pool if p.pid == pid), None)
        if proc is not None:
            self._feed(proc.index)

    def on_job_process_lost(self, job: Any, pid: int, exitcode: int) -> None:
        """The process of a running job is gone, and the lease with it: so is what waits under it.

        (Had it settled just before, what waits is missed by the heartbeat and sent again.)
        """
        super().on_job_process_lost(job, pid, exitcode)
        stamp = getattr(job, "affinity_stamp", None)
        if stamp is not None:
            self._refuse(stamp.slot, lambda other: other.affinity_stamp.epoch == stamp.epoch)

    def _refuse(self, slot: int, which: Callable[[Any], bool]) -> None:
        """Answer to waiting jobs what their gate would."""
        for job in list(self.slot_buffers.get(slot, ())):
            if which(job) and not job._accepted:
                self.slot_buffers[slot].remove(job)
                job.discard()
                job._set(0, (True, (0, REFUSED, 0.0)))

    def flush(self) -> None:
        """The broker connection is gone, or the worker stops: forget what no process has.

        The stock pool forgets every job that no process has *said* to have taken. One that is in
        the pipe starts all the same. Forgotten, it would be missed by the heartbeat and run a
        second time elsewhere, and at a stop its process would wait 30 s for the pool to count its
        result (test_a_stop_that_strikes_a_job_in_the_pipe_does_not_hang).
        """
        self._forget_waiting()
        in_pipe = [job for job in self._cache.values() if self._is_in_pipe(job)]
        kept = {number: job for number, job in self._cache.items() if self._is_with_process(job)}
        for job in in_pipe:
            job._accepted = True  # spared by the stock flush
            if hasattr(job, "affinity_stamp"):
                job._callback.__self__.taken()
        try:
            super().flush()
        finally:
            for job in in_pipe:
                job._accepted = False
        for number, job in kept.items():  # Celery 5.4 forgets running ones, too
            if job._write_to._is_alive():
                self._cache.setdefault(number, job)
                self._busy_workers.add(job._write_to.inqW_fd)

    def _is_with_process(self, job: Any) -> bool:
        running = job._accepted and hasattr(job, "affinity_stamp")
        return job._write_to is not None and (running or self._is_in_pipe(job))

    def _is_in_pipe(self, job: Any) -> bool:
        if job._accepted or job._write_to is None:
            return False
        # Ordinary jobs come again over a new connection, as they do in the stock pool.
        return hasattr(job, "affinity_stamp") or worker_state.should_stop is not None

    def close(self) -> None:
        """The worker stops: joining the pool must not wait for jobs that no process will take."""
        self._forget_waiting()
        super().close()

    def _forget_waiting(self) -> None:
        for waiting in self.slot_buffers.values():
            while waiting:
                waiting.popleft().discard()


def _is_revoked(job: Any) -> bool:
    """Whether a waiting job's task was revoked or has expired; its end is told then."""
    request = job._callback.__self__
    known = worker_state.revoked_stamps or job.correlation_id in worker_state.revoked
    return bool((request.expires or known) and request.revoked())


def _stamp_of(tup: Any) -> Stamp | None:
    try:
        return Stamp.parse(tup[1][3][2].get(STAMP_HEADER))
    except (LookupError, TypeError, AttributeError):
        return None


class SlotTaskPool(PreforkPool):  # type: ignore[misc]
    """The prefork pool over `SlotPool`."""

    # The worker's banner names the pool by its module.
    __module__ = PreforkPool.__module__
    Pool = SlotPool

    _put_off = False

    @property
    def num_processes(self) -> int:
        """The number of slots."""
        return int(self._pool.target)

    def on_stop(self) -> None:
        """Join the pool; a signal handler that struck one of its steps puts that off."""
        if self._pool is not None and self._pool.in_step:
            self._put_off = True  # `should_terminate` is set: the loop ends after this step
            return
        super().on_stop()

    def on_terminate(self) -> None:
        """The loop has ended: now join what was put off, then end it."""
        if self._put_off:
            super().on_stop()
        super().on_terminate()


def slots_are_processes(pool_cls: Any, wanted: bool, use_eventloop: bool) -> bool:
    """Whether this worker can run each slot's tasks in one process.

    A Celery whose pool differs from what `SlotPool` builds on falls back with a warning.
    """
    if not wanted or not use_eventloop or get_implementation(pool_cls) is not PreforkPool:
        return False
    needed = (
        "_create_write_handlers",
        "_event_process_exit",
        "create_result_handler",
        "on_job_ready",
        "on_job_process_lost",
        "on_process_alive",
        "flush",
        "maintain_pool",
        "_repopulate_pool",
    )
    missing = [name for name in needed if not hasattr(AsynPool, name)]
    if not hasattr(AsynPool.ResultHandler, "_recv_message"):
        missing.append("ResultHandler._recv_message")
    if missing:
        logger.warning(
            "This Celery's prefork pool lacks %s: tasks of a tag will run in any process of the "
            "worker. Order and exclusion are kept; process caches are not. Install "
            "celery>=5.4,<6, or set slot_is_process=False.",
            ", ".join(missing),
            extra={"action": "fallback", "missing": missing},
        )
    return not missing


def follow_size(pool: Any, most: Callable[[], int] | None, resized: Callable[[], None]) -> None:
    """Tell when the pool was made to grow or shrink.

    Arguments:
        most: With autoscale how many slots there may be: the pool then grows for a slot's job.
    """
    call_after_resizing(pool, resized)
    if isinstance(pool, SlotTaskPool):
        pool._pool.most = most


def pool_process_index() -> int | None:
    """The index of this pool process, or None outside of one."""
    index = getattr(current_process(), "index", None)
    return index if isinstance(index, int) else None
