"""A real server, started and stopped, and what its processes use."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from probescore import ProbeClient

START_SECONDS = 600.0


class Serving:
    """``probescore serve`` on a free port of this machine, ready to score; a context manager that stops it.

    Args:
        settings: of the server.

    Raises:
        RuntimeError: it did not start; with its log.
    """

    def __init__(self, model: str | Path, probes: Sequence[str | Path], **settings: str | int) -> None:
        chosen = {
            "model": model,
            "probes": ",".join(map(str, probes)),
            "port": 0,
            "metrics_port": 0,
            "devices": "cpu",
            "threads_per_worker": 1,
            "log_format": "json",
            **settings,
        }
        flags = [part for name, value in chosen.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        with tempfile.NamedTemporaryFile(prefix="probescore-benchmark-", suffix=".log", delete=False) as log:
            self._process = subprocess.Popen([sys.executable, "-m", "probescore_server.cli", "serve", *flags], stderr=log)
        self._log = Path(log.name)
        self.address = self._address()
        with ProbeClient(self.address) as client:
            client.wait_until_ready(START_SECONDS)
        front = psutil.Process(self._process.pid)
        self._processes = [front, *front.children(recursive=True)]

    def _address(self) -> str:
        end = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < end:
            for line in self._log.read_text().splitlines():
                event = json.loads(line) if line.startswith("{") else {}
                if event.get("event") == "listening":
                    return str(event["address"])
            time.sleep(0.05)
        raise RuntimeError(f"the server did not start:\n{self._log.read_text()}")

    def pids(self) -> list[int]:
        """Of the front process and its workers."""
        return [process.pid for process in self._processes]

    def cpu_seconds(self) -> float:
        """User and system time of them all, counted in hundredths."""
        times = [process.cpu_times() for process in self._processes]
        return sum(time.user + time.system for time in times)

    def close(self) -> None:
        """Stops it as an operator does, and removes its log."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
