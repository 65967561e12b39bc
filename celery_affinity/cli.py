"""``celery -A app affinity ...``: prints what the methods of `Affinity` return."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from celery_affinity.exceptions import ConfigurationError, UndeclaredQueueError
from celery_affinity.exporter import exporter

__all__ = ("affinity",)


@click.group()
def affinity() -> None:
    """Operate affinity queues."""


affinity.add_command(exporter)


@affinity.command()
@click.argument("queue")
@click.option("--timeout", default=60.0, show_default=True, help="Seconds for running tasks.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def evacuate(context: click.Context, queue: str, timeout: float, yes: bool, as_json: bool) -> None:
    """Write what waits in QUEUE back as plain Celery messages.

    Stops the queue's dispatch, waits for running tasks, and moves the rest, in order, for workers
    without the library. Exit code 1: tasks still run; nothing was moved; repeat it.
    """
    bound = _affinity(context)
    if bound.settings.queue(queue) is None:
        raise UndeclaredQueueError(queue, bound.settings.queue_names)
    if not yes:
        click.confirm(f"Stop {queue!r} and write its tasks back to the Celery queue?", abort=True)
    record = bound.evacuate(queue, timeout=timeout)
    if as_json:
        click.echo(json.dumps(asdict(record)))
    elif record.done:
        click.echo(
            f"{record.moved} messages written back. {queue!r} stays stopped until "
            f"`celery affinity resume {queue}`."
        )
    else:
        click.echo(
            f"{record.running} slots still hold a tag after {timeout:g} s; {record.waiting} "
            "entries wait. Nothing new is dispatched; repeat to go on, or resume."
        )
    context.exit(0 if record.done else 1)


@affinity.command()
@click.argument("queue")
@click.pass_context
def resume(context: click.Context, queue: str) -> None:
    """Let QUEUE work again after `evacuate`."""
    _affinity(context).resume(queue)
    click.echo(f"{queue!r} takes messages in and dispatches again.")


def _affinity(context: click.Context) -> Any:
    bound = getattr(context.obj.app, "celery_affinity", None)
    if bound is None:
        raise ConfigurationError(
            "found no Affinity(app) in this app; name the app with -A, and add "
            "affinity = Affinity(app, queues=[AffinityQueue(...)]) to its module"
        )
    return bound
