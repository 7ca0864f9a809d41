"""The image: built, and run as confined as it should be run."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tomllib
from image import BASE, ROOT, STOP_SECONDS, TOOLS, Container, attempt, run, server_container, server_image
from models import BOS, VOCAB_SIZE

from probescore import ProbeClient, RolloutGroup, ScoreResult
from probescore_server import Engine

CACHE = "/var/cache/probescore"
GROUPS = [RolloutGroup([BOS, 5, 6, 7], [[8, 9, 10], [11, 12]]), RolloutGroup([BOS, 13], [[14, 15, 16, 17]])]


@pytest.fixture(scope="module")
def server(mounted: Path) -> Iterator[Container]:
    """A server that nobody may harm."""
    with server_container(mounted / "model", mounted / "probes", name="probescore-test-image") as container:
        yield container


@pytest.fixture
def own_server(mounted: Path) -> Iterator[Container]:
    """A server of the test's own, under another user, which does not start a worker again."""
    models = (mounted / "model", mounted / "probes")
    with server_container(*models, "--user=4242:4242", name="probescore-test-own", worker_restart_seconds="3600") as container:
        yield container


def in_image(*command: str) -> str:
    """What a command in the image wrote, without a network."""
    limits = ("--ulimit=nofile=8192:8192", "--ulimit=nproc=4096:4096", "--health-interval=disable")
    options = ("--rm", "--runtime=runc", "--network=none", *limits, f"--entrypoint={command[0]}")
    return run("podman", "run", *options, server_image(), *command[1:])


# ------------------------------------------------------------------------------------------------------------------- the Dockerfile


def test_hadolint_has_nothing_to_say_of_either_target() -> None:
    linted = attempt(TOOLS / "hadolint", "docker/Dockerfile")
    assert (linted.returncode, linted.stdout) == (0, "")


def test_its_base_is_the_one_that_is_made_here() -> None:
    """Or the build would need a registry, or the check would be of something else."""
    (base,) = [line for line in (ROOT / "docker/Dockerfile").read_text().splitlines() if line.startswith("ARG BASE=")]
    assert f"docker.io/library/{base.removeprefix('ARG BASE=')}" == BASE


def test_the_labels_say_what_it_was_made_of() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert [label("version"), label("licenses")] == [version, "Apache-2.0"]
    # not always the newest: buildah's cache does not look at the arguments of a label
    assert run("git", "cat-file", "-t", label("revision")) == "commit\n"


def label(name: str) -> str:
    """One of the labels that the Open Containers Initiative named."""
    template = f'{{{{index .Config.Labels "org.opencontainers.image.{name}"}}}}'
    return run("podman", "image", "inspect", "--format", template, server_image()).strip()


def test_everything_in_it_has_the_version_that_is_locked() -> None:
    code = "from importlib.metadata import distributions\nfor d in distributions(): print(d.name, d.version.partition('+')[0])"
    installed = dict(line.split() for line in in_image("python", "-c", code).splitlines())
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    locked = dict(line.split("==") for line in lines)
    del installed["probescore"]
    assert installed.items() <= locked.items()


@pytest.mark.parametrize("tool", ["pip", "gcc", "curl"])
def test_it_has_no_tool_that_serving_does_without(tool: str) -> None:
    assert in_image("sh", "-c", f"command -v {tool} || echo none") == "none\n"


def test_the_configuration_of_the_builder_stays_with_the_builder() -> None:
    """Where it was mounted, nothing is left but the empty places."""
    assert in_image("find", "/etc/pip.conf", "/run/pip", "-type", "f", "-size", "+0") == ""


def test_it_is_not_larger_than_its_page_says() -> None:
    size = int(run("podman", "image", "inspect", "--format={{.Size}}", server_image()))
    page = (ROOT / "docs/reference/image.md").read_text()
    (stated,) = [line for line in page.splitlines() if line.startswith("| all of it |")]
    assert size / 1e6 <= 1.02 * float(stated.split("|")[2].replace(",", ""))


