"""Keeps the application to this machine and to its own pages: who may ask, and what its pages may load."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_HEADER = "x-probescore-review"
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
MOST_BODY_BYTES = 4 * 2**20
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = (
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
_OWN_SITE = frozenset({b"same-origin", b"none"})
_READING = frozenset({"GET", "HEAD"})


class GuardMiddleware:
    """ASGI middleware that answers only requests to this machine by a name of its own, so that no other site's name can lead here, and
    none of which a browser says that another site's page made. Only requests with the session's token change anything. Every answer has a
    policy under which a page loads nothing from elsewhere, and runs no script but the application's files.

    Args:
        app: the application.
        token: the session's token, which only the application's own pages can read.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or refuses it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                set_already = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(header for header in _HEADERS if header[0] not in set_already)]
            await send(message)

        if scope["type"] != "http":
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if (problem := self._problem(scope["method"], scope["path"], headers)) is not None:
            await _refuse(send_with_headers, *problem)
            return
        await self._app(scope, _limited(receive), send_with_headers)

    def _problem(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> tuple[int, str] | None:
        if _name_of(headers.get(b"host", b"")) not in LOOPBACK:
            return 403, "Host: this is answered on localhost alone; open the address that the command printed"
        if path.startswith("/api/") and headers.get(b"sec-fetch-site", b"none") not in _OWN_SITE:
            return 403, "Sec-Fetch-Site: another site's page asks; open the address that the command printed"
        if method in _READING:
            return None
        if not hmac.compare_digest(headers.get(TOKEN_HEADER.encode(), b""), self._token):
            return 403, "X-Probescore-Review: the session's token is missing or another's; load the page anew"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MOST_BODY_BYTES:
            return 413, f"body: at most {MOST_BODY_BYTES:,} bytes"
        return None


def _name_of(host: bytes) -> str:
    name = host.decode("latin-1").lower()
    return name.rpartition(":")[0] if name.rpartition(":")[2].isdigit() and ":" in name and not name.endswith("]") else name


def _limited(receive: Receive) -> Receive:
    """Wraps what receives a request's body, so that more than the limit is as if the sender had gone."""
    seen = 0

    async def wrapped() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        return {"type": "http.disconnect"} if seen > MOST_BODY_BYTES else message

    return wrapped


async def _refuse(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"error": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
