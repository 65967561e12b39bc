"""The whole system as a user with the least rights, by TLS and on a unix socket."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from celery import Celery, chord
from redis.exceptions import AuthenticationError

from acceptance.support import (
    APP,
    LEAN,
    QUICK,
    WORKER_ONLY,
    Producer,
    finished,
    wait_for_nodes,
    wait_for_run,
)
from celery_affinity import ConfigurationError
from celery_affinity.embedded import Server, start_server
from certificates import Authority, tls_server
from harness import BROKER_VARIABLE, RESULTS_VARIABLE, Cluster, wait_until

pytestmark = pytest.mark.acceptance

TAGS = [f"tag-{number}" for number in range(6)]
ROOT = Path(__file__).resolve().parents[2]
HOWTO = ROOT / "docs" / "howto_redis.md"
PASSWORD = "Geheim/+@1"
#: What kombu and redis-py call when connections or workers get lost, and this run need not see.
OF_RARE_TROUBLE = {"auth", "hello", "watch", "unwatch", "punsubscribe", "zrevrangebyscore"}


def documented_user(name: str = "celery") -> list[str]:
    """The words after ACL SETUSER, of the how-to's block for that user."""
    (block,) = re.findall(rf"```text\nACL SETUSER ({name} .*?)```", HOWTO.read_text(), re.DOTALL)
    words = block.replace("invoices", "jobs").split()
    return [f">{PASSWORD}" if word == ">PASSWORD" else word for word in words]


def run_all(cluster: Cluster, url: str, monkeypatch: pytest.MonkeyPatch) -> Producer:
    """Two workers, one of which is killed, and a beat do all of some work, with results."""
    monkeypatch.setenv(BROKER_VARIABLE, url)
    cluster.environ[BROKER_VARIABLE] = url
    producer = Producer(url)
    workers = [
        cluster.worker(
            APP, name, queues="jobs,ordinary", concurrency=2, environ={**QUICK, **WORKER_ONLY},
            extra=LEAN if name == "w1" else (),
        )
        for name in ("w1", "w2")
    ]
    cluster.beat(APP, environ=QUICK)
    wait_for_nodes(producer.affinity, 2)
    wait_until(lambda: producer.affinity.leader("jobs"), what="a leader")
    producer.send_each(TAGS, 4, ms=20)
    producer.send("held", task="long", ms=3000)
    held = wait_for_run(Path(cluster.environ["AFFINITY_HISTORY"]), lambda run: run.tag == "held")
    next(worker for worker in workers if worker.name == held.worker).kill9()
    producer.send_each(TAGS, 4, ms=20)
    producer.send("retried", 2, task="flaky")
    results = producer.send("late", 2, countdown=0.5)
    finished(Path(cluster.environ["AFFINITY_HISTORY"]))
    assert [result.get(timeout=20) for result in results] == [0, 1]
    wait_until(lambda: producer.affinity.stats("jobs").entries == 0, what="all settled")
    return producer


def operate(producer: Producer) -> None:
    """Ask and change all that operators may."""
    affinity, app = producer.affinity, producer.app
    chord([work_of(app, "a"), work_of(app, "b")], work_of(app, "c"))().get(timeout=20)
    wait_until(lambda: affinity.stats("jobs").entries == 0, what="all settled")
    affinity.pause("jobs", "paused", by="ann")
    held = producer.send("paused", 3)
    wait_until(lambda: affinity.stats("jobs").entries == 3, what="what waits")
    affinity.explain("paused")
    affinity.explain_task(held[0].id)
    affinity.limit("jobs", "paused", 2)
    affinity.move("jobs", "paused", affinity.workers()[0].name)
    affinity.top_tags("jobs")
    affinity.revoke_tag("jobs", "paused")
    affinity.purge("jobs", "paused")
    affinity.resume("jobs", "paused")
    affinity.status()
    affinity.tags("jobs")
    affinity.dead_letters("jobs")
    affinity.requeue_dead("jobs", tag="none")
    print(affinity.doctor())
    app.control.inspect(timeout=1).stats()
    affinity.evacuate("jobs")
    affinity.resume("jobs")


def work_of(app: Celery, tag: str) -> Any:
    return app.tasks["jobs.work"].si(tag, 0)


def as_user(url: str) -> str:
    return url.replace("//", f"//celery:{quote(PASSWORD, safe='')}@")


def test_the_minimal_acl_is_enough(
    server: Server, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RESULTS_VARIABLE, "1")
    cluster.environ[RESULTS_VARIABLE] = "1"
    client = server.client()
    client.execute_command("ACL", "SETUSER", *documented_user())
    producer = run_all(cluster, as_user(server.url()), monkeypatch)
    operate(producer)
    denied = [(entry["reason"], entry["context"], entry["object"]) for entry in client.acl_log()]
    assert not denied
    allowed = {word[1:] for word in documented_user() if word[0] == "+"}
    seen = {name.removeprefix("cmdstat_") for name in client.info("commandstats")}  # type: ignore[union-attr]
    assert of_scripts() <= allowed
    assert allowed - seen - of_scripts() <= OF_RARE_TROUBLE, "it is minimal"


