"""The option that `Affinity` adds to ``celery worker`` and ``celery beat``: ``--affinity-role``.

Celery adds what is in `app.user_options` to its commands once it has loaded the app (5.4 to 5.7).
So the option exists where the module named by ``-A`` has made its `Affinity`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

__all__ = ("add_role_option",)

#: The roles that a command can have. A beat runs no tasks.
ROLES = {"worker": ("scheduler", "worker", "both"), "beat": ("scheduler", "both")}
HELP = {
    "worker": "What this worker does for affinity queues; before AFFINITY_ROLE and the app's "
    "settings.",
    "beat": "A beat with -S affinity schedules; the role of its workers does not concern it.",
}


class _RoleOption(click.Option):
    """``--affinity-role``, under a heading of its own in ``--help``."""

    help_group = "Affinity Options"


def add_role_option(app: Any, take: Callable[[str], None]) -> None:
    """Add the option to the commands; a later call for the same app replaces it.

    Arguments:
        take: Called with the role while the command line is read, before anything starts.
    """

    def callback(context: click.Context, option: click.Parameter, value: str | None) -> None:
        if value is not None:
            take(value)

    for command, roles in ROLES.items():
        options = app.user_options[command]
        for old in [option for option in options if isinstance(option, _RoleOption)]:
            options.discard(old)
        options.add(
            _RoleOption(
                ("--affinity-role",),
                type=click.Choice(roles),
                callback=callback,
                expose_value=False,  # Celery's commands do not know it
                allow_from_autoenv=False,  # the environment has its own name: AFFINITY_ROLE
                help=HELP[command],
            )
        )
