"""A real ``probescore gateway`` in a process of its own, for tests."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

START_SECONDS = 60.0
ANSWER_SECONDS = 20.0


@dataclass(frozen=True)
class Answer:
    """What came back: status, headers in lower case, body."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class RunningGateway:
    """A gateway that was started; a context manager that stops it."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int = 0

    def __enter__(self) -> RunningGateway:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def url(self, route: str) -> str:
        """What a trainer is given."""
        return f"http://127.0.0.1:{self.port}{route}"

    def post(self, route: str, body: bytes, content_type: str = "application/json") -> Answer:
        """Posts these bytes."""
        return self.request("POST", route, body, {"Content-Type": content_type})

    def get(self, route: str) -> Answer:
        return self.request("GET", route)

    def request(self, method: str, route: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        """One request on a connection of its own.

        Raises:
            TimeoutError: no answer within `ANSWER_SECONDS`.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        try:
            connection.request(method, route, body, headers or {})
            response = connection.getresponse()
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
        finally:
            connection.close()

    def stop(self) -> int:
        """Asks it to end and returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def start_gateway(*flags: str, wait: bool = True) -> RunningGateway:
    """Runs ``probescore gateway`` on any free port.

    Args:
        flags: of the command.
        wait: until it listens; else until it ended.
    """
    with tempfile.NamedTemporaryFile(prefix="probescore-gateway-", suffix=".log", delete=False) as log:
        process = subprocess.Popen(
            [os.environ.get("PROBESCORE_SERVER_PYTHON", sys.executable), "-m", "probescore_server.cli", "gateway", "--port", "0", *flags],
            stderr=log,
        )
    gateway = RunningGateway(process, Path(log.name))
    if not wait:
        try:
            process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return gateway
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if listening := re.search(r"running on http://127\.0\.0\.1:(\d+)", gateway.log.read_text()):
            gateway.port = int(listening[1])
            return gateway
        if process.poll() is not None:
            raise RuntimeError(f"the gateway ended with exit code {process.returncode}:\n{gateway.log.read_text()}")
        time.sleep(0.02)
    raise TimeoutError(f"the gateway does not listen:\n{gateway.log.read_text()}")
