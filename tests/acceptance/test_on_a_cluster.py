"""What holds with the ledger in one Redis holds with the ledger in a Redis Cluster.

The laws are those of other files, with the broker another Redis.
"""

from __future__ import annotations

from urllib.parse import quote

import pytest

from acceptance.test_order import (
    test_a_single_worker_schedules_for_itself,
    test_tasks_with_a_due_time_run_not_before_it_and_soon_after,
    test_thirty_tags_on_three_nodes_lose_double_overlap_and_reorder_nothing,
)
from acceptance.test_recovery import (
    test_a_killed_workers_tags_run_elsewhere_within_the_heartbeat_timeout,
    test_a_leader_that_goes_is_replaced,
    test_a_warm_stop_gives_back_what_it_had_not_started,
    test_with_role_both_whichever_dies_the_other_goes_on,
)
from acceptance.test_redis_kinds import (
    PASSWORD,
    documented_user,
    of_scripts,
    operate,
    run_all,
)
from brokers import CLUSTERED
from clusters import RedisCluster
from harness import RESULTS_VARIABLE, Cluster

__all__ = (
    "test_a_killed_workers_tags_run_elsewhere_within_the_heartbeat_timeout",
    "test_a_leader_that_goes_is_replaced",
    "test_a_single_worker_schedules_for_itself",
    "test_a_warm_stop_gives_back_what_it_had_not_started",
    "test_tasks_with_a_due_time_run_not_before_it_and_soon_after",
    "test_thirty_tags_on_three_nodes_lose_double_overlap_and_reorder_nothing",
    "test_with_role_both_whichever_dies_the_other_goes_on",
)

pytestmark = [
    pytest.mark.acceptance, pytest.mark.servers,
    pytest.mark.parametrize("broker", CLUSTERED[:1], indirect=True),
]


@pytest.fixture
def redis_cluster(redis_cluster: RedisCluster) -> RedisCluster:
    """Its user is the documented one, but for CONFIG GET: the laws have no time for its failover."""
    for server in redis_cluster.masters:
        words = [word for word in documented_user("ledger") if word != "+config|get"]
        server.client().execute_command("ACL", "SETUSER", *words)
    redis_cluster.user = f"ledger:{quote(PASSWORD, safe='')}@"
    return redis_cluster


def test_operators_calls_and_the_minimal_acl_are_enough(
    redis_cluster: RedisCluster, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RESULTS_VARIABLE, "1")
    cluster.environ[RESULTS_VARIABLE] = "1"
    operate(run_all(cluster, cluster.broker_url, monkeypatch))
    clients = [server.client() for server in redis_cluster.masters]
    denied = {entry["object"] for client in clients for entry in client.acl_log()}
    assert denied <= {"config|get"}
    seen = {
        name.removeprefix("cmdstat_")
        for client in clients for name in client.info("commandstats")  # type: ignore[union-attr]
    }  # fmt: skip
    allowed = {word[1:] for word in documented_user("ledger") if word[0] == "+"}
    unneeded = allowed - seen - of_scripts() - {"auth", "hello"}
    assert unneeded <= {"config|get"}, "it is minimal"
    for client in clients:
        assert not [key for key in client.keys("*") if not key.startswith(b"{affinity:default}:")]
