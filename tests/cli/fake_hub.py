"""The part of the Hugging Face hub's HTTP interface that a download of files needs, over a real socket."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


@dataclass
class FakeHub:
    """A hub with one repository.

    Attributes:
        repository: ``organisation/repository``.
        commits: the content of each file by path, by commit.
        branches: the commit of each branch.
        gated: whether a licence must be accepted first.
        asked: the paths that were asked for.
    """

    repository: str
    commits: dict[str, Mapping[str, bytes]]
    branches: dict[str, str]
    gated: bool = False
    asked: list[str] = field(default_factory=list)
    address: str = ""

    def commit(self, revision: str) -> str:
        return revision if revision in self.commits else self.branches.get(revision, "")


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """The hub at ``hub.address``, while it is open."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, *, body: bool) -> None:
            path = unquote(urlparse(self.path).path)
            hub.asked.append(path)
            if path.startswith(f"/api/models/{hub.repository}"):
                revision = path.removeprefix(f"/api/models/{hub.repository}").removeprefix("/revision/") or "main"
                self._describe(hub.commit(revision), body)
            elif path.startswith(f"/{hub.repository}/resolve/"):
                revision, _, file = path.removeprefix(f"/{hub.repository}/resolve/").partition("/")
                self._send(hub.commit(revision), file, body)
            else:
                self._refuse(401, "RepoNotFound", body)

        def _describe(self, commit: str, body: bool) -> None:
            if hub.gated:
                return self._refuse(403, "GatedRepo", body)
            if not commit:
                return self._refuse(404, "RevisionNotFound", body)
            siblings = [{"rfilename": name, "size": len(content), "blobId": "0" * 40} for name, content in hub.commits[commit].items()]
            answer = json.dumps({"_id": "1", "id": hub.repository, "sha": commit, "siblings": siblings}).encode()
            return self._write(200, {"Content-Type": "application/json"}, answer, body)

        def _send(self, commit: str, file: str, body: bool) -> None:
            if not commit or file not in hub.commits[commit]:
                return self._refuse(404, "EntryNotFound" if commit else "RevisionNotFound", body)
            content = hub.commits[commit][file]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            return self._write(200, headers, content, body)

        def _refuse(self, code: int, reason: str, body: bool) -> None:
            self._write(code, {"X-Error-Code": reason, "X-Error-Message": reason}, b"{}", body)

        def _write(self, code: int, headers: Mapping[str, str], content: bytes, body: bool) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
