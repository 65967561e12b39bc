"""Laws of what is exported: docs and examples name what there is, and no label grows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from celery import Celery
from click.testing import CliRunner
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from redis.exceptions import ConnectionError

from celery_affinity import Affinity, AffinityQueue, ConfigurationError, exporting
from celery_affinity.cli import affinity
from celery_affinity.measures import COUNTERS, WAIT_BOUNDS_MS, QueueMeasures
from celery_affinity.prometheus import MAX_TOP_TAGS, LedgerCollector
from celery_affinity.types import QueueStats, TagRecord

DOCS = Path(__file__).resolve().parents[2] / "docs"
MONITORING = DOCS / "monitoring"
NAME = re.compile(r"celery_affinity_\w+")


def measures(queue: str = "jobs", top: int = 0) -> QueueMeasures:
    numbers = {one.name: 2 for one in fields(QueueStats)}
    stats = QueueStats(**{**numbers, "queue": queue, "evacuated": False, "paused": False})  # type: ignore[arg-type]
    bounds = (*(b / 1000 for b in WAIT_BOUNDS_MS), float("inf"))
    return QueueMeasures(
        stats, dict.fromkeys(COUNTERS, 5), False, 17, 2, 4, 1.5, 1, 4.0,
        tuple((bound, n) for n, bound in enumerate(bounds)), 12.5,
        tuple(TagRecord(f"tag-{n}", n, (), None) for n in range(top)),
    )


def exported(found: Sequence[QueueMeasures], top: int = 0) -> str:
    registry = CollectorRegistry()
    registry.register(LedgerCollector(lambda _: found, top))
    return generate_latest(registry).decode()


def samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def names(top: int = 1) -> set[str]:
    return {name for name, _, _ in samples(exported([measures(top=top)], top))}


def expressions() -> Iterator[tuple[str, str]]:
    """Where there is an expression, and the expression."""
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    keda = yaml.safe_load((MONITORING / "keda.yaml").read_text())
    yield "keda", keda["spec"]["triggers"][0]["metadata"]["query"]


def test_dashboard_alerts_and_scaling_name_only_what_is_exported() -> None:
    known = names()
    for where, expression in expressions():
        found = set(NAME.findall(expression))
        assert found and found <= known, (where, found - known)


def test_every_metric_is_described_and_nothing_else_is() -> None:
    text = (DOCS / "monitoring.md").read_text()
    rows = set(re.findall(r"^\| `(celery_affinity_\w+)` \|", text, re.MULTILINE))
    histogram = "celery_affinity_start_latency_seconds"
    single = {name for name in names() if not name.startswith(histogram)}
    assert rows == single
    prose = set(NAME.findall(text))
    assert prose <= single | {histogram}
    assert histogram in prose


def test_every_alert_says_what_happened_and_what_to_do() -> None:
    for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("critical", "warning"), rule
            assert rule["annotations"]["summary"] and rule["annotations"]["action"], rule


def test_panels_have_their_own_place_and_number() -> None:
    panels = json.loads((MONITORING / "grafana.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)


def test_the_queue_is_the_only_label_unless_tags_are_asked_for() -> None:
    found = {label for _, labels, _ in samples(exported([measures(top=3)])) for label in labels}
    assert found == {"queue", "le"}


def test_no_more_tags_than_asked_for_have_a_name_and_no_more_than_a_hundred_can() -> None:
    text = exported([measures(top=MAX_TOP_TAGS)], MAX_TOP_TAGS)
    tags = [labels["tag"] for _, labels, _ in samples(text) if "tag" in labels]
    assert len(tags) == MAX_TOP_TAGS
    with pytest.raises(ValueError, match="0 to 100"):
        LedgerCollector(lambda _: [], MAX_TOP_TAGS + 1)


def test_each_queue_has_its_own_figures() -> None:
    found = {
        (name, labels.get("queue")): value
        for name, labels, value in samples(exported([measures("a"), measures("b")]))
    }
    assert found["celery_affinity_entries", "a"] == found["celery_affinity_entries", "b"] == 2
    assert found["celery_affinity_workers_needed", "a"] == 2
    assert found["celery_affinity_start_latency_seconds_count", "b"] == len(WAIT_BOUNDS_MS)
    assert found["celery_affinity_start_latency_seconds_sum", "b"] == 12.5


def test_a_redis_that_does_not_answer_is_a_figure_not_an_error() -> None:
    def read(_: int) -> Any:
        raise ConnectionError("away")

    registry = CollectorRegistry()
    registry.register(LedgerCollector(read))
    assert list(samples(generate_latest(registry).decode())) == [("celery_affinity_up", {}, 0.0)]


def test_metrics_without_their_library_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "celery_affinity.prometheus", None)
    monkeypatch.delattr("celery_affinity.prometheus", raising=False)
    app = Celery("metrics", broker="redis://127.0.0.1:1/0", set_as_current=False)
    bound = Affinity(app, queues=[AffinityQueue("jobs")], metrics_port=9808)
    with pytest.raises(ConfigurationError, match=r"celery-affinity\[prometheus\]"):
        exporting.check_metrics_port(bound.settings)
    silent = Affinity(app, queues=[AffinityQueue("jobs")])
    exporting.check_metrics_port(silent.settings)


def test_the_exporter_prints_once_and_says_by_its_exit_code_whether_redis_answered() -> None:
    app = Celery("metrics", broker="redis://127.0.0.1:1/0", set_as_current=False)
    Affinity(app, queues=[AffinityQueue("jobs")])
    done = CliRunner().invoke(affinity, ["exporter", "--once"], obj=SimpleNamespace(app=app))
    assert done.exit_code == 1
    assert "celery_affinity_up 0.0" in done.output
