"""Where the ledger is, and how messages get there from the app's broker."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from celery_affinity import address
from celery_affinity.amqp_broker import AmqpBroker
from celery_affinity.broker import Broker
from celery_affinity.connection import connect, place, same_database
from celery_affinity.delivery import CarriedDelivery, Delivery, SameRedisDelivery
from celery_affinity.exceptions import ConfigurationError
from celery_affinity.keys import Keys
from celery_affinity.redis_broker import RedisBroker
from celery_affinity.settings import AffinitySettings
from celery_affinity.topology import RedisNames

__all__ = ("broker_kind", "choose_delivery", "ledger_url")

logger = logging.getLogger(__name__)


def ledger_url(app: Any, settings: AffinitySettings) -> str:
    """URL of the ledger's Redis, all of it: `redis_url`, else the broker's. Does no I/O.

    Raises:
        ConfigurationError: If there is none, or the broker has no place for worker queues.
    """
    _refuse_cluster(app)
    kind = broker_kind(app)
    if kind not in ("redis", "amqp"):
        raise ConfigurationError(
            f"the broker is {kind!r}, which has no place for the queue of each worker; expected "
            "RabbitMQ (amqp://, amqps://) or a Redis or Valkey (redis://, rediss://, "
            "redis+socket://, sentinel://)"
        )
    if settings.redis_url is not None:
        return address.ledger_url(settings.redis_url, None, app.conf.broker_transport_options)
    if kind != "redis":
        raise ConfigurationError(
            f"the broker is {kind!r}; celery_affinity needs a Redis or Valkey for its ledger, "
            "beside it: set redis_url, such as Affinity(app, ..., redis_url='redis://host:6379/0')"
        )
    return _redis_broker_url(app)


def choose_delivery(app: Any, settings: AffinitySettings) -> Delivery:
    """How messages get into the ledger and out of it.

    Asks a Redis as the broker whether it is a node of a cluster; and both servers who they are if
    broker and ledger are Redis under two names.

    Raises:
        ConfigurationError: If the broker is such a node, or as `ledger_url` does.
    """
    url = ledger_url(app, settings)
    kind = broker_kind(app)
    keys = Keys(settings.namespace)
    names = RedisNames.from_transport_options(app.conf.broker_transport_options or {})
    broker: Broker
    if kind == "redis":
        brokers = _redis_broker_url(app)
        _refuse_node(brokers)
        # Into which of several shards a message belongs a carrier has to say.
        if settings.shards == 1 and _is_same(brokers, url, keys.prefix):
            return SameRedisDelivery(names)
        broker = RedisBroker(partial(connect, brokers), names)
    else:
        broker = AmqpBroker(
            _opener(app),
            lambda name: app.amqp.queues[name],
            settings.leader_ttl,
            max(60.0, 6 * settings.heartbeat_timeout),
        )
    return CarriedDelivery(broker, keys)


def _refuse_cluster(app: Any) -> None:
    url = str(app.conf.broker_write_url or app.conf.broker_url)
    if url.startswith(tuple(f"{scheme}://" for scheme in address.CLUSTERS)):
        raise ConfigurationError(
            "the broker is a Redis Cluster, which Celery cannot use. Let it have the ledger, by "
            "redis_url='redis+cluster://...', and set broker_url to RabbitMQ or another Redis"
        )


def _refuse_node(broker: str) -> None:
    """Refuse a node of a cluster that has a plain URL.

    It has to be asked before Celery connects: what it answers to Celery's own commands is an error
    of its channel, for which a worker connects anew without end.
    """
    client = _client(broker)
    client.set_retry(Retry(NoBackoff(), 1))
    try:
        if not int(client.info("cluster").get("cluster_enabled", 0)):
            return
        node = place(client)
    except RedisError:
        return  # away, and waited for as ever; or it does not tell
    finally:
        client.connection_pool.disconnect()
    raise ConfigurationError(
        f"the broker's Redis ({node}) is a node of a Redis Cluster, which Celery cannot use. Let "
        "the cluster have the ledger, by redis_url='redis+cluster://...', and set broker_url to "
        "RabbitMQ or another Redis"
    )


def broker_kind(app: Any) -> str:
    """What kombu calls the kind of broker: "redis", "amqp". Does no I/O."""
    return str(app.connection_for_write().transport.driver_type or "unknown")


def _redis_broker_url(app: Any) -> str:
    conf = app.conf
    url = str(conf.broker_write_url or conf.broker_url)
    return address.ledger_url(url, conf.broker_use_ssl, conf.broker_transport_options)


def _is_same(broker: str, ledger: str, prefix: str) -> bool:
    if address.Address.parse(ledger).is_cluster:
        return False
    if address.same_server(broker, ledger):
        return True
    clients = _client(broker), _client(ledger, prefix)
    try:
        return same_database(*clients)
    except RedisError as error:
        # Carried is right in both cases, and only slower if they are one after all.
        logger.warning(
            "Whether the broker's Redis is the ledger's could not be asked (%s): taken for two.",
            error,
            extra={"action": "redis_check"},
        )
        return False
    finally:
        for client in clients:
            client.connection_pool.disconnect()


def _client(url: str, prefix: str | None = None) -> Redis:
    return connect(url, prefix, socket_timeout=3.0)


def _opener(app: Any) -> Callable[..., Any]:
    def connection(transport_options: dict[str, Any], **options: Any) -> Any:
        return app.connection_for_write(transport_options=transport_options, **options)

    return connection
