"""The law of the how-to of batch tasks (batches_shop/): its code does what the page says."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path

import pytest

from celery_affinity.embedded import Server
from harness import Cluster

FILES = Path(__file__).parent / "batches_shop"
LEAN = ("--without-gossip", "--without-mingle")


def test_the_example_indexes_retries_and_refuses_one_by_one(
    cluster: Cluster, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(FILES, tmp_path / "shop")
    cluster.directory = tmp_path / "shop"
    results = server.url().rpartition("/")[0] + "/1"
    urls = {"CELERY_BROKER_URL": server.url(), "CELERY_RESULT_BACKEND": results}
    for name, value in urls.items():
        monkeypatch.setenv(name, value)
    cluster.environ |= urls
    monkeypatch.syspath_prepend(str(cluster.directory))
    search = importlib.import_module("search")
    try:
        texts = ("one", "later", "", "three")
        sent = [search.index.delay(tenant="acme", text=text) for text in texts]
        node = cluster.worker("search", queues="documents", pool="solo", extra=LEAN)
        found = [result.get(timeout=30, propagate=False) for result in sent]
        assert [found[0], found[1], found[3]] == ["acme/3", "acme/5", "acme/5"], node.log_tail()
        assert str(found[2]) == "not a document: ''"
    finally:
        sys.modules.pop("search", None)
