"""An incident, played through with the command line alone; docs/howto_incident.md is its transcript.

AFFINITY_WRITE_INCIDENT=1 writes what the commands said into the document.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

import acceptance.apps.gated  # noqa: F401  (the test's producer knows its tasks)
from acceptance.apps.gated import GATES_VARIABLE
from acceptance.support import LEAN, QUICK, WORKER_ONLY, Producer, wait_for_nodes
from celery_affinity.cli import affinity as command
from harness import RESULTS_VARIABLE, Cluster, Node, wait_until

pytestmark = pytest.mark.acceptance

APP = "acceptance.apps.gated"
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "howto_incident.md"
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
QUEUE = {"AFFINITY_TEST_QUEUE": json.dumps({"on_failure": "block"})}


def cut(line: str) -> str:
    """The document's lines are not longer than a screen's, and know no folder of this machine."""
    line = line.replace(f"{DOCUMENT.parents[1]}/", "")
    return line if len(line) <= 120 else line[:117] + "..."


class Operator:
    """Types commands and keeps what they say."""

    def __init__(self, producer: Producer) -> None:
        self.producer = producer
        self.blocks: list[list[str]] = []

    def block(self) -> None:
        self.blocks.append([])

    def type(self, line: str, code: int = 0) -> str:
        done = CliRunner().invoke(command, line.split(), obj=SimpleNamespace(app=self.producer.app))
        assert done.exit_code == code, (line, done.output, done.exception)
        said = [cut(text) for text in done.output.splitlines() if "site-packages" not in text]
        self.blocks[-1] += [f"$ celery -A shop affinity {line}", *said]
        if code:
            self.blocks[-1].append(f"[exit code {code}]")
        return done.output


@pytest.fixture
def operator(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Operator:
    gates = tmp_path / "gates"
    gates.mkdir()
    for name, value in {RESULTS_VARIABLE: "1", GATES_VARIABLE: str(gates), **QUICK, **QUEUE}.items():
        monkeypatch.setenv(name, value)
        cluster.environ[name] = value
    return Operator(Producer(cluster.broker_url))


def test_an_incident_is_seen_and_ended_with_the_command_line_alone(
    cluster: Cluster, operator: Operator, tmp_path: Path
) -> None:
    beat = cluster.beat(APP)
    workers = {name: _worker(cluster, name) for name in ("w1", "w2")}
    affinity = operator.producer.affinity
    wait_for_nodes(affinity, 2)
    wait_until(lambda: affinity.leader("jobs"), what="a leader")
    _hot_tag(operator, affinity)
    _poison_tag(operator, affinity, tmp_path / "gates")
    _hung_worker(operator, affinity, tmp_path / "gates", workers)
    _lost_leader(operator, affinity, cluster, beat)
    operator.block()
    assert operator.type("status").count("@") >= 4, "who did all that"
    _compare(operator)


def _worker(cluster: Cluster, name: str) -> Node:
    return cluster.worker(APP, name, queues="jobs", environ=WORKER_ONLY, extra=LEAN)


def _hot_tag(operator: Operator, affinity: Any) -> None:
    operator.producer.send("acme", 600, ms=100)
    operator.producer.send("umbrella", 200, ms=100)
    operator.producer.send("initech", 1, ms=100)
    wait_until(lambda: affinity.stats("jobs").leases_per_second > 0, what="a rate")
    wait_until(lambda: 0 < affinity.explain("acme").waiting < 580, what="some work done")
    results = operator.producer.send("initech", 12, ms=100)
    wait_until(lambda: affinity.explain("initech").place, what="its turn")
    operator.block()
    assert re.search(r"^acme +\d{3} ", operator.type("tags --top 3"), re.M)
    assert "waiting: " in operator.type("explain initech")
    operator.type("pause acme")
    operator.type("pause umbrella")
    assert results[-1].get(timeout=20) is not None
    operator.block()
    assert "paused by" in operator.type("explain acme")
    operator.type("resume acme")
    operator.type("purge umbrella --yes")
    operator.type("resume umbrella")
    affinity.purge("jobs", "acme")
    wait_until(lambda: affinity.stats("jobs").entries == 0, 30, "the end of it")


def _poison_tag(operator: Operator, affinity: Any, gates: Path) -> None:
    (gates / "broken").touch()
    results = operator.producer.send("globex", 1, task="poison")
    results += operator.producer.send("globex", 5)
    (letter,) = wait_until(lambda: affinity.dead_letters("jobs"), what="its burial")
    wait_until(lambda: affinity.explain("globex").waiting == 5, what="what waits behind it")
    operator.block()
    assert f"dead letter {letter.entry}" in operator.type("explain globex")
    assert "has no address" in operator.type(f"dead show {letter.entry}")
    (gates / "broken").unlink()
    operator.type(f"dead requeue {letter.entry}")
    assert [result.get(timeout=20) for result in results[1:]] == [1, 2, 3, 4, 5]
    wait_until(lambda: affinity.stats("jobs").entries == 0, 30, "the end of it")
    operator.type("explain globex", code=1)


def _hung_worker(
    operator: Operator, affinity: Any, gates: Path, workers: dict[str, Node]
) -> None:
    operator.producer.send("hooli", 3, task="gated")
    wait_until(lambda: affinity.explain("hooli").holds, what="a slot")
    (hold,) = wait_until(
        lambda: [h for h in affinity.explain("hooli").holds if h.running_seconds], what="its start"
    )
    hung = workers[hold.worker.split("@")[0]]
    hung.stop_process(tree=True)
    wait_until(
        lambda: [w for w in affinity.workers() if w.heartbeat_left_seconds < 1], what="its silence"
    )
    operator.block()
    operator.type("workers")
    operator.type("explain hooli")
    wait_until(lambda: len(affinity.workers()) == 1, what="the rescue")
    wait_until(lambda: affinity.explain("hooli").holds, what="another slot")
    time.sleep(0.2)
    operator.block()
    assert hold.worker not in operator.type("explain hooli")
    hung.destroy()
    (gates / "hooli").touch()
    wait_until(lambda: affinity.stats("jobs").entries == 0, 30, "the end of it")


def _lost_leader(operator: Operator, affinity: Any, cluster: Cluster, beat: Node) -> None:
    beat.kill9()
    wait_until(lambda: affinity.leader("jobs") is None, what="the end of the term")
    operator.producer.send("acme", 3)
    operator.block()
    assert "nobody schedules" in operator.type("leader", code=1)
    assert "3 messages of its pending queue" in operator.type("explain acme", code=1)
    operator.type("queues")
    cluster.beat(APP, "beat2")
    wait_until(lambda: affinity.leader("jobs"), 40, "another leader")
    operator.block()
    operator.type("leader")
    wait_until(lambda: affinity.stats("jobs").settled > 0 and affinity.stats("jobs").entries == 0, 30)


def _compare(operator: Operator) -> None:
    said = ["\n".join(lines) + "\n" for lines in operator.blocks]
    text = DOCUMENT.read_text()
    if os.environ.get("AFFINITY_WRITE_INCIDENT"):
        fresh = iter(said)
        DOCUMENT.write_text(BLOCK.sub(lambda _: f"```console\n{next(fresh)}```", text))
        text = DOCUMENT.read_text()
    assert [_commands(block) for block in BLOCK.findall(text)] == [_commands(s) for s in said]


def _commands(block: str) -> list[str]:
    """What is typed in a block, but for the numbers of letters."""
    return [re.sub(r"\d+", "N", line) for line in block.splitlines() if line.startswith("$ ")]
