"""The connection to the ledger's Redis, and what is checked of it before anything runs."""

from __future__ import annotations

import logging
from urllib.parse import urlsplit

from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import NoPermissionError, ResponseError
from redis.retry import Retry

from celery_affinity.exceptions import ConfigurationError

__all__ = ("Reachability", "check_server", "connect", "same_database", "same_server")

#: Oldest Redis whose command set the scripts keep to (BLMOVE).
MINIMUM_VERSION = (6, 2)


def connect(url: str, *, socket_timeout: float = 10.0) -> Redis:
    """A client of its own for the ledger. Does no I/O.

    Arguments:
        url: ``redis://``, ``rediss://``, ``unix://`` or kombu's ``redis+socket://``.
        socket_timeout: Seconds after which an unanswered command fails and is sent again; the
            scripts answer a repeat as they did the first time.
    """
    if url.startswith("redis+socket://"):
        url = "unix://" + url[len("redis+socket://") :].replace("virtual_host=", "db=")
    return Redis.from_url(
        url,
        socket_timeout=socket_timeout,
        socket_connect_timeout=5.0,
        socket_keepalive=True,
        health_check_interval=25,
        retry=Retry(ExponentialBackoff(cap=1.0, base=0.05), 3),
        client_name="celery_affinity",
    )


def same_server(one: str, other: str) -> bool:
    """Whether two URLs name one database of one server, as far as their text tells."""

    def identity(url: str) -> tuple[str, int, str]:
        parts = urlsplit(url)
        db = parts.path.strip("/") or "0"
        host = {"localhost": "127.0.0.1"}.get(parts.hostname or "localhost", parts.hostname or "")
        return (host, parts.port or 6379, db)

    return identity(one) == identity(other)


def same_database(one: Redis, other: Redis) -> bool:
    """Whether two clients are connected to one database of one server, by its run id.

    Raises:
        redis.RedisError: If one of them cannot be asked.
    """

    def identity(client: Redis) -> tuple[str, int]:
        info = client.info("server")
        return str(info["run_id"]), int(client.connection_pool.connection_kwargs.get("db") or 0)

    return identity(one) == identity(other)


#: Servers that this process has warned of: a worker and its schedulers all check the same one.
_warned: set[str] = set()


def check_server(client: Redis, logger: logging.Logger) -> None:
    """Refuse a Redis that cannot keep the promises, warn of one that weakens them.

    Raises:
        ConfigurationError: If it is too old, may evict the ledger's keys, or does not tell.
    """
    try:
        info = client.info()
    except NoPermissionError as error:
        raise ConfigurationError(
            f"the ledger's Redis does not tell what it is ({error}); besides what Celery "
            "needs, its user needs INFO: ACL SETUSER <user> +info"
        ) from None
    url = str(client.connection_pool.connection_kwargs)
    found = str(info["redis_version"])
    numbers = tuple(int(part) for part in found.split(".")[:2])
    if numbers < MINIMUM_VERSION:
        raise ConfigurationError(
            f"the ledger's Redis has version {found}, expected 6.2 or newer: upgrade the server"
        )
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if int(info.get("maxmemory", 0)) and policy.startswith("allkeys"):
        raise ConfigurationError(
            f"the ledger's Redis evicts keys when memory is full (maxmemory-policy {policy}), "
            "which would lose tasks. Expected noeviction: CONFIG SET maxmemory-policy noeviction"
        )
    if policy != "noeviction":
        logger.warning(
            "The ledger's Redis has maxmemory-policy %s; set noeviction, so that a full memory "
            "refuses tasks instead of dropping state.",
            policy,
            extra={"action": "redis_check", "maxmemory_policy": policy},
        )
    if url not in _warned and not _is_persistent(client, info, logger):
        logger.warning(
            "The ledger's Redis keeps nothing across its restart (appendonly no): "
            "tasks that wait are lost with it. CONFIG SET appendonly yes.",
            extra={"action": "redis_check", "appendonly": False},
        )
    _warned.add(url)


def _is_persistent(client: Redis, info: dict[str, object], logger: logging.Logger) -> bool:
    if info.get("aof_enabled"):
        return True
    try:
        return bool(client.config_get("save").get("save"))
    except ResponseError as error:
        logger.warning(
            "Whether the ledger's Redis keeps its data across a restart could not be checked (%s). "
            "Expected: appendonly yes.",
            error,
            extra={"action": "redis_check", "appendonly": None},
        )
        return True


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
