"""Which broker stands beside which ledger: what laws are parametrised with that hold on all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from celery_affinity.embedded import Server
from clusters import RedisCluster
from harness import QUEUE_TYPE_VARIABLE, RESULTS_URL_VARIABLE
from rabbit import RabbitServer

__all__ = ("CLASSIC", "CLUSTERED", "ELSEWHERE", "LEDGER_VARIABLE", "OTHERS", "QUORUM", "RABBIT", "SAME", "Broker", "broker_of")

#: Tells the library where the ledger is, if that is not the broker.
LEDGER_VARIABLE = "AFFINITY_REDIS_URL"
#: The broker is the ledger's Redis.
SAME = "same-redis"
#: The broker is another Redis.
ELSEWHERE = "redis-elsewhere"
CLASSIC, QUORUM = "rabbitmq-classic", "rabbitmq-quorum"
#: The ledger is in a Redis Cluster, the broker another Redis, or RabbitMQ.
CLUSTERED = (f"{ELSEWHERE}+cluster", f"{CLASSIC}+cluster")
#: By the type of the pending queue.
RABBIT = (CLASSIC, QUORUM)
#: All that have their laws in files of their own (`make test` runs the others).
OTHERS = (ELSEWHERE, *RABBIT)


@dataclass(frozen=True)
class Broker:
    """A broker and its ledger, as an app of the tests is told of them."""

    kind: str
    url: str
    #: For the processes of the cluster, and of the test itself.
    environ: Mapping[str, str] = field(default_factory=dict)


def broker_of(
    kind: str, ledger: Server, rabbit: RabbitServer | None = None, elsewhere: Server | None = None,
    redis_cluster: RedisCluster | None = None,
) -> Broker:
    """One of the kinds, on these servers.

    Arguments:
        ledger: Has the ledger, and results in its database 1.
        rabbit: Where a virtual host is made, if the kind needs one.
        elsewhere: The broker's Redis, if the kind needs one.
        redis_cluster: Has the ledger, if the kind says so.
    """
    if kind == SAME:
        return Broker(kind, ledger.url())
    kind, _, clustered = kind.partition("+")
    environ = {LEDGER_VARIABLE: ledger.url(), RESULTS_URL_VARIABLE: ledger.url(1)}
    if clustered:
        assert redis_cluster is not None
        environ[LEDGER_VARIABLE] = redis_cluster.url
    if kind == ELSEWHERE:
        assert elsewhere is not None
        return Broker(kind, elsewhere.url(), environ)
    assert rabbit is not None
    environ[QUEUE_TYPE_VARIABLE] = kind.removeprefix("rabbitmq-")
    return Broker(kind, rabbit.new_virtual_host(), environ)
