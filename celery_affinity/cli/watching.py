"""Commands that watch: top, alive, doctor."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from celery_affinity.cli.group import affinity, bound, json_option
from celery_affinity.cli.reading import (
    QUEUE_COLUMNS,
    SLOT_COLUMNS,
    TAG_COLUMNS,
    queue_row,
    slot_rows,
    tag_row,
)
from celery_affinity.cli.rendering import duration, lines, print_json, rich_table

if TYPE_CHECKING:
    from celery_affinity.app import Affinity

__all__ = ()

#: A table's columns and rows.
Table = tuple[tuple[str, ...], list[tuple[object, ...]]]


@affinity.command()
@click.option("--interval", default=1.0, show_default=True, type=click.FloatRange(0.1))
@click.option("-n", "rounds", type=click.IntRange(1), help="So many times; else until Ctrl-C.")
@click.option("--tags", "shown_tags", default=10, show_default=True, type=click.IntRange(1, 100))
@click.pass_context
def top(context: click.Context, interval: float, rounds: int | None, shown_tags: int) -> None:
    """Watch queues, slots and the longest backlogs, live."""
    here = bound(context)
    with _screen() as show:
        while True:
            show(_tables(here, shown_tags))
            rounds = rounds - 1 if rounds else rounds
            if rounds == 0:
                return
            try:
                time.sleep(interval)
            except KeyboardInterrupt:
                return


def _tables(here: Affinity, shown_tags: int) -> list[Table]:
    workers = here.workers()
    names = {worker.worker_id: worker.name for worker in workers}
    queues = here.settings.queue_names
    longest = [tag_row(record, names) for q in queues for record in here.top_tags(q, shown_tags)]
    return [
        (QUEUE_COLUMNS, [queue_row(here.stats(queue)) for queue in queues]),
        (SLOT_COLUMNS, [row for worker in workers for row in slot_rows(worker)]),
        (TAG_COLUMNS, longest),
    ]


def _screen() -> Any:
    """A context whose value shows tables: in place on a terminal with rich, else one by one."""
    if sys.stdout.isatty() and rich_table(("",), []) is not None:
        return _RichScreen()
    return nullcontext(_echo)


def _echo(tables: list[Table]) -> None:
    click.clear()
    for columns, rows in tables:
        click.echo("\n".join([*lines(columns, rows), ""]))


class _RichScreen:
    """rich's live display."""

    def __enter__(self) -> Callable[[list[Table]], None]:
        from rich.console import Group
        from rich.live import Live

        self._live = Live(screen=False, auto_refresh=False)
        self._live.__enter__()
        return lambda tables: self._live.update(
            Group(*(rich_table(*table) or "" for table in tables)), refresh=True
        )

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)


@affinity.command()
@click.option("--node", help="This worker; else all on this machine.")
@json_option
@click.pass_context
def alive(context: click.Context, node: str | None, as_json: bool) -> None:
    """Tell whether this machine's workers live: for probes. Asks no Redis.

    Exit code 1: one's process is gone or its heartbeat's thread hangs, or there is none.
    """
    found = bound(context).alive(node)
    if as_json:
        print_json(found)
    for record in () if as_json else found:
        state = "lives" if record.alive else "DOES NOT LIVE"
        text = f"its heartbeat went round {duration(record.age_seconds)} ago"
        click.echo(f"{record.node} (pid {record.pid}) {state}: {text}")
    if not found and not as_json:
        click.echo("no worker has left a sign of life on this machine")
    context.exit(0 if found and all(record.alive for record in found) else 1)


@affinity.command()
@json_option
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Look for what is set up wrongly, each with its fix. Exit code 1: an error was found."""
    found = bound(context).doctor()
    if as_json:
        print_json(found)
    for finding in () if as_json else found:
        mark = {"ok": "ok     ", "warning": "WARNING", "error": "ERROR  "}[finding.verdict]
        click.echo(f"{mark} {finding.about}: {finding.found}")
        if finding.fix:
            click.echo(f"        -> {finding.fix}")
    context.exit(1 if any(finding.verdict == "error" for finding in found) else 0)
