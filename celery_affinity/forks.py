"""Sockets of this process that its forked children must not keep open.

A pool process outlives its killed parent for as long as its task takes. With a copy of the socket
it would keep the parent's connection open, and with it what RabbitMQ has handed out there
(test_a_forked_child_does_not_keep_a_connection_open_whose_process_has_gone).
"""

from __future__ import annotations

import os
from typing import Any
from weakref import WeakSet

__all__ = ("close_in_children",)

_sockets: WeakSet[Any] = WeakSet()


def close_in_children(sock: Any) -> None:
    """Close a socket in each child that is forked while it lives."""
    _sockets.add(sock)


def _close_all() -> None:
    for sock in list(_sockets):
        try:
            sock.close()  # the parent's end is not shut down by that
        except OSError:
            pass
    _sockets.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_all)
