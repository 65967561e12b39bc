"""Flower's side of the Affinity page: the one module that touches Flower's internals.

Checked with Flower 2.2. Flower has no plug-ins, so its application class is built on:

- handlers of our own are added with Tornado's `add_handlers`, which come before Flower's;
- they stand on Flower's `BaseHandler` and `BaseApiHandler`, whose login, roles and refusals they
  share (--basic_auth, --auth, --read_only, FLOWER_UNAUTHENTICATED_API);
- the tab is written into Flower's navigation as its template is loaded;
- tags get a column among the tasks; pending queues and ledgers a row among the broker's queues;
- a worker that has been silent for `heartbeat_timeout` is taken off the pages and the API, as its
  tasks are rescued by then. Stock Flower keeps it for ever (--purge_offline_workers).

Each is tried by itself. What does not fit the Flower that is there is left out with a warning, and
the rest goes on; if the classes are not there, `cli.flower` starts the stock Flower.
"""

from __future__ import annotations

import logging
import math
import re
import time
from base64 import b64decode
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from celery.events.state import Task
from flower import command
from flower.api import BaseApiHandler
from flower.api.tasks import GetQueueLengths
from flower.app import Flower, rewrite_handler
from flower.views import BaseHandler
from flower.views import tasks as task_views
from flower.views.broker import BrokerView
from redis.exceptions import RedisError
from tornado import web
from tornado.escape import json_encode
from tornado.template import Loader, Template

from celery_affinity.exceptions import AffinityError
from celery_affinity.flower.page import gather, operate
from celery_affinity.message import TAG_HEADER

__all__ = ("run",)

logger = logging.getLogger(__name__)

CHECKED = "2.2"
TEMPLATES = Path(__file__).parent / "templates"
#: The first list of links, up to its end.
_LINKS = re.compile(r'<ul class="[^"]*navbar-nav[^"]*">.*?(?=</ul>)', re.DOTALL)
_TAB = """
        <li class="nav-item">
          <a class="nav-link{% if active_tab == 'affinity' %} active{% end %}"
            href="{{ reverse_url('affinity') }}"
            {% if active_tab == 'affinity' %}aria-current="page"{% end %}>Affinity</a>
        </li>
      """


def run(context: Any, arguments: Iterable[str]) -> None:
    """Run Flower's own command, with the Affinity page in it, until it is stopped.

    Arguments:
        context: The click context of our command, with Celery's object.
        arguments: Flower's options.
    """
    here = version("flower")
    if not here.startswith(f"{CHECKED}."):
        logger.warning(
            "Found Flower %s; the Affinity page was checked with %s.",
            here,
            CHECKED,
            extra={"action": "flower_unchecked", "version": here},
        )
    stock = command.Flower
    command.Flower = Dashboard
    try:
        context.invoke(command.flower, tornado_argv=tuple(arguments))
    finally:
        command.Flower = stock


@contextmanager
def _part(what: str) -> Iterator[None]:
    """Leave a part out, with a warning, if this Flower is not as expected."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        logger.warning(
            "Flower %s is not as expected (checked: %s); left out: %s. %s: %s",
            version("flower"),
            CHECKED,
            what,
            type(error).__name__,
            error,
            extra={"action": "flower_part_left_out", "part": what},
        )


class Dashboard(Flower):  # type: ignore[misc]
    """Flower's application with the Affinity page."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        loader = Templates(settings["template_path"])
        super().__init__(*args, template_loader=loader, **settings)
        self.affinity = self.capp.celery_affinity
        with _part("the column of tags among the tasks"):
            show_tags(self.options)
        with _part("taking lost workers off the pages"):
            if self.options.purge_offline_workers is None:
                timeout = self.affinity.settings.heartbeat_timeout
                self.options.purge_offline_workers = math.ceil(timeout)
        added = [
            web.url(r"/affinity", AffinityView, {"template": "affinity.html"}, "affinity"),
            web.url(
                r"/affinity/tables",
                AffinityView,
                {"template": "affinity_tables.html"},
                "affinity_tables",
            ),
            web.url(r"/affinity/(pause|resume)", AffinityOperation, name="affinity_operation"),
            web.url(r"/broker", AffinityBrokerView, name="affinity_broker"),
            web.url(r"/api/queues/length", AffinityQueueLengths, name="affinity_lengths"),
        ]
        prefix = self.options.url_prefix
        self.add_handlers(r".*", [rewrite_handler(h, prefix) for h in added] if prefix else added)

    @property
    def workers(self) -> Any:
        """What workers have told of themselves, without those that are lost."""
        for name in self._lost():
            self.inspector.workers.pop(name, None)
        return self.inspector.workers

    def _lost(self) -> list[str]:
        seen = self.events.state.workers
        return [
            name
            for name in list(self.inspector.workers)
            if name in seen and not seen[name].alive and self._silent(seen[name])
        ]

    def _silent(self, worker: Any) -> bool:
        last = max(worker.heartbeats, default=None)
        threshold = self.options.purge_offline_workers
        return last is None or (threshold is not None and time.time() - last >= threshold)


class Templates(Loader):
    """Flower's templates, with ours beside them and our tab in its navigation."""

    def _create_template(self, name: str) -> Template:
        own = TEMPLATES / name
        if own.is_file():
            return Template(own.read_bytes(), name=name, loader=self)
        if name != "navbar.html":
            return super()._create_template(name)
        text = (Path(self.root) / name).read_text()
        with _part("the Affinity tab (the page is at /affinity)"):
            text = with_tab(text)
        return Template(text, name=name, loader=self)


