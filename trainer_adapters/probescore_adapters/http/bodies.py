"""Limits how large a request's body may be, and how slowly it may come."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from probescore_adapters.http.problems import answer

BODY_SECONDS = 30.0
"""Is how long a client may take to send a body."""


class _ClientDisconnected(Exception):
    """Says that a client went away before its body was there."""


class BodyLimitMiddleware:
    """Hands a request on when its body is there as a whole; answers 413 and 408 itself, and ends the connection after a 408.

    Args:
        app: gets the others.
        max_bytes: of a body.
        seconds: for a body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float = BODY_SECONDS) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection of ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(receive), self._seconds)
        except asyncio.TimeoutError:
            # the server would otherwise go on reading what nobody wants, for as long as it comes
            headers = {"Connection": "close"}
            await answer(408, "The body did not arrive in time", f"it may take {self._seconds:g} s", headers=headers)(scope, receive, send)
            return
        except _ClientDisconnected:
            return
        if body is None:
            await answer(413, "The body is too large", f"the limit is {self._max_bytes} bytes")(scope, receive, send)
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_body() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, receive_body, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """Returns the body, or ``None`` if it is too large. It is read to its end even then: many clients only listen when they have said
        all.
        """
        body, size = bytearray(), 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise _ClientDisconnected
            size += len(message.get("body", b""))
            if size <= self._max_bytes:
                body += message.get("body", b"")
            if not message.get("more_body", False):
                return bytes(body) if size <= self._max_bytes else None
