"""The manifests: what kustomize makes of them is valid, agrees with the server, and starts under podman."""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import kubernetes_validate
import numpy as np
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from image import CONTAINERS_CONF, attempt, free_ports, run, server_image

from probescore import ProbeClient, RolloutGroup
from probescore_server import Engine
from probescore_server.settings import ENVIRONMENT_PREFIX, ServerSettings, load_settings

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "docker/kubernetes"
PAGE = ROOT / "docs/how-to/deploy/kubernetes.md"
OPERATOR_MODELS = ROOT / "build/schemas"
OVERLAYS = ("cpu", "gpu")
# The first that knows every field that is used, and the newest that kubernetes-validate knows.
VERSIONS = ("1.30", kubernetes_validate.latest_version())
OPERATORS_KIND = "ServiceMonitor"
PROBES = ("startup", "liveness", "readiness")

Manifest = dict[str, Any]

over_overlays = pytest.mark.parametrize("overlay", OVERLAYS)


@functools.cache
def built(overlay: str) -> list[Manifest]:
    """What ``kubectl apply --kustomize`` would send."""
    return list(yaml.safe_load_all(run("kubectl", "kustomize", MANIFESTS / "overlays" / overlay)))


def the(kind: str, overlay: str) -> Manifest:
    (found,) = [manifest for manifest in built(overlay) if manifest["kind"] == kind]
    return found


def pod(overlay: str) -> Manifest:
    return the("Deployment", overlay)["spec"]["template"]["spec"]


def settings(overlay: str, monkeypatch: pytest.MonkeyPatch) -> ServerSettings:
    """What the server would read of its environment."""
    (container,) = pod(overlay)["containers"]
    environment = {**the("ConfigMap", overlay)["data"], **{entry["name"]: entry.get("value", "4") for entry in container["env"]}}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return load_settings({})


# -------------------------------------------------------------------------------------------------------------------------------- validity


@over_overlays
@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_is_valid(overlay: str, version: str) -> None:
    for manifest in built(overlay):
        if manifest["kind"] != OPERATORS_KIND:
            kubernetes_validate.validate(manifest, version, strict=True)


@over_overlays
def test_the_service_monitor_is_valid(overlay: str) -> None:
    check = "import { ServiceMonitor } from '@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/ServiceMonitor';"
    check += f"new ServiceMonitor({json.dumps(the(OPERATORS_KIND, overlay))}).validate();"
    command = ["node", "--input-type=module", "--eval", check]
    done = subprocess.run(command, cwd=OPERATOR_MODELS, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_what_the_page_shows_is_valid(tmp_path: Path) -> None:
    overlay, claim = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL))
    shutil.copytree(MANIFESTS, tmp_path / "kubernetes")
    (tmp_path / "kubernetes/mine").mkdir()
    (tmp_path / "kubernetes/mine/kustomization.yaml").write_text(yaml.safe_dump(overlay))
    manifests = [claim, *yaml.safe_load_all(run("kubectl", "kustomize", tmp_path / "kubernetes/mine"))]
    for manifest in manifests:
        if manifest["kind"] != OPERATORS_KIND:
            kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)
    (config,) = [manifest for manifest in manifests if manifest["kind"] == "ConfigMap"]
    assert "PROBESCORE_MAX_BATCH_TOKENS" in config["data"]


# ----------------------------------------------------------------------------------------------- agreement, among them and with the server


@over_overlays
def test_everything_that_selects_pods_selects_the_servers(overlay: str) -> None:
    labels = the("Deployment", overlay)["spec"]["template"]["metadata"]["labels"]
    selectors = [
        the("Deployment", overlay)["spec"]["selector"]["matchLabels"],
        the("Service", overlay)["spec"]["selector"],
        the("PodDisruptionBudget", overlay)["spec"]["selector"]["matchLabels"],
        the("NetworkPolicy", overlay)["spec"]["podSelector"]["matchLabels"],
    ]
    assert selectors == [labels] * len(selectors)


