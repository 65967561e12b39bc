"""When a periodic entry is due, told from its schedule and its last due time alone.

Celery counts from the moment at which a beat happened to send. Here each due time follows from the
one before, so that every beat derives the same one, and an interval does not drift. Times are
microseconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from hashlib import sha256
from typing import Any

from celery.schedules import crontab, schedule
from celery.utils.time import maybe_make_aware

__all__ = ("after", "latest", "mark", "micros", "moment", "now")

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)


def moment(at: int) -> datetime:
    """The aware time of so many microseconds since the epoch."""
    return _EPOCH + at * _MICROSECOND


def micros(at: datetime | None) -> int:
    """Microseconds since the epoch; 0 for None, Celery's "never". A naive time is UTC."""
    return 0 if at is None else max(0, (maybe_make_aware(at) - _EPOCH) // _MICROSECOND)


def now(when: Any) -> int:
    """The present time by a schedule's own clock."""
    return micros(when.maybe_make_aware(when.now()))


def after(when: Any, last: int) -> int | None:
    """The due time that follows `last`; None if the schedule cannot tell one.

    Arguments:
        when: A Celery schedule: an interval, crontab, solar event, or any other that has
            `remaining_estimate`.
        last: The due time before.
    """
    if isinstance(when, schedule) and not when.relative:
        return last + _every(when) if _every(when) > 0 else None
    return _estimate(when, last)


def latest(when: Any, last: int, until: int) -> int | None:
    """The last due time after `last` that is not after `until`; None if there is none."""
    if isinstance(when, schedule) and _every(when) > 0:
        steps = (until - last) // _every(when)
        return last + steps * _every(when) if steps > 0 else None
    look = 60_000_000
    while True:
        start = max(last, until - look)
        found = after(when, start)
        if found is not None and start < found <= until:
            return _last_of(when, found, until)
        if start == last:
            return None
        look *= 2


def _last_of(when: Any, found: int, until: int) -> int:
    while (following := after(when, found)) is not None and found < following <= until:
        found = following
    return found


def _every(when: Any) -> int:
    return int(when.run_every // _MICROSECOND)


def _estimate(when: Any, last: int) -> int | None:
    # The schedule answers with what remains from now on: with its clock stopped at `last`, that
    # is the whole step. A copy by __dict__, since __reduce__ of some forgets the app.
    at = moment(last).astimezone(when.tz)
    stopped: Any = object.__new__(type(when))
    stopped.__dict__.update(vars(when))
    clock: Callable[[], datetime] = lambda: at  # noqa: E731
    stopped.nowfun = clock
    try:
        left = stopped.remaining_estimate(at)
    except NotImplementedError:
        return None
    return None if left is None else last + int(left // _MICROSECOND)


def mark(when: Any) -> str:
    """Tells a schedule from another one, in every process alike."""
    if isinstance(when, schedule):
        said = f"{_every(when)} {when.relative}"
    elif isinstance(when, crontab):
        said = f"{when!r} {when.tz}"
    else:
        said = repr(when)
    if " at 0x" in said:
        said = type(when).__qualname__
    return sha256(said.encode()).hexdigest()[:12]
