"""The connection to the ledger's Redis, and who it is that answers there."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from redis import ConnectionPool, Redis
from redis.backoff import ExponentialBackoff
from redis.connection import (
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
    parse_url,
)
from redis.exceptions import AskError, ReadOnlyError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry
from redis.sentinel import (
    Sentinel,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)

from celery_affinity.address import Address
from celery_affinity.cluster import Owner, ToOwner
from celery_affinity.exceptions import ConfigurationError

__all__ = ("Reachability", "connect", "is_by_cluster", "place", "same_database", "server_clock")

#: Seconds in which a server has to take a connection.
CONNECT_SECONDS = 5.0
#: Seconds in which a sentinel has to answer before the next one is asked.
SENTINEL_SECONDS = 1.0
#: Seconds in which a node of a cluster has to answer before the next one is asked.
ASK_SECONDS = 1.0


class _Reconnecting:
    """For a connection: a server that has become a replica is left, not talked to for ever.

    redis-py does so itself only with sentinels; and what a script meets on Redis 6.2 is an error
    of another kind with the same text in it.

    And one that sends us to another node is named: redis-py's text is a slot and an address.
    """

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_response(*args, **kwargs)  # type: ignore[misc]
        except ResponseError as error:
            # MOVED is a kind of ASK to redis-py.
            if isinstance(error, AskError):
                raise ResponseError(
                    f"{_place(self)} is a node of a Redis Cluster, and another one has this key "
                    f"({error}). If it is the ledger's, set redis_url='redis+cluster://...'; the "
                    "broker has to be RabbitMQ or another Redis"
                ) from None
            if not isinstance(error, ReadOnlyError) and "-READONLY " not in str(error):
                raise
            self.disconnect()  # type: ignore[attr-defined]
            raise RedisConnectionError("it has become a replica, which takes no writes") from None


class _Connection(_Reconnecting, Connection):
    pass


class _TlsConnection(_Reconnecting, SSLConnection):
    pass


class _SocketConnection(_Reconnecting, UnixDomainSocketConnection):
    pass


class _ManagedConnection(_Reconnecting, SentinelManagedConnection):
    pass


class _ManagedTlsConnection(_Reconnecting, SentinelManagedSSLConnection):
    pass


class _OwnersConnection(ToOwner, Connection):
    pass


class _OwnersTlsConnection(ToOwner, SSLConnection):
    pass


def connect(url: str, prefix: str | None = None, *, socket_timeout: float = 10.0) -> Redis:
    """A client of its own for the ledger, or for a broker. Does no I/O.

    Arguments:
        url: See address.py.
        prefix: What the keys begin with that are asked for (`Keys.prefix`): of a cluster the client
            is connected to the master that owns their slot. A broker needs none.
        socket_timeout: Seconds after which an unanswered command fails and is sent again; the
            scripts answer a repeat as they did the first time.

    Raises:
        ConfigurationError: If the URL cannot be taken apart, or is of another kind; or if it is a
            cluster's, and no prefix is given.
    """
    address = Address.parse(url)
    options: dict[str, Any] = {
        "db": address.db,
        "username": address.username,
        "password": address.password,
        "socket_timeout": socket_timeout,
        "health_check_interval": 25,
        "retry": Retry(ExponentialBackoff(cap=1.0, base=0.05), 3),
        # redis-py 5.3 repeats a command only for errors that are named.
        "retry_on_error": [RedisConnectionError, RedisTimeoutError],
        "client_name": "celery_affinity",
        **_typed(address.other_options),
    }
    if address.scheme == "unix":
        pool = ConnectionPool(connection_class=_SocketConnection, path=address.path, **options)
        return Redis(connection_pool=pool)
    options |= {"socket_connect_timeout": CONNECT_SECONDS, "socket_keepalive": True}
    if address.is_tls:
        # Not every redis-py checks the name by itself.
        options |= {"ssl_check_hostname": True, **address.tls_options}
    if address.scheme == "sentinel":
        return _by_sentinel(address, options)
    if address.is_cluster:
        return _by_cluster(address, prefix, options)
    host, port = address.hosts[0]
    kind = _TlsConnection if address.is_tls else _Connection
    return Redis(connection_pool=ConnectionPool(kind, host=host, port=port, **options))


def _by_sentinel(address: Address, options: dict[str, Any]) -> Redis:
    kind = _ManagedTlsConnection if address.is_tls else _ManagedConnection
    sentinels: Any = Sentinel
    found: Redis = sentinels(address.hosts, sentinel_kwargs=_to_sentinels(address)).master_for(
        address.master_name, connection_class=kind, **options
    )
    return found


def _by_cluster(address: Address, prefix: str | None, options: dict[str, Any]) -> Redis:
    if prefix is None:
        raise ConfigurationError("the broker is a Redis Cluster, which Celery cannot use")
    patience = {"socket_timeout": ASK_SECONDS, "socket_connect_timeout": ASK_SECONDS}
    asked: Any = SSLConnection if address.is_tls else Connection
    asking = {**options, **patience, "retry": None, "retry_on_error": []}
    owner = Owner(address.hosts, prefix, lambda node: asked(host=node[0], port=node[1], **asking))
    kind = _OwnersTlsConnection if address.is_tls else _OwnersConnection
    return Redis(connection_pool=ConnectionPool(kind, owner=owner, **options))


def _to_sentinels(address: Address) -> dict[str, Any]:
    patience = {"socket_timeout": SENTINEL_SECONDS, "socket_connect_timeout": SENTINEL_SECONDS}
    return {**patience, **_typed(address.sentinel_options)}


def _typed(options: Mapping[str, str]) -> dict[str, Any]:
    """Options from a URL's query, of the types that redis-py wants them to have."""
    parse: Any = parse_url
    found: dict[str, Any] = parse("redis://?" + urlencode(options))
    return found


def server_clock(client: Redis, key: str) -> tuple[str, float]:
    """Run id of the server that has a key now, and its clock in seconds, in one round trip.

    Of a cluster, a server that had the key would answer both; but not the look for the key.

    Raises:
        redis.RedisError: If it cannot be asked, or the key's slot is being moved.
    """
    with client.pipeline(transaction=False) as pipe:
        pipe.exists(key)
        pipe.info("server")
        pipe.time()
        _, info, (seconds, micros) = pipe.execute()
    return str(info["run_id"]), seconds + micros / 1e6


def place(client: Redis) -> str:
    """Which server a client asks now: host and port, or a socket's path. Connects if need be.

    Raises:
        redis.RedisError: If that is not possible.
    """
    connection = client.connection_pool.get_connection()
    try:
        return _place(connection)
    finally:
        client.connection_pool.release(connection)


def _place(connection: Any) -> str:
    return getattr(connection, "path", "") or f"{connection.host}:{connection.port}"


def is_by_cluster(client: Redis) -> bool:
    """Whether a client goes to the owner of a slot of a cluster."""
    return issubclass(client.connection_pool.connection_class, ToOwner)


def same_database(one: Redis, other: Redis) -> bool:
    """Whether two clients are connected to one database of one server, by its run id.

    Raises:
        redis.RedisError: If one of them cannot be asked.
    """

    def identity(client: Redis) -> tuple[str, int]:
        info = client.info("server")
        return str(info["run_id"]), int(client.connection_pool.connection_kwargs.get("db") or 0)

    return identity(one) == identity(other)


class Reachability:
    """Logs one line when a server stops answering or refuses, and one when it answers again.

    Arguments:
        who: What waits meanwhile, such as "heartbeats".
        server: What it waits for.
    """

    def __init__(self, logger: logging.Logger, who: str, server: str = "Redis") -> None:
        self._logger = logger
        self._who = who
        self._server = server
        self._reachable = True

    def answered(self) -> None:
        """A command was answered."""
        if not self._reachable:
            self._reachable = True
            self._logger.warning(
                "%s answers again: %s go on.",
                self._server,
                self._who,
                extra={"action": "redis_back"},
            )

    def unanswered(self, error: Exception) -> None:
        """A command was not answered."""
        if self._reachable:
            self._reachable = False
            refuses = isinstance(error, ResponseError)
            self._logger.warning(
                "%s %s (%s): %s wait.",
                self._server,
                "answers with an error" if refuses else "does not answer",
                error,
                self._who,
                extra={"action": "redis_gone"},
            )
