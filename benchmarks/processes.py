"""Real `celery` subprocesses, each in a session of its own; none outlives its `with` block."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from celery_affinity.embedded import die_with_parent

__all__ = ("ROOT", "Nodes", "cpu_seconds", "run_python")

ROOT = Path(__file__).resolve().parent.parent
_GONE_SECONDS = 10.0


class Nodes:
    """The celery processes of one run; the context manager's end kills them all.

    Arguments:
        environ: More of their environment.
        directory: Where they log.
    """

    def __init__(self, environ: Mapping[str, str], directory: Path) -> None:
        self._environ = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
        self._directory = directory
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(_GONE_SECONDS)
        deadline = time.monotonic() + _GONE_SECONDS
        while any(_group_lives(process.pid) for process in self._processes.values()):
            if time.monotonic() > deadline:
                raise TimeoutError("a killed process group is still there")
            time.sleep(0.01)

    def start(self, name: str, arguments: Sequence[str]) -> None:
        """Start ``celery <arguments>``."""
        with self._log(name).open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "celery", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                env=self._environ,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )

    def set_environ(self, **values: str) -> None:
        """Change the environment of what is started from now on."""
        self._environ.update(values)

    def worker(self, app: str, name: str, concurrency: int) -> None:
        """Start a worker of the queue "bench", otherwise with defaults."""
        self.start(
            name,
            ["-A", app, "worker", "-Q", "bench", "-n", f"{name}@bench", "-c", str(concurrency)],
        )

    def check(self) -> None:
        """Fail with its log if a process has ended."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise RuntimeError(
                    f"{name} ended with {process.returncode}:\n{self.log_tail(name)}"
                )

    def log_tail(self, name: str, lines: int = 30) -> str:
        """The end of a process' log."""
        text = self._log(name).read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def all_logs(self) -> str:
        """The ends of all logs, for an error."""
        return "\n".join(f"--- {name}\n{self.log_tail(name)}" for name in self._processes)

    def cpu(self) -> tuple[float, float]:
        """CPU seconds so far of the parents, and of their pool processes."""
        parents = children = 0.0
        for process in self._processes.values():
            parents += cpu_seconds(process.pid)
            children += sum(cpu_seconds(child) for child in _children(process.pid))
        return parents, children

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"


def run_python(arguments: Sequence[str], environ: Mapping[str, str], timeout_seconds: float) -> str:
    """Run ``python <arguments>`` to its end; what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        stdout=subprocess.PIPE,
        timeout=timeout_seconds,
        check=True,
        text=True,
    )
    return done.stdout


def cpu_seconds(pid: int) -> float:
    """CPU seconds of one process; 0 if it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)
    return 0.0


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(psutil.NoSuchProcess):
        yield from [child.pid for child in psutil.Process(pid).children(recursive=True)]


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
