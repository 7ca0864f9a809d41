"""Limits the size of an HTTP request's body, and the time in which the body must arrive."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from probescore_adapters.http.problems import answer

BODY_SECONDS = 30.0
"""Seconds in which a client must send the body of a request."""


class _ClientDisconnected(Exception):
    """Exception raised when a client closed the connection before the body of its HTTP request had arrived."""


class BodyLimitMiddleware:
    """ASGI middleware that passes an HTTP request on once its body has arrived completely. It responds with status 413 to a body that is
    too large and with 408 to a body that is too slow, and closes the connection after a 408.

    Args:
        app: the application that receives all other requests.
        max_bytes: maximum size of a body in bytes.
        seconds: seconds in which a body must arrive.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float = BODY_SECONDS) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection: passes an HTTP request on once its body has arrived, and any other connection unchanged."""
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
        """Returns the body of an HTTP request, or ``None`` if the body is too large. A body that is too large is also read to its end,
        since many clients read the response only after they have sent everything.
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
