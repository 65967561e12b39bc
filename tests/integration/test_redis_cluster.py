"""The ledger's connections to a Redis Cluster: who is asked, what is waited for, what is refused."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from redis import Redis
from redis.crc import key_slot
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from celery_affinity import Affinity, AffinityQueue
from celery_affinity.connection import connect, server_clock
from celery_affinity.doorbell import Doorbell
from celery_affinity.embedded import Server, find_binary
from celery_affinity.exceptions import ConfigurationError
from celery_affinity.keys import Keys
from celery_affinity.scripts import Scripts
from celery_affinity.server_checks import check_failover, check_server
from certificates import Authority, speaks_tls
from clusters import RedisCluster, call, node_id
from harness import wait_until
from starts import start

pytestmark = pytest.mark.servers

WAITS = "the ledger's slot is not served"


@pytest.fixture(scope="module")
def shared(server_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """For laws that keep apart by `namespace`."""
    found = RedisCluster(tmp_path_factory.mktemp("shared"))
    yield found
    found.close()


@pytest.fixture
def keys(namespace: str) -> Keys:
    return Keys(namespace)


@pytest.fixture
def scripts(shared: RedisCluster, keys: Keys) -> Scripts:
    return Scripts(connect(shared.url, keys.prefix), keys)


def run_id(server: Server) -> str:
    info = server.client().info("server")
    return str(info["run_id"])  # type: ignore[index]


def test_each_namespace_is_on_the_master_of_its_slot(shared: RedisCluster, namespace: str) -> None:
    owners = set()
    for number in range(12):
        keys = Keys(f"{namespace}-{number}")
        scripts = Scripts(connect(shared.url, keys.prefix), keys)
        assert scripts.claim("q", "me", 1000)[0]
        owner = shared.owner(keys.prefix)
        assert owner.client().exists(keys.queue("q", "leader"))
        owners.add(owner.port)
    assert len(owners) == 3


def test_one_node_that_answers_is_enough(shared: RedisCluster, keys: Keys) -> None:
    *_, last = shared.url.split(";")
    assert Scripts(connect(f"redis+cluster://127.0.0.1:1;{last}", keys.prefix), keys).claim("q", "me", 1000)[0]
    with pytest.raises(RedisConnectionError, match="no node of the cluster tells who owns slot"):
        connect("redis+cluster://127.0.0.1:1;redis+cluster://127.0.0.1:2", keys.prefix).ping()


@pytest.mark.proves("a slot of a Redis Cluster is moved key by key (ASK)", "the ledger waits: nothing is written on the importing node, nothing is done by halves")
@pytest.mark.parametrize("single_threaded", [False, True])
def test_a_half_moved_slot_is_waited_for(
    shared: RedisCluster, keys: Keys, single_threaded: bool
) -> None:
    client = connect(shared.url, keys.prefix)
    scripts = Scripts(client, keys, single_threaded=single_threaded)
    target = shared.others(keys.prefix)[0]
    term, _ = scripts.claim("q", "me", 60_000)
    assert term

    def refused() -> None:
        there = shared.keys(keys.prefix)
        with pytest.raises(RedisConnectionError, match=WAITS):
            scripts.claim("q", "other", 60_000)
        with pytest.raises(RedisConnectionError, match=WAITS):
            scripts.carry("q", "token", "fence", [], 1000, 10)
        with pytest.raises(RedisConnectionError, match=WAITS):
            client.lpush(keys.inbox("q"), "one")
        assert sorted(shared.keys(keys.prefix)) == sorted(there)

    source = shared.begin_move(keys.prefix, target)
    refused()
    while shared.move_keys(keys.prefix, source, target, 1):
        refused()
    shared.end_move(keys.prefix, source, target)
    assert scripts.claim("q", "me", 60_000)[0] == term, "it is the same ledger"


def test_a_script_with_a_list_that_is_still_there_is_waited_for_too(
    shared: RedisCluster, keys: Keys, scripts: Scripts
) -> None:
    scripts.client.lpush(keys.inbox("q"), "one")
    target = shared.others(keys.prefix)[0]
    source = shared.begin_move(keys.prefix, target)
    with pytest.raises(RedisConnectionError, match=WAITS):
        scripts._call("admit", "q", lists=[keys.inbox("q")])
    shared.move_keys(keys.prefix, source, target)
    shared.end_move(keys.prefix, source, target)
    assert scripts.client.llen(keys.inbox("q")) == 1


@pytest.mark.parametrize("single_threaded", [False, True])
def test_a_slot_that_moves_as_a_whole_is_followed(
    shared: RedisCluster, keys: Keys, single_threaded: bool
) -> None:
    scripts = Scripts(connect(shared.url, keys.prefix), keys, single_threaded=single_threaded)
    term, _ = scripts.claim("q", "me", 60_000)
    owner, target = shared.owner(keys.prefix), shared.others(keys.prefix)[0]
    slot = key_slot(keys.prefix.encode())
    try:
        call(owner, "CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", node_id(target))
    except ResponseError:
        pytest.skip("a server that moves slots key by key (Valkey 9 does not)")
    wait_until(lambda: shared.owner(keys.prefix) is target, what="the slot at its new owner")

    def claimed() -> str | None:
        try:
            return scripts.claim("q", "me", 60_000)[0]
        except RedisError:
            return None

    assert wait_until(claimed, what="an answer") == term, "it is the same ledger"
    assert server_clock(scripts.client, keys.prefix)[0] == run_id(target)


def test_who_is_asked_for_its_clock_is_the_owner(
    shared: RedisCluster, keys: Keys, scripts: Scripts
) -> None:
    client = scripts.client
    assert server_clock(client, keys.prefix)[0] == run_id(shared.owner(keys.prefix))
    target = shared.others(keys.prefix)[0]
    shared.move(keys.prefix, target)
    stale = client.info("server")
    assert stale["run_id"] != run_id(target), "a connection to the old owner answers that"  # type: ignore[index]
    assert wait_for_answer(client, keys)[0] == run_id(target)


def wait_for_answer(client: Redis, keys: Keys) -> tuple[str, float]:
    """What who has the ledger says; an old owner's "not here" is overheard."""

    def answer() -> tuple[str, float] | None:
        try:
            return server_clock(client, keys.prefix)
        except RedisError:
            return None

    return wait_until(answer, what="an answer")  # type: ignore[return-value]


