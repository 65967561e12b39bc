"""What `celery affinity` says before it does anything."""

from __future__ import annotations

from types import SimpleNamespace

from celery import Celery
from click.testing import CliRunner

from celery_affinity import Affinity, AffinityQueue
from celery_affinity.cli import affinity


def test_a_queue_that_is_not_declared_is_refused_before_anything_is_asked() -> None:
    app = Celery("cli", broker="redis://127.0.0.1:1/0", set_as_current=False)
    Affinity(app, queues=[AffinityQueue("jobs")])
    done = CliRunner().invoke(affinity, ["evacuate", "jbos"], obj=SimpleNamespace(app=app))
    assert done.exit_code == 1
    assert done.output.strip() == "Error: 'jbos' is not an affinity queue (declared: 'jobs')"