def of_scripts() -> set[str]:
    """The commands that the ledger's scripts call."""
    texts = (path.read_text() for path in (ROOT / "celery_affinity" / "lua").rglob("*.lua"))
    return {word.lower() for text in texts for word in re.findall(r"redis\.p?call\('(\w+)'", text)}


@pytest.mark.proves("a password that is right, wrong, or changed while all runs", "in no log, error, answer or repr")
def test_no_password_is_in_any_log_error_or_answer(
    server: Server, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client = server.client()
    client.execute_command("ACL", "SETUSER", "celery", "on", f">{PASSWORD}", "~*", "&*", "+@all")
    url = as_user(server.url())
    monkeypatch.setenv(BROKER_VARIABLE, url)
    monkeypatch.setenv("AFFINITY_REDIS_URL", url)
    cluster.environ |= {BROKER_VARIABLE: url, "AFFINITY_REDIS_URL": url}
    debug = (*LEAN, "-l", "DEBUG")
    worker = cluster.worker(APP, queues="jobs", environ={**QUICK, **WORKER_ONLY}, extra=debug)
    beat = cluster.beat(APP, environ=QUICK, extra=("-l", "DEBUG"))
    producer = Producer(url)
    affinity, inspect = producer.affinity, producer.app.control.inspect(timeout=1)
    wait_for_nodes(affinity, 1)
    producer.send("a", 2)
    wait_until(lambda: affinity.stats("jobs").settled == 2, what="the end of two tasks")
    told: list[Any] = [affinity.settings, affinity.banner(), affinity, affinity._ledger, affinity._scripts]
    told += [affinity.stats("jobs"), affinity.workers(), affinity.status(), affinity.doctor()]
    told += [inspect.stats(), inspect._request("affinity"), inspect.report(), inspect.conf()]
    client.execute_command("ACL", "SETUSER", "celery", "resetpass", ">another")
    client.client_kill_filter(_type="normal", skipme=True)
    for node in (worker, beat):
        node.wait_for_log("nvalid username-password pair")
    told += [one.log_text(all_starts=True) for one in (worker, beat)]
    told += [console(cluster, command) for command in ("status", "doctor", "workers", "explain a")]
    with pytest.raises(AuthenticationError) as error:
        affinity.stats("jobs")
    told += [repr(error.value), affinity.doctor(), affinity._scripts.client, affinity._scripts.client.connection_pool]
    monkeypatch.setenv("AFFINITY_REDIS_URL", url.replace(f":{server.port}", ":x"))
    with pytest.raises(ConfigurationError) as refusal:
        Producer(url).affinity.stats("jobs")
    told.append(refusal.getrepr())
    text = "\n".join(one if isinstance(one, str) else repr(one) for one in told)
    assert "jobs" in text and "celery" in text
    for spelled in (PASSWORD, quote(PASSWORD, safe=""), quote(PASSWORD), PASSWORD[:6]):
        assert [line for line in text.splitlines() if spelled in line] == []


def console(cluster: Cluster, command: str) -> str:
    """What a command of `celery affinity` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", APP, "affinity", *command.split()],
        env=cluster.environ, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.servers
def test_the_whole_system_runs_by_tls(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority.found(tmp_path / "certificates")
    with tls_server(authority) as (server, url):
        query = f"?ssl_cert_reqs=required&ssl_ca_certs={authority.certificate}"
        monkeypatch.setenv(RESULTS_VARIABLE, url.replace("/0", "/1") + query)
        cluster.environ[RESULTS_VARIABLE] = url.replace("/0", "/1") + query
        run_all(cluster, url + query, monkeypatch)
        for node in cluster.nodes:
            assert "insecure SSL" not in node.log_text()
        plain = [one for one in server.client().client_list() if one["name"] == "celery_affinity"]
        assert plain and all(one["laddr"].endswith(url[-7:-2]) for one in plain)
        cluster.destroy()


@pytest.mark.servers
def test_the_whole_system_runs_on_a_socket(
    cluster: Cluster, server_binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "redis.sock"
    with start_server(extra_args=("--unixsocket", str(path))):
        monkeypatch.setenv(RESULTS_VARIABLE, f"redis+socket://{path}?virtual_host=1")
        cluster.environ[RESULTS_VARIABLE] = f"redis+socket://{path}?virtual_host=1"
        run_all(cluster, f"redis+socket://{path}", monkeypatch)
        cluster.destroy()
