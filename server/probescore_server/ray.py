"""Ray Serve: the same contract over Ray's gRPC proxy, a replica per GPU.

::

    serve run probescore_server.ray:app model=./model probes=./probes max_replicas=8

A call goes from the proxy (`add_to_proxy`), which has the port, to a replica (`Replica`), which has the same core as a plain server. Ray
hands on only a copy of a call's context, without its deadline, and answers for a replica that died with INTERNAL: both are put right in
the proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NamedTuple, NoReturn, TypeAlias, cast

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from pydantic import BaseModel, Field, ValidationError
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, gRPCOptions
from ray.serve.grpc_util import RayServegRPCContext

from probescore.v1 import scoring_pb2
from probescore_server.errors import StartupError, WorkerUnavailable
from probescore_server.front.error_interceptor import ErrorInterceptor, Handler
from probescore_server.front.health import SCORING_SERVICE, SERVICES
from probescore_server.front.scoring_core import ScoringCore
from probescore_server.front.server import find_devices
from probescore_server.front.status_codes import status_of
from probescore_server.logs import configure_logs
from probescore_server.settings import ServerSettings, join_host_port, load_settings

logger = structlog.get_logger(__name__)

DEPLOYMENT = "probescore"
QUEUED_TOKENS = "queued_tokens"
# The scheduler admits by tokens; Ray's own limit, by calls, must never be what counts.
MAX_CALLS = 100_000
RETRY_SECONDS = 0.5

_METHODS: tuple[MethodDescriptor, ...] = (
    *scoring_pb2.DESCRIPTOR.services_by_name["ScoringService"].methods,
    cast("MethodDescriptor", health_pb2.DESCRIPTOR.services_by_name["Health"].methods_by_name["Check"]),
)

Write: TypeAlias = Callable[[Message], Awaitable[None]]


def _handler_maker(method: MethodDescriptor) -> tuple[Callable[..., Handler], str]:
    """What makes a handler of a method, and the attribute of it that has the behavior."""
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler, "unary_stream"
    return grpc.unary_unary_rpc_method_handler, "unary_unary"


# ------------------------------------------------------------------------------------------------------------------ the application


class ReplicaScaling(BaseModel, extra="forbid", frozen=True):
    """How many replicas there are: arguments of the application beside the settings of a server."""

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_queued_tokens: int = Field(65_536, ge=1)


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """Builds the application, and starts Ray Serve with its gRPC proxy unless it runs already.

    Args:
        arguments: settings of a server, as of ``probescore serve``, and `ReplicaScaling`.

    Raises:
        StartupError: an argument is unknown or out of its bounds, or means nothing here.
    """
    flags = {name: value for name, value in arguments.items() if name not in ReplicaScaling.model_fields}
    settings = load_settings(flags)
    try:
        scaling = ReplicaScaling(**{name: value for name, value in arguments.items() if name in ReplicaScaling.model_fields})
    except ValidationError as error:
        raise StartupError(str(error)) from None
    for name in ("interceptors", "admin"):
        if getattr(settings, name):
            raise StartupError(f"{name}: not under Ray Serve, whose proxy has the port and chooses the replica")
    serve.start(grpc_options=gRPCOptions(port=settings.port, grpc_servicer_functions=[f"{__name__}:{add_to_proxy.__name__}"]))
    return deployment(settings, scaling).bind(settings)


def deployment(settings: ServerSettings, scaling: ReplicaScaling) -> serve.Deployment:
    """One replica per device, or per list of devices, as many as `scaling` says."""
    devices = 0 if settings.devices == ("cpu",) else len(settings.devices)
    return serve.deployment(
        Replica,
        name=DEPLOYMENT,
        ray_actor_options={"num_gpus": devices, "num_cpus": max(1, settings.threads_per_worker)},
        max_ongoing_requests=MAX_CALLS,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        autoscaling_config=AutoscalingConfig(
            min_replicas=scaling.min_replicas,
            max_replicas=max(scaling.min_replicas, scaling.max_replicas),
            policy=AutoscalingPolicy(
                policy_function=f"{__name__}:{QueuedTokens.__name__}", policy_kwargs={"target": scaling.target_queued_tokens}
            ),
        ),
    )


class QueuedTokens:
    """Ray Serve's autoscaling policy: so many replicas that each has at most `target` tokens waiting.

    One replica less is enough only when half of that would be: a queue is short as soon as there are enough replicas.
    """

    def __init__(self, target: int) -> None:
        self._target = target

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Replicas that are wanted; Ray applies its bounds and delays."""
        queued = sum(context.aggregated_metrics.get(QUEUED_TOKENS, {}).values())
        now = context.target_num_replicas
        wanted = math.ceil(queued / self._target)
        if wanted < now:
            wanted = now - 1 if math.ceil(2 * queued / self._target) < now else now
        return wanted, {}


