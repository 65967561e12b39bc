"""The acceptance app before it adopted the library: the same task, as a plain Celery task."""

from __future__ import annotations

from celery import Celery

from acceptance.apps.plain import make_app as make_plain_app
from acceptance.apps.plain import work


def make_app(broker_url: str | None = None) -> Celery:
    """An app on a broker; default: where AFFINITY_TEST_BROKER points."""
    app = make_plain_app(broker_url)
    app.conf.task_default_queue = "jobs"
    app.task(work, name="jobs.work", bind=True)
    return app


app = make_app()
