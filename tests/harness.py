"""Real `celery worker` and `celery beat` processes, and the faults that may be done to them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import psutil

from celery_affinity.embedded import die_with_parent
from history import HISTORY_VARIABLE
from nursery import TESTS, ForkedProcess, nursery

T = TypeVar("T")

#: Tells the apps of the tests their broker.
BROKER_VARIABLE = "AFFINITY_TEST_BROKER"
#: Tells affinity_app to keep results, in database 1 of the same server.
RESULTS_VARIABLE = "AFFINITY_TEST_RESULTS"
#: Or there.
RESULTS_URL_VARIABLE = "AFFINITY_TEST_RESULTS_URL"
#: Tells affinity_app what kind of queues to make on RabbitMQ: classic or quorum.
QUEUE_TYPE_VARIABLE = "AFFINITY_TEST_QUEUE_TYPE"

_POLL_SECONDS = 0.01
_MOST_POLL_SECONDS = 0.1
#: How much CPU `allowed` uses to see how long that takes; several turns of the kernel's scheduler.
_PROBE_SECONDS = 0.05
#: A loaded machine with two cores needs several seconds for a worker's imports.
_READY_SECONDS = 40.0


def wait_until(predicate: Callable[[], T], timeout: float = 20.0, what: str = "") -> T:
    """Poll every 10 ms until the predicate is true; return its value.

    One that takes more CPU, such as reading a whole history, is asked less often: waiting leaves the
    CPU to what is waited for.

    Raises:
        AssertionError: After `timeout` seconds, saying what was waited for.
    """
    deadline = time.monotonic() + timeout
    begin = time.thread_time()
    while not (value := predicate()):
        if time.monotonic() > deadline:
            wanted = what or getattr(predicate, "__name__", repr(predicate))
            raise AssertionError(f"waited {timeout:g} s for {wanted}; last seen: {value!r}")
        used, begin = time.thread_time() - begin, time.thread_time()
        time.sleep(min(max(_POLL_SECONDS, 4 * used), _MOST_POLL_SECONDS))
    return value


def allowed(seconds: float) -> float:
    """How long something may take now that is done in so many seconds where a core is free.

    For a law whose promise is a time: beside other work a process waits for its CPU, and that is
    not what the law is about. To be called right after what is judged.
    """
    begin, cpu = time.monotonic(), time.thread_time()
    while (used := time.thread_time() - cpu) < _PROBE_SECONDS:
        pass
    return seconds * max(1.0, (time.monotonic() - begin) / used)


class LineCounter:
    """Counts the lines of a growing file that hold a text, reading each byte once."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._text = text.encode()
        self._offset = 0
        self._count = 0

    def __call__(self) -> int:
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._offset += len(whole)
            self._count += sum(self._text in line for line in whole.splitlines())
        return self._count


def wait_for_ends(history_path: Path, count: int, timeout: float = 60.0) -> None:
    """Wait until the history has `count` ends (those of retries and reruns counted)."""
    ends = LineCounter(history_path, '"event":"end"')
    try:
        wait_until(lambda: ends() >= count, timeout, f"{count} ends in the history")
    except AssertionError as error:
        raise AssertionError(f"{error} ({ends()} ends are there)") from None


