"""What holds with broker and ledger on one Redis holds on every other broker beside the ledger.

The laws are those of other files, on the brokers of brokers.py.
"""

from __future__ import annotations

import pytest

from acceptance.support import Producer
from acceptance.test_order import (
    test_a_single_worker_schedules_for_itself,
    test_a_tag_with_concurrency_three_never_exceeds_it_and_starts_in_order,
    test_one_queue_one_worker_one_tag_runs_in_order,
    test_tasks_with_a_due_time_run_not_before_it_and_soon_after,
    test_thirty_tags_on_three_nodes_lose_double_overlap_and_reorder_nothing,
)
from acceptance.test_recovery import (
    test_a_killed_workers_tags_run_elsewhere_within_the_heartbeat_timeout,
    test_a_leader_that_goes_is_replaced,
    test_a_warm_stop_gives_back_what_it_had_not_started,
    test_with_role_both_whichever_dies_the_other_goes_on,
)
from brokers import OTHERS
from harness import Cluster

__all__ = (
    "test_a_killed_workers_tags_run_elsewhere_within_the_heartbeat_timeout",
    "test_a_leader_that_goes_is_replaced",
    "test_a_single_worker_schedules_for_itself",
    "test_a_tag_with_concurrency_three_never_exceeds_it_and_starts_in_order",
    "test_a_warm_stop_gives_back_what_it_had_not_started",
    "test_one_queue_one_worker_one_tag_runs_in_order",
    "test_tasks_with_a_due_time_run_not_before_it_and_soon_after",
    "test_thirty_tags_on_three_nodes_lose_double_overlap_and_reorder_nothing",
    "test_with_role_both_whichever_dies_the_other_goes_on",
)

pytestmark = [
    pytest.mark.acceptance, pytest.mark.rabbitmq,
    pytest.mark.parametrize("broker", OTHERS, indirect=True),
]


@pytest.fixture
def producer(cluster: Cluster) -> Producer:
    return Producer(cluster.broker_url)
