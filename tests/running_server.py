"""A real server in a process of its own, for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

START_SECONDS = 120.0


@dataclass
class RunningServer:
    """A server that was started; a context manager that stops it.

    Attributes:
        address: what a client connects to: ``127.0.0.1:40123``, ``unix:/…``.
        metrics_address: of the Prometheus metrics.
    """

    process: subprocess.Popen[bytes]
    log: Path
    address: str = ""
    metrics_address: str = ""
    _logged: list[dict[str, Any]] = field(default_factory=list)

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the front process."""
        return self.process.pid

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """What it has logged so far: all, or the events of one name."""
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [event for event in map(json.loads, lines) if name in ("", event["event"])]

    def wait_for(self, name: str, *, count: int = 1, seconds: float = START_SECONDS) -> dict[str, Any]:
        """Waits until it has logged `count` such events and returns the last.

        Raises:
            RuntimeError: it ended.
            TimeoutError: it did not.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ended = self.process.poll() is not None
            found = self.events(name)
            if len(found) >= count:
                return found[count - 1]
            if ended:
                raise RuntimeError(f"the server ended with exit code {self.process.returncode}:\n{self.log.read_text()}")
            time.sleep(0.02)
        raise TimeoutError(f"no {name!r} in {seconds} s:\n{self.log.read_text()}")

    def worker_pid(self) -> int:
        """Of the newest worker."""
        return int(self.events("worker ready")[-1]["pid"])

    def stop(self, signum: int = signal.SIGTERM, seconds: float = 60.0) -> int:
        """Signals it and returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


def start_server(model: Path | str, probes: Sequence[Path | str], *, wait: bool = True, **settings: Any) -> RunningServer:
    """Starts ``probescore serve`` on a free port; `settings` are those of `ServerSettings`.

    Args:
        model: a directory.
        probes: probe files.
        wait: until it serves; else only until it listens.
    """
    chosen: dict[str, Any] = {"port": 0, "metrics_port": 0, "devices": "cpu", "threads_per_worker": 1, "log_format": "json", **settings}
    if probes:
        chosen["probes"] = ",".join(map(str, probes))
    server = launch(["--model", str(model), *flags_of(chosen)])
    listening = server.wait_for("listening")
    server.address, server.metrics_address = listening["address"], listening["metrics_address"]
    if wait:
        server.wait_for("serving")
    return server


def launch(arguments: Sequence[str], **environment: str) -> RunningServer:
    """Runs ``probescore serve`` with these arguments, and waits for nothing."""
    with tempfile.NamedTemporaryFile(prefix="probescore-server-", suffix=".log", delete=False) as log:
        process = subprocess.Popen(
            [os.environ.get("PROBESCORE_SERVER_PYTHON", sys.executable), "-m", "probescore_server.cli", "serve", *arguments],
            stderr=log,
            env={**os.environ, **environment},
        )
    return RunningServer(process, Path(log.name))


def flags_of(settings: dict[str, Any]) -> list[str]:
    """Settings as flags."""
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return flags
