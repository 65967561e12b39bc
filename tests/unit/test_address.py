"""The ledger's URL: made of what kombu is told, taken apart, shown without its passwords."""

from __future__ import annotations

import ssl
from typing import Any

import pytest
from celery import Celery
from redis.connection import SSLConnection
from redis.sentinel import SentinelManagedConnection, SentinelManagedSSLConnection

from celery_affinity import Affinity, AffinityQueue, ConfigurationError
from celery_affinity.address import Address, ledger_url, masked, same_server
from celery_affinity.cluster import ToOwner
from celery_affinity.connection import connect
from celery_affinity.resolving import resolve

SENTINELS = "sentinel://:pw@one:1;sentinel://:pw@two:2"


@pytest.mark.parametrize(
    ("url", "hosts", "path", "db", "user"),
    [
        ("redis://", [("localhost", 6379)], "", 0, (None, None)),
        ("redis://me:p%40%2Fs@there:7/3", [("there", 7)], "", 3, ("me", "p@/s")),
        ("rediss://there/?db=4", [("there", 6379)], "", 4, (None, None)),
        ("redis+socket://:pw@/tmp/a%20b.sock?virtual_host=5", [], "/tmp/a b.sock", 5, (None, "pw")),
        ("unix:///tmp/s.sock?db=6", [], "/tmp/s.sock", 6, (None, None)),
        (SENTINELS, [("one", 1), ("two", 2)], "", 0, (None, "pw")),
        ("redis+cluster://:pw@one:1;redis+cluster://:pw@two:2/0", [("one", 1), ("two", 2)], "", 0, (None, "pw")),
        ("rediss+cluster://me:pw@one", [("one", 6379)], "", 0, ("me", "pw")),
        ("sentinel://one;sentinel://two/7", [("one", 26379), ("two", 26379)], "", 7, (None, None)),
    ],
)  # fmt: skip
def test_an_address_is_taken_apart(
    url: str, hosts: list[Any], path: str, db: int, user: tuple[Any, Any]
) -> None:
    found = Address.parse(url)
    assert [*found.hosts] == hosts
    assert (found.path, found.db, (found.username, found.password)) == (path, db, user)


@pytest.mark.parametrize(
    "url",
    ["redis://:my/Secret@host", "redis://:Secret@host:x/0", "redis://host/Secret", "Secret://host"
     "sentinel://a/1;sentinel://:Secret@b/2", "redis://:Secret@a;sentinel://b",
     "redis+cluster://:Secret@a;redis://b", "redis+cluster://:Secret@a/x"],
)  # fmt: skip
def test_what_cannot_be_taken_apart_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        connect(url, "prefix")
    assert "Secret" not in str(error.value) and error.value.__suppress_context__


def test_the_refusal_of_a_list_of_nodes_shows_how_one_is_written() -> None:
    with pytest.raises(ConfigurationError, match=r"redis\+cluster://host:port;redis\+cluster://host2:port") as error:
        Address.parse("redis+cluster://a:1,b:2")
    assert "sentinel://host:port;sentinel://host2:port/db" in str(error.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://me:Secret@h:1/0", "redis://me:**@h:1/0"),
        ("redis://:Sec@Secret?/Secret@h:1/0", "redis://:**@h:1/0"),
        ("sentinel://:Secret@a;sentinel://u:Secret@b", "sentinel://:**@a;sentinel://u:**@b"),
        ("redis+cluster://u:Secret@a;redis+cluster://:Secret@b", "redis+cluster://u:**@a;redis+cluster://:**@b"),
        ("unix:///s?password=Secret&db=1", "unix:///s?password=**&db=1"),
        ("sentinel://a?sentinel_password=Secret", "sentinel://a?sentinel_password=**"),
        ("rediss://a?ssl_password=Secret", "rediss://a?ssl_password=**"),
    ],
)
def test_a_masked_address_has_no_password(url: str, shown: str) -> None:
    assert masked(url) == shown


def test_what_kombu_is_told_of_tls_holds_for_the_ledger() -> None:
    told = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": "/a b.crt", "ssl_keyfile": "/k"}
    url = ledger_url("redis://there:1/2", told | {"ssl_min_version": ssl.TLSVersion.TLSv1_3})
    assert url.startswith("rediss://there:1/2?")
    kwargs = connect(url).connection_pool.connection_kwargs
    assert kwargs["ssl_cert_reqs"] == "required" and kwargs["ssl_ca_certs"] == "/a b.crt"
    assert kwargs["ssl_min_version"] is ssl.TLSVersion.TLSv1_3
    assert ledger_url("rediss://there?ssl_cert_reqs=none", told).count("ssl_cert_reqs") == 1


