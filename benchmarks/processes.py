"""Real `celery` processes, each in a session of its own; none outlives its `with` block.

A worker is a fork of the benchmark, which has Celery's imports done: it starts in a fifth of a
second instead of one and a half, and runs `celery` itself from there. Monkey-patching has to come
before the imports, so workers with greenlets are started afresh. All contestants alike.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from celery_affinity.embedded import die_with_parent

__all__ = ("ROOT", "Nodes", "Publisher", "cpu_seconds")

ROOT = Path(__file__).resolve().parent.parent
_GONE_SECONDS = 10.0
_IMPORTS = (
    "celery.apps.beat",
    "celery.apps.worker",
    "celery.bin.celery",
    "celery.concurrency.prefork",
    "celery.concurrency.thread",
    "celery.worker.consumer",
    "celery.worker.loops",
    "celery.worker.strategy",
    "kombu.asynchronous.hub",
    "kombu.transport.redis",
    "celery_affinity.beat",
)


class Nodes:
    """The celery processes of one run; the context manager's end kills them all.

    Arguments:
        environ: More of their environment.
        directory: Where they log.
    """

    def __init__(self, environ: Mapping[str, str], directory: Path) -> None:
        self._environ = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
        self._directory = directory
        self._pids: dict[str, int] = {}

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        deadline = time.monotonic() + _GONE_SECONDS
        while any(_group_lives(pid) for pid in self._pids.values()):
            if time.monotonic() > deadline:
                raise TimeoutError("a killed process group is still there")
            time.sleep(0.005)

    def start(
        self, name: str, arguments: Sequence[str], environ: Mapping[str, str] | None = None
    ) -> None:
        """Start ``celery <arguments>``."""
        whole = {**self._environ, **(environ or {})}
        log = str(self._log(name))
        if "gevent" in arguments:
            with open(log, "ab") as file:
                self._pids[name] = subprocess.Popen(
                    [sys.executable, "-m", "celery", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    cwd=self._directory,
                    env=whole,
                    start_new_session=True,
                    preexec_fn=die_with_parent(),
                ).pid
            return
        for module in _IMPORTS:
            importlib.import_module(module)
        sys.stdout.flush()
        die = die_with_parent()
        pid = os.fork()
        if not pid:
            _be_celery(arguments, log, str(self._directory), whole, die)
        self._pids[name] = pid

    def worker(
        self, name: str, queue: str, pool: str, concurrency: int, role: str | None = None
    ) -> None:
        """Start a worker of a queue, otherwise with defaults."""
        app, where = ["-A", "benchmarks.contestants"], ["-Q", queue, "-n", f"{name}@bench"]
        size = ["-P", pool, "-c", str(concurrency)]
        self.start(
            name,
            [*app, "worker", *where, *size],
            {"AFFINITY_ROLE": role} if role else None,
        )

    def beat(self) -> None:
        """Start the scheduling beat service."""
        app, files = ["-A", "benchmarks.contestants"], ["-s", "schedule", "--pidfile="]
        self.start(
            "beat",
            [*app, "beat", "-S", "affinity", *files],
            {"AFFINITY_ROLE": "scheduler"},
        )

    def check(self) -> None:
        """Fail with its log if a process has ended."""
        for name, pid in self._pids.items():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                raise RuntimeError(f"{name} ended with {status}:\n{self.logs()}")

    def logs(self, lines: int = 30) -> str:
        """The ends of all logs, for an error."""
        ends = []
        for name in self._pids:
            text = self._log(name).read_text(errors="replace")
            ends.append(f"--- {name}\n" + "\n".join(text.splitlines()[-lines:]))
        return "\n".join(ends)

    def cpu(self) -> tuple[float, float]:
        """CPU seconds so far of the parents, and of their pool processes."""
        parents = children = 0.0
        for pid in self._pids.values():
            parents += cpu_seconds(pid)
            children += sum(cpu_seconds(child) for child in _children(pid))
        return parents, children

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"


class Publisher:
    """A process that publishes for one contestant; see submit.py."""

    def __init__(self, contestant: str, broker: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.submit"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "BENCH_CONTESTANT": contestant,
                "BENCH_BROKER": broker,
            },
            preexec_fn=die_with_parent(),
        )

    def order(self, do: str, **details: Any) -> None:
        """Have something done; `answer` waits for its end."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **details}).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """What came of the last order."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the publisher ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def cpu_seconds(pid: int) -> float:
    """CPU seconds of one process; 0 if it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)
    return 0.0


def _be_celery(
    arguments: Sequence[str], log: str, directory: str, environ: Mapping[str, str], die: Any
) -> None:
    """Become `celery` in a fork; never returns."""
    status = 1
    try:
        for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        if die is not None:
            die()
        os.closerange(3, 1024)
        for file, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
            path = log if file else os.devnull
            opened = os.open(path, flags | (os.O_APPEND | os.O_CREAT if file else 0), 0o644)
            os.dup2(opened, file)
            os.close(opened)
        os.environ.clear()
        os.environ.update(environ)
        os.chdir(directory)
        sys.argv = ["celery", *arguments]
        from celery.__main__ import main

        main()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(psutil.NoSuchProcess):
        yield from [child.pid for child in psutil.Process(pid).children(recursive=True)]


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
