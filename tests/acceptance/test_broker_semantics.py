"""What of Celery depends on the way of a message, on every other broker beside the ledger.

The laws are those of test_semantics.py, with one worker for each of the brokers of brokers.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery

from acceptance.apps.affinity_app import make_app
from acceptance.support import LEAN, QUICK
from acceptance.test_semantics import (
    APP,
    Twins,
    log_of_the_worker,
    tagged,
    test_a_chain_hands_results_on_over_tags,
    test_a_child_has_its_parents_ids_and_not_its_tag,
    test_a_group_and_a_chord_run_their_members_and_the_body,
    test_a_retry_keeps_the_id_and_ends_with_its_result,
    test_every_way_to_call_gives_the_callers_id_and_the_result,
    test_links_run_after_success_and_errbacks_after_failure,
    test_retries_are_counted_asked_for_or_automatic,
    test_what_has_expired_ends_revoked_and_its_tag_goes_on,
    test_what_replaces_a_task_has_its_id_and_its_place_in_the_chain,
)
from brokers import ELSEWHERE, OTHERS, Broker, broker_of
from celery_affinity import Affinity
from celery_affinity.embedded import start_server
from harness import BROKER_VARIABLE, RESULTS_VARIABLE, Cluster, Node
from history import HISTORY_VARIABLE
from rabbit import RabbitServer

__all__ = (
    "log_of_the_worker",
    "tagged",
    "test_a_chain_hands_results_on_over_tags",
    "test_a_child_has_its_parents_ids_and_not_its_tag",
    "test_a_group_and_a_chord_run_their_members_and_the_body",
    "test_a_retry_keeps_the_id_and_ends_with_its_result",
    "test_every_way_to_call_gives_the_callers_id_and_the_result",
    "test_links_run_after_success_and_errbacks_after_failure",
    "test_retries_are_counted_asked_for_or_automatic",
    "test_what_has_expired_ends_revoked_and_its_tag_goes_on",
    "test_what_replaces_a_task_has_its_id_and_its_place_in_the_chain",
)

pytestmark = [pytest.mark.acceptance, pytest.mark.rabbitmq]


@pytest.fixture(scope="module", params=OTHERS)
def broker(server_binary: Path, request: pytest.FixtureRequest) -> Iterator[Broker]:
    kind = request.param
    rabbit: RabbitServer | None = None
    if kind.startswith("rabbitmq"):
        rabbit = request.getfixturevalue("rabbit_server")
    with start_server() as ledger, start_server() as elsewhere:
        yield broker_of(kind, ledger, rabbit, elsewhere if kind == ELSEWHERE else None)


@pytest.fixture(scope="module")
def environment(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("semantics") / "history.jsonl"
        patch.setenv(HISTORY_VARIABLE, str(path))
        patch.setenv(RESULTS_VARIABLE, "1")
        for name, value in {BROKER_VARIABLE: broker.url, **broker.environ}.items():
            patch.setenv(name, value)
        yield path


@pytest.fixture(scope="module")
def worker(broker: Broker, environment: Path) -> Iterator[Node]:
    nodes = Cluster(broker.url, environment.parent, environment)
    node = nodes.worker(APP, queues="jobs,ordinary", concurrency=2, environ=QUICK, extra=LEAN)
    try:
        yield node.wait_ready()
    finally:
        nodes.destroy()


@pytest.fixture(scope="module")
def apps(broker: Broker, worker: Node) -> tuple[Celery, Affinity]:
    return make_app(broker.url)


@pytest.fixture
def twins(tagged: Twins) -> Twins:
    return tagged
