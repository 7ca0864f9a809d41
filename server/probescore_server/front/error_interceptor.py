"""The boundary that every RPC crosses: its request is parsed here, its errors become statuses, and it is counted.

Left to itself, gRPC answers any exception, a request that does not parse among them, with UNKNOWN or INTERNAL and the exception's text.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import nullcontext
from typing import Any, NoReturn, TypeAlias

import grpc
import structlog
from google.protobuf.descriptor_pool import Default
from google.protobuf.message import DecodeError

from probescore_server.errors import CoreError, InternalFault, InvalidRequest
from probescore_server.front.calls_under_way import CallsUnderWay
from probescore_server.front.metrics import Metrics, RpcLabels
from probescore_server.front.status_codes import CODES, status_of
from probescore_server.offloading import MAX_BYTES_PARSED_ON_LOOP, off_the_loop

logger = structlog.get_logger(__name__)

# Any other error, those meant for the operator among them, is a fault of ours when it ends a call.
FOR_CLIENTS = tuple(CODES)

# gRPC ends a call whose deadline passed itself, on both sides, and cancels its handler. What is sent after the end it never frees
# (grpc/grpc#43360). So nothing is sent that would come too late: the boundary waits for the end, and sends only if that does not come.
SECONDS_TOO_LATE = 0.005
SECONDS_FOR_GRPC_TO_END_A_CALL = 1.0

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Raw: TypeAlias = bytes | AsyncIterable[bytes]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

UNKNOWN = "/unknown/unknown"

# By (request_streaming, response_streaming): Prometheus' name of the kind, the handler's attribute, what makes such a handler.
KINDS: dict[tuple[bool, bool], tuple[str, str, Callable[..., Handler]]] = {
    (False, False): ("unary", "unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("server_stream", "unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("client_stream", "stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("bidi_stream", "stream_stream", grpc.stream_stream_rpc_method_handler),
}


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """The outermost interceptor; those of the settings, and the servicers, run inside it.

    Args:
        metrics: where RPCs are counted.
        services: full names of those whose methods are counted by name. An interceptor of the settings may answer a call of any other, a
            token that is wrong for example; its name is the client's invention, and it is counted as ``unknown``.
        under_way: bounds the calls to the ``bounded`` services; ``None`` = they are not.
        bounded: full names of those whose calls compute something. Health must answer also where there is no room for more of them.
    """

    def __init__(
        self, metrics: Metrics, services: Iterable[str] = (), under_way: CallsUnderWay | None = None, bounded: Iterable[str] = ()
    ) -> None:
        self._metrics = metrics
        self._under_way = under_way
        self._bounded = frozenset(bounded)
        self._paths = {f"/{name}/{method.name}" for name in services for method in Default().FindServiceByName(name).methods}
        self._guarded: dict[str, tuple[Handler, Handler]] = {}  # by path, a handler and what it was made into

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]], handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Wraps the handler of a call. A method that does not exist has none and stays UNIMPLEMENTED."""
        try:
            handler = await continuation(handler_call_details)
        except Exception as failed:  # in an interceptor of the settings
            handler = grpc.unary_unary_rpc_method_handler(_raising(failed))
        path = handler_call_details.method if handler_call_details.method in self._paths else UNKNOWN
        return None if handler is None else self._guard_once(path, handler)

    def _guard_once(self, path: str, handler: Handler) -> Handler:
        """A servicer's methods have one handler each; an interceptor of the settings may make a new one for each call."""
        known, guarded = self._guarded.get(path, (None, None))
        if known is not handler or guarded is None:
            guarded = self.guard(path, handler)
            self._guarded[path] = handler, guarded
        return guarded

    def guard(self, path: str, handler: Handler) -> Handler:
        """The handler of a method, named ``/package.Service/Method``, inside the boundary. It takes requests as bytes: parsing them is part
        of what is guarded.
        """
        kind, behavior, make_handler = KINDS[bool(handler.request_streaming), bool(handler.response_streaming)]
        _, service, method = path.rsplit("/", 2)
        under_way = self._under_way if service in self._bounded else None
        guarded = _GuardedMethod(handler, getattr(handler, behavior), self._metrics, (kind, service, method), under_way)
        return make_handler(guarded.call, None, handler.response_serializer)


def _raising(error: Exception) -> Callable[[object, Context], Awaitable[object]]:
    async def behavior(request: object, context: Context) -> object:
        raise error

    return behavior


class _GuardedMethod:
    """One method of a servicer, as gRPC may call it."""

    def __init__(
        self, handler: Handler, behavior: Callable[..., Any], metrics: Metrics, labels: RpcLabels, under_way: CallsUnderWay | None
    ) -> None:
        self._under_way = under_way
        self._handler = handler
        self._behavior = behavior
        self._metrics = metrics
        self._counted = metrics.of_method(labels)
        self._name = labels[-1]

    async def call(self, raw: Raw, context: Context) -> object:
        """Calls the method with a request or an iterator of requests as bytes; ends the RPC with a status if it fails."""
        self._counted.count_start()
        started = time.monotonic()
        code = grpc.StatusCode.OK
        try:
            with nullcontext() if self._under_way is None else self._under_way.call(len(raw) if isinstance(raw, bytes) else 0):
                return await self._answer(raw, context)
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            self._metrics.cancelled.inc()
            raise
        except grpc.aio.AbortError:
            code = next((known for known in grpc.StatusCode if context.code() in (known, known.value[0])), grpc.StatusCode.UNKNOWN)
            raise
        except FOR_CLIENTS as error:
            code = status_of(error).code
            await self._abort(context, error)
        except Exception:
            fault = InternalFault.new()
            code = grpc.StatusCode.INTERNAL
            logger.exception("a call failed", incident=fault.incident, method=self._name)
            await self._abort(context, fault)
        finally:
            seconds = time.monotonic() - started
            if code is grpc.StatusCode.OK:  # the answer goes first; an error has gone
                asyncio.get_running_loop().call_soon(self._counted.count_end, code.name, seconds)
            else:
                self._counted.count_end(code.name, seconds)

    async def _answer(self, raw: Raw, context: Context) -> object:
        requests = await self._parse(raw) if isinstance(raw, bytes) else self._parse_each(raw)
        answer = self._behavior(requests, context)
        if not isinstance(answer, AsyncIterator):
            response = await answer
            await _until_over(context)
            self._counted.sent.inc()
            return response
        async for response in answer:
            await _until_over(context)
            await context.write(response)
            self._counted.sent.inc()
        return None

    async def _parse_each(self, raw: AsyncIterable[bytes]) -> AsyncIterator[object]:
        async for message in raw:
            yield await self._parse(message)

    async def _parse(self, raw: bytes) -> object:
        self._counted.received.inc()
        parse = self._handler.request_deserializer or bytes
        try:
            return await off_the_loop(parse, raw, small=len(raw) <= MAX_BYTES_PARSED_ON_LOOP)
        except DecodeError:
            raise InvalidRequest("request", f"its {len(raw)} bytes are not the message that this method takes") from None

    async def _abort(self, context: Context, error: CoreError) -> NoReturn:
        status = status_of(error)
        self._metrics.refused.labels(error.reason).inc()
        await _until_over(context)
        await context.abort(status.code, status.details, status.trailing_metadata)


async def _until_over(context: Context) -> None:
    """Waits for gRPC to end a call, which cancels the caller, if its deadline is as good as passed; returns at once otherwise."""
    remaining = context.time_remaining()
    if remaining is not None and remaining < SECONDS_TOO_LATE:
        await asyncio.sleep(SECONDS_FOR_GRPC_TO_END_A_CALL)
