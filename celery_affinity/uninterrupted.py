"""Holding off the signals that end a process, while it does what should not be left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ("uninterrupted",)

_NUMBERS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def uninterrupted(wake: Callable[[], None] = lambda: None) -> Iterator[None]:
    """SIGTERM and SIGINT wait for the end of the block; a second one goes through at once.

    Arguments:
        wake: Called when one comes, in the signal handler: ends what the block waits for.

    Handlers run in the main thread only, so in another thread there is nothing to hold off.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or getattr(signal.getsignal(signal.SIGTERM), "holds", False):
        yield  # within such a block the outer one holds them off
        return
    held: list[int] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def hold(number: int, _: object) -> None:
        held.append(number)
        wake()
        if len(held) > 1:
            restore()
            signal.raise_signal(number)

    hold.holds = True  # type: ignore[attr-defined]
    for number in _NUMBERS:
        if signal.getsignal(number) is not None:  # None: not Python's, it could not be restored
            previous[number] = signal.signal(number, hold)
    try:
        yield
    finally:
        restore()
        if len(held) == 1:
            signal.raise_signal(held[0])
