"""What the pool forgets when the connection to the broker is lost."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.pool import RUN
from celery.worker import state as worker_state

from celery_affinity.slot_pool import SlotPool


class Job:
    """As much of a pool's job as `flush` looks at."""

    def __init__(self, cache: dict[int, Any], *, written: bool, stamped: bool) -> None:
        self._accepted = False
        proc = SimpleNamespace(_is_alive=lambda: True, inqW_fd=7)
        self._write_to = proc if written else None
        self._scheduled_for = None
        self.taken = 0
        self._callback = SimpleNamespace(__self__=SimpleNamespace(taken=self._take))
        if stamped:
            self.affinity_stamp = "a stamp"
        self._cache = cache
        cache[len(cache)] = self

    def _take(self) -> None:
        self.taken += 1

    def discard(self) -> None:
        for number, job in list(self._cache.items()):
            if job is self:
                del self._cache[number]


@pytest.fixture
def pool() -> Any:
    pool = SlotPool.__new__(SlotPool)
    pool._state, pool.synack, pool._cache = RUN, False, {}
    pool.slot_buffers, pool.outbound_buffer, pool._active_writers = {}, deque(), set()
    pool._active_writes, pool._busy_workers = set(), {7}
    pool.maintain_pool = lambda: None
    return pool


def test_a_dispatched_job_in_the_pipe_of_a_process_is_kept_and_reported_as_held(pool: Any) -> None:
    job = Job(pool._cache, written=True, stamped=True)
    pool.flush()
    assert list(pool._cache.values()) == [job]
    assert job.taken == 1
    assert not job._accepted, "its process has not said so"
    assert pool._busy_workers == {7}, "nothing else is written to that process"


@pytest.mark.parametrize("written, stamped", [(False, True), (True, False)])
def test_what_comes_again_over_a_new_connection_is_forgotten(
    pool: Any, written: bool, stamped: bool
) -> None:
    Job(pool._cache, written=written, stamped=stamped)
    pool.flush()
    assert not pool._cache


def test_at_a_stop_every_job_in_a_pipe_is_kept(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_state, "should_stop", 0)
    job = Job(pool._cache, written=True, stamped=False)
    Job(pool._cache, written=False, stamped=False)
    pool.flush()
    assert list(pool._cache.values()) == [job]


def test_a_waiting_job_that_a_process_has_got_meanwhile_is_dropped_and_its_answer_counts(
    pool: Any,
) -> None:
    """A job that was put back twice (its process was met twice as gone) waits twice."""
    job = Job(pool._cache, written=True, stamped=True)
    job._accepted = True
    pool.target, pool.most, pool._pool = 1, None, []
    pool.slot_buffers[0] = deque([job])
    pool._feed(0)
    assert not pool.slot_buffers[0]
    assert list(pool._cache.values()) == [job]
