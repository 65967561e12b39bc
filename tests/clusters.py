"""Three masters of a Redis Cluster, of a test's own, and replicas of them."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redis import Redis
from redis.cluster import parse_cluster_slots
from redis.crc import key_slot
from redis.exceptions import RedisError

from celery_affinity.embedded import Server, find_binary
from certificates import Authority
from harness import wait_until

__all__ = ("RedisCluster", "SLOTS")

SLOTS = 16384


class RedisCluster:
    """Masters of a third of the slots each, as processes of this one.

    Arguments:
        node_timeout_ms: After how long without an answer a node is taken for down.
        replicas: Whether each master has one.
        authority: Signs the servers' certificate, if they are to speak TLS.
        arguments: More of each server's command line.
    """

    def __init__(
        self, directory: Path, *, node_timeout_ms: int = 1000, replicas: bool = False,
        authority: Authority | None = None, arguments: Sequence[str] = (),
    ) -> None:
        self._directory = directory
        #: What stands before "@" in `url`, with it.
        self.user = ""
        self._tls: tuple[str, ...] = ()
        #: By which the nodes know each other: that of TLS, if they have one.
        self._ports: dict[Server, int] = {}
        if authority is not None:
            key, certificate = authority.sign("server")
            self._tls = (
                "--tls-cert-file", str(certificate), "--tls-key-file", str(key),
                "--tls-ca-cert-file", str(authority.certificate), "--tls-cluster", "yes",
                "--tls-replication", "yes", "--tls-auth-clients", "optional",
            )
        self._arguments = (
            "--cluster-enabled", "yes", "--cluster-node-timeout", str(node_timeout_ms),
            "--repl-diskless-sync-delay", "0", *arguments,
        )
        self.masters = [self._server(f"master{number}") for number in range(3)]
        self.replicas = [self._server(f"replica{number}") for number in range(3 if replicas else 0)]
        self._form()

    @property
    def servers(self) -> list[Server]:
        return [*self.masters, *self.replicas]

    @property
    def url(self) -> str:
        """Names two of the masters, so that one of them may die."""
        scheme = "rediss+cluster" if self._tls else "redis+cluster"
        return ";".join(f"{scheme}://{self.user}127.0.0.1:{self._ports[one]}" for one in self.masters[:2])

    def owner(self, prefix: str) -> Server:
        """The server that has the prefix' slot, as the first living one says."""
        slot = key_slot(prefix.encode())
        port = next(filter(None, (owners_port(one, slot) for one in self.servers)))
        return next(one for one in self.servers if one.port == port)

    def replica_of(self, master: Server) -> Server:
        """Its replica."""
        return self.replicas[self.masters.index(master)]

    def wait_for_failover(self, prefix: str, successor: Server) -> None:
        """Wait until all that live say that the successor has the prefix' slot."""
        slot = key_slot(prefix.encode())
        living = [one for one in self.servers if one.pid is not None]
        wait_until(
            lambda: all(owners_port(one, slot) == successor.port for one in living), 30, "a new master"
        )

    def others(self, prefix: str) -> list[Server]:
        """The masters that do not have it."""
        return [one for one in self.masters if one is not self.owner(prefix)]

    def keys(self, prefix: str) -> list[bytes]:
        """All keys that begin so, wherever they are."""
        return [key for one in self.masters for key in one.client().scan_iter(f"{prefix}*")]

    def close(self) -> None:
        for one in self.servers:
            one.close()

    # Moving a slot, as redis-cli --cluster reshard does

    def begin_move(self, prefix: str, target: Server) -> Server:
        """Mark the slot as moving to that server; the one that it leaves."""
        slot, source = key_slot(prefix.encode()), self.owner(prefix)
        call(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", node_id(source))
        call(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", node_id(target))
        return source

    def move_keys(self, prefix: str, source: Server, target: Server, most: int = 1_000_000) -> list[bytes]:
        """Move so many keys of the slot, one by one; which went."""
        slot, moved = key_slot(prefix.encode()), []
        while len(moved) < most and (found := call(source, "CLUSTER", "GETKEYSINSLOT", slot, 1)):
            call(source, "MIGRATE", "127.0.0.1", self._ports[target], found[0], 0, 5000)
            moved += found
        return moved

    def end_move(self, prefix: str, source: Server, target: Server) -> None:
        """The slot is the target's, and all masters know that."""
        slot, owner = key_slot(prefix.encode()), node_id(target)
        for one in (target, source, *(two for two in self.masters if two not in (target, source))):
            call(one, "CLUSTER", "SETSLOT", slot, "NODE", owner)

    def move(self, prefix: str, target: Server) -> None:
        """All of it at once."""
        source = self.begin_move(prefix, target)
        self.move_keys(prefix, source, target)
        self.end_move(prefix, source, target)

    def _server(self, name: str) -> Server:
        directory = self._directory / name
        directory.mkdir(parents=True)
        port = bus = free_port()
        tls: tuple[str, ...] = ()
        if self._tls:
            bus = free_port()
            tls = ("--tls-port", str(bus), *self._tls)
        found = Server(find_binary(), directory, port, (*self._arguments, *tls))
        found.start()
        self._ports[found] = bus
        return found

    def _form(self) -> None:
        first, *others = self.servers
        share = -(-SLOTS // len(self.masters))
        for number, one in enumerate(self.masters):
            slots = range(number * share, min((number + 1) * share, SLOTS))
            call(one, "CLUSTER", "ADDSLOTS", *slots)
        for number, one in enumerate(self.servers, 1):
            call(one, "CLUSTER", "SET-CONFIG-EPOCH", number)
        for one in others:
            call(first, "CLUSTER", "MEET", "127.0.0.1", self._ports[one])
        wait_until(lambda: all(self._knows_all(one) for one in self.servers), 30, "nodes that know each other")
        for master, replica in zip(self.masters, self.replicas, strict=False):
            call(replica, "CLUSTER", "REPLICATE", node_id(master))
        wait_until(lambda: all(_is_ok(one) for one in self.servers), 30, "a cluster")
        wait_until(lambda: all(_in_step(one) for one in self.replicas), 30, "replicas that are in step")

    def _knows_all(self, server: Server) -> bool:
        lines = call(server, "CLUSTER", "NODES").decode().splitlines()
        return len(lines) == len(self.servers) and not any("handshake" in line for line in lines)


def owners_port(server: Server, slot: int) -> int | None:
    """Who has the slot, as that server says."""
    try:
        ranges = parse_cluster_slots(call(server, "CLUSTER", "SLOTS"))
    except RedisError:
        return None
    found = [two["primary"][1] for (first, end), two in ranges.items() if first <= slot <= end]
    return int(found[0]) if found else None


def call(server: Server, *command: Any) -> Any:
    """A command's answer, as it is."""
    client: Any = Redis(port=server.port)
    with client:
        connection = client.connection_pool.get_connection()
        try:
            connection.send_command(*command)
            return connection.read_response()
        finally:
            client.connection_pool.release(connection)


def node_id(server: Server) -> str:
    """What its cluster calls it."""
    return str(call(server, "CLUSTER", "MYID").decode())


def free_port() -> int:
    """One whose bus port, 10,000 above, is free too; both below those that are given out."""
    while True:
        port = random.randrange(12_000, 22_000)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as bus:
            one.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + 10_000))
            return port


def _is_ok(server: Server) -> bool:
    return b"cluster_state:ok" in call(server, "CLUSTER", "INFO")


def _in_step(replica: Server) -> bool:
    info: Any = replica.client().info("replication")
    return info.get("master_link_status") == "up"
