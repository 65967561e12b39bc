"""Result backends that end a chord with a task of Celery's own, which has no tag."""

from __future__ import annotations

from pathlib import Path

import pytest
from celery import chord

from acceptance.apps import semantics  # noqa: F401  registers the tasks
from acceptance.apps.affinity_app import make_app
from acceptance.support import LEAN, QUICK, wait_for_nodes
from harness import RESULTS_VARIABLE, Cluster, wait_until

pytestmark = pytest.mark.acceptance


@pytest.mark.proves(
    "outcome: chord whose result backend ends it with a task of Celery's own",
    "the body runs: that task goes to the body's queue, and is a tag of its own there",
)
@pytest.mark.parametrize("routed", [False, True])
def test_a_chord_ends_whatever_its_result_backend(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, routed: bool
) -> None:
    """The body stayed PENDING: its queue was not seen, or the task was buried for want of a tag."""
    (tmp_path / "results").mkdir()
    results = {RESULTS_VARIABLE: f"file://{tmp_path}/results"}
    monkeypatch.setenv(RESULTS_VARIABLE, results[RESULTS_VARIABLE])
    app, affinity = make_app(cluster.broker_url)
    cluster.worker("acceptance.apps.semantics", queues="jobs", environ={**QUICK, **results}, extra=LEAN)
    wait_for_nodes(affinity, 1)
    add, total = app.tasks["tagged.add"], app.tasks["tagged.total"]
    body = total.s(tag="body").set(queue="jobs") if routed else total.s(tag="body")
    result = chord([add.s(1, tag="one"), add.s(2, tag="two")])(body)
    assert result.get(timeout=30) == 3
    wait_until(lambda: affinity.stats("jobs").entries == 0, what="nothing is left")
    assert not affinity.dead_letters("jobs")
