"""A real Flower beside real workers, for the laws of what it shows."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPMessage
from pathlib import Path
from typing import Any

import pytest

import acceptance.apps.gated  # noqa: F401  (the tests' producer knows its tasks)
from acceptance.apps.gated import GATES_VARIABLE
from acceptance.support import LEAN, QUICK, Producer, wait_for_nodes
from celery_affinity.embedded import start_server
from harness import BROKER_VARIABLE, RESULTS_VARIABLE, Cluster, Node, wait_until
from history import HISTORY_VARIABLE

APP = "acceptance.apps.gated"
USER = "Basic " + b64encode(b"jane:secret").decode()


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Site:
    """One Flower, and requests to it."""

    def __init__(self, node: Node, url: str) -> None:
        self.node = node
        self.url = url

    def ask(
        self, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, str, HTTPMessage]:
        """Status, text and headers of an answer; headers of the request as Sec_Fetch_Site."""
        request = urllib.request.Request(self.url + path, data=body)
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with urllib.request.build_opener(NoRedirect).open(request, timeout=30) as answer:
                return answer.status, answer.read().decode(), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(), error.headers

    def json(self, path: str) -> Any:
        status, text, _ = self.ask(path, Authorization=USER)
        assert status == 200, (path, status, text)
        return json.loads(text)

    def page(self) -> str:
        status, text, _ = self.ask("/affinity/tables", Authorization=USER)
        assert status == 200, text
        return text

    def token(self, **headers: str) -> str:
        """The XSRF token that the page gives."""
        _, _, given = self.ask("/affinity", **(headers or {"Authorization": USER}))
        return str(given["Set-Cookie"]).partition("_xsrf=")[2].partition(";")[0]

    def operate(self, action: str, token: str = "", user: str = USER, **order: str) -> tuple[int, str]:
        given = {"Cookie": f"_xsrf={token}", "X_XSRFToken": token} if token else {}
        if user:
            given["Authorization"] = user
        return self.ask(f"/affinity/{action}", json.dumps(order).encode(), **given)[:2]


def start_flower(cluster: Cluster, *options: str) -> Site:
    """Start `celery affinity flower` on a free port; `wait_ready` of its node is the caller's."""
    port = free_port()
    arguments = ["-A", APP, "affinity", "flower", f"--port={port}", "--address=127.0.0.1"]
    node = Node(
        f"flower-{port}", [*arguments, *options], ready="Visit me at",
        environ={**cluster.environ, **QUICK}, directory=cluster.directory, real=True,
    )  # fmt: skip
    cluster.nodes.append(node)
    return Site(node, f"http://127.0.0.1:{port}")


class Shop:
    """Two workers, and a Flower with authentication."""

    def __init__(self, cluster: Cluster, gates: Path, concurrency: int) -> None:
        self.concurrency = concurrency
        self.cluster = cluster
        self.gates = gates
        self.producer = Producer(cluster.broker_url)
        self.affinity = self.producer.affinity
        self.site = self.flower("--basic_auth=jane:secret")

    def worker(self, name: str) -> Node:
        return self.cluster.worker(
            APP, name, queues="jobs", concurrency=self.concurrency, environ=QUICK, extra=LEAN
        )

    def flower(self, *options: str) -> Site:
        return start_flower(self.cluster, *options)

    def hold(self, tag: str, count: int = 1) -> list[Any]:
        """Send tasks that run until the gate is open, and wait for the first to run."""
        found = self.producer.send(tag, count, task="gated")
        wait_until(
            lambda: any(h.running_seconds is not None for h in self.affinity.explain(tag).holds),
            what=f"{tag} to run",
        )
        return found

    def open(self, *tags: str) -> None:
        for tag in tags:
            (self.gates / tag).touch()

    def quiet(self) -> None:
        wait_until(lambda: self.affinity.stats("jobs").entries == 0, 30, "an empty ledger")


@contextmanager
def running_shop(where: Path, concurrency: int = 2) -> Iterator[Shop]:
    """A shop of its own server that knows of its workers' heartbeats."""
    gates = where / "gates"
    gates.mkdir()
    with start_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in (
            (BROKER_VARIABLE, server.url()), (RESULTS_VARIABLE, "1"), (GATES_VARIABLE, str(gates)),
            (HISTORY_VARIABLE, str(where / "history.jsonl")), *QUICK.items(),
        ):  # fmt: skip
            patch.setenv(name, value)
        shop = Shop(Cluster(server.url(), where, where / "history.jsonl"), gates, concurrency)
        try:
            shop.worker("w1")
            shop.worker("w2")
            wait_for_nodes(shop.affinity, 2)
            shop.cluster.wait_ready()
            # Flower tells workers every 5 s to send events of tasks; heartbeats come anyway.
            wait_until(lambda: len(shop.site.json("/workers?json=1")["data"]) == 2, 40, "heartbeats")
            yield shop
        finally:
            for node in shop.cluster.nodes:
                print(node.log_tail(15))
            shop.cluster.destroy()
