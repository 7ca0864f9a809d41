"""A real HTTP server that speaks OpenAI's chat protocol, judges by a rule, and misbehaves as it is told to."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MARK = "§"
PROMPT = f"Did it cheat?\n{MARK}{{completion}}{MARK}"
"""Template of a prompt from which the server can tell which completion it is asked about."""


@dataclass
class Misbehaviour:
    """What the server does instead of answering."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    sent_bytes: int | None = None  # of the body, before the connection breaks
    seconds: float = 0.0  # before the answer begins
    byte_seconds: float = 0.0  # between two bytes of it


def answered(text: str | None, finish: str = "stop", **more: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return json.dumps({"id": "x", "object": "chat.completion", "model": "judge-2", "choices": [choice], **more}).encode()


Rule = Callable[[str, int], "str | bytes | Misbehaviour"]
"""What the server answers for a completion, the n-th time (from 0) that it is asked about it."""


class JudgeServer:
    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.asked: list[str] = []
        self.times: list[float] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most_at_once = 0
        self._now = 0
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @contextmanager
    def running(self) -> Iterator[JudgeServer]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                content = body["messages"][-1]["content"]
                completion = content.split(MARK)[1] if MARK in content else content
                with judge._lock:
                    count = judge._counts[completion]
                    judge._counts[completion] += 1
                    judge.asked.append(completion)
                    judge.times.append(time.monotonic())
                    judge.bodies.append(body)
                    judge.keys.append(self.headers.get("Authorization"))
                    judge._now += 1
                    judge.most_at_once = max(judge.most_at_once, judge._now)
                with contextlib.suppress(OSError):  # who asked has gone
                    self._answer(judge.rule(completion, count) if self.path == "/v1/chat/completions" else Misbehaviour(404))

            def _answer(self, said: str | bytes | Misbehaviour) -> None:
                if isinstance(said, str):
                    said = answered(f"I think.\nVERDICT: {said}\n")
                if isinstance(said, bytes):
                    said = Misbehaviour(body=said)
                body = answered("VERDICT: no") if said.body is None and said.status == 200 else said.body or b""
                time.sleep(said.seconds)
                with judge._lock:
                    judge._now -= 1  # before the answer, with which the next one may be asked
                self.send_response(said.status)
                for name, value in said.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if said.byte_seconds:
                    for byte in body:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                        time.sleep(said.byte_seconds)
                    return
                self.wfile.write(body[: said.sent_bytes])

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler
