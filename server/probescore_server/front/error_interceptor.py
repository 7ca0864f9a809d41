"""Wraps every RPC: parses the request, turns errors into gRPC statuses, and counts the RPC in the metrics.

Without this wrapper, gRPC would end the RPC on any exception, also for a request that cannot be parsed, with the status UNKNOWN or INTERNAL
and the exception's text.
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
from probescore_server.event_loop import MAX_BYTES_PARSED_ON_LOOP, off_the_loop
from probescore_server.front.calls_under_way import CallsUnderWay
from probescore_server.front.metrics import Metrics, RpcLabels
from probescore_server.front.status_codes import CODES, status_of

logger = structlog.get_logger(__name__)

# Any other error, including those meant for the operator, is a fault of the server when it ends a call.
FOR_CLIENTS = tuple(CODES)

# gRPC itself ends a call whose deadline has passed, on both sides, and cancels its handler. It never frees what is sent after that end
# (grpc/grpc#43360). So nothing is sent that would come too late: the interceptor waits for the end, and sends only if it does not come.
SECONDS_TOO_LATE = 0.005
SECONDS_FOR_GRPC_TO_END_A_CALL = 1.0

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Raw: TypeAlias = bytes | AsyncIterable[bytes]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

UNKNOWN = "/unknown/unknown"

# It holds, by (request_streaming, response_streaming): the name of the RPC's kind in metrics, the attribute of a handler that holds its
# function, and gRPC's constructor of such a handler.
KINDS: dict[tuple[bool, bool], tuple[str, str, Callable[..., Handler]]] = {
    (False, False): ("unary", "unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("server_stream", "unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("client_stream", "stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("bidi_stream", "stream_stream", grpc.stream_stream_rpc_method_handler),
}


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Outermost gRPC interceptor, which parses requests, turns errors into statuses, and counts and limits RPCs.

    The interceptors that the operator names in the server's settings, and the servicers, run inside this interceptor.

    Args:
        metrics: the metrics in which RPCs are counted.
        services: full names of the services whose methods are counted by name. An interceptor that the settings name may respond to an RPC
            of any other method, for example to refuse a wrong token. Since a client may choose such a method's name freely, the RPC is
            counted as ``unknown``.
        under_way: the counter that limits the RPCs of the services in ``bounded``; ``None`` = no limit.
        bounded: full names of the services whose RPCs compute something. The health service must not be one of them, since it must respond
            even while no further RPC is accepted.
    """

    def __init__(
        self, metrics: Metrics, services: Iterable[str] = (), under_way: CallsUnderWay | None = None, bounded: Iterable[str] = ()
    ) -> None:
        self._metrics = metrics
        self._under_way = under_way
        self._bounded = frozenset(bounded)
        self._paths = {f"/{name}/{method.name}" for name in services for method in Default().FindServiceByName(name).methods}
        self._guarded: dict[str, tuple[Handler, Handler]] = {}  # It holds, by path, a handler and its wrapped form.

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]], handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Returns the handler of an RPC, wrapped so that errors become gRPC statuses; ``None`` for a method that does not exist, for which
        gRPC ends the RPC with the status UNIMPLEMENTED.
        """
        try:
            handler = await continuation(handler_call_details)
        except Exception as failed:  # It was raised in an interceptor of the settings.
            handler = grpc.unary_unary_rpc_method_handler(_raising(failed))
        path = handler_call_details.method if handler_call_details.method in self._paths else UNKNOWN
        return None if handler is None else self._guard_once(path, handler)

    def _guard_once(self, path: str, handler: Handler) -> Handler:
        """Returns the handler of a gRPC method, wrapped so that errors become gRPC statuses. The wrapper is cached by the method's path,
        and made anew only if another interceptor returned a new handler for this RPC.
        """
        known, guarded = self._guarded.get(path, (None, None))
        if known is not handler or guarded is None:
            guarded = self.guard(path, handler)
            self._guarded[path] = handler, guarded
        return guarded

    def guard(self, path: str, handler: Handler) -> Handler:
        """Wraps the handler of a method so that errors become statuses and RPCs are counted and limited.

        The wrapped handler receives requests as bytes, since parsing a request may fail too.

        Args:
            path: the method's path, ``/package.Service/Method``.
            handler: the handler to wrap.
        """
        kind, behavior, make_handler = KINDS[bool(handler.request_streaming), bool(handler.response_streaming)]
        _, service, method = path.rsplit("/", 2)
        under_way = self._under_way if service in self._bounded else None
        guarded = _GuardedMethod(handler, getattr(handler, behavior), self._metrics, (kind, service, method), under_way)
        return make_handler(guarded.call, None, handler.response_serializer)


def _raising(error: Exception) -> Callable[[object, Context], Awaitable[object]]:
    """Returns a handler function that raises ``error`` in every RPC."""

    async def behavior(request: object, context: Context) -> object:
        raise error

    return behavior


class _GuardedMethod:
    """Wrapper of one method of a servicer, which parses requests, turns errors into statuses, and counts and limits the method's RPCs."""

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
        """Runs the wrapped servicer method with one request, or an iterator of requests, given as bytes. If the method fails, the RPC ends
        with a gRPC status.
        """
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
            if code is grpc.StatusCode.OK:  # The response is sent before it is counted; an error has been sent already.
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
    """Waits until gRPC ends an RPC whose deadline has passed or passes within moments, which cancels the calling task; otherwise returns at
    once.
    """
    remaining = context.time_remaining()
    if remaining is not None and remaining < SECONDS_TOO_LATE:
        await asyncio.sleep(SECONDS_FOR_GRPC_TO_END_A_CALL)