def test_all_connections_of_a_pool_leave_the_old_owner(
    shared: RedisCluster, keys: Keys, scripts: Scripts
) -> None:
    client, old = scripts.client, shared.owner(keys.prefix)
    pool = client.connection_pool
    lent = [pool.get_connection() for _ in range(3)]
    *idle, used = lent
    for one in idle:
        pool.release(one)
    target = shared.others(keys.prefix)[0]
    shared.move(keys.prefix, target)
    wait_for_answer(client, keys)
    pool.release(used)
    again = [pool.get_connection() for _ in range(3)]
    assert {one.port for one in again} == {target.port} != {old.port}
    for one in again:
        pool.release(one)


def test_a_doorbell_moves_with_the_slot(shared: RedisCluster, keys: Keys, scripts: Scripts) -> None:
    inbox = keys.inbox("q")
    doorbell = Doorbell(scripts.client, [inbox])
    assert not doorbell.wait(0)
    shared.move(keys.prefix, shared.others(keys.prefix)[0])
    assert doorbell.wait(10), "whoever waits at the old owner is woken"
    wait_until(lambda: quiet(doorbell), what="a doorbell at the new owner")
    timer = threading.Timer(0.2, connect(shared.url, keys.prefix).lpush, (inbox, "one"))
    timer.start()
    assert doorbell.wait(10)
    doorbell.close()
    timer.join()


def quiet(doorbell: Doorbell) -> bool:
    try:
        return not doorbell.wait(0)
    except RedisError:
        return False


