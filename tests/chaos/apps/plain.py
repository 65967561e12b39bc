"""Plain Celery at its most careful: acks late, gives back what a lost process ran.

Environment: AFFINITY_TEST_BROKER; CHAOS_VISIBILITY is the visibility timeout in seconds.
"""

from __future__ import annotations

import os
from typing import Any

from acceptance.apps.plain import make_app as make_plain_app
from acceptance.apps.plain import work


def make_app(broker_url: str | None = None) -> Any:
    """An app on a broker; default: where AFFINITY_TEST_BROKER points."""
    app = make_plain_app(broker_url)
    app.conf.update(
        task_default_queue="jobs", task_acks_late=True, task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=int(os.environ.get("CHAOS_PREFETCH", "0")),
    )
    if seconds := os.environ.get("CHAOS_VISIBILITY"):
        # Kombu 5.7 sweeps about every 100 s; here every second, as a busy site's many workers do.
        app.conf.broker_transport_options = {
            "visibility_timeout": float(seconds), "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
        }
    app.task(work, name="jobs.work", bind=True)
    return app


app = make_app()
