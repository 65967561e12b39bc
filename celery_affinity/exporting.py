"""Metrics for Prometheus: ``celery -A app affinity exporter``, and a port of whoever schedules.

All figures are in the ledger, so any process can show them. The exporter shows all queues; a
scheduler those that it leads, so that no figure comes from two of them. A queue's figures are those
of all its shards together: whoever leads the first one shows them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from celery_affinity.exceptions import ConfigurationError
from celery_affinity.measures import Measures, QueueMeasures
from celery_affinity.shards import Shards

if TYPE_CHECKING:
    from celery_affinity.prometheus import LedgerCollector, MetricsServer

__all__ = ("check_metrics_port", "collector_of", "prometheus_module", "scheduler_metrics")


def check_metrics_port(settings: Any) -> None:
    """Refuse a port for metrics without the library that serves them.

    Raises:
        ConfigurationError: If prometheus-client is missing.
    """
    if settings.metrics_port is not None:
        prometheus_module()


def prometheus_module() -> Any:
    """celery_affinity.prometheus.

    Raises:
        ConfigurationError: If prometheus-client is missing.
    """
    try:
        from celery_affinity import prometheus
    except ImportError as error:
        raise ConfigurationError(
            f"metrics need prometheus-client ({error}): pip install 'celery-affinity[prometheus]'"
        ) from None
    return prometheus


def collector_of(
    affinity: Any, top_tags: int = 0, led: Callable[[], Collection[str]] | None = None
) -> LedgerCollector:
    """What a Prometheus registry asks for an app's figures.

    Arguments:
        affinity: The app's `Affinity`.
        top_tags: So many of the longest backlogs are shown by the name of their tag.
        led: Names of the queues to show; default: all.

    Raises:
        ConfigurationError: If prometheus-client is missing.
    """
    measures = Measures(
        Shards(affinity.redis_url, affinity.settings.namespace, affinity.delivery)
    )

    def read(top: int) -> list[QueueMeasures]:
        shown = affinity.settings.queue_names if led is None else led()
        return measures.read([q for q in affinity.settings.queues if q.name in shown], top)

    made: LedgerCollector = prometheus_module().LedgerCollector(read, top_tags)
    return made


def scheduler_metrics(affinity: Any, led: Callable[[], Collection[str]]) -> MetricsServer | None:
    """Serve the figures of the led queues, if the settings name a port for that."""
    port = affinity.settings.metrics_port
    if port is None:
        return None
    server: MetricsServer = prometheus_module().MetricsServer(collector_of(affinity, led=led), port)
    server.start()
    return server
