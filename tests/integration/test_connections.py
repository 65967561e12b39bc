"""Connections to a Redis with TLS, on a unix socket, and to one that becomes a replica."""

from __future__ import annotations

from pathlib import Path

import pytest
from celery import Celery
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from celery_affinity import Affinity, AffinityQueue
from celery_affinity.connection import connect
from celery_affinity.doorbell import Doorbell
from celery_affinity.embedded import Server, start_server
from celery_affinity.keys import Keys
from celery_affinity.scripts import Scripts
from certificates import Authority, tls_server
from harness import wait_until


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.found(tmp_path_factory.mktemp("certificates") / "ours")


def trusting(url: str, authority: Authority, more: str = "") -> str:
    return f"{url}?ssl_ca_certs={authority.certificate}{more}"


@pytest.mark.proves("a certificate that is not trusted, of another host, or out of date", "refused, whoever asks")
@pytest.mark.parametrize(
    ("signed", "trusted", "says"),
    [
        ({}, False, "CERTIFICATE_VERIFY_FAILED"),
        ({"names": "DNS:elsewhere.example"}, True, "IP address mismatch|doesn't match"),
        ({"days": -1}, True, "certificate has expired"),
    ],
    ids=["not trusted", "another host's", "out of date"],
)
def test_a_certificate_that_is_not_trusted_is_refused(
    authority: Authority, signed: dict[str, object], trusted: bool, says: str
) -> None:
    with tls_server(authority, **signed) as (_, url):
        with pytest.raises(RedisConnectionError, match=says):
            connect(trusting(url, authority) if trusted else url).ping()
        unchecked = connect(f"{url}?ssl_cert_reqs=CERT_NONE")
        assert unchecked.ping(), "asked for by name, it is not checked"


def test_a_certificate_that_is_trusted_opens_scripts_and_doorbells(
    authority: Authority, namespace: str
) -> None:
    key, certificate = authority.sign("client")
    ours = f"&ssl_keyfile={key}&ssl_certfile={certificate}"
    with tls_server(authority) as (server, url):
        server.client().config_set("tls-auth-clients", "yes")
        with pytest.raises(RedisConnectionError):
            connect(trusting(url, authority)).ping()
        client = connect(trusting(url, authority, ours))
        term, _ = Scripts(client, Keys(namespace)).claim("q", "me", 1000)
        assert term
        doorbell = Doorbell(client, ["list"])
        assert not doorbell.wait(0)
        client.lpush("list", "one")
        assert doorbell.wait(10)
        doorbell.close()


@pytest.mark.parametrize(("scheme", "name"), [("redis+socket", "virtual_host"), ("unix", "db")])
def test_a_socket_is_a_place_like_any_other(
    server_binary: Path, tmp_path: Path, scheme: str, name: str, namespace: str
) -> None:
    path = tmp_path / "redis.sock"
    with start_server(extra_args=("--unixsocket", str(path))) as server:
        server.client().config_set("requirepass", "a@b/c")
        client = connect(f"{scheme}://:a%40b%2Fc@{path}?{name}=3")
        term, _ = Scripts(client, Keys(namespace)).claim("q", "me", 1000)
        assert term
        plain = Redis(port=server.port, password="a@b/c", db=3)
        assert plain.keys("*")


@pytest.mark.proves("31: the master becomes a replica (READONLY)", "a reconnect, by clients and doorbells alike")
def test_a_server_that_has_become_a_replica_is_left(server: Server, namespace: str) -> None:
    client = connect(server.url())
    scripts = Scripts(client, Keys(namespace), single_threaded=True)
    assert scripts.claim("q", "me", 60_000)[0]
    doorbell = Doorbell(client, ["list"])
    assert not doorbell.wait(0)
    known = server.client().client_list(_type="normal")
    server.client().execute_command("REPLICAOF", "127.0.0.1", "1")
    assert doorbell.wait(10), "a blocked connection is let go"
    with pytest.raises(RedisConnectionError, match="has become a replica"):
        scripts.claim("q", "me", 60_000)
    ours = {one["id"] for one in known if one["name"] == "celery_affinity"}

    def left() -> bool:
        now = {one["id"] for one in server.client().client_list(_type="normal")}
        return not ours & now

    wait_until(left, what="the end of the connections to it")
    server.client().execute_command("REPLICAOF", "NO", "ONE")
    assert scripts.claim("q", "me", 60_000)[0]
    doorbell.close()


@pytest.mark.proves("31: another server answers before the leader's term is over", "the term ends with its server")
def test_a_term_ends_with_its_server(aof_server: Server) -> None:
    app = Celery("shop", broker=aof_server.url())
    affinity = Affinity(app, queues=[AffinityQueue("q")], leader_ttl=60)
    affinity.start_scheduling("node")
    try:
        before = wait_until(lambda: affinity.leader("q"), what="a leader")
        assert before
        aof_server.restart()

        def anew() -> bool:
            now = affinity.leader("q")
            return now is not None and now.term > before.term

        wait_until(anew, 20, "a new term")
    finally:
        affinity.stop_scheduling()