class Node:
    """One `celery` process in a process group of its own, with its log.

    Does not: restart by itself.

    Arguments:
        name: Name of the node, as `record` and the log know it.
        arguments: The command line after `celery`.
        ready: What its log says once it works.
        environ: The whole environment.
        directory: Where it runs and logs.
        real: Whether an interpreter of its own runs it, and not a fork of the nursery.
    """

    def __init__(
        self, name: str, arguments: Sequence[str], *, ready: str, environ: Mapping[str, str],
        directory: Path, real: bool = False,
    ) -> None:
        self.name = name
        self.log_path = directory / (re.sub(r"[^\w@.-]", "_", name) + ".log")
        self._arguments = list(arguments)
        self._real = real
        self._ready = ready
        self._environ = dict(environ)
        self._directory = directory
        self._log_start = 0
        self._group: set[int] = set()
        self.process: subprocess.Popen[bytes] | ForkedProcess
        self.start()

    def __repr__(self) -> str:
        return f"<Node {self.name} pid={self.pid} {'alive' if self.alive else 'gone'}>"

    @property
    def pid(self) -> int:
        """Process id of the parent."""
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether the parent process runs."""
        return self.process.poll() is None

    @property
    def is_ready(self) -> bool:
        """Whether it runs, and has said since its last start that it works."""
        return self.alive and self._ready in self.log_text()

    def start(self) -> None:
        """Start the process, also again after it has gone: a new incarnation, the same name."""
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            if self._real:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "celery", *self._arguments], stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log, cwd=self._directory, env=self._environ,
                    start_new_session=True, preexec_fn=die_with_parent(),
                )
            else:
                self.process = nursery().fork(
                    self._arguments, self.log_path, self._directory, self._environ
                )
        self._group.add(self.pid)

    def log_text(self, *, all_starts: bool = False) -> str:
        """The log since the last start, or of all of them."""
        with self.log_path.open("rb") as log:
            log.seek(0 if all_starts else self._log_start)
            return log.read().decode(errors="replace")

    def wait_for_log(self, text: str, timeout: float = 20.0) -> None:
        """Wait until the log has the text; fails at once if the process ends without it."""

        def seen_or_gone() -> bool:
            return text in self.log_text() or not self.alive

        wait_until(seen_or_gone, timeout, f"{text!r} in the log of {self.name}")
        if text not in self.log_text():
            raise AssertionError(
                f"{self.name} ended with {self.process.returncode} before it logged {text!r}:\n"
                f"{self.log_tail()}"
            )

    def wait_ready(self, timeout: float = _READY_SECONDS) -> Node:
        """Wait until it says that it works."""
        self.wait_for_log(self._ready, timeout)
        return self

    def children(self) -> list[int]:
        """Process ids of its living pool processes; empty once the parent has gone."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.pid).children(recursive=True)
            return [child.pid for child in found if child.status() != psutil.STATUS_ZOMBIE]
        return []

    def group(self) -> list[int]:
        """Process ids of all that it started and that still lives, orphans too."""
        return [
            process.pid for process in psutil.process_iter()
            if _session(process.pid) in self._group and _is_running(process)
        ]

    def term(self) -> None:
        """SIGTERM: a warm stop."""
        self._signal(signal.SIGTERM)

    def quit(self) -> None:
        """SIGQUIT: a cold stop."""
        self._signal(signal.SIGQUIT)

    def kill9(self) -> None:
        """SIGKILL the parent process only, and wait for its end; its children learn by themselves."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def stop_process(self, *, tree: bool = False) -> None:
        """SIGSTOP the parent, or everything it started."""
        self._signal(signal.SIGSTOP, tree=tree)

    def cont(self, *, tree: bool = False) -> None:
        """SIGCONT: undo `stop_process`."""
        self._signal(signal.SIGCONT, tree=tree)

    def wait(self, timeout: float = 20.0) -> int:
        """Wait for the parent's end; its exit status."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {timeout:g} s") from None

    def destroy(self) -> None:
        """SIGKILL everything that it started, and wait until it is gone."""

        def gone() -> bool:
            left = self.group()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not left

        if self.alive:
            self.process.kill()
        self.process.wait()
        wait_until(gone, 10.0, f"the end of all processes of {self.name}")

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of the log of all starts."""
        return "\n".join(self.log_text(all_starts=True).splitlines()[-lines:])

    def _signal(self, number: int, *, tree: bool = False) -> None:
        if not tree:
            if self.alive:
                self.process.send_signal(number)
            return
        for pid in self.group():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


class Cluster:
    """The nodes of one test, on one broker, with one history.

    Arguments:
        broker_url: Handed to every node by AFFINITY_TEST_BROKER.
        directory: Where nodes run and log.
        history_path: Handed to every node by AFFINITY_HISTORY.
        environ: More of the environment of every node.
    """

    def __init__(
        self, broker_url: str, directory: Path, history_path: Path,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.broker_url = broker_url
        self.directory = directory
        self.nodes: list[Node] = []
        self.environ = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            "PYTHONUNBUFFERED": "1",
            BROKER_VARIABLE: broker_url,
            HISTORY_VARIABLE: str(history_path),
            **(environ or {}),
        }

    def worker(
        self, app: str, name: str = "w1", *, queues: str | None = None, concurrency: int = 1,
        pool: str = "prefork", environ: Mapping[str, str] | None = None,
        extra: Sequence[str] = (), real: bool = False,
    ) -> Node:
        """Start a worker; `wait_ready` is the caller's, so that several start at once.

        Arguments:
            app: Module of the app, such as "acceptance.apps.plain".
            name: Name of the node; the host part is "@test" unless given.
            queues: Comma-separated; None: no -Q.
            concurrency: Size of the pool.
            pool: prefork, threads, solo or gevent.
            environ: More of the environment.
            extra: More of the command line.
            real: See `Node`; gevent's always are.
        """
        full_name = name if "@" in name else f"{name}@test"
        chosen = () if queues is None else ("-Q", queues)
        return self._add(
            full_name,
            ["-A", app, "worker", "-n", full_name, "-c", str(concurrency), "-P", pool,
             "-l", "INFO", *chosen, *extra],
            f"{full_name} ready.", environ, real or pool == "gevent",
        )

    def beat(
        self, app: str, name: str = "beat", *, scheduler: str | None = "affinity",
        environ: Mapping[str, str] | None = None, extra: Sequence[str] = (), real: bool = False,
    ) -> Node:
        """Start a beat; `scheduler` None is Celery's own."""
        chosen = () if scheduler is None else ("-S", scheduler)
        schedule = str(self.directory / f"{name}.schedule")
        return self._add(
            name, ["-A", app, "beat", "-l", "INFO", "-s", schedule, "--pidfile=", *chosen, *extra],
            "beat: Starting", environ, real,
        )

    def wait_ready(self, timeout: float = _READY_SECONDS) -> None:
        """Wait until every living node works."""
        for node in self.nodes:
            if node.alive:
                node.wait_ready(timeout)

    def destroy(self) -> None:
        """Kill every process of every node."""
        for node in self.nodes:
            node.destroy()

    def _add(
        self, name: str, arguments: Sequence[str], ready: str, environ: Mapping[str, str] | None,
        real: bool,
    ) -> Node:
        node = Node(
            name, arguments, ready=ready, environ={**self.environ, **(environ or {})},
            directory=self.directory, real=real,
        )
        self.nodes.append(node)
        return node


def is_gone(pid: int) -> bool:
    """Whether a process has ended, be it a zombie still."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return not _is_running(psutil.Process(pid))
    return True


def _session(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        return os.getsid(pid)
    return None


def _is_running(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False