# --------------------------------------------------------------------------------------------------------------------- in the proxy


class ForwardedRequest(NamedTuple):
    """A request on its way from the proxy to a replica: its bytes, and the seconds until its deadline."""

    raw: bytes
    seconds_left: float | None


def add_to_proxy(_: object, server: Any) -> None:  # noqa: ANN401 - Ray's own subclass of grpc.aio.Server
    """Adds the services to Ray's gRPC proxy: one of its ``grpc_servicer_functions``."""
    for service in {method.containing_service.full_name for method in _METHODS}:
        methods = [method for method in _METHODS if method.containing_service.full_name == service]
        handlers: Any = grpc.method_handlers_generic_handler(service, {method.name: _unparsed(method) for method in methods})
        # Ray replaces the behavior of each handler by one that calls a method of that name of a replica
        server.add_generic_rpc_handlers((handlers,))
        handlers._method_handlers = {path: _forwarding(handler) for path, handler in handlers._method_handlers.items()}


def _unparsed(method: MethodDescriptor) -> Handler:
    """Requests stay bytes, which the replica parses inside its boundary."""
    make, _ = _handler_maker(method)
    return make(lambda request, context: None)


def _forwarding(routed: Any) -> Handler:  # noqa: ANN401
    async def unary(raw: bytes, context: Any) -> bytes:  # noqa: ANN401
        answer: bytes = await routed.unary_unary(ForwardedRequest(raw, context.time_remaining()), context)
        _explain_ray(context)
        return answer

    async def stream(raw: bytes, context: Any) -> AsyncIterator[bytes]:  # noqa: ANN401
        async for answer in routed.unary_stream(ForwardedRequest(raw, context.time_remaining()), context):
            if answer:  # an empty one only brings the status
                yield answer
        _explain_ray(context)

    return grpc.unary_stream_rpc_method_handler(stream) if routed.response_streaming else grpc.unary_unary_rpc_method_handler(unary)


_RAYS_OWN = {
    grpc.StatusCode.INTERNAL: "the replica that had this call is gone",
    grpc.StatusCode.NOT_FOUND: "no application is deployed, or there are several and metadata 'application' names none of them",
    grpc.StatusCode.UNAVAILABLE: "no replica takes calls at present",
}


def _explain_ray(context: Any) -> None:  # noqa: ANN401
    """Makes UNAVAILABLE, which clients retry, of what Ray itself ends a call with."""
    trailing = tuple(context.trailing_metadata() or ())
    code = next((known for known in _RAYS_OWN if context.code() in (known, known.value[0])), None)
    # a replica's own have details, except for NOT_FOUND of a health check, and every answer of one has some metadata
    a_replicas = any(key == "grpc-status-details-bin" for key, _ in trailing) or (code is grpc.StatusCode.NOT_FOUND and trailing)
    if code is None or a_replicas:
        return
    status = status_of(WorkerUnavailable(_RAYS_OWN[code], RETRY_SECONDS))
    context.set_code(status.code)
    context.set_details(status.details)
    context.set_trailing_metadata((*trailing, *status.trailing_metadata))


# -------------------------------------------------------------------------------------------------------------------- in a replica