@over_overlays
def test_every_variable_is_a_setting(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings(overlay, monkeypatch)  # that the values are allowed
    (container,) = pod(overlay)["containers"]
    names = [*the("ConfigMap", overlay)["data"], *(entry["name"] for entry in container["env"])]
    known = {ENVIRONMENT_PREFIX + field.upper() for field in ServerSettings.model_fields} | {"HF_HUB_OFFLINE"}
    assert set(names) <= known


@over_overlays
def test_it_listens_where_it_is_probed_called_and_scraped(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (container,) = pod(overlay)["containers"]
    read = settings(overlay, monkeypatch)
    ports = {"grpc": read.port, "metrics": read.metrics_port}
    assert {container[f"{kind}Probe"]["grpc"]["port"] for kind in PROBES} == {read.port}
    assert {entry["name"]: entry["containerPort"] for entry in container["ports"]} == ports
    assert {entry["targetPort"]: entry["port"] for entry in the("Service", overlay)["spec"]["ports"]} == ports


@over_overlays
def test_the_grace_period_outlasts_pre_stop_and_drain(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (container,) = pod(overlay)["containers"]
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod(overlay)["terminationGracePeriodSeconds"] > before + settings(overlay, monkeypatch).drain_seconds


@over_overlays
def test_no_service_sets_variables_that_the_server_would_read(overlay: str) -> None:
    """``PROBESCORE_PORT=tcp://…``, for example."""
    assert pod(overlay)["enableServiceLinks"] is False


def test_the_gpu_overlay_asks_for_a_gpu_and_computes_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    (container,) = pod("gpu")["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert settings("gpu", monkeypatch).devices == ("cuda:0",)


# ------------------------------------------------------------------------------------------------------------------------------- it starts


@dataclass(frozen=True)
class Started:
    """The Deployment under podman."""

    address: str
    probed_services: tuple[str, ...]


@pytest.fixture(scope="module")
def started(mounted: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """``podman kube play`` of the cpu overlay, changed only where podman, or a machine shared with others, needs it."""
    server_image()
    port, metrics_port = free_ports(2)
    config, deployment = (copy.deepcopy(the(kind, "cpu")) for kind in ("ConfigMap", "Deployment"))
    config["data"] |= {"PROBESCORE_PORT": str(port), "PROBESCORE_METRICS_PORT": str(metrics_port)}
    deployment["metadata"]["name"] = "probescore-test"
    deployment["spec"]["replicas"] = 1
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    container["resources"] = {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "2Gi"}}
    del container["ports"]  # podman would publish them, which it cannot on the machine's own network
    volume = spec["volumes"][0]["persistentVolumeClaim"]["claimName"] = "probescore-test-models"
    folder = tmp_path_factory.mktemp("kubernetes")
    (folder / "containers.conf").write_text(CONTAINERS_CONF)
    (folder / "manifests.yaml").write_text(yaml.safe_dump_all([config, deployment]))
    services = tuple(container[f"{kind}Probe"]["grpc"]["service"] for kind in PROBES)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CONTAINERS_CONF", str(folder / "containers.conf"))
        try:
            run("podman", "volume", "create", volume)
            shutil.copytree(mounted, run("podman", "volume", "inspect", "--format={{.Mountpoint}}", volume).strip(), dirs_exist_ok=True)
            run("podman", "kube", "play", "--network=host", folder / "manifests.yaml")
            yield Started(f"127.0.0.1:{port}", services)
        finally:
            attempt("podman", "kube", "down", folder / "manifests.yaml")
            attempt("podman", "volume", "rm", "--force", volume)


def test_the_deployment_scores_as_the_engine_does(started: Started, model: Path, probe_file: Path) -> None:
    groups = [RolloutGroup([1, 5, 6], [[7, 8, 9], [10, 11]])]
    with ProbeClient(started.address) as client:
        client.wait_until_ready(180)
        scored = client.score(groups).values("direction")
    expected = Engine.load(model, [probe_file]).score(groups).values("direction")
    np.testing.assert_allclose(scored, expected, atol=1e-4)


def test_every_probe_of_the_deployment_succeeds(started: Started) -> None:
    with ProbeClient(started.address) as client:
        client.wait_until_ready(180)
    with grpc.insecure_channel(started.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answers = [health.Check(health_pb2.HealthCheckRequest(service=name), timeout=60).status for name in started.probed_services]
    assert answers == [health_pb2.HealthCheckResponse.SERVING] * 3
