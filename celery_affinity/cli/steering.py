"""Commands that change something. Who asked is recorded, and shown by `status`."""

from __future__ import annotations

import click

from celery_affinity.cli.group import (
    affinity,
    ask,
    bound,
    json_option,
    queue_names,
    queue_option,
    worker_names,
    yes_option,
)
from celery_affinity.cli.rendering import print_json, shown

__all__ = ()

worker_argument = click.argument("worker", shell_complete=worker_names)


@affinity.command()
@click.argument("tag", required=False)
@queue_option
@json_option
@click.pass_context
def pause(context: click.Context, tag: str | None, queue: str | None, as_json: bool) -> None:
    """Give TAG, or all of --queue, no slot until it is resumed. What runs ends."""
    here = bound(context)
    _one_of(tag, queue)
    name = here.queue_named(queue).name
    here.pause(name, tag)
    text = f"{name!r} is paused: it takes messages in and dispatches nothing."
    if tag is not None:
        text = f"{shown(tag)} is paused in {name!r}; what runs ends."
    _done(as_json, text, queue=name, tag=tag, paused=True)


@affinity.command()
@click.argument("tag", required=False)
@queue_option
@json_option
@click.pass_context
def resume(context: click.Context, tag: str | None, queue: str | None, as_json: bool) -> None:
    """Let a paused or halted TAG go on, or a paused or evacuated --queue.

    Exit code 1: the tag was neither paused nor halted.
    """
    here = bound(context)
    _one_of(tag, queue)
    name = here.queue_named(queue).name
    changed = here.resume(name, tag)
    text = f"{name!r} takes messages in and dispatches again."
    if tag is not None:
        text = f"{shown(tag)} goes on in {name!r}."
    if not changed:
        text = f"{tag!r} was neither paused nor halted in {name!r}; a queue is named by --queue"
    _done(as_json, text, queue=name, tag=tag, paused=False, changed=changed)
    context.exit(0 if changed else 1)


def _done(as_json: bool, text: str, **record: object) -> None:
    if as_json:
        print_json(record)
    else:
        click.echo(text)


def _one_of(tag: str | None, queue: str | None) -> None:
    if tag is None and queue is None:
        raise click.UsageError("name a TAG, or the whole queue with --queue")


@affinity.command()
@worker_argument
@json_option
@click.pass_context
def drain(context: click.Context, worker: str, as_json: bool) -> None:
    """Give WORKER no more affinity tasks. What runs there ends; only a restart undoes it."""
    back = bound(context).drain(worker)
    text = f"{worker} takes no more; {back} tasks that had not started went back."
    _done(as_json, text, worker=worker, given_back=back)


@affinity.command()
@click.argument("tag")
@click.option("--to", "worker", required=True, help="A worker's name.", shell_complete=worker_names)
@queue_option
@json_option
@click.pass_context
def move(context: click.Context, tag: str, worker: str, queue: str | None, as_json: bool) -> None:
    """Have TAG's next lease be WORKER's, after its running task."""
    here = bound(context)
    name = here.queue_named(queue).name
    here.move(name, tag, worker)
    text = f"{shown(tag)} goes to {worker}, as soon as what runs has ended and a slot is free."
    _done(as_json, text, queue=name, tag=tag, worker=worker)


@affinity.command()
@click.argument("tag")
@click.option("--concurrency", type=click.IntRange(1, 1_000_000), help="Tasks at once.")
@click.option("--declared", is_flag=True, help="Back to what the settings say.")
@queue_option
@json_option
@click.pass_context
def limit(
    context: click.Context,
    tag: str,
    concurrency: int | None,
    declared: bool,
    queue: str | None,
    as_json: bool,
) -> None:
    """Set how many tasks of TAG may run at once, until it is taken back with --declared."""
    if (concurrency is None) != declared:
        raise click.UsageError("give --concurrency N, or --declared")
    here = bound(context)
    name = here.queue_named(queue).name
    here.limit(name, tag, concurrency)
    what = "as many as declared" if concurrency is None else f"at most {concurrency}"
    text = f"Of {shown(tag)} {what} run at once in {name!r}."
    _done(as_json, text, queue=name, tag=tag, concurrency=concurrency)


@affinity.command()
@click.argument("tag")
@queue_option
@yes_option
@json_option
@click.pass_context
def purge(context: click.Context, tag: str, queue: str | None, yes: bool, as_json: bool) -> None:
    """Delete what waits of TAG. Results stay PENDING; `revoke` tells whoever waits."""
    here = bound(context)
    name = here.queue_named(queue).name
    ask(f"Delete what waits of {shown(tag)} in {name!r} for good?", yes)
    deleted = here.purge(name, tag)
    _done(as_json, f"{deleted} tasks of {shown(tag)} deleted.", deleted=deleted)


@affinity.command()
@click.option("--tag", required=True, help="All tasks of this tag that wait.")
@queue_option
@yes_option
@json_option
@click.pass_context
def revoke(context: click.Context, tag: str, queue: str | None, yes: bool, as_json: bool) -> None:
    """Revoke what waits of a tag: each task ends as REVOKED when its turn comes."""
    here = bound(context)
    name = here.queue_named(queue).name
    ask(f"Revoke all tasks of {shown(tag)} that wait in {name!r}?", yes)
    count = here.revoke_tag(name, tag)
    _done(as_json, f"{count} tasks of {shown(tag)} are revoked.", revoked=count)


@affinity.command()
@click.argument("queue", shell_complete=queue_names)
@click.option("--timeout", default=60.0, show_default=True, help="Seconds for running tasks.")
@yes_option
@json_option
@click.pass_context
def evacuate(context: click.Context, queue: str, timeout: float, yes: bool, as_json: bool) -> None:
    """Write what waits in QUEUE back as plain Celery messages.

    Stops the queue's dispatch, waits for running tasks, and moves the rest, in order, for workers
    without the library. Exit code 1: tasks still run; nothing was moved; repeat it.
    """
    here = bound(context)
    here.queue_named(queue)
    ask(f"Stop {queue!r} and write its tasks back to the Celery queue?", yes)
    record = here.evacuate(queue, timeout=timeout)
    if as_json:
        print_json(record)
    elif record.done:
        click.echo(
            f"{record.moved} messages written back. {queue!r} stays stopped until "
            f"`celery affinity resume --queue {queue}`."
        )
    else:
        click.echo(
            f"{record.running} slots still hold a tag after {timeout:g} s; {record.waiting} "
            "entries wait. Nothing new is dispatched; repeat to go on, or resume."
        )
    context.exit(0 if record.done else 1)
