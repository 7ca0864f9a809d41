"""The server's image, built and run by tools that need neither a daemon nor a registry: mmdebstrap, buildah, podman.

The Dockerfile's base, which others pull, is made here under the same name from Debian's packages.
"""

from __future__ import annotations

import ast
import configparser
import functools
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import tomllib

ROOT = Path(__file__).parents[2]
TOOLS = Path(sys.executable).parent
"""What the environment of these tests installed beside its Python."""
BASE = "docker.io/library/debian:bookworm-slim"
NOT_IN_SLIM = ("doc", "groff", "info", "lintian", "locale", "man")
"""What Debian's slim images leave out of /usr/share."""
IMAGE = "localhost/probescore:cpu"

BUILD_SECONDS = 1800.0
START_SECONDS = 180.0
STOP_SECONDS = 40
"""The grace period: longer than ``drain_seconds``."""

# What docker/compose.yaml and the page on Docker ask for, by podman's names.
CONFINED = (
    "--runtime=runc",
    "--network=host",
    "--read-only",
    "--read-only-tmpfs=false",
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
    "--ulimit=nofile=8192:8192",
    "--ulimit=nproc=4096:4096",
    "--tmpfs=/var/cache/probescore",
    "--health-interval=disable",  # podman leaves it to systemd, which is not everywhere: the tests ask by themselves
)


# For what starts containers by itself: podman asks for more descriptors and processes than a container that it runs in may give.
CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=8192:8192", "nproc=4096:4096"]
[engine]
runtime = "runc"
"""


def run(*command: str | Path, seconds: float = 120.0) -> str:
    """What a command wrote to stdout.

    Raises:
        RuntimeError: it failed; with the end of what it wrote.
        subprocess.TimeoutExpired: it took longer.
    """
    ran = attempt(*command, seconds=seconds)
    if ran.returncode != 0:
        raise RuntimeError(f"{command[0]} {command[1]} ended with {ran.returncode}:\n{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}")
    return ran.stdout


def attempt(*command: str | Path, seconds: float = 120.0) -> subprocess.CompletedProcess[str]:
    """What a command did, which may have failed.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=seconds, check=False, cwd=ROOT)


# ------------------------------------------------------------------------------------------------------------------------ building


@functools.cache
def base_image() -> str:
    """The name of the base, which is made if it is not there."""
    if not image_exists(BASE):
        with tempfile.TemporaryDirectory(prefix="probescore-base-") as folder:
            archive = Path(folder, "base.tar")
            excluded = [f"--dpkgopt=path-exclude=/usr/share/{share}/*" for share in NOT_IN_SLIM]
            run("mmdebstrap", "--quiet", "--variant=minbase", *excluded, "bookworm", archive, seconds=BUILD_SECONDS)
            run("podman", "import", "--quiet", archive, BASE, seconds=BUILD_SECONDS)
    return BASE


@functools.cache
def server_image() -> str:
    """The name of the image of the target ``cpu``, built from the checkout as it is; layers that did not change are not built again."""
    base_image()
    with tempfile.TemporaryDirectory(prefix="probescore-pip-") as folder:
        run(
            *("buildah", "build", "--layers", "--isolation=chroot", "--pull-never", "--network=host", "--format=docker"),
            *(f"--volume={mount}:ro" for mount in pip_configuration(Path(folder))),
            *(f"--build-arg={name}={value}" for name, value in labels().items()),
            *("--file=docker/Dockerfile", "--target=cpu", f"--tag={IMAGE}", "."),
            seconds=BUILD_SECONDS,
        )
    return IMAGE


def image_exists(name: str) -> bool:
    """Whether this machine has an image."""
    return attempt("podman", "image", "exists", name).returncode == 0