def with_tab(navbar: str) -> str:
    """Flower's navigation with the tab at the end of its first list.

    Raises:
        LookupError: If no list is found.
    """
    links = _LINKS.search(navbar)
    if links is None:
        raise LookupError("found no list of links in navbar.html")
    return navbar[: links.end()] + _TAB.strip("\n") + navbar[links.end() :]


def show_tags(options: Any) -> None:
    """Give tasks a tag where events bring one, and the table of tasks a column for it."""
    record: Any = Task
    if TAG_HEADER not in record._fields:
        record._fields = (*record._fields, TAG_HEADER)
        setattr(record, TAG_HEADER, None)
    task_views.TASK_COLUMNS[TAG_HEADER] = "Tag"
    default = options._options["tasks-columns"].default  # Tornado's spelling
    if options.tasks_columns == default:
        first, _, others = default.partition(",")
        options.tasks_columns = ",".join((first, TAG_HEADER, others))


class AffinityView(BaseHandler):  # type: ignore[misc]
    """The page, and the part of it that it fetches anew."""

    def initialize(self, template: str) -> None:
        """Tornado's hook."""
        self._template = template

    @web.authenticated
    async def get(self) -> None:
        """Render it."""
        app = self.application
        page, trouble = None, ""
        try:
            page = await app.io_loop.run_in_executor(None, gather, app.affinity)
        except (RedisError, AffinityError) as error:
            trouble = f"{type(error).__name__}: {error}"
            self.set_status(503)
        self.render(
            self._template,
            page=page,
            trouble=trouble,
            may_steer=self._may_steer(),
            refreshes=bool(app.options.auto_refresh),
            order=json_encode,
        )

    def _may_steer(self) -> bool:
        options = self.application.options
        guarded = options.basic_auth or options.auth or self.unauthenticated_api
        return bool(guarded and not options.read_only)


class AffinityOperation(BaseApiHandler):  # type: ignore[misc]
    """Pause and resume. `BaseApiHandler` refuses it where Flower has no authentication."""

    def check_xsrf_cookie(self) -> None:
        """Ask for the token always: browsers send basic authentication by themselves."""
        super().check_xsrf_cookie()
        web.RequestHandler.check_xsrf_cookie(self)

    @web.authenticated
    async def post(self, action: str) -> None:
        """Do it, and say what was done."""
        app = self.application
        if app.options.read_only:
            raise web.HTTPError(403, "Read only mode is enabled")
        do = partial(operate, app.affinity, action, self.request.body, self._who())
        try:
            done = await app.io_loop.run_in_executor(None, do)
        except (ValueError, AffinityError) as error:
            raise web.HTTPError(400, "%s", error) from None
        except RedisError as error:
            raise web.HTTPError(503, "Redis does not answer: %s", error) from None
        self.write({"message": done})

    def write_error(self, status_code: int, **about: Any) -> None:
        """The reason as it is: the page shows it as text."""
        error = about["exc_info"][1] if "exc_info" in about else None
        if isinstance(error, web.HTTPError) and error.log_message:
            self.set_header("Content-Type", "text/plain; charset=UTF-8")
            self.write(error.get_message())
        self.finish()

    def _who(self) -> str:
        """Whoever logged in, for the record of changes."""
        user = self.current_user
        if isinstance(user, str):
            return f"{user} (Flower)"
        scheme, _, credentials = self.request.headers.get("Authorization", "").partition(" ")
        if self.application.options.basic_auth and scheme == "Basic":
            return f"{b64decode(credentials).decode().partition(':')[0]} (Flower)"
        return f"{self.request.remote_ip} (Flower)"


class LedgerToo:
    """Mixed over Flower's handlers that show the broker's queues: pending queues and ledgers."""

    application: Any

    def get_active_queue_names(self) -> list[str]:
        """Also the pending queues, which no worker consumes."""
        names: list[str] = super().get_active_queue_names()  # type: ignore[misc]
        pending = (queue.pending for queue in self.application.affinity.settings.queues)
        return sorted({*names, *pending})

    def get_broker(self) -> Any:
        """The broker with the ledgers behind it."""
        broker = super().get_broker()  # type: ignore[misc]
        return BrokerAndLedger(broker, self.application.affinity, self.application.io_loop)


class BrokerAndLedger:
    """Lengths of queues, and of ledgers as queues."""

    def __init__(self, broker: Any, affinity: Any, io_loop: Any) -> None:
        self._broker = broker
        self._affinity = affinity
        self._io_loop = io_loop

    async def queues(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """As Flower's brokers do it."""
        found: list[dict[str, Any]] = list(await self._broker.queues(names))
        found += await self._io_loop.run_in_executor(None, self._ledgers)
        return found

    def _ledgers(self) -> list[dict[str, Any]]:
        names = self._affinity.settings.queue_names
        return [
            {"name": f"{name} (ledger)", "messages": self._affinity.stats(name).entries}
            for name in names
        ]


class AffinityBrokerView(LedgerToo, BrokerView):  # type: ignore[misc]
    """Flower's page of queues."""


class AffinityQueueLengths(LedgerToo, GetQueueLengths):  # type: ignore[misc]
    """Flower's API of queue lengths."""
