"""Where the ledger is, and how messages get there from the app's broker."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from celery_affinity.amqp_broker import AmqpBroker
from celery_affinity.broker import Broker
from celery_affinity.connection import connect, same_database, same_server
from celery_affinity.delivery import CarriedDelivery, Delivery, SameRedisDelivery
from celery_affinity.exceptions import ConfigurationError
from celery_affinity.keys import Keys
from celery_affinity.redis_broker import RedisBroker
from celery_affinity.settings import AffinitySettings
from celery_affinity.topology import RedisNames

__all__ = ("choose_delivery", "ledger_url")

logger = logging.getLogger(__name__)


def ledger_url(app: Any, settings: AffinitySettings) -> str:
    """URL of the ledger's Redis: `redis_url`, else the broker's. Does no I/O.

    Raises:
        ConfigurationError: If there is none, or the broker has no place for worker queues.
    """
    kind, first = _broker(app)
    if kind not in ("redis", "amqp") or first.startswith("sentinel"):
        raise ConfigurationError(
            f"the broker is {_scheme(first) or kind!r}, which has no place for the queue of each "
            "worker; expected RabbitMQ (amqp://, amqps://) or one Redis or Valkey (redis://, "
            "rediss://, redis+socket://)"
        )
    if settings.redis_url is not None:
        return settings.redis_url
    if kind != "redis":
        raise ConfigurationError(
            f"the broker is {kind!r}; celery_affinity needs a Redis or Valkey for its ledger, "
            "beside it: set redis_url, such as Affinity(app, ..., redis_url='redis://host:6379/0')"
        )
    return first


def choose_delivery(app: Any, settings: AffinitySettings) -> Delivery:
    """How messages get into the ledger and out of it.

    Asks both servers who they are if broker and ledger are Redis under two names.
    """
    url = ledger_url(app, settings)
    kind, first = _broker(app)
    names = RedisNames.from_transport_options(app.conf.broker_transport_options or {})
    if kind == "redis" and _is_same(first, url):
        return SameRedisDelivery(names)
    broker: Broker = (
        RedisBroker(lambda: connect(first), names)
        if kind == "redis"
        else AmqpBroker(
            _opener(app),
            lambda name: app.amqp.queues[name],
            settings.leader_ttl,
            max(60.0, 6 * settings.heartbeat_timeout),
        )
    )
    return CarriedDelivery(broker, Keys(settings.namespace))


def _broker(app: Any) -> tuple[str, str]:
    kind = str(app.connection_for_write().transport.driver_type or "unknown")
    url = str(app.conf.broker_write_url or app.conf.broker_url or "")
    return kind, url.split(";")[0]


def _scheme(url: str) -> str:
    return url.partition("://")[0] if "://" in url else ""


def _is_same(broker: str, ledger: str) -> bool:
    if same_server(broker, ledger):
        return True
    try:
        return same_database(_client(broker), _client(ledger))
    except RedisError as error:
        # Carried is right in both cases, and only slower if they are one after all.
        logger.warning(
            "Whether the broker's Redis is the ledger's could not be asked (%s): taken for two.",
            error,
            extra={"action": "redis_check"},
        )
        return False


def _client(url: str) -> Redis:
    return connect(url, socket_timeout=3.0)


def _opener(app: Any) -> Callable[..., Any]:
    def connection(transport_options: dict[str, Any], **options: Any) -> Any:
        return app.connection_for_write(transport_options=transport_options, **options)

    return connection
