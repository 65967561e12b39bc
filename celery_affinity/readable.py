"""Which of several files can be read now: `select`, without its limit of 1,024 descriptors.

A worker with some hundred pool processes has more than that, and so has a leader of many queues.
"""

from __future__ import annotations

import selectors
from collections.abc import Iterable
from typing import Any

__all__ = ("wait_readable",)


def wait_readable(files: Iterable[Any], seconds: float) -> list[Any]:
    """Those of the files (descriptors, sockets) that can be read, as soon as one can.

    Arguments:
        seconds: How long to wait for one; after that the answer is empty.

    Raises:
        ValueError: If a file is closed.
    """
    # Not epoll: it would take a descriptor of its own, which a fork in this moment would keep.
    kind: Any = getattr(selectors, "PollSelector", selectors.DefaultSelector)
    with kind() as selector:
        for file in files:
            selector.register(file, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(max(0.0, seconds))]
