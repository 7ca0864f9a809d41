"""A running ``probescore review``, and what a page would ask of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any


class Refused(Exception):
    """An answer that is an error: its status and its sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(f"{status}: {sentence}")
        self.status = status
        self.sentence = sentence


class Review:
    """A process of ``probescore review``."""

    def __init__(self, *runs: Path, cache: Path, before: str = "") -> None:
        command = [*before.split(), sys.executable, "-m", "probescore_server.cli", "review", *map(str, runs), "--port", "0"]
        self.process = subprocess.Popen([*command, "--cache", str(cache)], stderr=subprocess.PIPE, text=True, env={**os.environ})
        self.said: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if match := re.search(r"http://(127\.0\.0\.1:\d+)", line):
                self.host = match[1]
                break
        else:
            raise AssertionError("".join(self.said))
        self.token = self.get("/api/session")["token"]

    def __enter__(self) -> Review:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.terminate()
        self.process.wait(20)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)

    def raw(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Any:
        request = urllib.request.Request(f"http://{self.host}{path}", body, headers or {}, method=method)
        return urllib.request.urlopen(request, timeout=120)  # noqa: S310 - http

    def asked(self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None) -> Any:
        sent = {"Content-Type": "application/json", "X-Probescore-Review": self.token} if method != "GET" else {}
        try:
            with self.raw(method, path, None if body is None else json.dumps(body).encode(), {**sent, **(headers or {})}) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise Refused(error.code, json.load(error)["error"]) from None

    def get(self, path: str, **query: object) -> Any:
        given = {name: value if isinstance(value, str) else json.dumps(value) for name, value in query.items()}
        return self.asked("GET", path + (f"?{urllib.parse.urlencode(given)}" if given else ""))

    def post(self, path: str, body: object) -> Any:
        return self.asked("POST", path, body)

    def label(self, rollout: str, label: str, labeller: str = "ann", **more: object) -> Any:
        return self.post("/api/runs/0/labels", {"rollout": rollout, "label": label, "labeller": labeller, **more})
