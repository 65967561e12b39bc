"""A worker's sign of life on its own machine: a file that its heartbeat's thread touches.

A liveness probe asks that file, not Redis: a Redis that is away would otherwise have every worker
killed. So the thread touches it on each round, whether its heartbeat was answered or not; what the
ledger thinks of the worker is told by `celery affinity workers`.

The files lie in ``<temporary directory>/celery_affinity-<user id>/``, one for each namespace and
node (TMPDIR moves them). A worker takes its own away when it stops; that of a killed one is taken
away by the next that starts there.

Does not: see an event loop or a task that hangs while that thread goes on.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from celery_affinity.types import PulseRecord

__all__ = ("Pulse", "folder", "pulses")

logger = logging.getLogger(__name__)

#: A thread that has not gone round for so long hangs: a Redis that swallows what it is sent
#: holds it up for 45 s (connection.py: a timeout of 10 s, four tries).
HUNG_SECONDS = 60.0


def folder() -> Path:
    """Where this user's signs of life lie."""
    return Path(tempfile.gettempdir()) / f"celery_affinity-{os.getuid()}"


class Pulse:
    """One worker's file."""

    def __init__(self, namespace: str, node: str) -> None:
        self._path = folder() / f"{quote(namespace, safe='')}~{quote(node, safe='')}"
        self._about = json.dumps({"node": node, "pid": os.getpid()})
        self._told = False

    def beat(self) -> None:
        """The heartbeat's thread goes round."""
        try:
            os.utime(self._path)
        except FileNotFoundError:
            self._write()
        except OSError as error:
            self._tell(error)

    def begin(self) -> None:
        """The worker starts."""
        self._write()
        for path in _files():
            if not _exists(_read(path).get("pid", 0)):
                path.unlink(missing_ok=True)

    def end(self) -> None:
        """The worker has stopped."""
        try:
            if _read(self._path).get("pid") == os.getpid():
                self._path.unlink()
        except OSError:
            pass

    def _write(self) -> None:
        try:
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            # Somebody else's directory of that name is not to be written into.
            about = os.lstat(self._path.parent)
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
                raise PermissionError(f"{self._path.parent} is not this user's directory")
            new = self._path.with_name(f".{os.getpid()}.new")
            new.write_text(self._about)
            new.replace(self._path)
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            logger.warning(
                "No sign of life can be left for `celery affinity alive` (%s): set TMPDIR to a "
                "directory that may be written.",
                error,
                extra={"action": "no_pulse"},
            )


def pulses(namespace: str, node: str | None = None) -> list[PulseRecord]:
    """The signs of life of a namespace's workers on this machine, by node."""
    start = quote(namespace, safe="") + "~"
    found = []
    for path in _files():
        about = _read(path)
        if not path.name.startswith(start) or not about or node not in (None, about["node"]):
            continue
        try:
            age = max(0.0, time.time() - path.stat().st_mtime)
        except FileNotFoundError:
            continue  # it has just stopped
        alive = age < HUNG_SECONDS and _exists(about["pid"])
        found.append(PulseRecord(str(about["node"]), int(about["pid"]), alive, age))
    return sorted(found, key=lambda record: record.node)


def _files() -> Iterator[Path]:
    try:
        yield from [path for path in folder().iterdir() if not path.name.startswith(".")]
    except OSError:
        return


def _read(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) and {"node", "pid"} <= set(about) else {}


def _exists(pid: object) -> bool:
    if not isinstance(pid, int) or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
