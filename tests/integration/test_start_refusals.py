"""Laws of the start: what cannot work stops the worker with what to change; Redis is waited for."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from redis import Redis

from celery_affinity.embedded import Server
from celery_affinity.exceptions import ConfigurationError
from celery_affinity.server_checks import check_server
from starts import start

WORKER = ("worker", "-Q", "jobs", "-c", "1", "-P", "solo")


@pytest.mark.parametrize(
    "body, says",
    [
        (
            """
            affinity = Affinity(app, queues=[AffinityQueue("jobs")])
            @affinity_task(queue="jbos", tag_from="tag")
            def task(tag): pass
            """,
            "'jbos', which is not an affinity queue (declared: 'jobs')",
        ),
        (
            "affinity = Affinity(app, queues=[AffinityQueue('jobs')], heartbeat_timeout=3)",
            "three times heartbeat_interval",
        ),
        (
            """
            app.conf.affinity_leder_ttl = 3
            affinity = Affinity(app, queues=[AffinityQueue("jobs")])
            """,
            "leder_ttl (from app.conf.affinity_leder_ttl): there is no such setting",
        ),
        (
            "affinity = Affinity(app, queues=[AffinityQueue('jobs')], role='scheduler')",
            "role 'scheduler' runs no affinity tasks, but -Q names 'jobs'",
        ),
        (
            """
            @affinity_task(queue="jobs", tag_from="tag")
            def task(tag): pass
            """,
            "Add to the app's module:  affinity = Affinity(app, queues=[AffinityQueue('jobs')])",
        ),
        (
            """
            app.conf.task_routes = {"refused.*": "jobs"}
            affinity = Affinity(app, queues=[AffinityQueue("others")])
            @affinity_task(tag_from="tag")
            def task(tag): pass
            """,
            "affinity task 'refused.task' is sent to queue 'jobs', which is not an affinity queue",
        ),
        (
            """
            affinity = Affinity(app)
            @affinity_task(tag_from="tag")
            def task(tag): pass
            """,
            "(declared: none)",
        ),
        (
            """
            app.conf.task_routes = {"refused.*": "jobs"}
            @affinity_task(tag_from="tag")
            def task(tag): pass
            """,
            "knows the affinity task 'refused.task', but its app has no Affinity",
        ),
        (
            """
            affinity = Affinity(app, queues=[AffinityQueue('jobs')])
            app.conf.worker_disable_prefetch = True
            """,
            "Leave it out: the ledger sends a slot at most one message beyond",
        ),
        (
            """
            affinity = Affinity(app, queues=[AffinityQueue('jobs')])
            app.conf.task_protocol = 1
            """,
            "task_protocol is 1, expected 2",
        ),
    ],
)
def test_a_worker_with_settings_that_cannot_work_does_not_start(
    shared_server: Server, tmp_path: Path, body: str, says: str
) -> None:
    done = start(tmp_path, shared_server.url(), body, *WORKER, real="jbos" in body)
    assert done.returncode != 0
    assert "\nError: " in done.stderr and "Traceback" not in done.stderr
    assert says in done.stderr


def test_a_beat_with_settings_that_cannot_work_does_not_start(
    shared_server: Server, tmp_path: Path
) -> None:
    body = "affinity = Affinity(app, queues=[AffinityQueue('jobs')], leader_ttl=-1)"
    done = start(tmp_path, shared_server.url(), body, "beat", "-S", "affinity")
    assert done.returncode != 0
    assert "leader_ttl" in done.stdout + done.stderr and "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("command", [WORKER, ("beat", "-S", "affinity")], ids=["worker", "beat"])
@pytest.mark.parametrize(
    "broker, says",
    [
        ("memory://", "the broker is 'memory', which has no place for the queue of each worker"),
        ("filesystem://", "the broker is 'filesystem'"),
        ("redis+cluster://127.0.0.1:1", "the broker is a Redis Cluster, which Celery cannot use"),
        ("amqp://127.0.0.1:1//", "the broker is 'amqp'; celery_affinity needs a Redis or Valkey"),
    ],
)
def test_a_transport_without_a_place_for_worker_queues_is_refused_at_start(
    tmp_path: Path, command: tuple[str, ...], broker: str, says: str
) -> None:
    done = start(tmp_path, broker, "affinity = Affinity(app, queues=[AffinityQueue('jobs')])", *command)
    assert done.returncode != 0
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_beat_without_affinity_says_what_to_add(shared_server: Server, tmp_path: Path) -> None:
    done = start(tmp_path, shared_server.url(), "", "beat", "-S", "affinity", real=True)
    assert done.returncode != 0
    assert "add affinity = Affinity(app" in done.stdout + done.stderr


@pytest.mark.proves(
    "23: Redis may evict keys",
    "refused at start, with the setting to change",
)
def test_a_redis_that_may_evict_keys_is_refused(server: Server, tmp_path: Path) -> None:
    client = server.client()
    client.config_set("maxmemory", "100mb")
    client.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(ConfigurationError, match="CONFIG SET maxmemory-policy noeviction"):
        check_server(client, logging.getLogger())
    body = "affinity = Affinity(app, queues=[AffinityQueue('jobs')])"
    done = start(tmp_path, server.url(), body, *WORKER)
    assert done.returncode != 0
    assert "maxmemory-policy noeviction" in done.stdout + done.stderr
    assert f"(127.0.0.1:{server.port})" in done.stderr and "Traceback" not in done.stderr


def test_a_redis_user_that_may_not_do_what_the_ledger_needs_is_refused(
    server: Server, tmp_path: Path
) -> None:
    user = ("low", "on", ">pw", "~*", "&*", "+@all", "-info")
    server.client().execute_command("ACL", "SETUSER", *user)
    body = "affinity = Affinity(app, queues=[AffinityQueue('jobs')])"
    done = start(tmp_path, server.url().replace("//", "//low:pw@"), body, *WORKER)
    assert done.returncode != 0
    assert "ACL SETUSER <user> +info" in done.stdout + done.stderr


@pytest.mark.proves(
    "Redis without AOF",
    "a warning at start",
)
def test_a_redis_without_aof_is_warned_of(
    server: Server, aof_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    check_server(aof_server.client(), logging.getLogger())
    assert "appendonly" not in caplog.text
    check_server(server.client(), logging.getLogger())
    assert "CONFIG SET appendonly yes" in caplog.text


@pytest.mark.proves("Redis does not say whether it persists (ACL)", "a warning that it could not be checked")
def test_a_redis_that_does_not_say_whether_it_keeps_its_data_is_told_of(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    user = ("quiet", "on", ">pw", "~*", "&*", "+@all", "-config")
    server.client().execute_command("ACL", "SETUSER", *user)
    check_server(Redis.from_url(server.url().replace("//", "//quiet:pw@")), logging.getLogger())
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "could not be checked" in record.message


@pytest.mark.proves("23: maxmemory-policy volatile-lru", "a warning at start")
def test_a_redis_that_may_evict_what_expires_is_warned_of(
    aof_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    aof_server.client().config_set("maxmemory-policy", "volatile-lru")
    check_server(aof_server.client(), logging.getLogger())
    assert "maxmemory-policy volatile-lru; set noeviction" in caplog.text
    assert f"127.0.0.1:{aof_server.port}" in caplog.text


def test_an_old_redis_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    client = server.client()
    monkeypatch.setattr(client, "info", lambda *a: {"redis_version": "6.0.16"})
    with pytest.raises(ConfigurationError, match=r"6\.0\.16, expected 6\.2"):
        check_server(client, logging.getLogger())
