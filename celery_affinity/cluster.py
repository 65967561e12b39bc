"""The ledger on a Redis Cluster: a connection to whoever owns its slot.

All keys of a namespace have one hash tag, so they are one slot, and one master at a time has all of
the ledger. A connection asks the nodes that it knows who that is, and goes there. An answer that
says "not here, or not now" ends it, and all others of its pool are of an old view and are closed
before they are used again; the error is that of a server which does not answer. Whoever waits for
Redis waits so for a failover and for a slot that moves, too.

Why not redis-py's RedisCluster: it follows ASK. While a slot is moved key by key, a script that is
sent with ASKING to the node that imports it would find an empty ledger there and begin a second
one, which the first is then copied over. Here nobody follows. The key that scripts are given, the
prefix, never exists, so the old owner answers ASK (or TRYAGAIN, where another key is there)
*before* a script runs: nothing is done by halves, and the ledger waits until all of it is there.
Commands on single keys are answered by the old owner as long as it has the key; it makes no new
one. (test_a_half_moved_slot_is_waited_for, test_a_slot_that_moves_under_load_...)

What a stale connection cannot be asked: a command without a key. The old owner answers INFO and
TIME as if nothing had happened; `connection.server_clock` sends a key with them
(test_who_is_asked_for_its_clock_is_the_owner).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from redis.cluster import parse_cluster_slots
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

__all__ = ("Owner", "ToOwner")

#: How errors begin that say: not here, or not now. redis-py 5.3 has no kinds of its own for them.
_ELSEWHERE = (
    "MOVED ",
    "ASK ",
    "TRYAGAIN ",
    "CLUSTERDOWN ",
    "MASTERDOWN ",
    "READONLY ",
    "UNBLOCKED ",
)
_ELSEWHERE_KINDS = (AskError, TryAgainError, ClusterDownError, ReadOnlyError)

Node = tuple[str, int]


class Owner:
    """Who has the slot of a prefix, as the nodes of its cluster say.

    Arguments:
        seeds: Nodes that are always asked, when those that they told of do not answer.
        open_: Makes a connection to a node.

    Does not: keep a connection, or an answer.
    """

    def __init__(self, seeds: Iterable[Node], prefix: str, open_: Callable[[Node], Any]) -> None:
        self._slot = key_slot(prefix.encode())
        self._seeds = tuple(seeds)
        self._nodes = self._seeds
        self._open = open_
        #: Grows when an answer has shown that connections made before may be to the wrong node.
        self.view = 0

    def find(self) -> Node:
        """Ask.

        Raises:
            redis.ConnectionError: If no node answers, or none knows an owner.
            redis.ResponseError: If one refuses to tell.
        """
        last: RedisError | None = None
        for node in self._nodes:
            try:
                ranges = self._ask(node)
            except RedisError as error:
                last = error
                continue
            found: list[Node] = [
                servers["primary"]
                for (first, end), servers in ranges.items()
                if first <= self._slot <= end
            ]
            if found:
                told = [one for servers in ranges.values() for one in _all(servers)]
                self._nodes = tuple(dict.fromkeys([node, *told, *self._seeds]))
                return found[0]
        if isinstance(last, ResponseError):
            raise last
        raise RedisConnectionError(
            f"no node of the cluster tells who owns slot {self._slot}"
            + (f": {last}" if last else "")
        )

    def doubt(self, view: int, knows: Node | None = None) -> None:
        """An answer was that of a wrong node: connections of that view are of no use.

        Arguments:
            view: The connection's; of several that find out, one is enough.
            knows: The node that says that another is the owner; it is asked first.
        """
        if view == self.view:
            self.view += 1
            if knows is None:
                self.ask_another()
            else:
                self._nodes = tuple(dict.fromkeys([knows, *self._nodes]))

    def ask_another(self) -> None:
        """What the first node says is of no use."""
        first, *others = self._nodes
        self._nodes = (*others, first)

    def _ask(self, node: Node) -> dict[tuple[int, int], Any]:
        connection = self._open(node)
        try:
            connection.connect()
            connection.send_command("CLUSTER", "SLOTS")
            return parse_cluster_slots(connection.read_response(), current_host=node[0])
        finally:
            connection.disconnect()


def _all(servers: dict[str, Any]) -> list[Node]:
    return [servers["primary"], *servers["replicas"]]


class ToOwner:
    """For a connection of redis-py: goes to the owner, and leaves it when it is that no more.

    It hooks in where redis-py makes the socket, so that each of its retries asks anew (looked at in
    5.3.1 and 8.1).
    """

    def __init__(self, *, owner: Owner, **options: Any) -> None:
        self._owner = owner
        self._view = owner.view
        super().__init__(**options)

    def connect(self) -> None:
        """Connect, unless that is done and still of today's view. Called whenever a pool lends."""
        if self._view != self._owner.view:
            self.disconnect()  # type: ignore[attr-defined]
        super().connect()  # type: ignore[misc]

    def _connect(self) -> Any:
        self._view = self._owner.view
        self.host, self.port = self._owner.find()
        try:
            return super()._connect()  # type: ignore[misc]
        except (OSError, RedisError):
            self._owner.ask_another()
            raise

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """An answer. One that says "not here" is a lost connection."""
        try:
            return super().read_response(*args, **kwargs)  # type: ignore[misc]
        except ResponseError as error:
            if not _is_elsewhere(error):
                raise
            self.disconnect()  # type: ignore[attr-defined]
            moved = isinstance(error, MovedError) or str(error).startswith("MOVED ")
            self._owner.doubt(self._view, (self.host, self.port) if moved else None)
            said = f"{type(error).__name__}: {error}"
            raise RedisConnectionError(
                f"the ledger's slot is not served by {self.host}:{self.port} now ({said})"
            ) from None


def _is_elsewhere(error: ResponseError) -> bool:
    if isinstance(error, _ELSEWHERE_KINDS):
        return True
    # What a script meets on Redis 6.2 is an error of another kind with the same text in it.
    return str(error).startswith(_ELSEWHERE) or "-READONLY " in str(error)
