"""Laws of the pytest plugin for users, in a pytest of its own: as theirs, it runs no code of these tests."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHOP = Path(__file__).parent / "testing_shop"

pytestmark = pytest.mark.acceptance

CONFTEST = '''
import time
import pytest
from celery import Celery
from celery_affinity import Affinity, AffinityQueue, affinity_task

app = Celery("inner")
Affinity(app, queues=[AffinityQueue("jobs", tag_concurrency={"loose": 3, "default": 1})])

@pytest.fixture(scope="session")
def affinity_app(affinity_broker):
    app.conf.update(broker_url=affinity_broker, result_backend=affinity_broker)
    return app

@affinity_task(queue="jobs", tag_from="tag", name="inner.nap")
def nap(tag, seconds):
    naps.append("started")
    time.sleep(seconds)
    naps.append("ended")

naps = []

@affinity_task(queue="jobs", tag_from="tag", bind=True, name="inner.again")
def again(self, tag):
    if not self.request.retries:
        raise self.retry(countdown=0)

@affinity_task(queue="jobs", tag_from="tag", bind=True, name="inner.headers")
def headers(self, tag, retries):
    if self.request.retries < retries:
        raise self.retry(countdown=0)
    return [self.request.get(name) for name in ("traceparent", "tracestate", "baggage")]

@affinity_task(queue="jobs", tag_from="tag", name="inner.boom")
def boom(tag):
    raise ValueError("boom")
'''

TESTS = '''
import time
import pytest
from conftest import again, app, boom, headers, nap, naps
from celery_affinity.testing import running_worker

def send(*tags, seconds=0.05):
    for tag in tags:
        nap.delay(tag, seconds)

def test_it_writes_down_all_that_happens(affinity_worker, affinity_history):
    send("a", "a", "b", seconds=0)
    again.delay("a")
    boom.delay("b")
    affinity_worker.wait_until_idle()
    runs = affinity_history.history.runs
    assert sorted((run.tag, run.seq, run.outcome) for run in runs) == [
        ("a", 1, "ok"), ("a", 2, "ok"), ("a", 3, "ok"), ("a", 3, "retry"), ("b", 1, "ok"),
        ("b", 2, "failed"),
    ]
    assert {run.worker for run in runs} == {affinity_worker.name}
    affinity_history.assert_lawful()

def test_it_convicts_tasks_that_ran_at_once(affinity_worker, affinity_history):
    send("loose", "loose", "loose", seconds=0.3)
    affinity_worker.wait_until_idle()
    with pytest.raises(AssertionError, match="overlap of 'loose'"):
        affinity_history.assert_lawful()
    affinity_history.assert_lawful(concurrency=3)

def test_it_convicts_a_task_that_did_not_end(affinity_worker, affinity_history):
    nap.apply_async(("a", 0), countdown=60)
    with pytest.raises(AssertionError, match=r"1 entries \\(1 due later\\)"):
        affinity_worker.wait_until_idle(0.5)
    with pytest.raises(AssertionError, match="loss of 'a': seq 1 never started"):
        affinity_history.assert_lawful()

def test_what_a_test_leaves_does_not_reach_the_next_one(affinity_worker):
    assert affinity_worker.affinity.stats("jobs").entries == 0
    naps.clear()
    send("a", "a", "a", seconds=2)
    while not naps:
        time.sleep(0.01)

def test_the_next_one(affinity_worker, affinity_history):
    assert naps == ["started", "ended"]
    affinity_worker.wait_until_idle(1)
    assert affinity_history.history.runs == []

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CONTEXT = {"traceparent": TRACE, "tracestate": "a=1,b=2", "baggage": "who=me"}

@pytest.mark.parametrize("retries", [0, 2])
def test_trace_context_passes_the_ledger_unchanged(affinity_worker, retries):
    sent = headers.apply_async(("a", retries), headers=CONTEXT)
    assert sent.get(timeout=10) == list(CONTEXT.values())

def test_so_it_does_from_a_producer_without_the_library_and_for_what_is_due_later(affinity_worker):
    sent = app.send_task(
        "inner.headers", ("a", 0), queue="jobs", headers={**CONTEXT, "identify_tag": "a"}, countdown=0.3
    )
    assert sent.get(timeout=10) == list(CONTEXT.values())

def test_without_a_provider_nothing_is_added(affinity_worker):
    assert headers.delay("a", 0).get(timeout=10) == [None, None, None]

def test_a_task_has_spans_for_its_wait_and_its_run_in_its_producers_trace(affinity_worker):
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    with provider.get_tracer("test").start_as_current_span("request") as request:
        headers.delay("a", 0)
        boom.delay("a")
    affinity_worker.wait_until_idle()
    spans = [span for span in exporter.get_finished_spans() if span.name != "request"]
    assert [span.name for span in spans] == ["affinity wait", "affinity run"] * 2
    for span in spans:
        assert span.parent.span_id == request.get_span_context().span_id
        assert span.attributes["affinity.tag"] == "a"
        assert span.attributes["messaging.destination.name"] == "jobs"
        assert span.attributes["affinity.epoch"] > 0
        assert span.start_time <= span.end_time
    assert [span.status.is_ok for span in spans] == [True, True, True, False]

def test_a_worker_has_as_many_slots_as_asked_for(affinity_app):
    with running_worker(affinity_app, concurrency=1) as worker:
        (record,) = worker.affinity.workers()
        assert len(record.slots) == 1 and record.name == worker.name
    assert worker.affinity.workers() == []
'''


def run_pytest(folder: Path) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "AFFINITY"))}
    environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # other plugins take their time
    # By its name: with the library installed, pytest would find the plugin by itself.
    return subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(folder),
            "-p", "no:cacheprovider", "-p", "celery_affinity.testing", str(folder),
        ],
        cwd=folder, env={**environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=100,
    )


def test_the_tests_of_the_howto_pass(server_binary: Path, tmp_path: Path) -> None:
    shutil.copytree(SHOP, tmp_path, dirs_exist_ok=True)  # away from these tests' conftest
    done = run_pytest(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


def test_the_fixtures_keep_what_they_promise(server_binary: Path, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_inner.py").write_text(TESTS)
    done = run_pytest(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "11 passed" in done.stdout


def test_without_an_app_the_fixture_says_what_to_define(server_binary: Path, tmp_path: Path) -> None:
    (tmp_path / "test_inner.py").write_text("def test_it(affinity_eager): ...\n")
    done = run_pytest(tmp_path)
    assert done.returncode == 1
    assert "the fixture affinity_app is yours to define" in done.stdout


def test_pytest_finds_the_plugin_under_the_name_of_its_module() -> None:
    """So that naming it with -p, too, does not register it twice."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    found = config["options.entry_points"]["pytest11"].strip()
    assert found == "celery_affinity.testing = celery_affinity.testing"
