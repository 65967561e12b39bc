"""Laws of FastAPI producers (fastapi_shop/, the how-to's files), with and without the library."""

from __future__ import annotations

import asyncio
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from celery import Celery

from celery_affinity.embedded import Server
from harness import Cluster, Node, wait_until

FILES = Path(__file__).parent / "fastapi_shop"
LEAN = ("--without-gossip", "--without-mingle")

#: Calls the endpoint of plain_web in a process that cannot import the library.
PLAIN = """
import asyncio, sys
sys.modules["celery_affinity"] = None
import httpx, plain_web

async def post():
    transport = httpx.ASGITransport(app=plain_web.web)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        print((await client.post("/invoices/acme/7")).text)
asyncio.run(post())
"""


@pytest.fixture
def worker(
    cluster: Cluster, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Node]:
    """A worker in a copy of the files; they can be imported here too, on the test's server."""
    shutil.copytree(FILES, tmp_path / "fastapi_shop")
    cluster.directory = tmp_path / "fastapi_shop"
    results = server.url().rpartition("/")[0] + "/1"
    # Celery lets these go before what the files say.
    urls = {"CELERY_BROKER_URL": server.url(), "CELERY_RESULT_BACKEND": results}
    cluster.environ |= urls
    for name, value in urls.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(cluster.directory))
    yield cluster.worker("shop", queues="invoices", pool="solo", extra=LEAN, real=True)
    for name in ("shop", "web"):
        sys.modules.pop(name, None)


def request(web: Any, method: str, path: str, body: Any = None) -> httpx.Response:
    """One request to an ASGI app in this process."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=web)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            return await client.request(method, path, json=body)

    return asyncio.run(send())


def result_of(app: Celery, answer: Any) -> Any:
    return app.AsyncResult(answer["task"]).get(timeout=40)


def test_an_endpoint_sends_with_its_companys_tag_and_refuses_what_has_none(
    worker: Node, server: Server
) -> None:
    module = importlib.import_module("web")
    web = module.web

    answers = [
        request(web, "POST", "/invoices", {"company": "acme", "number": n}) for n in range(3)
    ]
    refused = request(web, "POST", "/invoices", {"company": "", "number": 1})

    assert [answer.status_code for answer in answers] == [202] * 3
    tasks = [answer.json() for answer in answers]
    assert [result_of(module.app, one) for one in tasks] == [f"acme {n} sent" for n in range(3)]
    assert request(web, "GET", f"/tasks/{tasks[0]['task']}").json() == {"state": "SUCCESS"}
    assert refused.status_code == 422 and "shop.send_invoice" in refused.json()["detail"]
    wait_until(lambda: request(web, "GET", "/companies").json() == {}, what="the lease's end")
    client = server.client()  # the result is stored before its task is settled
    counters = "{affinity:default}:q:invoices:c"
    wait_until(lambda: client.hget(counters, "settled") == b"3", what="three settles")
    wait_until(lambda: client.hkeys("{affinity:default}:q:invoices:warm") == [b"acme"], what="its tag")
    module.app.close()


def test_a_process_without_the_library_sends_with_a_header(
    cluster: Cluster, worker: Node, server: Server
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLAIN], cwd=cluster.directory, env=cluster.environ,
        capture_output=True, text=True, timeout=60, check=False,
    )
    assert done.returncode == 0, done.stderr
    results = Celery("results", backend=cluster.environ["CELERY_RESULT_BACKEND"], set_as_current=False)
    assert result_of(results, json.loads(done.stdout)) == "acme 7 sent"
    client = server.client()  # the result is stored before its task is settled
    wait_until(lambda: client.hkeys("{affinity:default}:q:invoices:warm") == [b"acme"], what="its tag")
