"""Who asks for a change, for the record of it."""

from __future__ import annotations

import getpass
import json
import socket
from uuid import uuid4

from celery_affinity.operator_scripts import OperatorScripts

__all__ = ("me", "write_down")


def me() -> str:
    """The user and the host of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def write_down(
    scripts: OperatorScripts, who: str, what: str, queue: str, target: str = "", detail: str = ""
) -> None:
    """Record a change before it is made, so that none goes unrecorded."""
    change = {"who": who or me(), "what": what, "queue": queue, "target": target, "detail": detail}
    scripts.note(uuid4().hex, json.dumps(change)[:-1])