@pytest.mark.parametrize("url", ["rediss://there", "rediss://there?ssl_ca_certs=/ca"])
def test_a_certificate_is_checked_unless_somebody_says_otherwise(url: str) -> None:
    pool = connect(url).connection_pool
    connection: Any = pool.connection_class(**pool.connection_kwargs)
    assert isinstance(connection, SSLConnection)
    assert connection.cert_reqs is ssl.CERT_REQUIRED and connection.check_hostname


def test_what_kombu_is_told_of_sentinels_holds_for_the_ledger() -> None:
    told = {"master_name": "mine", "sentinel_kwargs": {"password": "s", "socket_timeout": 0.5}}
    pool: Any = connect(ledger_url(SENTINELS, None, told)).connection_pool
    assert issubclass(pool.connection_class, SentinelManagedConnection)
    assert pool.service_name == "mine" and pool.connection_kwargs["password"] == "pw"
    (one, two) = (s.connection_pool.connection_kwargs for s in pool.sentinel_manager.sentinels)
    assert (one["host"], one["port"], two["host"], two["port"]) == ("one", 1, "two", 2)
    assert one["password"] == "s" and one["socket_timeout"] == 0.5
    by_tls = connect(ledger_url(SENTINELS, {"ssl_ca_certs": "/ca"}, told)).connection_pool
    assert issubclass(by_tls.connection_class, SentinelManagedSSLConnection)


def test_a_master_that_is_not_named_is_asked_for() -> None:
    with pytest.raises(ConfigurationError, match="broker_transport_options"):
        connect(SENTINELS)
    with pytest.raises(ConfigurationError, match="sentinel_kwargs retry is a dict"):
        ledger_url(SENTINELS, None, {"sentinel_kwargs": {"retry": {}}})


def test_a_clusters_connections_are_to_the_owner_and_its_nodes_are_seeds() -> None:
    url = ledger_url("redis+cluster://me:pw@one:1;redis+cluster://two?protocol=2", None, {})
    pool = connect(url, "{a}:").connection_pool
    assert issubclass(pool.connection_class, ToOwner) and not issubclass(pool.connection_class, SSLConnection)
    assert pool.connection_kwargs["username"] == "me" and pool.connection_kwargs["protocol"] == 2
    for tls in ("rediss+cluster://one", "redis+cluster://one?ssl_ca_certs=/ca"):
        assert issubclass(connect(tls, "{a}:").connection_pool.connection_class, SSLConnection)
    with pytest.raises(ConfigurationError, match="names the database 1, and a Redis Cluster has none but 0"):
        connect("redis+cluster://one/1", "{a}:")


@pytest.mark.parametrize("scheme", ["redis+cluster", "rediss+cluster"])
def test_a_cluster_is_refused_as_the_broker(scheme: str) -> None:
    app = Celery("shop", broker=f"{scheme}://:Secret@one")
    affinity = Affinity(app, queues=[AffinityQueue("q")])
    with pytest.raises(ConfigurationError, match="the broker is a Redis Cluster") as error:
        _ = affinity.redis_url
    assert "Secret" not in str(error.value)
    with pytest.raises(ConfigurationError, match="the broker is a Redis Cluster"):
        connect(f"{scheme}://one")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("redis://localhost", "rediss://127.0.0.1:6379/0?ssl_ca_certs=/a", True),
        ("redis://localhost/1", "redis://localhost/2", False),
        ("redis+socket:///a?virtual_host=1", "unix:///a?db=1", True),
        ("redis+socket:///a?virtual_host=1", "redis+socket:///a", False),
        ("redis+socket:///a", "redis+socket:///b", False),
        ("sentinel://a;sentinel://b?master_name=m", "sentinel://b;sentinel://a?master_name=m", True),
        ("sentinel://a?master_name=m", "sentinel://a?master_name=n", False),
        ("sentinel://a:6379?master_name=m", "redis://a:6379", False),
        ("redis+cluster://a;redis+cluster://b", "rediss+cluster://b;rediss+cluster://a", True),
        ("redis+cluster://a:6379", "redis://a:6379", False),
    ],
)
def test_two_urls_of_one_database_are_known_as_such(one: str, other: str, same: bool) -> None:
    assert same_server(one, other) is same


def test_settings_never_show_a_password() -> None:
    settings, origins = resolve({"redis_url": "redis://:Secret@there/1"}, {}, {})
    app = Celery("shop", broker="redis://:Secret@here/0")
    affinity = Affinity(app, queues=[AffinityQueue("q")], redis_url="redis://:Secret@there/1")
    assert "Secret" not in repr(settings) + affinity.banner() and "redis_url" in origins
    assert "redis://:**@there/1" in affinity.banner()
    with pytest.raises(ConfigurationError, match="not shown") as error:
        resolve({"redis_url": ["redis://:Secret@there"]}, {}, {})
    assert "Secret" not in str(error.value)
