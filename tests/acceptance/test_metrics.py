"""The exporter and the scheduler's port, as processes."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from acceptance.support import APP, LEAN, QUICK, Producer
from harness import Cluster, wait_for_ends, wait_until

pytestmark = pytest.mark.acceptance

Figures = dict[tuple[str, str], float]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def figures(text: str) -> Figures:
    """Values by name (without the prefix) and bound."""
    return {
        (sample.name.removeprefix("celery_affinity_"), sample.labels.get("le", "")): sample.value
        for family in text_string_to_metric_families(text) for sample in family.samples
    }


def scraped(port: int) -> Figures | None:
    try:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return figures(answer.read().decode())
    except OSError:
        return None


def test_the_exporter_and_the_leaders_port_tell_what_happened(
    cluster: Cluster, history_path: Path
) -> None:
    port, own = free_port(), free_port()
    metered = {**QUICK, "AFFINITY_METRICS_PORT": str(port)}
    with socket.socket() as taken:  # the process before has not ended yet
        taken.bind(("0.0.0.0", port))
        taken.listen()
        worker = cluster.worker(
            APP, "w1", queues="jobs", concurrency=2, environ=metered, extra=LEAN
        )
        worker.wait_for_log(f"Cannot serve metrics on 0.0.0.0:{port}", 60)
    producer = Producer(cluster.broker_url)
    producer.send_each([f"tag-{n}" for n in range(10)], 4)
    wait_for_ends(history_path, 40)
    wait_until(lambda: producer.affinity.stats("jobs").entries == 0, what="the end of all")

    command = [sys.executable, "-m", "celery", "-A", APP, "affinity", "exporter"]
    exporter = subprocess.Popen(
        [*command, "--port", str(own), "--address", "127.0.0.1", "--top-tags", "3"],
        cwd=cluster.directory, env=cluster.environ, stdout=subprocess.PIPE, text=True,
    )
    try:
        assert exporter.stdout is not None
        assert exporter.stdout.readline() == f"Metrics of jobs on 127.0.0.1:{own}.\n"
        for source in (port, own):
            found = wait_until(lambda source=source: scraped(source), 30, f"port {source}")  # type: ignore[misc]
            assert found is not None
            assert found["up", ""] == found["leader", ""] == 1
            assert found["admitted_tasks_total", ""] == found["settled_tasks_total", ""] == 40
            assert 10 <= found["leases_total", ""] <= 40
            assert found["entries", ""] == found["workers_needed", ""] == 0
            assert (found["workers", ""], found["idle_slots", ""]) == (1, 2)
            assert 1 <= found["start_latency_seconds_bucket", "+Inf"] <= 8
        worker.term()
        worker.wait()
        assert scraped(port) is None
        assert (found := scraped(own)) is not None and found["leader", ""] == 0
        exporter.send_signal(signal.SIGTERM)
        assert exporter.wait(10) == 0
    finally:
        exporter.kill()
        exporter.wait()


def test_one_who_does_not_lead_shows_no_queue(cluster: Cluster) -> None:
    """Else two schedulers would both count what there is once."""
    ports = free_port(), free_port()
    for name, port in zip(("s1", "s2"), ports, strict=True):
        cluster.beat(APP, name, environ={**QUICK, "AFFINITY_METRICS_PORT": str(port)})

    def shown() -> list[int] | None:
        found = [scraped(port) for port in ports]
        if any(one is None or one["up", ""] != 1 for one in found):
            return None
        return sorted(sum(name == "entries" for name, _ in one) for one in found if one) or None

    wait_until(lambda: shown() == [0, 1], 60, "a leader that shows its queue, alone")
