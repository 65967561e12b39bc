"""Laws of docker/: the fields that matter are there, and files that name each other agree.

That the commands work is tests/acceptance/test_containers.py's; that hadolint and the compose schema
agree is `make check`'s.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

DOCKER = Path(__file__).resolve().parents[2] / "docker"
MANIFESTS = DOCKER / "kubernetes"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
KUSTOMIZATION = yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())
OBJECTS: dict[tuple[str, str], Any] = {
    (found["kind"], found["metadata"]["name"]): found
    for name in KUSTOMIZATION["resources"]
    for found in yaml.safe_load_all((MANIFESTS / name).read_text())
}
PODS = [key for key in OBJECTS if key[0] in ("Deployment", "StatefulSet")]


def pod(kind: str, name: str) -> tuple[Any, Any]:
    """A workload's pod and its only container."""
    spec = OBJECTS[kind, name]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return spec, container


def test_the_image_is_built_in_two_stages_and_runs_as_nobody_special() -> None:
    assert len(re.findall("^FROM ", DOCKERFILE, re.MULTILINE)) == 2
    (uid,) = re.findall(r"^USER (\d+):\d+$", DOCKERFILE, re.MULTILINE)
    assert int(uid) >= 1000
    assert f"--uid {uid} " in DOCKERFILE
    for kind, name in PODS:
        if name != "redis":
            assert pod(kind, name)[0]["securityContext"]["runAsUser"] == int(uid)


def test_what_the_image_copies_is_there_and_is_sent_to_the_builder() -> None:
    sent = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        for source in line.split():
            assert (DOCKER.parent / source).exists(), source
            assert f"!{source}" in sent, source


def test_compose_runs_two_beats_and_three_workers_beside_a_redis_that_keeps_what_it_has() -> None:
    assert SERVICES["beat"]["deploy"]["replicas"] == 2
    assert SERVICES["worker"]["deploy"]["replicas"] == 3
    assert {"redis", "flower", "prometheus", "grafana"} <= set(SERVICES)
    redis = SERVICES["redis"]["command"]
    assert "--appendonly yes" in redis and "--maxmemory-policy noeviction" in redis
    assert any(volume.endswith(":/data") for volume in SERVICES["redis"]["volumes"])


def test_compose_mounts_only_what_is_there() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (DOCKER / source).exists(), source


def test_prometheus_scrapes_the_port_that_beats_open() -> None:
    port = SERVICES["beat"]["environment"]["AFFINITY_METRICS_PORT"]
    (job,) = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())["scrape_configs"]
    assert job["dns_sd_configs"] == [{"names": ["beat"], "type": "A", "port": int(port)}]
    assert f"localhost:{port}/" in SERVICES["beat"]["healthcheck"]["test"][-1]
    _, beat = pod("Deployment", "beat")
    assert {"name": "AFFINITY_METRICS_PORT", "value": str(beat["ports"][0]["containerPort"])} in beat["env"]


def test_grafana_finds_the_dashboard_and_its_data() -> None:
    provisioning = DOCKER / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards/celery_affinity.yaml").read_text())["providers"]
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    targets = [volume.split(":")[1] for volume in SERVICES["grafana"]["volumes"]]
    assert any(target.startswith(provider["options"]["path"]) for target in targets)
    assert source["type"] == "prometheus" and source["url"] == "http://prometheus:9090"


@pytest.mark.parametrize("kind, name", PODS)
def test_a_pod_is_chosen_by_its_labels_is_not_root_and_has_bounds(kind: str, name: str) -> None:
    workload = OBJECTS[kind, name]["spec"]
    assert workload["selector"]["matchLabels"] == workload["template"]["metadata"]["labels"]
    spec, container = pod(kind, name)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["resources"]["requests"] and container["resources"]["limits"]
    assert spec["terminationGracePeriodSeconds"] >= 30
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    claims = {claim["metadata"]["name"] for claim in workload.get("volumeClaimTemplates", [])}
    assert mounted == {volume["name"] for volume in spec.get("volumes", [])} | claims


def test_a_workers_liveness_asks_no_redis_and_its_readiness_is_its_registration() -> None:
    spec, worker = pod("Deployment", "worker")
    assert worker["livenessProbe"]["exec"]["command"] == ["celery", "-A", "app", "affinity", "alive"]
    assert "affinity workers --node worker@$(hostname)" in worker["readinessProbe"]["exec"]["command"][-1]
    name = worker["command"][worker["command"].index("-n") + 1]
    assert name == "worker@%h"
    # A probe starts an interpreter: the default of 1 s would fail it on a busy node.
    for probe in ("livenessProbe", "readinessProbe"):
        assert worker[probe]["timeoutSeconds"] >= 10
    assert spec["terminationGracePeriodSeconds"] > 300
    assert SERVICES["worker"]["healthcheck"]["test"][-2:] == ["affinity", "alive"]
    assert "stop_grace_period" in SERVICES["worker"]


def test_there_is_a_budget_for_each_deployment_and_the_image_has_one_name() -> None:
    (image,) = KUSTOMIZATION["images"]
    for kind, name in PODS:
        if kind == "Deployment":
            budget = OBJECTS["PodDisruptionBudget", name]["spec"]
            assert budget["selector"] == OBJECTS[kind, name]["spec"]["selector"]
            assert pod(kind, name)[1]["image"] == image["name"] == SERVICES["worker"]["image"]
