"""Holding off the signals that end a process, while it does what should not be left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ("uninterrupted",)

_NUMBERS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """SIGTERM and SIGINT wait for the end of the block; a second one goes through at once.

    Handlers run in the main thread only, so in another thread there is nothing to hold off.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def hold(number: int, _: object) -> None:
        held.append(number)
        if len(held) > 1:
            restore()
            signal.raise_signal(number)

    for number in _NUMBERS:
        if signal.getsignal(number) is not None:  # None: not Python's, it could not be restored
            previous[number] = signal.signal(number, hold)
    try:
        yield
    finally:
        restore()
        if len(held) == 1:
            signal.raise_signal(held[0])
