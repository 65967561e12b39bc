"""Commands that look and change nothing."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import click

from celery_affinity.cli.group import affinity, bound, json_option, queue_option, worker_names
from celery_affinity.cli.rendering import print_json, print_table, shown
from celery_affinity.cli.wording import nothing_words, tag_words, task_words
from celery_affinity.types import ChangeRecord, QueueStats, TagRecord, WorkerRecord

if TYPE_CHECKING:
    from celery_affinity.app import Affinity

__all__ = ("QUEUE_COLUMNS", "SLOT_COLUMNS", "TAG_COLUMNS", "queue_row", "slot_rows", "tag_row")

QUEUE_COLUMNS = (
    "queue", "pending", "entries", "scheduled", "ready", "held", "halted", "idle slots", "dead",
    "tasks/s", "state",
)  # fmt: skip
SLOT_COLUMNS = ("worker", "slot", "status", "queue", "tag", "batch", "epoch", "beat left")
TAG_COLUMNS = ("tag", "waiting", "place", "slots", "halted")


@affinity.command()
@json_option
@click.pass_context
def status(context: click.Context, as_json: bool) -> None:
    """Show all queues, what to look at, and who changed what."""
    found = bound(context).status()
    if as_json:
        return print_json(found)
    print_table(
        (*QUEUE_COLUMNS, "workers", "leader"),
        [
            (*queue_row(q.stats), q.workers, q.leader and q.leader.leader.split("/")[0])
            for q in found.queues
        ],
    )
    for warning in found.warnings:
        click.echo(f"! {warning}")
    if found.changes:
        click.echo("\nchanges, the latest first:")
        for change in found.changes:
            click.echo(f"  {_change(change)}")


@affinity.command()
@json_option
@click.pass_context
def queues(context: click.Context, as_json: bool) -> None:
    """Show the counts of each affinity queue."""
    here = bound(context)
    found = [here.stats(name) for name in here.settings.queue_names]
    if as_json:
        return print_json(found)
    print_table(QUEUE_COLUMNS, [queue_row(stats) for stats in found])


@affinity.command()
@click.option("--node", help="This worker; else all.", shell_complete=worker_names)
@json_option
@click.pass_context
def workers(context: click.Context, node: str | None, as_json: bool) -> None:
    """Show each worker's slots, with the tags that they hold.

    Exit code 1: --node is not registered, or its heartbeat is overdue. So it is a readiness probe.
    """
    found = [worker for worker in bound(context).workers() if node in (None, worker.name)]
    if as_json:
        print_json(found)
    else:
        print_table(SLOT_COLUMNS, [row for worker in found for row in slot_rows(worker)])
    ready = node is None or any(worker.heartbeat_left_seconds > 0 for worker in found)
    context.exit(0 if ready else 1)


@affinity.command()
@queue_option
@click.option(
    "--top", type=click.IntRange(1, 1000), help="So many tags, the longest backlog first."
)
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="A page.")
@click.option("--skip", type=click.IntRange(0), default=0, help="Pass over so many: earlier pages.")
@json_option
@click.pass_context
def tags(
    context: click.Context, queue: str | None, top: int | None, limit: int, skip: int, as_json: bool
) -> None:
    """Show who holds slots and who waits, in the order of their turn."""
    here = bound(context)
    name = only(here, queue)
    found = here.top_tags(name, top) if top else here.tags(name, limit, skip=skip)
    if as_json:
        return print_json(found)
    names = {worker.worker_id: worker.name for worker in here.workers()}
    print_table(TAG_COLUMNS, [tag_row(record, names) for record in found])


@affinity.command()
@queue_option
@json_option
@click.pass_context
def leader(context: click.Context, queue: str | None, as_json: bool) -> None:
    """Show who schedules. Exit code 1: nobody does."""
    here = bound(context)
    name = only(here, queue)
    found = here.leader(name)
    if as_json:
        print_json(found)
    elif found is None:
        click.echo(
            f"nobody schedules {name!r}; start `beat -S affinity` or a worker with role both"
        )
    else:
        click.echo(f"{found.leader}, term {found.term}, {found.left_seconds:.1f} s left")
    context.exit(0 if found else 1)


@affinity.command()
@click.argument("tag_or_task_id")
@queue_option
@click.option("--task", "is_task", is_flag=True, help="It is a task's id, whatever tags there are.")
@json_option
@click.pass_context
def explain(
    context: click.Context, tag_or_task_id: str, queue: str | None, is_task: bool, as_json: bool
) -> None:
    """Say where a tag or a task stands, and what it waits for. Exit code 1: it is not known."""
    here = bound(context)
    tag = None
    if not is_task:
        tag = here.explain(tag_or_task_id, queue)
        if tag.known:
            return print_json(tag) if as_json else click.echo("\n".join(tag_words(tag)))
    task = here.explain_task(tag_or_task_id, queue)
    unknown = task.state in ("unknown", "unseen")
    if as_json:
        print_json(task)
    elif unknown and tag is not None:
        has_dead = bool(here.dead_letters(tag.queue, 1, tag=tag.tag))
        click.echo(nothing_words(tag, task.reason, has_dead))
    else:
        click.echo("\n".join(task_words(task)))
    context.exit(1 if unknown else 0)


def only(here: Affinity, queue: str | None) -> str:
    """The named queue, or the only one."""
    return here.queue_named(queue).name


def queue_row(stats: QueueStats) -> tuple[object, ...]:
    """A row of QUEUE_COLUMNS."""
    state = "evacuated" if stats.evacuated else "paused" if stats.paused else "on"
    return (
        stats.queue, stats.pending, stats.entries, stats.scheduled, stats.ready_tags,
        stats.held_tags, stats.halted_tags, stats.idle_slots, stats.dead,
        round(stats.settled_per_second, 1), state,
    )  # fmt: skip


def slot_rows(worker: WorkerRecord) -> list[tuple[object, ...]]:
    """Rows of SLOT_COLUMNS."""
    state = "draining, " if worker.draining else ""
    return [
        (
            worker.name, slot.index, state + slot.status, slot.queue,
            slot.current_identify_tag and shown(slot.current_identify_tag, 40),
            slot.current_batch_size or None, slot.epoch,
            f"{worker.heartbeat_left_seconds:.1f} s",
        )
        for slot in worker.slots
    ]  # fmt: skip


def tag_row(record: TagRecord, names: dict[str, str]) -> tuple[object, ...]:
    """A row of TAG_COLUMNS; `names` are the workers' by incarnation."""
    held = [slot.partition(":") for slot in record.slots]
    slots = ", ".join(f"{names.get(inc, inc)} slot {index}" for inc, _, index in held)
    return shown(record.tag, 40), record.waiting, record.place, slots, " ".join(record.halted)


def _change(change: ChangeRecord) -> str:
    at = datetime.fromtimestamp(change.at).astimezone().isoformat(" ", "seconds")
    what = " ".join(filter(None, (change.what, shown(change.target, 60), change.detail)))
    return f"{at}  {shown(change.who)}: {what}" + (f" ({change.queue})" if change.queue else "")
