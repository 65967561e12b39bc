"""The acceptance app in a worker that stops itself (SIGSTOP), once, where AFFINITY_TEST_FREEZES says.

"registered": it is in the ledger, and has not noted its queue there; "noted": has not declared it;
"declared": its heartbeat's thread has not begun; "started": it does not consume yet; "consuming": its
event loop has not begun; "looping": that begins; "relaying": it has published nothing that it was
dispatched.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from celery.worker import loops
from celery.worker.consumer import Consumer

from acceptance.apps.affinity_app import affinity, app
from celery_affinity.node import Node
from celery_affinity.relay import Relay
from celery_affinity.reporter import Reporter

__all__ = ("affinity", "app")

_has_frozen = False


def _freeze(*_: Any) -> None:
    global _has_frozen
    if not _has_frozen:
        _has_frozen = True
        os.kill(os.getpid(), signal.SIGSTOP)


def _freezing(kind: Any, name: str, *, first: bool = False) -> None:
    """Have a method's first call freeze the process, before it or after it."""
    method = getattr(kind, name)

    def called(*args: Any) -> Any:
        if first:
            _freeze()
        answer = method(*args)
        _freeze()
        return answer

    setattr(kind, name, called)


match os.environ["AFFINITY_TEST_FREEZES"]:
    case "registered":
        _freezing(Reporter, "register")
    case "noted":
        _freezing(Node, "_announce")
    case "declared":
        _freezing(Node, "consumer_started", first=True)
    case "started":
        _freezing(Node, "consumer_started")
    case "consuming":
        _freezing(Consumer, "on_ready")
    case "looping":
        _freezing(loops, "_quick_drain", first=True)
        app.conf.worker_enable_remote_control = False
    case "relaying":
        _freezing(Relay, "relay", first=True)
