"""Metrics for Prometheus: ``celery -A app affinity exporter``, and a port of whoever schedules.

All figures are in the ledger, so any process can show them. The exporter shows all queues; a
scheduler those that it leads, so that no figure comes from two of them.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import click

from celery_affinity.connection import connect
from celery_affinity.exceptions import ConfigurationError
from celery_affinity.keys import Keys
from celery_affinity.ledger import Ledger
from celery_affinity.measures import Measures, QueueMeasures

if TYPE_CHECKING:
    from celery_affinity.prometheus import LedgerCollector, MetricsServer

__all__ = ("check_metrics_port", "collector_of", "exporter", "scheduler_metrics")

#: The exporter's port unless it is told another.
PORT = 9808


def check_metrics_port(settings: Any) -> None:
    """Refuse a port for metrics without the library that serves them.

    Raises:
        ConfigurationError: If prometheus-client is missing.
    """
    if settings.metrics_port is not None:
        _prometheus()


def _prometheus() -> Any:
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
    keys, client = Keys(affinity.settings.namespace), connect(affinity.redis_url)
    measures = Measures(client, keys, Ledger(client, keys, affinity.delivery))

    def read(top: int) -> list[QueueMeasures]:
        shown = affinity.settings.queue_names if led is None else led()
        return measures.read([q for q in affinity.settings.queues if q.name in shown], top)

    made: LedgerCollector = _prometheus().LedgerCollector(read, top_tags)
    return made


def scheduler_metrics(affinity: Any, led: Callable[[], Collection[str]]) -> MetricsServer | None:
    """Serve the figures of the led queues, if the settings name a port for that."""
    port = affinity.settings.metrics_port
    if port is None:
        return None
    server: MetricsServer = _prometheus().MetricsServer(collector_of(affinity, led=led), port)
    server.start()
    return server


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True)
@click.option("--address", default="0.0.0.0", show_default=True, help="Where to listen.")
@click.option(
    "--top-tags",
    type=click.IntRange(0, 100),
    default=0,
    show_default=True,
    help="Show so many of the longest backlogs by the name of their tag.",
)
@click.option("--once", is_flag=True, help="Print the metrics and end. Exit code 1: no Redis.")
@click.pass_context
def exporter(context: click.Context, port: int, address: str, top_tags: int, once: bool) -> None:
    """Serve the figures of all queues to Prometheus, until it is stopped."""
    affinity = getattr(context.obj.app, "celery_affinity", None)
    if affinity is None:
        raise ConfigurationError(
            "found no Affinity(app) in this app; name the app with -A, and add "
            "affinity = Affinity(app, queues=[AffinityQueue(...)]) to its module"
        )
    collector = collector_of(affinity, top_tags)
    if once:
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry()
        registry.register(collector)
        text = generate_latest(registry).decode()
        click.echo(text, nl=False)
        context.exit(0 if "celery_affinity_up 1.0" in text else 1)
    server = _prometheus().MetricsServer(collector, port, address)
    try:
        server.serve()
    except OSError as error:
        raise click.ClickException(f"cannot listen on {address}:{port}: {error}") from None
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    click.echo(f"Metrics of {', '.join(affinity.settings.queue_names)} on {address}:{server.port}.")
    stop.wait()
    server.stop()