class Replica:
    """One replica: a core without a port. Ray calls its methods by the names that the proxy knows.

    Raises:
        StartupError: it cannot load what it should serve.
    """

    async def __init__(self, settings: ServerSettings) -> None:  # type: ignore[misc] # Ray awaits it
        configure_logs(settings.log_format, settings.log_level)
        assigned = serve.get_replica_context()
        self._max_message_bytes = settings.max_message_bytes
        self._changed = asyncio.Event()
        self._core = ScoringCore(settings, await find_devices(settings.devices), self._changed.set)
        self._methods = _guarded_methods(self._core)
        port = _serve_metrics(self._core, settings, assigned.rank.local_rank)
        logger.info("metrics", address=join_host_port(settings.metrics_host, port), replica=assigned.replica_tag)
        self._running = asyncio.create_task(self._core.run())
        changed = asyncio.create_task(self._changed.wait())
        await asyncio.wait([changed, self._running], return_when=asyncio.FIRST_COMPLETED)
        if self._running.done():
            self._running.result()

    async def Score(self, request: ForwardedRequest, grpc_context: RayServegRPCContext) -> Message:  # noqa: N802
        """Scores every completion and answers once all are done."""
        return await self._answer("Score", request, grpc_context)

    async def ScoreStream(self, request: ForwardedRequest, grpc_context: RayServegRPCContext) -> AsyncIterator[Message]:  # noqa: N802
        """Scores and answers in pieces, as batches finish."""
        written: asyncio.Queue[Message | None] = asyncio.Queue()
        answering = asyncio.create_task(self._answer("ScoreStream", request, grpc_context, written.put))
        answering.add_done_callback(lambda _: written.put_nowait(None))
        try:
            while (message := await written.get()) is not None:
                yield message
            yield await answering
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)

    async def GetServerInfo(self, request: ForwardedRequest, grpc_context: RayServegRPCContext) -> Message:  # noqa: N802
        """Says what runs in this replica."""
        return await self._answer("GetServerInfo", request, grpc_context)

    async def ListProbes(self, request: ForwardedRequest, grpc_context: RayServegRPCContext) -> Message:  # noqa: N802
        """Lists the loaded probes with their manifests."""
        return await self._answer("ListProbes", request, grpc_context)

    async def Check(self, request: ForwardedRequest, grpc_context: RayServegRPCContext) -> Message:  # noqa: N802
        """Of ``grpc.health.v1.Health``: whether this replica serves."""
        return await self._answer("Check", request, grpc_context)

    def check_health(self) -> None:
        """Asked by Ray, which replaces a replica that raises several times in a row."""
        if not self._core.serving:
            raise RuntimeError("no worker can score")

    def record_autoscaling_stats(self) -> dict[str, int]:
        """Asked by Ray, for `QueuedTokens`."""
        return {QUEUED_TOKENS: self._core.scheduler.queued_tokens}

    async def _answer(
        self, method: str, request: ForwardedRequest, grpc_context: RayServegRPCContext, write: Write | None = None
    ) -> Message:
        """The answer to a call, empty if `grpc_context` says why there is none, or at the end of a stream."""
        call = _RayServicerContext(request, grpc_context, write)
        try:
            if (size := len(request.raw)) > self._max_message_bytes:
                # as gRPC itself says it
                await call.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED, f"Received message larger than max ({size} vs. {self._max_message_bytes})"
                )
            answer: Message | None = await self._methods[method](request.raw, call)
        except grpc.aio.AbortError:
            return Empty()
        return answer or Empty()


class _RayServicerContext:
    """What a servicer and the boundary use of a ``grpc.aio.ServicerContext``."""

    def __init__(self, request: ForwardedRequest, context: RayServegRPCContext, write: Write | None) -> None:
        self._context = context
        self._deadline = None if request.seconds_left is None else time.monotonic() + request.seconds_left
        self._write = write

    def invocation_metadata(self) -> list[tuple[str, str | bytes]]:
        metadata: list[tuple[str, str | bytes]] = self._context.invocation_metadata()
        return metadata

    def peer(self) -> str:
        return str(self._context.peer())

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def code(self) -> Any:  # noqa: ANN401
        return self._context.code()

    async def write(self, message: Message) -> None:
        assert self._write is not None  # noqa: S101 - only streams write
        await self._write(message)

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: tuple[tuple[str, str | bytes], ...] = ()
    ) -> NoReturn:
        self._context.set_code(code)
        self._context.set_details(details)
        self._context.set_trailing_metadata(list(trailing_metadata))
        raise grpc.aio.AbortError


def _guarded_methods(core: ScoringCore) -> dict[str, Callable[[bytes, _RayServicerContext], Awaitable[Message | None]]]:
    """By name, what answers a request given as bytes."""

    async def check(request: health_pb2.HealthCheckRequest, context: _RayServicerContext) -> health_pb2.HealthCheckResponse:
        if request.service not in SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        status = health_pb2.HealthCheckResponse
        return status(status=status.SERVING if core.serving else status.NOT_SERVING)

    boundary = ErrorInterceptor(core.metrics, (), core.under_way, [SCORING_SERVICE])
    methods = {}
    for method in _METHODS:
        behavior = check if method.name == "Check" else getattr(core.servicer, method.name)
        make, attribute = _handler_maker(method)
        handler = make(behavior, request_deserializer=GetMessageClass(method.input_type).FromString)
        guarded = boundary.guard(f"/{method.containing_service.full_name}/{method.name}", handler)
        methods[method.name] = getattr(guarded, attribute)
    return methods


def _serve_metrics(core: ScoringCore, settings: ServerSettings, local_rank: int) -> int:
    """Serves them on ``metrics_port`` plus the replica's number on its machine; on any free port if that is taken, or if it is 0."""
    if settings.metrics_port:
        with contextlib.suppress(StartupError):
            return core.metrics.serve(settings.metrics_host, settings.metrics_port + local_rank)
    return core.metrics.serve(settings.metrics_host, 0)
