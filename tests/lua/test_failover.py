"""What the ledger's numbers do when a replica that lagged becomes the master."""

from __future__ import annotations

import pytest

from celery_affinity.embedded import Server, start_server
from celery_affinity.keys import Keys
from celery_affinity.scripts import Scripts
from harness import wait_until
from lua.conftest import Bench


@pytest.mark.proves("32: failover to a replica that lags", "terms and epochs grow; what it did not get is lost or runs again")
def test_terms_and_epochs_grow_over_a_replica_that_lagged(
    server: Server, namespace: str
) -> None:
    bench = Bench(server.client(), Scripts(server.client(), Keys(namespace)))
    with start_server(extra_args=("--replicaof", "127.0.0.1", str(server.port))) as replica:
        node = bench.opening("one", "two")
        node.take().run()
        wait_until(lambda: replica.client().info("replication")["master_link_status"] == "up")  # type: ignore[index]
        bench.client.execute_command("WAIT", 1, 10_000)
        replica.client().execute_command("REPLICAOF", "NO", "ONE")
        bench.scripts.resign("q", bench.fence)
        bench.lead(candidate="leader/2")
        term = int(bench.fence.split()[1])
        bench.send("b", 1, 2)
        bench.admit_all()
        epochs: list[int] = []
        while copy := node.receive():
            epochs.append(int(copy.stamp.epoch))
            copy.run()
        assert max(epochs) > term
        other = Bench(replica.client(), Scripts(replica.client(), Keys(namespace)))
        other.client.delete(other.queue_key("leader"))  # the old term runs out
        other.lead(candidate="leader/3")
        assert int(other.fence.split()[1]) > term
        assert other.scripts.renew("q", bench.fence, 1000) is False
        elsewhere = other.node("m")
        other.send("c", 1)
        other.admit_all()
        assert int(elsewhere.take().stamp.epoch) > max(epochs)
