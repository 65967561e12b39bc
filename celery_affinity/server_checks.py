"""What is checked of the ledger's Redis before anything runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from redis import Redis
from redis.exceptions import NoPermissionError, RedisError, ResponseError
from redis.sentinel import SentinelConnectionPool

from celery_affinity.connection import is_by_cluster, place
from celery_affinity.exceptions import ConfigurationError

__all__ = (
    "MINIMUM_VERSION",
    "check_failover",
    "check_server",
    "refusal_of_cluster",
    "too_short_a_timeout",
)

#: Oldest Redis whose command set the scripts keep to (BLMOVE).
MINIMUM_VERSION = (6, 2)
#: Times of cluster-node-timeout after which a dead master is taken for down at the latest. (It was
#: replaced 2.2 to 2.6 s after a kill -9 with a timeout of 1 s, 5.9 to 6.7 s with one of 4 s.)
CLUSTER_PATIENCE = 1.5
#: Seconds that a failover takes once the master is taken for down (1.3 to 2.1 were measured).
FAILOVER_SECONDS = 3.0

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
        needed = "+info +cluster|slots" if is_by_cluster(client) else "+info"
        raise ConfigurationError(
            f"the ledger's Redis does not tell what it is ({error}); besides what Celery "
            f"needs, its user needs: ACL SETUSER <user> {needed}"
        ) from None
    except ResponseError as error:
        if "cluster support disabled" not in str(error):
            raise
        raise ConfigurationError(
            "redis_url says that the ledger's Redis is a cluster, and the server is not a node of "
            "one. Set redis_url='redis://<host>:<port>/<db>', or leave it out if that is the broker"
        ) from None
    if refused := refusal_of_cluster(client, info):
        raise ConfigurationError(refused)
    server = place(client)
    found = str(info["redis_version"])
    numbers = tuple(int(part) for part in found.split(".")[:2])
    if numbers < MINIMUM_VERSION:
        raise ConfigurationError(
            f"the ledger's Redis has version {found}, expected 6.2 or newer: upgrade the server"
        )
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if int(info.get("maxmemory", 0)) and policy.startswith("allkeys"):
        raise ConfigurationError(
            f"the ledger's Redis ({server}) evicts keys when memory is full (maxmemory-policy "
            f"{policy}), which would lose tasks. Expected noeviction: "
            "CONFIG SET maxmemory-policy noeviction"
        )
    if policy != "noeviction":
        logger.warning(
            "The ledger's Redis (%s) has maxmemory-policy %s; set noeviction, so that a full "
            "memory refuses tasks instead of dropping state.",
            server,
            policy,
            extra={"action": "redis_check", "maxmemory_policy": policy},
        )
    if server not in _warned and not _is_persistent(client, info, server, logger):
        logger.warning(
            "The ledger's Redis (%s) keeps nothing across its restart (appendonly no): "
            "tasks that wait are lost with it. CONFIG SET appendonly yes.",
            server,
            extra={"action": "redis_check", "appendonly": False},
        )
    _warned.add(server)


def check_failover(client: Redis, heartbeat_timeout: float) -> None:
    """Refuse a heartbeat_timeout that every failover would be longer than.

    Raises:
        ConfigurationError: With the least that would do.
    """
    if found := too_short_a_timeout(client, heartbeat_timeout):
        raise ConfigurationError(". ".join(found))


def too_short_a_timeout(client: Redis, heartbeat_timeout: float) -> tuple[str, str] | None:
    """What is wrong with a heartbeat_timeout, and what to do; None if nothing is, or nobody tells.

    By what Sentinel or the cluster says of a failover. Says nothing if no sentinel answers, or
    there is none.
    """
    pool: Any = client.connection_pool
    if is_by_cluster(client):
        return _by_cluster(client, heartbeat_timeout)
    if not isinstance(pool, SentinelConnectionPool):
        return None
    for sentinel in pool.sentinel_manager.sentinels:
        try:
            found = sentinel.sentinel_masters()[pool.service_name]
            asked = place(sentinel)
        except (RedisError, KeyError):
            continue
        down_after = int(found["down-after-milliseconds"]) / 1000
        least = down_after + FAILOVER_SECONDS
        if heartbeat_timeout >= least:
            return None
        return (
            f"heartbeat_timeout ({heartbeat_timeout:g} s) is shorter than a failover: Sentinel "
            f"({asked}) takes the master {pool.service_name!r} for down after {down_after:g} s, "
            f"and the change takes some {FAILOVER_SECONDS:g} s more",
            f"Set heartbeat_timeout to {least:g} s or more, or lower down-after-milliseconds",
        )
    return None


def _by_cluster(client: Redis, heartbeat_timeout: float) -> tuple[str, str] | None:
    try:
        found = client.config_get("cluster-node-timeout")
        asked = place(client)
    except ResponseError:
        return None  # hosted ones do not tell
    down_after = int(found.get("cluster-node-timeout") or 0) / 1000
    least = CLUSTER_PATIENCE * down_after + FAILOVER_SECONDS
    if heartbeat_timeout >= least:
        return None
    return (
        f"heartbeat_timeout ({heartbeat_timeout:g} s) is shorter than a failover: the cluster "
        f"(asked {asked}) takes a master for down after {down_after:g} s, and until another is "
        f"elected some {least - down_after:g} s more may pass",
        f"Set heartbeat_timeout to {least:g} s or more, or lower cluster-node-timeout",
    )


def refusal_of_cluster(client: Redis, info: Mapping[str, Any]) -> str | None:
    """Why a node of a cluster cannot be used as if it were alone; None if it is not.

    Arguments:
        info: Its INFO.
    """
    if is_by_cluster(client) or not int(info.get("cluster_enabled", 0)):
        return None
    return (
        "the ledger's Redis is a node of a Redis Cluster. Set "
        "redis_url='redis+cluster://<host>:<port>', and as the broker another Redis or RabbitMQ: "
        "Celery cannot use a cluster as its broker"
    )


def _is_persistent(
    client: Redis, info: dict[str, object], server: str, logger: logging.Logger
) -> bool:
    if info.get("aof_enabled"):
        return True
    try:
        return bool(client.config_get("save").get("save"))
    except ResponseError as error:
        logger.warning(
            "Whether the ledger's Redis (%s) keeps its data across a restart could not be checked "
            "(%s). Expected: appendonly yes.",
            server,
            error,
            extra={"action": "redis_check", "appendonly": None},
        )
        return True
