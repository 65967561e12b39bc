"""Servers and clusters of real processes for the tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from brokers import CLUSTERED, ELSEWHERE, SAME, Broker, broker_of
from celery_affinity.embedded import Server, find_binary, start_server
from celery_affinity.exceptions import ConfigurationError
from clusters import RedisCluster
from harness import BROKER_VARIABLE, Cluster
from history import HISTORY_VARIABLE
from rabbit import RabbitServer, start_rabbit

pytest_plugins = ["reliability"]

#: Run with the plugin for users, by tests of their own (integration/test_testing_plugin.py).
collect_ignore_glob = ["integration/testing_shop/*"]

_clusters = pytest.StashKey[list[Cluster]]()


@pytest.fixture(scope="session")
def server_binary() -> Path:
    """A server's binary: without one, tests are skipped at home and fail in CI."""
    try:
        return find_binary()
    except ConfigurationError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture
def server(server_binary: Path) -> Iterator[Server]:
    """A server of the test's own, which it may kill, pause and restart."""
    with start_server() as running:
        yield running


@pytest.fixture
def aof_server(server_binary: Path) -> Iterator[Server]:
    """A server of the test's own that loses no write when it is killed."""
    with start_server(aof=True) as running:
        yield running


@pytest.fixture(scope="session")
def shared_server(server_binary: Path) -> Iterator[Server]:
    """One server for many tests, which keep apart by `namespace` and do it no harm."""
    with start_server() as running:
        yield running


@pytest.fixture(scope="session")
def rabbit_server() -> Iterator[RabbitServer]:
    """One RabbitMQ for many tests, which keep apart by virtual hosts; they use `rabbit`."""
    try:
        server = start_rabbit()
    except ConfigurationError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
    with server:
        yield server


@pytest.fixture
def rabbit(rabbit_server: RabbitServer) -> RabbitServer:
    """A RabbitMQ that runs, which the test may kill and restart."""
    if rabbit_server.pid is None:
        rabbit_server.start()
    return rabbit_server


@pytest.fixture
def broker_server(server_binary: Path) -> Iterator[Server]:
    """A Redis that is the broker only, which loses no write when it is killed."""
    with start_server(aof=True) as running:
        yield running


@pytest.fixture
def broker(server: Server, request: pytest.FixtureRequest) -> Broker:
    """The broker of `cluster`: `server`, unless the law is parametrised with a kind (brokers.py)."""
    kind = getattr(request, "param", SAME)
    return broker_of(
        kind, server,
        request.getfixturevalue("rabbit") if kind.startswith("rabbitmq") else None,
        request.getfixturevalue("broker_server") if kind.startswith(ELSEWHERE) else None,
        request.getfixturevalue("redis_cluster") if kind in CLUSTERED else None,
    )


@pytest.fixture
def redis_cluster(server_binary: Path, tmp_path: Path) -> Iterator[RedisCluster]:
    """A Redis Cluster of the test's own, without replicas."""
    found = RedisCluster(tmp_path / "cluster")
    yield found
    found.close()


@pytest.fixture
def namespace() -> str:
    """A name that no other test uses."""
    return f"test-{uuid4().hex[:12]}"


@pytest.fixture
def history_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the test's tasks record what they do; `record` in the test itself goes there too."""
    path = tmp_path / "history.jsonl"
    monkeypatch.setenv(HISTORY_VARIABLE, str(path))
    return path


@pytest.fixture
def make_cluster(
    tmp_path: Path, history_path: Path, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Cluster]]:
    """Makes clusters on a broker; all their processes are gone when the test is over."""
    made: list[Cluster] = []

    def make(broker_url: str, **environ: str) -> Cluster:
        for name, value in {BROKER_VARIABLE: broker_url, **environ}.items():
            monkeypatch.setenv(name, value)
        made.append(Cluster(broker_url, tmp_path, history_path, environ))
        request.node.stash.setdefault(_clusters, []).append(made[-1])
        return made[-1]

    try:
        yield make
    finally:
        for nodes in made:
            nodes.destroy()


@pytest.fixture
def cluster(broker: Broker, make_cluster: Callable[..., Cluster]) -> Cluster:
    """Starts nodes on `broker`; all their processes are gone when the test is over."""
    return make_cluster(broker.url, **broker.environ)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[None]:
    """Show the end of every node's log with a failure."""
    report: pytest.TestReport = yield  # type: ignore[assignment]
    if report.failed:
        for nodes in item.stash.get(_clusters, []):
            for node in nodes.nodes:
                report.sections.append((f"log of {node!r}", node.log_tail()))
    return report  # type: ignore[return-value]
