"""Which process it was: a number may be another one's later."""

from __future__ import annotations

import os
import time

__all__ = ("identity", "is_gone")


def identity(pid: int) -> str:
    """A living process' number and when it started."""
    return f"{pid}:{_started(pid) or f'{time.time():.0f}'}"


def is_gone(identity: str) -> bool:
    """Whether that process of this machine has ended."""
    pid, _, started = identity.partition(":")
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    now = _started(int(pid))
    return now is not None and now != started


def _started(pid: int) -> str | None:
    """In the system's ticks; None where the system does not say."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            return stat.read().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return None
