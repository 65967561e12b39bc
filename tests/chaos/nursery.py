"""Starts `celery` processes in a fifth of a second: forks of one that has the imports done.

On two cores an ordinary start costs two seconds of CPU, most of it imports; an experiment with
hundreds of kills would measure those. What runs after the fork is `celery` itself, with the
command line, the environment and the session of a process of its own; the app's module is
imported there, so that it may read its environment.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from celery_affinity.embedded import die_with_parent
from harness import TESTS, Cluster, Node


class Nursery:
    """The process that forks; everything it forked dies with it, and it with its caller."""

    def __init__(self) -> None:
        environ = {
            **os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
            "PYTHONUNBUFFERED": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "chaos.nursery"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=environ, start_new_session=True, preexec_fn=die_with_parent(), bufsize=0,
        )
        self._buffer = b""
        self._pid: int | None = None
        self._ended: dict[int, int] = {}

    def fork(
        self, arguments: Sequence[str], log: Path, directory: Path, environ: Mapping[str, str]
    ) -> ForkedProcess:
        """Start `celery` with these arguments."""
        order = {"argv": list(arguments), "log": str(log), "cwd": str(directory), "env": dict(environ)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._pid = None
        deadline = time.monotonic() + 30
        while self._pid is None:
            self._read(0.5)
            assert time.monotonic() < deadline, "the nursery does not answer"
        return ForkedProcess(self, self._pid)

    def returncode(self, pid: int) -> int | None:
        """How a fork ended; None while it runs."""
        self._read(0)
        return self._ended.get(pid)

    def close(self) -> None:
        """End it, and so all its forks."""
        self._process.kill()
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
                    self._pid = line["started"]
                else:
                    self._ended[line["ended"]] = line["status"]
            if lines:
                return


class ForkedProcess:
    """What `Node` needs of `subprocess.Popen`."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self._nursery = nursery
        self.pid = pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._nursery.returncode(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            time.sleep(0.005)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkedNode(Node):
    """A node that the nursery starts."""

    nursery: Nursery

    def start(self) -> None:
        """Start the process, also again after it has gone."""
        self.log_path.touch()
        self._log_start = self.log_path.stat().st_size
        self.process = self.nursery.fork(  # type: ignore[assignment]
            self.command[3:], self.log_path, self._directory, self._environ
        )
        self._group.add(self.pid)


class ForkedCluster(Cluster):
    """A cluster whose nodes the nursery starts."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._nursery = Nursery()
        self._node_class = type("ForkedNode", (ForkedNode,), {"nursery": self._nursery})

    def destroy(self) -> None:
        """Kill every process of every node, and the nursery."""
        super().destroy()
        self._nursery.close()

    def _add(
        self, name: str, arguments: Sequence[str], ready: str, environ: Mapping[str, str] | None
    ) -> Node:
        node: Node = self._node_class(
            name, arguments, ready=ready, environ={**self.environ, **(environ or {})},
            directory=self.directory,
        )
        self.nodes.append(node)
        return node


# In the nursery itself


_IMPORTS = (
    "celery.apps.beat", "celery.apps.worker", "celery.backends.redis", "celery.bin.celery",
    "celery.concurrency.prefork", "celery.concurrency.thread", "celery.worker.consumer",
    "celery.worker.loops", "celery.worker.strategy", "kombu.asynchronous.hub",
    "kombu.transport.redis", "celery_affinity", "celery_affinity.beat",
)


def _be_celery(order: dict[str, Any], die: Any, wakeups: tuple[int, int]) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for file in wakeups:
        os.close(file)
    os.setsid()
    if die is not None:
        die()
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["celery", *order["argv"]]
    sys.path[:0] = [path for path in order["env"]["PYTHONPATH"].split(os.pathsep) if path not in sys.path]
    from celery.__main__ import main

    main()


def _serve() -> None:
    for name in _IMPORTS:
        importlib.import_module(name)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    os.set_blocking(reader, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    buffer = b""
    while True:
        ready = select.select([0, reader], [], [])[0]
        if reader in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(reader, 4096)
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                _say(ended=found[0], status=os.waitstatus_to_exitcode(found[1]))
        if 0 not in ready:
            continue
        if not (part := os.read(0, 1 << 20)):
            return
        buffer += part
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            die = die_with_parent()
            pid = os.fork()
            if not pid:
                status = 1
                try:
                    _be_celery(json.loads(line), die, (reader, writer))
                    status = 0
                except SystemExit as error:
                    status = error.code if isinstance(error.code, int) else int(error.code is not None)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(status)
            _say(started=pid)


def _say(**line: int) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")


if __name__ == "__main__":
    _serve()
