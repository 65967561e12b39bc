"""The exporter of metrics for Prometheus."""

from __future__ import annotations

import signal
import threading

import click

from celery_affinity.cli.group import affinity, bound
from celery_affinity.exceptions import OperationError
from celery_affinity.exporting import collector_of, prometheus_module

__all__ = ("exporter",)

#: Its port unless it is told another.
PORT = 9808


@affinity.command()
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
    here = bound(context)
    collector = collector_of(here, top_tags)
    if once:
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry()
        registry.register(collector)
        text = generate_latest(registry).decode()
        click.echo(text, nl=False)
        context.exit(0 if "celery_affinity_up 1.0" in text else 1)
    server = prometheus_module().MetricsServer(collector, port, address)
    try:
        server.serve()
    except OSError as error:
        raise OperationError(f"cannot listen on {address}:{port}: {error}") from None
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    click.echo(f"Metrics of {', '.join(here.settings.queue_names)} on {address}:{server.port}.")
    stop.wait()
    server.stop()
