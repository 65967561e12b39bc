"""A RabbitMQ server of the tests' own, and the faults that may be done to it.

It has its own node name, directories and ports, and its own port mapper (epmd), which Erlang would
otherwise leave behind as a daemon. Both die with their parent. A start takes four seconds of CPU, so
that tests share one server and keep apart by virtual hosts.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING
from uuid import uuid4

from amqp.exceptions import AMQPError
from kombu import Connection
from kombu.exceptions import OperationalError

from celery_affinity.embedded import die_with_parent
from celery_affinity.exceptions import ConfigurationError

if TYPE_CHECKING:
    from typing import Self

__all__ = ("RabbitServer", "find_programs", "start_rabbit")

#: Debian's `rabbitmq-server` on PATH changes user, and is not the process that serves.
_DEBIAN = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
_HOST = "127.0.0.1"
#: With a load of 12 on two cores.
_START_SECONDS = 120.0
_COMMAND_SECONDS = 30.0
_POLL_SECONDS = 0.05
#: Outside the range of outgoing connections, one of which could have a stopped server's port.
_PORTS = range(20000, 32000)


def find_programs() -> dict[str, str]:
    """The paths of `rabbitmq-server`, `epmd` and `erl_call`.

    Raises:
        ConfigurationError: If one is not installed.
    """
    found = {name: shutil.which(name) for name in ("rabbitmq-server", "epmd", "erl_call")}
    if _DEBIAN.exists():
        found["rabbitmq-server"] = str(_DEBIAN)
    if missing := [name for name, path in found.items() if path is None]:
        raise ConfigurationError(
            f"RabbitMQ is not installed: {', '.join(missing)} not found, expected on PATH; "
            "apt-get install rabbitmq-server"
        )
    return {name: path for name, path in found.items() if path is not None}


class RabbitServer:
    """A running node: its address, its virtual hosts, and the faults that may be done to it.

    Arguments:
        programs: What `find_programs` found.
        directory: Where its data and logs are; `close` removes it.
    """

    def __init__(self, programs: dict[str, str], directory: Path) -> None:
        self.directory = directory
        self._programs = programs
        self._cookie = uuid4().hex
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.port, self._distribution_port, self._mapper_port = _free_ports(3)
        self.node_name = f"test{self.port}@localhost"
        self._environ = self._configure()
        atexit.register(self.close)

    def __repr__(self) -> str:
        return f"<RabbitServer {self.node_name} port={self.port} pid={self.pid}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The process id, or None while it does not run."""
        process = self._processes.get("server")
        return process.pid if process and process.poll() is None else None

    @property
    def version(self) -> str:
        """Such as "3.10.8"."""
        found = re.search(r'"([\d.]+)"', self.control("rabbit_misc:version()"))
        assert found is not None
        return found[1]

    def url(self, virtual_host: str = "/") -> str:
        """The ``amqp://`` URL of a virtual host."""
        return f"amqp://guest:guest@{_HOST}:{self.port}/{virtual_host}"

    def new_virtual_host(self) -> str:
        """Make an empty virtual host; its URL."""
        name = f"test-{uuid4().hex[:12]}"
        self.control(
            f'rabbit_vhost:add(<<"{name}">>, <<"tests">>), '
            f'rabbit_auth_backend_internal:set_permissions(<<"guest">>, <<"{name}">>, '
            '<<".*">>, <<".*">>, <<".*">>, <<"tests">>)'
        )
        return self.url(name)

    def queues(self, url: str) -> dict[str, int]:
        """How many messages the queues of a virtual host have, those that are out included.

        (Of quorum queues as it was some seconds ago.)
        """
        name = url.rpartition("/")[2]
        text = self.control(
            "lists:flatten([io_lib:format(\"~ts=~w;\", [element(4, Name), Count]) || "
            f'[{{name, Name}}, {{messages, Count}}] <- rabbit_amqqueue:info_all(<<"{name}">>, '
            "[name, messages])])"
        )
        return {name: int(count) for name, count in re.findall(r"([^;\"]+)=(\d+);", text)}

    def log_text(self) -> str:
        """What it has logged so far; first what it wrote before it could log."""
        files = (self.directory / "server.log", self.directory / "log" / f"{self.node_name}.log")
        return "".join(file.read_text(errors="replace") for file in files if file.exists())

    def control(self, expression: str) -> str:
        """What an Erlang expression answers in the server.

        `rabbitmqctl eval` does the same with a virtual machine of its own, which takes 0.5 s of CPU.

        Raises:
            AssertionError: If it fails.
        """
        done = subprocess.run(
            [self._programs["erl_call"], "-c", self._cookie, "-sname", self.node_name, "-e"],
            input=expression + ".\n", env=self._environ, cwd=self.directory, capture_output=True,
            text=True, timeout=_COMMAND_SECONDS,
        )
        assert done.stdout.startswith("{ok"), f"{expression}: {done.stdout}{done.stderr}"
        return done.stdout

    def spawn(self) -> None:
        """Start it; `lets_in` says when it is there."""
        mapper = self._processes.get("epmd")
        if mapper is None or mapper.poll() is not None:
            port = str(self._mapper_port)
            self._spawn("epmd", [self._programs["epmd"], "-port", port, "-address", _HOST])
        self._spawn("server", [self._programs["rabbitmq-server"]])

    def start(self) -> None:
        """Start it and wait until it lets clients in.

        Raises:
            ConfigurationError: If it ends or lets nobody in within 120 s.
        """
        self.spawn()
        deadline = time.monotonic() + _START_SECONDS
        while not self.lets_in():
            if self.pid is None or time.monotonic() > deadline:
                log = self.log_text()[-2000:]
                self._end("server", signal.SIGKILL)
                raise ConfigurationError(
                    f"rabbitmq-server on port {self.port} let nobody in within "
                    f"{_START_SECONDS:g} s. Its log ends:\n{log}"
                )
            time.sleep(_POLL_SECONDS)

    def lets_in(self) -> bool:
        """Whether a client can connect."""
        try:
            with Connection(self.url(), connect_timeout=2) as connection:
                connection.connect()
        except (OSError, AMQPError, OperationalError):
            return False
        return True

    def kill(self) -> None:
        """SIGKILL it, as a crash would.

        First it is made to note down which quorum queues there are, as it does every few seconds:
        RabbitMQ 3.10 does not find a queue again that was declared just before.
        """
        if self.pid is not None:
            self.control("[dets:sync(Table) || Table <- dets:all()]")
        self._end("server", signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP: it keeps its connections and answers nothing."""
        os.kill(self._running(), signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT: undo `pause`."""
        os.kill(self._running(), signal.SIGCONT)

    def close_connections(self) -> None:
        """Close all clients' connections, as an operator or an upgrade does."""
        self.control(
            '[rabbit_networking:close_connection(One, "a test closes it") || '
            "One <- rabbit_networking:connections()]"
        )

    @contextlib.contextmanager
    def memory_alarm(self) -> Iterator[None]:
        """While it is open the server takes no message from any publisher."""
        self.control("vm_memory_monitor:set_vm_memory_high_watermark({absolute, 1000000})")
        try:
            yield
        finally:
            self.control("vm_memory_monitor:set_vm_memory_high_watermark(0.4)")

    @contextlib.contextmanager
    def consumer_timeout(self, seconds: float) -> Iterator[None]:
        """Close channels that do not acknowledge a message for so long; for new channels only."""
        self._set(consumer_timeout=int(seconds * 1000), channel_tick_interval=500)
        try:
            yield
        finally:
            self._set(consumer_timeout=1_800_000, channel_tick_interval=60_000)

    def close(self) -> None:
        """SIGKILL it and its port mapper, and remove its files."""
        for name in ("server", "epmd"):
            self._end(name, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)
        atexit.unregister(self.close)

    def _configure(self) -> dict[str, str]:
        """Write its files; the environment of all its programs."""
        (self.directory / "plugins").write_text("[].\n")
        cookie = self.directory / ".erlang.cookie"
        cookie.write_text(self._cookie)
        cookie.chmod(0o400)
        (self.directory / "environment").touch()
        (self.directory / "rabbitmq.conf").write_text("disk_free_limit.absolute = 1MB\n")
        path = str(self.directory)
        return {
            **os.environ,
            "HOME": path,  # where the cookie is
            "ERL_EPMD_PORT": str(self._mapper_port),
            "ERL_EPMD_ADDRESS": _HOST,
            "RABBITMQ_NODENAME": self.node_name,
            "RABBITMQ_NODE_IP_ADDRESS": _HOST,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_MNESIA_BASE": f"{path}/data",
            "RABBITMQ_LOG_BASE": f"{path}/log",
            "RABBITMQ_CONFIG_FILE": f"{path}/rabbitmq",
            "RABBITMQ_CONF_ENV_FILE": f"{path}/environment",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{path}/plugins",
            # The script becomes the server, so that its process id is the one to kill.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environ,
                cwd=self.directory, start_new_session=True, preexec_fn=die_with_parent(),
            )

    def _set(self, **values: int) -> None:
        sets = [f"application:set_env(rabbit, {name}, {value})" for name, value in values.items()]
        self.control(", ".join(sets))

    def _running(self) -> int:
        assert self.pid is not None, "the server does not run"
        return self.pid

    def _end(self, name: str, number: int) -> None:
        if process := self._processes.get(name):
            if process.poll() is None:
                process.send_signal(number)
            process.wait()


def start_rabbit() -> RabbitServer:
    """Start a server and wait until it lets clients in.

    Raises:
        ConfigurationError: If it is not installed, or does not start.
    """
    server = RabbitServer(find_programs(), Path(tempfile.mkdtemp(prefix="celery-affinity-rabbit-")))
    try:
        server.start()
    except BaseException:
        server.close()
        raise
    return server


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        port = random.choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((_HOST, port))
            found.append(port)
    return found
