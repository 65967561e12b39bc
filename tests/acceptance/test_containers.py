"""The commands of docker/: as ordinary processes they do what compose file and manifests want of them.

What is not tried here needs an engine: the image, networks, volumes, Prometheus, Grafana.
"""

from __future__ import annotations

import os
import shlex
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from celery_affinity.embedded import Server
from harness import Cluster, Node, wait_until
from pools import long

pytestmark = [pytest.mark.acceptance, long]

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]


def manifest(name: str) -> Any:
    """The only container of a workload."""
    workload = next(yaml.safe_load_all((ROOT / "docker" / "kubernetes" / f"{name}.yaml").read_text()))
    return workload["spec"]["template"]["spec"]["containers"][0]


class Host:
    """Runs the containers' commands, in a folder, with a TMPDIR of their own."""

    def __init__(self, cluster: Cluster, folder: Path, environ: dict[str, str]) -> None:
        self.cluster = cluster
        self.folder = folder
        # Signs of life lie in TMPDIR.
        self.environ = {
            **cluster.environ, **environ, "TMPDIR": str(cluster.directory),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip

    def start(self, name: str, command: Sequence[str], ready: str, **environ: str) -> Node:
        assert command[0] == "celery"
        node = Node(
            name, command[1:], ready=ready, environ={**self.environ, **environ}, directory=self.cluster.directory
        )  # fmt: skip
        self.cluster.nodes.append(node)
        return node

    def run(self, command: Sequence[str], **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env={**self.environ, **environ}, text=True, capture_output=True,
            timeout=60, check=False,
        )  # fmt: skip


def free_port() -> str:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def indexed(folder: Path) -> int:
    count = 0
    for path in folder.glob("*.sqlite"):
        with closing(sqlite3.connect(path)) as database:
            count += database.execute("SELECT count(*) FROM links").fetchone()[0]
    return count


def test_the_commands_of_the_compose_file_index_every_file(
    cluster: Cluster, aof_server: Server, tmp_path: Path
) -> None:
    index, port = tmp_path / "index", free_port()
    index.mkdir()
    host = Host(cluster, ROOT, {"CELERY_BROKER_URL": aof_server.url(0), "DEMO_INDEX": str(index), "FILES": "2"})
    beat = host.start("beat", shlex.split(COMPOSE["beat"]["command"]), "beat: Starting", AFFINITY_METRICS_PORT=port)
    # In containers %h differs.
    command = COMPOSE["worker"]["command"]
    workers = [
        host.start(name, shlex.split(command.replace("%h", name)), f"worker@{name} ready.") for name in ("h1", "h2")
    ]
    sent = host.run([sys.executable, *shlex.split(COMPOSE["submit"]["command"])[1:]])
    assert sent.returncode == 0, sent.stderr
    files = int(sent.stdout.split()[0].replace(",", ""))
    assert files > 50
    wait_until(lambda: indexed(index) == files, 40, f"{files} files in the index")
    health = host.run(COMPOSE["worker"]["healthcheck"]["test"][1:])
    assert health.returncode == 0 and "worker@h1" in health.stdout, health
    _, *look = COMPOSE["beat"]["healthcheck"]["test"]
    assert host.run([part.replace("9808", port) for part in look]).returncode == 0
    for node in (beat, *workers):
        node.term()
    assert [node.wait() for node in (beat, *workers)] == [0, 0, 0]
    assert host.run(COMPOSE["worker"]["healthcheck"]["test"][1:]).returncode == 1
    assert host.run([part.replace("9808", port) for part in look]).returncode != 0


def test_the_probes_of_the_manifests_tell_a_worker_that_works_from_one_that_does_not(
    cluster: Cluster, aof_server: Server
) -> None:
    beat, worker = manifest("beat"), manifest("worker")
    assert beat["workingDir"] == worker["workingDir"] == "/app/demo/smallest"
    folder = ROOT / "demo" / "smallest"
    cluster.environ["PYTHONPATH"] += f"{os.pathsep}{folder}"
    host = Host(
        cluster, folder, {"CELERY_BROKER_URL": aof_server.url(0), "CELERY_RESULT_BACKEND": aof_server.url(1)}
    )  # fmt: skip
    alive, ready = (worker[probe]["exec"]["command"] for probe in ("livenessProbe", "readinessProbe"))
    assert host.run(ready).returncode == 1
    assert host.run(alive).returncode == 1
    node = host.start("worker", worker["command"], " ready.").wait_ready()
    assert host.run(alive).returncode == 0
    registered = host.run(ready)
    assert registered.returncode == 0 and "worker@" in registered.stdout, registered
    host.start("beat", beat["command"], "beat: Starting", AFFINITY_METRICS_PORT=free_port())
    done = host.run([sys.executable, "app.py", "acme"])
    assert done.returncode == 0 and "acme-30" in done.stdout, done
    # Redis that is away has nobody killed, but nobody counts as ready either.
    aof_server.stop()
    assert host.run(alive).returncode == 0
    aof_server.start()
    node.term()
    assert node.wait() == 0
    assert host.run(alive).returncode == 1
    assert host.run(ready).returncode == 1
