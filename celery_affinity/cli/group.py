"""The command group, and what its commands share: the app, options, completion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from celery.app.utils import find_app
from click.shell_completion import CompletionItem
from redis.exceptions import RedisError

from celery_affinity.exceptions import ConfigurationError, OperationError, TagError

if TYPE_CHECKING:
    from celery_affinity.app import Affinity

__all__ = (
    "affinity",
    "ask",
    "bound",
    "json_option",
    "queue_names",
    "queue_option",
    "worker_names",
    "yes_option",
)


class Commands(click.Group):
    """Commands whose foreseeable errors are one line, not a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except RedisError as error:
            raise OperationError(f"Redis does not answer: {error}") from None
        except TagError as error:
            raise OperationError(str(error)) from None


@click.group(cls=Commands)
def affinity() -> None:
    """See and steer affinity queues.

    Exit codes: 0 done; 1 not done, not found or not well; 2 wrong usage.
    """


def bound(context: click.Context) -> Affinity:
    """The Affinity of the app that -A names."""
    found: Affinity | None = getattr(context.obj.app, "celery_affinity", None)
    if found is None:
        raise ConfigurationError(
            "found no Affinity(app) in this app; name the app with -A, and add "
            "affinity = Affinity(app, queues=[AffinityQueue(...)]) to its module"
        )
    return found


def ask(question: str, yes: bool) -> None:
    """Ask before something is destroyed, unless --yes was given."""
    if not yes:
        click.confirm(question, abort=True)


# Completion: no command has run, so the app is still what -A says.


def _completing(context: click.Context) -> Affinity | None:
    app = context.find_root().params.get("app")
    try:
        found = find_app(app) if isinstance(app, str) else app
    except Exception:  # of whatever the user's module raises: there is nothing to complete then
        return None
    return getattr(found, "celery_affinity", None)


def _matching(names: list[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def queue_names(context: click.Context, _: Any, incomplete: str) -> list[CompletionItem]:
    """Names of the declared queues."""
    found = _completing(context)
    return _matching(found.settings.queue_names, incomplete) if found else []


def worker_names(context: click.Context, _: Any, incomplete: str) -> list[CompletionItem]:
    """Names of the registered workers; none if Redis does not answer."""
    found = _completing(context)
    try:
        names = [worker.name for worker in found.workers()] if found else []
    except (RedisError, ConfigurationError):
        return []
    return _matching(names, incomplete)


queue_option = click.option(
    "--queue",
    "-q",
    help="The affinity queue; not needed if there is one.",
    shell_complete=queue_names,
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask.")
