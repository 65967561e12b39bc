"""Three sentinels, a master and a replica of a test's own."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from celery_affinity.embedded import Server, die_with_parent, find_binary
from harness import wait_until

__all__ = ("Sentinels",)

NAME = "mymaster"


class Sentinels:
    """All five, as processes of this one.

    Arguments:
        down_after_ms: After how long without an answer a master is taken for down.
    """

    def __init__(self, directory: Path, down_after_ms: int = 1000) -> None:
        self._directory = directory
        self.first = self._server("first")
        self.second = self._server("second", "--replicaof", "127.0.0.1", str(self.first.port))
        self._processes: list[subprocess.Popen[bytes]] = []
        self.ports = [free_port() for _ in range(3)]
        for port in self.ports:
            self._sentinel(port, down_after_ms)
        self.wait_for_the_replica()
        wait_until(self._know_each_other, what="three sentinels that know each other")

    @property
    def url(self) -> str:
        return ";".join(f"sentinel://127.0.0.1:{port}" for port in self.ports)

    @property
    def options(self) -> dict[str, Any]:
        return {"master_name": NAME}

    def wait_for_the_replica(self) -> None:
        """Wait until the replica has all that the master has."""
        wait_until(
            lambda: self.second.client().info("replication").get("master_link_status") == "up",  # type: ignore[union-attr]
            what="a replica that is in step",
        )

    def wait_for_failover(self) -> None:
        """Wait until the second server is the master, and the sentinels say so."""
        wait_until(
            lambda: all(self._master(port) == self.second.port for port in self.ports),
            30, "a new master",
        )

    def wait_for_demotion(self) -> None:
        """Wait until the first server has been made a replica."""
        wait_until(lambda: self.first.client().role()[0] == b"slave", 30, "a demoted master")

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self.first.close()
        self.second.close()

    def _server(self, name: str, *arguments: str) -> Server:
        directory = self._directory / name
        directory.mkdir(parents=True)
        found = Server(
            find_binary(), directory, None,
            ("--repl-diskless-sync-delay", "0", "--repl-timeout", "5", *arguments),
        )
        found.start()
        return found

    def _sentinel(self, port: int, down_after_ms: int) -> None:
        conf = self._directory / f"{port}.conf"
        conf.write_text(
            f"bind 127.0.0.1\nport {port}\ndir {self._directory}\n"
            f"sentinel monitor {NAME} 127.0.0.1 {self.first.port} 2\n"
            f"sentinel down-after-milliseconds {NAME} {down_after_ms}\n"
            f"sentinel failover-timeout {NAME} 10000\n"
        )
        with (self._directory / f"{port}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    [str(find_binary()), str(conf), "--sentinel"], stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log, start_new_session=True, preexec_fn=die_with_parent(),
                )
            )

    def _master(self, port: int) -> int | None:
        try:
            client: Any = Redis(port=port)
            return int(client.sentinel_get_master_addr_by_name(NAME)[1])
        except (RedisError, TypeError):
            return None

    def _know_each_other(self) -> bool:
        try:
            for port in self.ports:
                client: Any = Redis(port=port)
                found = client.sentinel_masters()[NAME]
                if found["num-other-sentinels"] != 2 or found["num-slaves"] != 1:
                    return False
        except RedisError:
            return False
        return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
