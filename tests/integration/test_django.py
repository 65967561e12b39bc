"""Laws of a Django project (django_shop/, the how-to's files), run as its users run it.

The judge is the project's own database: each invoice is sent once, those of a company one at a
time and in the order in which they were committed.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from celery_affinity.embedded import Server
from harness import Cluster, wait_until

PROJECT = Path(__file__).parent / "django_shop"
COMPANIES = [f"company-{number}" for number in range(6)]
LEAN = ("--without-gossip", "--without-mingle")

#: Posts to the view, in the project; prints each answer's status, or the error's name.
POST = """
import json, sys, django
django.setup()
from django.test import Client
client = Client()
for company, number in json.load(sys.stdin):
    try:
        print(client.post("/invoices/", {"company": company, "number": number}).status_code)
    except Exception as error:
        print(type(error).__name__)
"""
#: Calls that are wrong, each in a transaction; prints what came, where, and whether it committed.
MISTAKES = """
import django
django.setup()
from django.db import transaction
from invoices.models import Invoice
from invoices.tasks import send_invoice
from shop import celery_app

celery_app.send_task = lambda name, args, kwargs, **options: print("sent", args, options["queue"],
    options["headers"]["identify_tag"])
calls = [
    lambda: send_invoice.delay_on_commit(None, 1),
    lambda: send_invoice.apply_async_on_commit((None, 1)),
    lambda: send_invoice.apply_async_on_commit(("acme", 1), queue="invioces"),
    lambda: send_invoice.apply_async_on_commit(("acme", 1), identify_tag="eu:acme"),
    lambda: send_invoice.apply_async_on_commit(args=("acme", 2), kwargs={}),
    lambda: send_invoice.delay_on_commit(company="acme", invoice_id=3),
]
for number, call in enumerate(calls):
    at = "before"
    try:
        with transaction.atomic():
            Invoice.objects.create(company="acme", number=number)
            at = "at the call"
            call()
            at = "at the commit"
    except Exception as error:
        print(type(error).__name__, at)
print(Invoice.objects.count(), "committed")
"""


class Project:
    """A copy of the project with a database of its own."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.directory = directory
        shutil.copytree(PROJECT, directory)
        cluster.directory = directory
        cluster.environ |= {
            # Celery lets it go before the settings' CELERY_BROKER_URL.
            "CELERY_BROKER_URL": cluster.broker_url,
            "DJANGO_SETTINGS_MODULE": "shop.settings",
            "PYTHONPATH": os.pathsep.join([str(directory), cluster.environ["PYTHONPATH"]]),
        }
        self._environ = cluster.environ
        self.manage("migrate", "--run-syncdb", "--verbosity=0")

    def manage(self, *command: str) -> str:
        """Run ``manage.py``; what it printed."""
        return self._run(["manage.py", *command])

    def script(self, text: str, given: Any = None) -> list[str]:
        """Run Python in the project; the lines that it printed."""
        return self._run(["-c", text], json.dumps(given)).splitlines()

    def post(self, invoices: Sequence[tuple[str, int]]) -> list[str]:
        """Post to the view; the answers."""
        return self.script(POST, invoices)

    def invoices(self) -> list[sqlite3.Row]:
        """The rows, by company in the order of their commits."""
        with sqlite3.connect(self.directory / "db.sqlite3", timeout=20) as database:
            database.row_factory = sqlite3.Row
            return list(database.execute("SELECT * FROM invoices_invoice ORDER BY company, id"))

    def _run(self, arguments: Sequence[str], given: str = "") -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.directory, env=self._environ, input=given,
            capture_output=True, text=True, timeout=90, check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr


@pytest.fixture
def project(cluster: Cluster, tmp_path: Path) -> Project:
    return Project(cluster, tmp_path / "django_shop")


def test_a_django_project_sends_each_committed_invoice_once_in_order_per_company(
    cluster: Cluster, project: Project, server: Server
) -> None:
    workers = [
        cluster.worker("shop", name, queues="invoices", concurrency=2, extra=LEAN, real=True)
        for name in ("w1", "w2")
    ]
    cluster.wait_ready()
    wanted = [(company, number) for number in range(10) for company in COMPANIES]

    answers = project.post([*wanted, ("company-0", 3), ("", 1), ("company-1", 99)])

    assert answers == ["201"] * 60 + ["IntegrityError", "TagError", "201"]
    wait_until(lambda: all(row["sent_times"] for row in project.invoices()), 60, "all invoices sent")
    for worker in workers:
        worker.term()
        worker.wait()
    rows = project.invoices()
    assert [row["sent_times"] for row in rows] == [1] * 61
    for one, other in pairwise(rows):
        if one["company"] == other["company"]:
            assert one["sent_until"] <= other["sent_from"], "sent side by side or out of order"
            assert one["epoch"] <= other["epoch"]
    settled = server.client().hget("{affinity:default}:q:invoices:c", "settled")
    assert settled == b"61", "something was sent that was not committed"


def test_a_wrong_call_on_commit_is_refused_at_the_call_and_rolls_back(project: Project) -> None:
    assert project.script(MISTAKES) == [
        "MissingTagError at the call",
        "MissingTagError at the call",
        "UndeclaredQueueError at the call",
        "sent ('acme', 1) invoices eu:acme",
        "sent ('acme', 2) invoices acme",
        "sent () invoices acme",
        "3 committed",
    ]


def test_the_projects_own_tests_pass_without_a_worker_and_without_redis(
    cluster: Cluster, project: Project
) -> None:
    project._environ = {**cluster.environ, "CELERY_BROKER_URL": "redis://127.0.0.1:1/0"}
    said = project.manage("test")
    assert "Ran 1 test" in said and "\nOK" in said


def test_the_banner_and_errors_name_settings_as_django_users_write_them(
    cluster: Cluster, project: Project
) -> None:
    worker = cluster.worker("shop", queues="invoices", pool="solo", extra=LEAN, real=True).wait_ready()
    worker.wait_for_log(".> heartbeat_timeout: 12.0 (settings.CELERY_AFFINITY_HEARTBEAT_TIMEOUT)")
    assert ".> queues: invoices(max_batch_size=5) (settings.CELERY_AFFINITY_QUEUES)" in (
        worker.log_text()
    )
    settings = project.directory / "shop" / "settings.py"
    text = settings.read_text()
    for line, says in (
        ("CELERY_AFFINITY_HEARTBEET_TIMEOUT = 12", "there is no such setting"),
        ("CELERY_AFFINITY_ROLE = 'boss'", "found 'boss'"),
        ("CELERY_AFFINITY_QUEUES = {'invoices': {'batch': 3}}", "batch: there is no such setting"),
    ):
        settings.write_text(f"{text}\n{line}\n")
        refused = cluster.worker("shop", "refused", queues="invoices", pool="solo", extra=LEAN, real=True)
        assert refused.wait(60) != 0
        said = refused.log_text()
        assert f"settings.{line.split(' ')[0]}" in said and says in said
        assert "Traceback" not in said


