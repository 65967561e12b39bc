"""``celery affinity flower``: Flower with the Affinity page."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

import click

from celery_affinity.cli.group import affinity, bound
from celery_affinity.exceptions import ConfigurationError

__all__ = ()

logger = logging.getLogger(__name__)


@affinity.command(context_settings={"ignore_unknown_options": True})
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def flower(context: click.Context, options: tuple[str, ...]) -> None:
    """Start Flower with an Affinity page. OPTIONS are Flower's, such as --port=5555.

    Pause and resume on the page need Flower's own authentication (--basic_auth or --auth).
    """
    bound(context)
    try:
        version("flower")
    except PackageNotFoundError:
        raise ConfigurationError(
            "found no Flower, which shows the page; install it: "
            "pip install 'celery-affinity[flower]'"
        ) from None
    try:
        from celery_affinity.flower.host import run
    except ImportError as error:
        logger.warning(
            "Flower %s is not as expected (%s): starting it without the Affinity page.",
            version("flower"),
            error,
            extra={"action": "flower_stock"},
        )
        from flower.command import flower as stock

        context.invoke(stock, tornado_argv=options)
    else:
        run(context, options)