# ----------------------------------------------------------------------------------------------------------------------- it serves


def test_a_client_outside_gets_the_scores_of_the_engine(server: Container, model: Path, probe_file: Path) -> None:
    with ProbeClient(server.address) as client:
        scored = client.score(GROUPS).values("direction")
    expected = Engine.load(model, [probe_file]).score(GROUPS).values("direction")
    np.testing.assert_allclose(scored, expected, atol=1e-4)


def test_it_reports_its_metrics(server: Container) -> None:
    assert "probescore_ready 1.0" in metrics(server)


def metrics(server: Container) -> str:
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=30) as answer:
        return answer.read().decode()


# --------------------------------------------------------------------------------------------------------------------- it is confined


def status(server: Container) -> dict[str, str]:
    """What the kernel says of the first process."""
    return dict(line.split(":\t", 1) for line in server.execute("cat", "/proc/1/status").splitlines() if ":\t" in line)


def test_the_first_process_reaps_the_others(server: Container) -> None:
    assert status(server)["Name"] == "tini"


def test_it_is_not_root(server: Container) -> None:
    assert status(server)["Uid"].split() == ["10001"] * 4


@pytest.mark.parametrize("capabilities", ["CapEff", "CapPrm", "CapBnd"])
def test_it_has_no_capability(server: Container, capabilities: str) -> None:
    assert int(status(server)[capabilities], 16) == 0


def test_it_writes_to_its_cache_and_nowhere_else(server: Container) -> None:
    code = (
        "for place in / /tmp /run /var/tmp /opt/probescore /model /var/cache/probescore; do touch $place/x 2>/dev/null && echo $place; done"
    )
    assert attempt("podman", "exec", server.name, "sh", "-c", code).stdout == f"{CACHE}\n"


def test_what_looks_for_a_home_or_a_place_for_files_finds_its_cache(server: Container) -> None:
    code = "import tempfile, pathlib, huggingface_hub.constants as hub; print(tempfile.gettempdir(), pathlib.Path.home(), hub.HF_HOME)"
    assert server.execute("python", "-c", code).split() == [CACHE, CACHE, f"{CACHE}/huggingface"]


# ------------------------------------------------------------------------------------------------------------------- health and ending


def test_another_user_may_run_it(own_server: Container) -> None:
    assert status(own_server)["Uid"].split() == ["4242"] * 4


def test_its_health_check_fails_where_no_worker_is_left(own_server: Container) -> None:
    own_server.execute("sh", "-c", "for p in /proc/[0-9]*; do grep -q [s]pawn_main $p/cmdline && kill -9 ${p#/proc/}; done; true")
    end = time.monotonic() + 60
    while own_server.is_healthy() and time.monotonic() < end:
        time.sleep(0.2)
    assert not own_server.is_healthy()


def test_a_stop_waits_for_the_call_that_is_under_way(own_server: Container) -> None:
    random = np.random.default_rng(0)
    groups = [RolloutGroup([BOS, *random.integers(4, VOCAB_SIZE, 9)], [random.integers(4, VOCAB_SIZE, 90)]) for _ in range(600)]
    results: list[ScoreResult] = []
    with ProbeClient(own_server.address, restart_budget=0) as client:
        calling = threading.Thread(target=lambda: results.append(client.score(groups)))
        calling.start()
        end = time.monotonic() + 60
        while "probescore_rpcs_in_flight 1.0" not in metrics(own_server) and time.monotonic() < end:
            time.sleep(0.05)
        exit_code = own_server.stop(STOP_SECONDS)
        calling.join(60)
    assert exit_code == 0
    assert [len(result.groups) for result in results] == [600]


def test_what_it_cannot_serve_ends_it(mounted: Path) -> None:
    no_model = server_container(mounted / "probes", mounted / "probes", name="probescore-test-none")
    with pytest.raises(RuntimeError, match="ended with 1"), no_model:
        pass
