"""docker/compose.yaml: started whole, but for Grafana, whose image no Debian package makes."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from image import CONTAINERS_CONF, ROOT, TOOLS, attempt, base_image, free_ports, image_exists, run, server_image

from probescore import ProbeClient, RolloutGroup

COMPOSE = ROOT / "docker/compose.yaml"
PROJECT = "probescore-test-compose"
START_SECONDS = 300.0
SERVICES = ("demo-model-cpu", "probescore-cpu", "prometheus")


@dataclass(frozen=True)
class Composed:
    """Where the services are published."""

    server: str
    metrics: str
    prometheus: str


def services(profile: str) -> dict[str, Any]:
    """What a profile starts."""
    every: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
    return {name: service for name, service in every.items() if profile in service["profiles"]}


def prometheus_image() -> None:
    """Makes Debian's Prometheus known by the name of the project's image."""
    name = f"docker.io/{services('cpu')['prometheus']['image']}"
    if not image_exists(name):
        base_image()
        build = ("buildah", "build", "--isolation=chroot", "--pull-never", "--network=host", "--format=docker", f"--tag={name}")
        run(*build, "--file=tests/deploy/prometheus.Dockerfile", "tests/deploy", seconds=600)


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composed]:
    """``--profile cpu up``, without Grafana."""
    server_image()
    prometheus_image()
    ports = dict(zip(("GRPC_PORT", "METRICS_PORT", "PROMETHEUS_PORT"), map(str, free_ports(3)), strict=True))
    conf = tmp_path_factory.mktemp("compose") / "containers.conf"
    conf.write_text(CONTAINERS_CONF)
    environment = {**os.environ, **ports, "CONTAINERS_CONF": str(conf), "PROBESCORE_THREADS_PER_WORKER": "1"}
    compose = [TOOLS / "podman-compose", "--file", COMPOSE, "--project-name", PROJECT, "--profile", "cpu"]
    try:
        up = ["up", "--detach", "--no-build", "--pull=never", *SERVICES]
        subprocess.run([*compose, *up], env=environment, check=True, timeout=START_SECONDS)
        yield Composed(*(f"127.0.0.1:{port}" for port in ports.values()))
    finally:
        subprocess.run([*compose, "down", "--volumes"], env=environment, check=True, timeout=120)


# ----------------------------------------------------------------------------------------------------------------------- as written


def test_it_is_what_the_schema_says() -> None:
    checked = attempt(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_a_profile_is_a_demo_model_a_server_and_what_watches_it(profile: str) -> None:
    assert sorted(services(profile)) == sorted([f"demo-model-{profile}", f"probescore-{profile}", "prometheus", "grafana"])


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_whatever_waits_waits_for_a_service_of_its_profile(profile: str) -> None:
    needed = {other for service in services(profile).values() for other in service.get("depends_on", {})}
    assert needed <= services(profile).keys()


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_nothing_is_published_beyond_the_machine(profile: str) -> None:
    ports = [port for service in services(profile).values() for port in service.get("ports", [])]
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_every_service_is_confined(profile: str) -> None:
    confined = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}
    assert [name for name, service in services(profile).items() if not confined.items() <= service.items()] == []


def test_only_the_gpu_profile_asks_for_a_gpu() -> None:
    (device,) = services("gpu")["probescore-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert "reservations" not in services("cpu")["probescore-cpu"]["deploy"]["resources"]


def test_every_directory_that_it_mounts_is_there() -> None:
    volumes = [volume for service in services("cpu").values() for volume in service.get("volumes", [])]
    mounted = [volume.split(":")[0] for volume in volumes if volume.startswith("./")]
    assert [path for path in mounted if not (COMPOSE.parent / path).exists()] == []


# ---------------------------------------------------------------------------------------------------------------------------- started


def test_the_demo_model_scores(composed: Composed) -> None:
    random = np.random.default_rng(0)
    groups = [RolloutGroup(random.integers(1000, size=20), [random.integers(1000, size=40) for _ in range(4)])]
    with ProbeClient(composed.server) as client:
        client.wait_until_ready(START_SECONDS)
        scores = client.score(groups).values("demo")
    assert np.isfinite(scores).all()


def test_prometheus_finds_the_server_by_its_name(composed: Composed) -> None:
    wait_for(composed, "probescore_ready")


def test_the_recording_rules_of_the_repository_are_evaluated(composed: Composed) -> None:
    with urllib.request.urlopen(f"http://{composed.prometheus}/api/v1/rules", timeout=30) as answer:
        groups = json.load(answer)["data"]["groups"]
    loaded = {Path(group["file"]).name for group in groups}
    assert loaded == {path.name for path in (ROOT / "docker/prometheus/rules").glob("*.yaml")}


def wait_for(composed: Composed, query: str, seconds: float = START_SECONDS) -> None:
    """Waits until an expression is 1 wherever it is evaluated.

    Raises:
        TimeoutError: it is not.
    """
    url = f"http://{composed.prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with urllib.request.urlopen(url, timeout=30) as answer:
            result = json.load(answer)["data"]["result"]
        if result and all(float(sample["value"][1]) == 1 for sample in result):
            return
        time.sleep(1)
    raise TimeoutError(f"{query} is not 1: {result}")
