"""Processes in the place of pytest-celery's Docker containers.

pytest-celery needs Docker in three fixtures only. `default_redis_broker`, `default_redis_backend`
and `default_worker_container` below hand it containers that stand on processes: each has the few
attributes of a Docker container that the plugin touches.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from pytest_celery import CeleryWorkerContainer, RedisContainer

from celery_affinity.embedded import Server, start_server
from harness import TESTS, Node, wait_until

__all__ = ("default_redis_backend", "default_redis_broker", "default_worker_container")

_EXEC_SECONDS = 20.0
_READY_SECONDS = 40.0
_STOP_SECONDS = 15.0


class ProcessContainer:
    """What the plugin asks of a `docker.models.containers.Container`.

    Does not: isolate anything. It shares the machine's files, network and processes.
    """

    def __init__(self, name: str) -> None:
        self.id = uuid4().hex
        self.name = name
        self.attrs: dict[str, Any] = {
            "Config": {"Hostname": self.id[:12], "Env": []},
            "HostConfig": {"PortBindings": {}},
            "NetworkSettings": {"Networks": {}, "Ports": {}},
        }

    @property
    def status(self) -> str:
        """Docker's word for whether it lives."""
        return "running" if self.is_alive() else "exited"

    def reload(self) -> None:
        """Nothing is cached."""

    def is_alive(self) -> bool:
        """Whether its main process runs."""
        raise NotImplementedError


class ServerProcess(ProcessContainer):
    """A Redis server as a container; it keeps its port and its data over a restart."""

    def __init__(self, name: str, server: Server) -> None:
        super().__init__(name)
        self.server = server

    def is_alive(self) -> bool:
        """Whether the server runs."""
        return self.server.pid is not None

    def kill(self, signal: str | int | None = None) -> None:
        """Docker's kill: SIGKILL unless another signal is named."""
        if _number(signal) == _number("SIGKILL"):
            self.server.kill()
        else:
            self.server.stop()

    def restart(self, timeout: float = _STOP_SECONDS) -> None:
        """Stop it if it runs, and start it."""
        self.server.restart()

    def logs(self) -> bytes:
        """Its log since the last start."""
        return (self.server.directory / "server.log").read_bytes()


class WorkerProcess(ProcessContainer):
    """A `celery worker` as a container; its directory takes the place of the volume."""

    def __init__(self, command: list[str], environ: Mapping[str, str], directory: Path) -> None:
        super().__init__("worker")
        self.directory = directory
        self.environ = dict(environ)
        arguments = [part.replace("%h", self.id[:12]) for part in command]
        assert arguments.pop(0) == "celery", command
        self.node = Node(
            "worker", arguments, ready="ready.", environ=self.environ, directory=directory,
            real=True,
        )

    def is_alive(self) -> bool:
        """Whether the parent process runs."""
        return self.node.alive

    def kill(self, signal: str | int | None = None) -> None:
        """Send a signal to the parent; SIGKILL ends all of its processes, as in a container."""
        if _number(signal) == _number("SIGKILL"):
            self.node.destroy()
        else:
            os.kill(self.node.pid, _number(signal))

    def restart(self, timeout: float = _STOP_SECONDS) -> None:
        """A warm stop within the time, else a kill; then a start."""
        if self.node.alive:
            self.node.term()
            try:
                self.node.wait(timeout)
            except AssertionError:
                self.node.destroy()
        self.node.start()

    def logs(self) -> bytes:
        """Its log since the last start."""
        return self.node.log_text().encode()

    def exec_run(self, command: str) -> tuple[int, bytes]:
        """Run a command in its directory and environment: (exit status, output)."""
        done = subprocess.run(
            shlex.split(command),
            cwd=self.directory,
            env=self.environ,
            timeout=_EXEC_SECONDS,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        return done.returncode, done.stdout


class _FastReady:
    """The plugin looks at a log once a second; this looks every 10 ms."""

    ready_prompt: str | None

    def _wait_ready(self, timeout: float = _READY_SECONDS) -> bool:
        prompt = self.ready_prompt or ""
        return bool(wait_until(lambda: prompt in self.logs(), timeout, prompt))  # type: ignore[attr-defined]


class RedisProcessContainer(_FastReady, RedisContainer):  # type: ignore[misc]
    """A Redis container on a process: one address, from inside and from outside."""

    @property
    def server(self) -> Server:
        """The server itself."""
        return self._container.server  # type: ignore[no-any-return]

    @property
    def url(self) -> str:
        """Address for workers."""
        return self.server.url()

    @property
    def host_url(self) -> str:
        """Address for the test."""
        return self.server.url()

    @property
    def hostname(self) -> str:
        """Host for workers."""
        return "127.0.0.1"

    @property
    def port(self) -> int:
        """Port, from inside and from outside."""
        return self.server.port


class WorkerProcessContainer(_FastReady, CeleryWorkerContainer):  # type: ignore[misc]
    """A worker container on a process."""


def _number(name: str | int | None) -> int:
    if name is None:
        return int(signal.SIGKILL)
    return int(signal.Signals[name]) if isinstance(name, str) else name


def _worker_environ(given: Mapping[str, str], directory: Path) -> dict[str, str]:
    return {
        **os.environ,
        **given,
        "PYTHONPATH": os.pathsep.join([str(directory), str(TESTS.parent)]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }


def _write(content: Mapping[str, bytes], directory: Path) -> None:
    for name, data in content.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@pytest.fixture
def default_redis_broker(server_binary: Path) -> Iterator[RedisProcessContainer]:
    """A broker process that loses no write when it is killed."""
    with start_server(aof=True) as server:
        yield RedisProcessContainer(ServerProcess("broker", server))


@pytest.fixture
def default_redis_backend(server_binary: Path) -> Iterator[RedisProcessContainer]:
    """A result backend process."""
    with start_server() as server:
        yield RedisProcessContainer(ServerProcess("backend", server))


@pytest.fixture
def default_worker_container(
    default_worker_initial_content: dict[str, bytes],
    default_worker_env: dict[str, str],
    default_worker_command: list[str],
    tmp_path: Path,
) -> Iterator[WorkerProcessContainer]:
    """A worker process; all of its processes are gone when the test is over."""
    directory = tmp_path / "app"
    _write(default_worker_initial_content, directory)
    process = WorkerProcess(
        default_worker_command, _worker_environ(default_worker_env, directory), directory
    )
    try:
        container = WorkerProcessContainer(process)
        container.ready()
        yield container
    finally:
        process.node.destroy()