@pytest.mark.proves("a Redis Cluster is spoken to by TLS, with users", "as a single server is; CLUSTER SLOTS is all that a user needs more")
def test_a_cluster_with_tls_and_users_is_like_any_other(tmp_path: Path, keys: Keys) -> None:
    if not speaks_tls(find_binary()):
        pytest.skip("a server without TLS")
    authority = Authority.found(tmp_path / "ours")
    found = RedisCluster(tmp_path / "tls", authority=authority)
    try:
        for server in found.masters:
            allowed = ("~{affinity:*", "+@all", "-cluster", "+cluster|slots")
            server.client().execute_command("ACL", "SETUSER", "me", "on", ">a@b", *allowed)
        url = found.url.replace("//", "//me:a%40b@")
        with pytest.raises(RedisConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            connect(url, keys.prefix).ping()
        for text in (url, url.replace("rediss", "redis")):
            client = connect(f"{text}?ssl_ca_certs={authority.certificate}", keys.prefix)
            scripts = Scripts(client, keys)
            assert scripts.claim("q", "me", 60_000)[0]
            found.move(keys.prefix, found.others(keys.prefix)[0])
            wait_for_answer(client, keys)
            assert scripts.claim("q", "me", 60_000)[0]
    finally:
        found.close()


def test_a_user_that_may_not_ask_for_the_owner_is_told_what_it_needs(
    shared: RedisCluster, keys: Keys
) -> None:
    for server in shared.masters:
        user = ("low", "on", ">pw", "~*", "&*", "+@all", "-cluster")
        server.client().execute_command("ACL", "SETUSER", *user)
    client = connect(shared.url.replace("//", "//low:pw@"), keys.prefix)
    with pytest.raises(ConfigurationError, match=r"\+cluster\|slots"):
        check_server(client, logging.getLogger())
    for server in shared.masters:
        server.client().execute_command("ACL", "SETUSER", "low", "+cluster|slots")
    check_server(client, logging.getLogger())


@pytest.mark.proves("a node of a Redis Cluster is used as if it were alone, or a single Redis as a cluster", "refused at start, with what to set")
def test_a_node_of_a_cluster_is_refused_as_a_single_server_and_the_reverse(
    shared: RedisCluster, server: Server, keys: Keys
) -> None:
    with pytest.raises(ConfigurationError, match=r"Set redis_url='redis\+cluster://"):
        check_server(shared.masters[0].client(), logging.getLogger())
    with pytest.raises(ConfigurationError, match="not a node of one. Set redis_url='redis://"):
        check_server(connect(f"redis+cluster://127.0.0.1:{server.port}", keys.prefix), logging.getLogger())
    check_server(connect(shared.url, keys.prefix), logging.getLogger())
    check_server(server.client(), logging.getLogger())


def test_a_doctor_knows_a_node_of_a_cluster(shared: RedisCluster, server: Server, namespace: str) -> None:
    def findings(url: str) -> list[str]:
        app = Celery("shop", broker=server.url())
        affinity = Affinity(app, queues=[AffinityQueue("q")], redis_url=url, namespace=namespace)
        return [one.fix for one in affinity.doctor() if one.verdict == "error"]

    assert any("redis+cluster://" in fix for fix in findings(shared.masters[0].url()))
    assert not any("redis+cluster://" in fix for fix in findings(shared.url))


@pytest.mark.parametrize("ledger", ["the cluster", "the broker's"])
@pytest.mark.parametrize(
    "command",
    [("worker", "-Q", "q", "-c", "1", "-P", "solo"), ("worker", "-c", "1", "--affinity-role", "scheduler"),
     ("beat", "-S", "affinity")],
    ids=["worker", "scheduler", "beat"],
)  # fmt: skip
def test_a_node_of_a_cluster_is_refused_as_the_broker(
    shared: RedisCluster, tmp_path: Path, namespace: str, ledger: str, command: tuple[str, ...]
) -> None:
    url = repr(shared.url if ledger == "the cluster" else None)
    body = f"affinity = Affinity(app, queues=[AffinityQueue('q')], namespace='{namespace}', redis_url={url})"
    done = start(tmp_path, shared.masters[0].url(), body, *command)
    said = done.stdout + done.stderr
    assert done.returncode != 0 and "Traceback" not in said
    assert f"the broker's Redis (127.0.0.1:{shared.masters[0].port}) is a node of a Redis Cluster" in said


def test_a_doctor_knows_a_node_of_a_cluster_as_the_broker(shared: RedisCluster, namespace: str) -> None:
    app = Celery("shop", broker=shared.masters[0].url())
    affinity = Affinity(app, queues=[AffinityQueue("q")], redis_url=shared.url, namespace=namespace)
    *_, last = affinity.doctor()
    assert (last.about, last.verdict) == ("broker", "error") and "set broker_url to RabbitMQ" in last.fix


def test_a_single_servers_client_says_what_it_means_that_a_key_is_elsewhere(
    shared: RedisCluster, keys: Keys
) -> None:
    stranger = shared.others(keys.prefix)[0]
    text = rf"127.0.0.1:{stranger.port} is a node of a Redis Cluster, .*set redis_url='redis\+cluster://"
    with pytest.raises(ResponseError, match=text):
        Scripts(connect(stranger.url()), keys).claim("q", "me", 1000)
    with pytest.raises(ResponseError, match=text):
        server_clock(connect(stranger.url()), keys.prefix)


def test_a_heartbeat_timeout_shorter_than_a_clusters_failover_is_refused(
    shared: RedisCluster, keys: Keys
) -> None:
    client = connect(shared.url, keys.prefix)
    check_failover(client, 4.5)
    asked = rf"asked 127.0.0.1:{shared.owner(keys.prefix).port}"
    with pytest.raises(ConfigurationError, match=rf"{asked}.*down after 1 s.* Set heartbeat_timeout to 4\.5 s"):
        check_failover(client, 4.4)
    app = Celery("shop", broker="amqp://127.0.0.1:1//")
    limits = {"heartbeat_timeout": 4.4, "heartbeat_interval": 1.0}
    affinity = Affinity(app, queues=[AffinityQueue("q")], redis_url=shared.url, namespace=keys.namespace, **limits)
    found = {one.about: one for one in affinity.doctor()}
    assert found["heartbeat_timeout"].verdict == "error"
    assert found["heartbeat_timeout"].fix.startswith("Set heartbeat_timeout to 4.5 s")
    assert "confirm_publish" in found["broker confirms"].fix
    app.conf.broker_transport_options = {"confirm_publish": True}
    assert "broker confirms" not in {one.about for one in affinity.doctor()}
    for server in shared.masters:
        user = ("quiet", "on", ">pw", "~*", "&*", "+@all", "-config")
        server.client().execute_command("ACL", "SETUSER", *user)
    check_failover(connect(shared.url.replace("//", "//quiet:pw@"), keys.prefix), 0.1)
