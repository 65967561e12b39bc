"""Starts `celery` processes in a fraction of a second: forks of one that has the imports done.

On two cores an ordinary start costs two seconds of CPU, most of it imports; a law would wait for
those longer than for what it is about. What runs after the fork is what `python -m celery` runs,
to its end: the module as `__main__`, with the command line, environment, directory, session, log and
signals of a process of its own, and the interpreter's own end. The app's module is imported there,
so that it may read its environment. tests/integration/test_nursery.py compares the two.

What differs: forks share the seed of `hash`, their name in `ps`, which modules are imported
already, so that one that the library forgets to import is not missed, and the collector leaves
alone what was there before the fork. Hence some laws stay on real
starts (`real=True` of `Cluster.worker` and `Cluster.beat`): all of gevent, which has to patch
before the imports; acceptance/test_plain_celery.py; in test_setup.py those of the command line
and the banner, with `-S affinity` found by its entry point; in test_start_refusals.py; the demo's,
Django's, FastAPI's and pytest-celery's.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from celery_affinity.embedded import die_with_parent

TESTS = Path(__file__).resolve().parent
_ANSWER_SECONDS = 30.0
_POLL_SECONDS = 0.005


class Nursery:
    """The process that forks; everything it forked dies with it, and it with its caller."""

    def __init__(self) -> None:
        # The kernel takes the thread for the parent: with it the nursery would end.
        assert threading.current_thread() is threading.main_thread(), "start it in the main thread"
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            env={
                **os.environ, "PYTHONUNBUFFERED": "1",
                "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
            },
            start_new_session=True, preexec_fn=die_with_parent(),
        )
        self._lock = threading.Lock()
        self._buffer = b""
        self._started: int | None = None
        self._ended: dict[int, int] = {}
        atexit.register(self._close)

    def fork(
        self, arguments: Sequence[str], log: Path, directory: Path, environ: Mapping[str, str],
        errors: Path | None = None,
    ) -> ForkedProcess:
        """Start `celery` with these arguments.

        Arguments:
            arguments: The command line after `celery`.
            log: To its end goes the output.
            directory: Where it runs.
            environ: The whole environment.
            errors: To its end goes standard error; None: to the log's.

        Raises:
            AssertionError: If the nursery does not answer.
        """
        order = {
            "argv": list(arguments), "cwd": str(directory), "env": dict(environ),
            "stdout": str(log), "stderr": str(errors or log),
        }
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._started = None
            deadline = time.monotonic() + _ANSWER_SECONDS
            while self._started is None:
                self._read(0.5)
                assert time.monotonic() < deadline, "the nursery does not answer"
            # Its number may have been another's, which has ended.
            self._ended.pop(self._started, None)
            return ForkedProcess(self, self._started)

    def returncode(self, pid: int) -> int | None:
        """How a fork ended, negative: by which signal; None while it runs."""
        with self._lock:
            self._read(0)
            return self._ended.get(pid)

    def _close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self, seconds: float) -> None:
        assert self._process.stdout is not None
        file = self._process.stdout.fileno()
        while select.select([file], [], [], seconds)[0]:
            part = os.read(file, 65536)
            assert part, f"the nursery ended with {self._process.wait()}"
            self._buffer += part
            *lines, self._buffer = self._buffer.split(b"\n")
            for line in map(json.loads, lines):
                if "started" in line:
                    self._started = line["started"]
                else:
                    self._ended[line["ended"]] = line["status"]
            if lines:
                return


@functools.cache
def _nursery_of(pid: int) -> Nursery:
    return Nursery()


def nursery() -> Nursery:
    """The one of this process, which is started at the first call."""
    return _nursery_of(os.getpid())


class ForkedProcess:
    """A fork of the nursery, with what `Node` needs of `subprocess.Popen`."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self._nursery = nursery
        self._status: int | None = None
        self.pid = pid

    @property
    def returncode(self) -> int | None:
        """As `poll`."""
        return self.poll()

    def poll(self) -> int | None:
        """How it ended; None while it runs."""
        if self._status is None:
            self._status = self._nursery.returncode(self.pid)
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; how it ended.

        Raises:
            subprocess.TimeoutExpired: After that many seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if timeout is not None and deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(_POLL_SECONDS)
        return status

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL it, if it runs."""
        self.send_signal(signal.SIGKILL)


# In the nursery itself

#: What a worker or a beat imports before it looks at its app; not what reads the environment as it
#: is imported, as celery.worker.autoscale does (AUTOSCALE_KEEPALIVE).
_IMPORTS = (
    "celery.app.amqp", "celery.app.control", "celery.app.log", "celery.apps.beat",
    "celery.apps.worker", "celery.backends.redis", "celery.bin.celery",
    "celery.concurrency.prefork", "celery.concurrency.solo", "celery.concurrency.thread",
    "celery.worker.consumer", "celery.worker.loops",
    "celery.worker.strategy", "kombu.asynchronous.hub", "kombu.transport.redis",
    "celery_affinity", "celery_affinity.beat",
)


class _Parent:
    """Forks as ordered on its standard input, and tells of it on its standard output."""

    def __init__(self) -> None:
        # `-m` puts the directory first, a script its own; then PYTHONPATH, then the installation.
        given = {*os.environ["PYTHONPATH"].split(os.pathsep), str(TESTS)}
        self._installed = [path for path in sys.path if path not in given]
        self._die = die_with_parent()
        for name in _IMPORTS:
            importlib.import_module(name)
        # A collector that walks them in each fork copies their pages: that was half of the CPU of a
        # worker's start and end.
        gc.collect()
        gc.freeze()
        assert threading.active_count() == 1, "a fork has the thread that forks only"
        self._wakeup, self._wake = os.pipe()
        os.set_blocking(self._wakeup, False)
        os.set_blocking(self._wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # A shell ignores them for what it starts behind an `&`: a worker that is told to quit before
        # Celery has its handlers would not hear of it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)

    def serve(self) -> bool:
        """Fork until the input ends; whether this is a fork."""
        buffer = b""
        while True:
            ready = select.select([0, self._wakeup], [], [])[0]
            with contextlib.suppress(BlockingIOError):
                os.read(self._wakeup, 4096)
            with contextlib.suppress(ChildProcessError):
                while (found := os.waitpid(-1, os.WNOHANG))[0]:
                    self._say(ended=found[0], status=os.waitstatus_to_exitcode(found[1]))
            if 0 not in ready:
                continue
            if not (part := os.read(0, 1 << 20)):
                return False
            *lines, buffer = (buffer + part).split(b"\n")
            for line in lines:
                if not (pid := os.fork()):
                    self._become(json.loads(line))
                    return True
                self._say(started=pid)

    def _become(self, order: dict[str, Any]) -> None:
        """Have what a process of its own has."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(self._wakeup)
        os.close(self._wake)
        os.setsid()
        if self._die is not None:
            self._die()
        append = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        files = ((os.devnull, os.O_RDONLY), (order["stdout"], append), (order["stderr"], append))
        for target, (path, flags) in enumerate(files):
            source = os.open(path, flags, 0o666)
            os.dup2(source, target)
            os.close(source)
        os.environ.clear()
        os.environ.update(order["env"])
        time.tzset()
        os.chdir(order["cwd"])
        more = order["env"].get("PYTHONPATH", "")
        sys.path[:] = [order["cwd"], *filter(None, more.split(os.pathsep)), *self._installed]
        sys.argv[:] = ["celery", *order["argv"]]
        importlib.invalidate_caches()

    def _say(self, **line: int) -> None:
        os.write(1, json.dumps(line).encode() + b"\n")


if __name__ == "__main__":
    if _Parent().serve():
        runpy.run_module("celery", run_name="__main__", alter_sys=True)
