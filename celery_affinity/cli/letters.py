"""``celery affinity dead ...``: the dead letters."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import click

from celery_affinity.cli.group import (
    affinity,
    ask,
    bound,
    json_option,
    queue_option,
    yes_option,
)
from celery_affinity.cli.rendering import print_json, print_table, shown
from celery_affinity.types import DeadLetter

__all__ = ()

tag_option = click.option("--tag", help="Only those of this tag.")
all_option = click.option("--all", "all_", is_flag=True, help="All that there are now.")
entries_argument = click.argument("entries", type=int, nargs=-1)


@affinity.group()
def dead() -> None:
    """See, requeue and delete what was buried."""


@dead.command("list")
@queue_option
@tag_option
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="A page.")
@click.option("--after", default=0, help="The last entry of the page before.")
@json_option
@click.pass_context
def list_(
    context: click.Context,
    queue: str | None,
    tag: str | None,
    limit: int,
    after: int,
    as_json: bool,
) -> None:
    """List dead letters by entry, the order of admission."""
    here = bound(context)
    found = here.dead_letters(here.queue_named(queue).name, limit, after=after, tag=tag)
    if as_json:
        return print_json(found)
    rows = [
        (one.entry, shown(one.tag, 30), one.attempts, _at(one), shown(_task(one), 40),
         shown(one.reason, 60))
        for one in found
    ]  # fmt: skip
    print_table(("entry", "tag", "starts", "buried", "task", "reason"), rows)


@dead.command()
@click.argument("entry", type=int)
@queue_option
@json_option
@click.pass_context
def show(context: click.Context, entry: int, queue: str | None, as_json: bool) -> None:
    """Show one dead letter whole, with its traceback. Exit code 1: there is none."""
    here = bound(context)
    name = here.queue_named(queue).name
    found = [one for one in here.dead_letters(name, 1, after=entry - 1) if one.entry == entry]
    if not found:
        raise click.ClickException(f"{name!r} has no dead letter {entry}; see `dead list`")
    (letter,) = found
    if as_json:
        return print_json(letter)
    for label, text in (
        ("entry", str(letter.entry)), ("tag", shown(letter.tag, 600)), ("task", _task(letter)),
        ("args", _arguments(letter)),
        ("reason", shown(letter.reason, 1000)), ("starts", str(letter.attempts)),
        ("buried", _at(letter)),
    ):  # fmt: skip
        click.echo(f"{label + ':':8} {text}")
    click.echo(f"message: {shown(letter.message.decode('utf-8', 'replace'), 2000)}")
    for line in letter.traceback.splitlines():
        click.echo(f"  {shown(line, 200)}")


@dead.command()
@entries_argument
@queue_option
@tag_option
@all_option
@json_option
@click.pass_context
def requeue(
    context: click.Context,
    entries: tuple[int, ...],
    queue: str | None,
    tag: str | None,
    all_: bool,
    as_json: bool,
) -> None:
    """Let ENTRIES, those of --tag, or --all run. Exit code 1: none was requeued."""
    here = bound(context)
    _which(entries, tag, all_)
    count = here.requeue_dead(here.queue_named(queue).name, entries or None, tag=tag)
    if as_json:
        print_json({"requeued": count})
    else:
        click.echo(f"{count} dead letters requeued.")
    context.exit(0 if count else 1)


@dead.command()
@entries_argument
@queue_option
@tag_option
@all_option
@yes_option
@json_option
@click.pass_context
def purge(
    context: click.Context,
    entries: tuple[int, ...],
    queue: str | None,
    tag: str | None,
    all_: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Delete ENTRIES, those of --tag, or --all for good. Exit code 1: none was deleted."""
    here = bound(context)
    _which(entries, tag, all_)
    name = here.queue_named(queue).name
    what = f"of {shown(tag)}" if tag is not None else "all" if all_ else f"{len(entries)}"
    ask(f"Delete {what} dead letters of {name!r} for good?", yes)
    count = here.purge_dead(name, entries or None, tag=tag)
    if as_json:
        print_json({"deleted": count})
    else:
        click.echo(f"{count} dead letters deleted.")
    context.exit(0 if count else 1)


def _which(entries: tuple[int, ...], tag: str | None, all_: bool) -> None:
    if bool(entries) + (tag is not None) + all_ != 1:
        raise click.UsageError("give ENTRIES, or --tag TAG, or --all")


def _at(letter: DeadLetter) -> str:
    return datetime.fromtimestamp(letter.buried_at).astimezone().isoformat(" ", "seconds")


def _task(letter: DeadLetter) -> str:
    headers = _headers(letter)
    readable = {"task", "id"} <= headers.keys()
    return f"{headers['task']} {headers['id']}" if readable else "unreadable"


def _arguments(letter: DeadLetter) -> str:
    """As the producer has described them, which it may not have."""
    headers = _headers(letter)
    found = [str(headers[name]) for name in ("argsrepr", "kwargsrepr") if headers.get(name)]
    return shown(" ".join(found), 1000) or "not described by the producer"


def _headers(letter: DeadLetter) -> dict[str, Any]:
    try:
        headers = json.loads(letter.message)["headers"]
    except (ValueError, KeyError, TypeError):
        return {}
    return headers if isinstance(headers, dict) else {}
