"""The processes that the demo starts, none of which outlives it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from celery_affinity.embedded import die_with_parent

if TYPE_CHECKING:
    from typing import Self

__all__ = ("ProcessEndedError", "Processes")

#: A worker that has nothing to do stops in less.
_STOP_SECONDS = 10.0


class ProcessEndedError(Exception):
    """A process of the demo ended by itself, or never got ready."""


class Processes:
    """Named Python processes, each at the head of a process group with a log of its own.

    They end with the context: orderly if it ends so, at once if it is left by an exception. If
    this process is killed, the kernel kills them (on Linux); a worker's pool goes with its worker.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._ask_to_stop()
        finally:
            self._kill_groups()

    def start(self, name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start ``python <arguments>``."""
        with self.log(name).open("wb") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the demo, which then stops what it has started.
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )

    def log(self, name: str) -> Path:
        """Where a process writes to."""
        return self._directory / f"{name}.log"

    def kill(self, name: str) -> None:
        """``kill -9``."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def check(self) -> None:
        """Raise an error with the end of its log if a process has ended by itself."""
        for name, process in self._running.items():
            if process.poll() is not None:
                lines = self.log(name).read_text(errors="replace").splitlines()[-15:]
                raise ProcessEndedError(
                    f"{name} ended with status {process.returncode}. Its log "
                    f"({self.log(name)}) ends:\n" + "\n".join(lines)
                )

    def _ask_to_stop(self) -> None:
        for process in self._running.values():
            process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))

    def _kill_groups(self) -> None:
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._running.values():
            process.wait()