def labels() -> dict[str, str]:
    """The build arguments that say where an image comes from."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    revision = run("git", "rev-parse", "HEAD").strip()
    created = run("git", "log", "-1", "--format=%cI").strip()  # not the time of the build: the same checkout gives the same image
    return {"VERSION": version, "REVISION": revision, "CREATED": created}


def pip_configuration(folder: Path) -> list[str]:
    """Volumes with which pip in a build finds what this pip finds, none of which ends up in a layer."""
    config = configparser.ConfigParser(interpolation=None)
    config["global"] = pip_settings()
    mounts = [f"{folder / 'pip.conf'}:/etc/pip.conf"]
    if bundle := config["global"].get("cert"):
        # not where it was: the image has a bundle of its own there
        shutil.copy(bundle, folder / "bundle.crt")
        config["global"]["cert"] = "/run/pip/bundle.crt"
        mounts.append(f"{folder / 'bundle.crt'}:/run/pip/bundle.crt")
    for word in " ".join(value for name, value in config["global"].items() if name != "cert").split():
        # the pages of an index link to files beside it
        folder_of_packages = Path(word.removeprefix("file://")).parent if word.startswith("file://") else Path(word)
        if folder_of_packages.is_absolute() and folder_of_packages.is_dir():
            mounts.append(f"{folder_of_packages}:{folder_of_packages}")
    with (folder / "pip.conf").open("w") as file:
        config.write(file)
    return mounts


def pip_settings() -> dict[str, str]:
    """Where this pip looks for packages, from its files and its environment; the environment counts."""
    wanted = ("index-url", "extra-index-url", "find-links", "trusted-host", "cert", "default-timeout")
    found = {}
    lines = run(sys.executable, "-m", "pip", "config", "list").splitlines()
    for line in sorted(lines, key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        option = name.rpartition(".")[2]
        if option in wanted:
            found[option] = str(ast.literal_eval(value))
    return found


# ------------------------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Container:
    """A server in a container; a context manager that stops and removes it.

    Attributes:
        address: what a client connects to.
        metrics_address: of the Prometheus metrics.
    """

    name: str
    address: str
    metrics_address: str

    def __enter__(self) -> Container:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        attempt("podman", "rm", "--force", "--time=5", self.name)

    def is_healthy(self) -> bool:
        """What the image's own health check says now."""
        return attempt("podman", "healthcheck", "run", self.name).returncode == 0

    def wait_until_healthy(self, seconds: float = START_SECONDS) -> None:
        """Waits for the health check.

        Raises:
            RuntimeError: it ended.
            TimeoutError: it was not healthy in time.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.is_healthy():
                return
            if self.inspect("{{.State.Running}}") != "true":
                raise RuntimeError(f"{self.name} ended with {self.inspect('{{.State.ExitCode}}')}:\n{self.logs()}")
            time.sleep(0.5)
        raise TimeoutError(f"{self.name} is not healthy after {seconds} s:\n{self.logs()}")

    def stop(self, grace_seconds: int = STOP_SECONDS) -> int:
        """Sends SIGTERM, SIGKILL after the grace period, and returns the exit code."""
        run("podman", "stop", f"--time={grace_seconds}", self.name, seconds=grace_seconds + 60)
        return int(self.inspect("{{.State.ExitCode}}"))

    def logs(self) -> str:
        """What it has written so far."""
        ran = attempt("podman", "logs", self.name)
        return ran.stdout + ran.stderr

    def inspect(self, template: str) -> str:
        """What podman knows about it."""
        return run("podman", "inspect", "--format", template, self.name).strip()

    def execute(self, *command: str) -> str:
        """What a command in the container wrote to stdout."""
        return run("podman", "exec", self.name, *command)


@contextmanager
def server_container(model: Path, probes: Path, *options: str, name: str = "probescore-test", **settings: str) -> Iterator[Container]:
    """Starts the image on free ports, confined, and waits until it is healthy.

    Args:
        model: a directory, mounted read-only.
        probes: a directory, mounted read-only.
        options: further ones of ``podman run``.
        name: of the container.
        settings: of the server, by name.
    """
    port, metrics_port = free_ports(2)
    variables = {"port": str(port), "metrics_port": str(metrics_port), "threads_per_worker": "1", **settings}
    environment = [f"--env=PROBESCORE_{key.upper()}={value}" for key, value in variables.items()]
    mounts = [f"--volume={model}:/model:ro", f"--volume={probes}:/probes:ro"]
    with Container(name, f"127.0.0.1:{port}", f"127.0.0.1:{metrics_port}") as container:
        run("podman", "run", "--detach", f"--name={name}", *CONFINED, *mounts, *environment, *options, server_image())
        container.wait_until_healthy()
        yield container


def free_ports(count: int) -> Sequence[int]:
    """TCP ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports
