"""Serves the gRPC services of a plain probe-scoring server under Ray Serve, behind Ray's gRPC proxy and with one replica per GPU.

::

    serve run probescore_server.ray:app model=./model probes=./probes max_replicas=8

An RPC goes from Ray's proxy (``add_to_proxy``), which owns the port, to a replica (``Replica``), which has the same core as a plain server.
Ray passes to the replica only a copy of an RPC's context, without the deadline. If a replica dies, Ray ends the RPC with the status
INTERNAL. The code of this module that runs in the proxy passes the deadline on and corrects the status.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NamedTuple, NoReturn, TypeAlias, cast

import grpc
import ray
import structlog
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from pydantic import BaseModel, Field, ValidationError
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, DeploymentActorConfig, gRPCOptions
from ray.serve.grpc_util import RayServegRPCContext

from probescore.v1 import admin_pb2, scoring_pb2
from probescore_server.errors import StartupError, WorkerUnavailable
from probescore_server.front.admin_service import AdminServicer
from probescore_server.front.error_interceptor import ErrorInterceptor, Handler
from probescore_server.front.health import SCORING_SERVICE, SERVICES
from probescore_server.front.scoring_core import ScoringCore
from probescore_server.front.server import find_devices
from probescore_server.front.status_codes import status_of
from probescore_server.hub_probes import local_paths, pinned_names
from probescore_server.logs import configure_logs
from probescore_server.ray_readings import TABLE, ActorTable, ReadingTableActor, outcome_of
from probescore_server.registry.readings import ReadingRegistry
from probescore_server.registry.shared_readings import SharedReadings
from probescore_server.settings import ServerSettings, join_host_port, load_settings

logger = structlog.get_logger(__name__)

DEPLOYMENT = "probescore"
QUEUED_TOKENS = "queued_tokens"
# The scheduler admits by tokens; Ray's own limit, which is on calls, must never be the one that is reached.
MAX_CALLS = 100_000
RETRY_SECONDS = 0.5

_ADMIN_METHODS = admin_pb2.DESCRIPTOR.services_by_name["ProbeAdminService"].methods_by_name
_READING_METHODS: tuple[MethodDescriptor, ...] = (_ADMIN_METHODS["LoadReading"], _ADMIN_METHODS["UnloadReading"])
_METHODS: tuple[MethodDescriptor, ...] = (
    *scoring_pb2.DESCRIPTOR.services_by_name["ScoringService"].methods,
    cast("MethodDescriptor", health_pb2.DESCRIPTOR.services_by_name["Health"].methods_by_name["Check"]),
    *_READING_METHODS,
)

Write: TypeAlias = Callable[[Message], Awaitable[None]]


def _handler_maker(method: MethodDescriptor) -> tuple[Callable[..., Handler], str]:
    """Returns gRPC's constructor for the handler of a method, and the name of the handler's attribute that holds the handling function."""
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler, "unary_stream"
    return grpc.unary_unary_rpc_method_handler, "unary_unary"


# ------------------------------------------------------------------------------------------------------------------ the application


class ReplicaScaling(BaseModel, extra="forbid", frozen=True):
    """Value object with those arguments of the Ray Serve application that determine the number of replicas of the scoring server.

    Attributes:
        min_replicas: the fewest replicas.
        max_replicas: the most replicas.
        target_queued_tokens: the number of tokens waiting to be scored per replica above which replicas are added.
    """

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_queued_tokens: int = Field(65_536, ge=1)


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """Builds the Ray Serve application of the scoring server, and starts Ray Serve with its gRPC proxy unless they run already.

    Args:
        arguments: a dictionary, keyed by name, of the settings of ``probescore serve`` and of ``min_replicas``, ``max_replicas`` and
            ``target_queued_tokens``.

    Raises:
        StartupError: an argument is unknown or out of its bounds, or has no meaning under Ray Serve.
    """
    flags = {name: value for name, value in arguments.items() if name not in ReplicaScaling.model_fields}
    settings = load_settings(flags)
    # every replica gets the same files, whenever it starts
    settings = settings.model_copy(update={"probes": pinned_names(settings.probes)})
    try:
        scaling = ReplicaScaling(**{name: value for name, value in arguments.items() if name in ReplicaScaling.model_fields})
    except ValidationError as error:
        raise StartupError(str(error)) from None
    for name in ("interceptors", "allow_activations", *(["admin"] if settings.readings_root is None else [])):
        if getattr(settings, name):
            problem = f"{name}: cannot be set under Ray Serve, whose proxy owns the port and chooses the replica"
            exception = ", unless readings_root is set, too: only readings can be loaded and unloaded" if name == "admin" else ""
            raise StartupError(f"{problem}{exception}; run probescore serve inside the Ray job instead")
    serve.start(grpc_options=gRPCOptions(port=settings.port, grpc_servicer_functions=[f"{__name__}:{add_to_proxy.__name__}"]))
    return deployment(settings, scaling).bind(settings)


def deployment(settings: ServerSettings, scaling: ReplicaScaling) -> serve.Deployment:
    """Returns the Ray Serve deployment of the scoring server.

    Each replica uses the devices (such as GPUs) that ``settings`` names, and ``scaling`` bounds the number of replicas.
    """
    devices = 0 if settings.devices == ("cpu",) else len(settings.devices)
    table = DeploymentActorConfig(
        name=TABLE,
        actor_class=ray.remote(ReadingTableActor),
        init_kwargs={"max_readings": settings.max_readings},
        actor_options={"num_cpus": 0, "max_concurrency": MAX_CALLS},
    )
    return serve.deployment(
        Replica,
        name=DEPLOYMENT,
        ray_actor_options={"num_gpus": devices, "num_cpus": max(1, settings.threads_per_worker)},
        deployment_actors=[] if settings.readings_root is None else [table],
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
    """Ray Serve autoscaling policy that asks for so many replicas that each has at most ``target`` tokens waiting.

    The policy removes one replica at a time, and only if each of the other replicas would then have at most half of ``target`` tokens
    waiting. The queue becomes short as soon as there are enough replicas, so a short queue alone is no reason to remove a replica.
    """

    def __init__(self, target: int) -> None:
        self._target = target

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Returns the number of replicas that Ray Serve's autoscaler should run, and an empty state; Ray applies its own bounds and delays
        to the number.
        """
        queued = sum(context.aggregated_metrics.get(QUEUED_TOKENS, {}).values())
        now = context.target_num_replicas
        wanted = math.ceil(queued / self._target)
        if wanted < now:
            wanted = now - 1 if math.ceil(2 * queued / self._target) < now else now
        return wanted, {}


# --------------------------------------------------------------------------------------------------------------------- in the proxy


class ForwardedRequest(NamedTuple):
    """Message that carries an RPC's request from Ray's proxy to a replica.

    Attributes:
        raw: the request message as bytes.
        seconds_left: the seconds until the RPC's deadline; ``None`` = there is no deadline.
    """

    raw: bytes
    seconds_left: float | None


def add_to_proxy(_: object, server: Any) -> None:  # noqa: ANN401 - Ray's own subclass of grpc.aio.Server
    """Adds the scoring and health services to the gRPC server of Ray's proxy. Ray calls this function, which is listed in the proxy's
    ``grpc_servicer_functions``.
    """
    for service in {method.containing_service.full_name for method in _METHODS}:
        methods = [method for method in _METHODS if method.containing_service.full_name == service]
        handlers: Any = grpc.method_handlers_generic_handler(service, {method.name: _unparsed(method) for method in methods})
        # Ray replaces the behavior of each handler by one that calls a method of that name of a replica.
        server.add_generic_rpc_handlers((handlers,))
        handlers._method_handlers = {path: _forwarding(handler) for path, handler in handlers._method_handlers.items()}


def _unparsed(method: MethodDescriptor) -> Handler:
    """Returns a gRPC handler of a method that leaves requests as bytes, since the replica parses requests and turns errors into
    statuses.
    """
    make, _ = _handler_maker(method)
    return make(lambda request, context: None)


def _forwarding(routed: Any) -> Handler:  # noqa: ANN401
    """Returns a handler that sends each request with its remaining time to a replica, and corrects the statuses that Ray itself sets."""

    async def unary(raw: bytes, context: Any) -> bytes:  # noqa: ANN401
        answer: bytes = await routed.unary_unary(ForwardedRequest(raw, context.time_remaining()), context)
        _explain_ray(context)
        return answer

    async def stream(raw: bytes, context: Any) -> AsyncIterator[bytes]:  # noqa: ANN401
        async for answer in routed.unary_stream(ForwardedRequest(raw, context.time_remaining()), context):
            if answer:  # An empty response only carries the status.
                yield answer
        _explain_ray(context)

    return grpc.unary_stream_rpc_method_handler(stream) if routed.response_streaming else grpc.unary_unary_rpc_method_handler(unary)


_RAYS_OWN = {
    grpc.StatusCode.INTERNAL: "the replica that had this call is gone",
    grpc.StatusCode.NOT_FOUND: "no application is deployed, or there are several and metadata 'application' names none of them",
    grpc.StatusCode.UNAVAILABLE: "no replica takes calls at present",
}


def _explain_ray(context: Any) -> None:  # noqa: ANN401
    """Replaces the status of an RPC that Ray itself, not a replica, ended by the status UNAVAILABLE, after which clients retry."""
    trailing = tuple(context.trailing_metadata() or ())
    code = next((known for known in _RAYS_OWN if context.code() in (known, known.value[0])), None)
    # A replica's own statuses have details, except for NOT_FOUND of a health check, and every response of a replica has some metadata.
    a_replicas = any(key == "grpc-status-details-bin" for key, _ in trailing) or (code is grpc.StatusCode.NOT_FOUND and trailing)
    if code is None or a_replicas:
        return
    status = status_of(WorkerUnavailable(_RAYS_OWN[code], RETRY_SECONDS))
    context.set_code(status.code)
    context.set_details(status.details)
    context.set_trailing_metadata((*trailing, *status.trailing_metadata))


# -------------------------------------------------------------------------------------------------------------------- in a replica


class Replica:
    """Ray Serve replica with worker processes and their scheduler, but without a gRPC port of its own.

    Ray calls the methods by the names of the RPCs. The constructor returns once the replica's workers have changed state for the first
    time, which usually means that one can score, and once the replica has the readings that the other replicas have.

    Raises:
        StartupError: the replica cannot load its model or probes.
    """

    async def __init__(self, settings: ServerSettings) -> None:  # type: ignore[misc] # Ray awaits it
        configure_logs(settings.log_format, settings.log_level)
        assigned = serve.get_replica_context()
        self._max_message_bytes = settings.max_message_bytes
        self._changed = asyncio.Event()
        probes = await asyncio.to_thread(local_paths, settings.probes, lambda name: logger.info("probe from the hub", probe=name))
        settings = settings.model_copy(update={"probes": probes})
        readings = None if settings.readings_root is None else functools.partial(SharedReadings, ActorTable())
        self._core = ScoringCore(settings, await find_devices(settings.devices), self._changed.set, readings or ReadingRegistry)
        self._methods = _guarded_methods(self._core)
        port = _serve_metrics(self._core, settings, assigned.rank.local_rank)
        logger.info("metrics", address=join_host_port(settings.metrics_host, port), replica=assigned.replica_tag)
        self._running = asyncio.create_task(self._core.run())
        changed = asyncio.create_task(self._changed.wait())
        await asyncio.wait([changed, self._running], return_when=asyncio.FIRST_COMPLETED)
        if self._running.done():
            self._running.result()
        self._following: asyncio.Task[None] | None = None
        if isinstance(self._core.readings, SharedReadings):
            await self._core.readings.join()
            self._following = asyncio.create_task(self._core.readings.run())

    async def Score(self, request: ForwardedRequest, grpc_context: RayServegRPCContext) -> Message:  # noqa: N802
        """Scores every completion of a request with probes, and responds once all are scored."""
        return await self._answer("Score", request, grpc_context)

    async def ScoreStream(self, request: ForwardedRequest, grpc_context: RayServegRPCContext) -> AsyncIterator[Message]:  # noqa: N802
        """Scores every completion of a request with probes, and yields the scores in pieces, as batches finish."""
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
        """Returns a description of the model, probes, limits and workers (processes that score) of this Ray Serve replica."""
        return await self._answer("GetServerInfo", request, grpc_context)

    async def ListProbes(self, request: ForwardedRequest, grpc_context: RayServegRPCContext) -> Message:  # noqa: N802
        """Returns the loaded probes with their manifests, as the response to the RPC ``ListProbes``."""
        return await self._answer("ListProbes", request, grpc_context)

    async def LoadReading(self, request: ForwardedRequest, grpc_context: RayServegRPCContext) -> Message:  # noqa: N802
        """Loads an adapter or a checkpoint in every replica, and responds once its name means it in all of them."""
        return await self._answer("LoadReading", request, grpc_context)

    async def UnloadReading(self, request: ForwardedRequest, grpc_context: RayServegRPCContext) -> Message:  # noqa: N802
        """Lets a name mean no reading any more in any replica, and responds with what it meant."""
        return await self._answer("UnloadReading", request, grpc_context)

    async def change_readings(self, method: str, *arguments: object) -> Any:  # noqa: ANN401
        """Takes part in a change of readings in all replicas, as the actor ``ReadingTableActor`` asks for it: returns what a method of
        ``SharedReadings`` returns, or the ``CoreError`` that it raises.
        """
        return await outcome_of(getattr(self._core.readings, method)(*arguments))

    async def Check(self, request: ForwardedRequest, grpc_context: RayServegRPCContext) -> Message:  # noqa: N802
        """Responds to the RPC ``grpc.health.v1.Health/Check`` with whether this Ray Serve replica serves."""
        return await self._answer("Check", request, grpc_context)

    def check_health(self) -> None:
        """Raises ``RuntimeError`` if no worker process of this Ray Serve replica serves, or if the replica cannot learn of readings any
        more. Ray calls this method at intervals, and replaces a replica whose health check fails several times.
        """
        if not self._core.serving:
            raise RuntimeError("no worker can score")
        if self._following is not None and self._following.done():
            raise RuntimeError("the readings of other replicas are not followed")

    def record_autoscaling_stats(self) -> dict[str, int]:
        """Returns a dictionary with the number of tokens that wait to be scored in this Ray Serve replica; Ray passes the dictionary to the
        autoscaling policy ``QueuedTokens``.
        """
        return {QUEUED_TOKENS: self._core.scheduler.queued_tokens}

    async def _answer(
        self, method: str, request: ForwardedRequest, grpc_context: RayServegRPCContext, write: Write | None = None
    ) -> Message:
        """Returns the response to an RPC. The response is an empty message if the RPC was ended with a status, and at the end of a
        stream.
        """
        call = _RayServicerContext(request, grpc_context, write)
        try:
            if (size := len(request.raw)) > self._max_message_bytes:
                # The message is the one that gRPC itself sends.
                await call.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED, f"Received message larger than max ({size} vs. {self._max_message_bytes})"
                )
            if method not in self._methods:
                await call.abort(grpc.StatusCode.UNIMPLEMENTED, "this server loads no readings: start it with admin=true and readings_root")
            answer: Message | None = await self._methods[method](request.raw, call)
        except grpc.aio.AbortError:
            return Empty()
        return answer or Empty()


class _RayServicerContext:
    """Adapter that offers, on top of Ray's context of an RPC, the methods of ``grpc.aio.ServicerContext`` that the server's code uses."""

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
    """Returns a dictionary, keyed by the method's name, of functions that handle a request given as bytes and turn errors into statuses."""

    async def check(request: health_pb2.HealthCheckRequest, context: _RayServicerContext) -> health_pb2.HealthCheckResponse:
        if request.service not in SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        status = health_pb2.HealthCheckResponse
        return status(status=status.SERVING if core.serving else status.NOT_SERVING)

    boundary = ErrorInterceptor(core.metrics, (), core.under_way, [SCORING_SERVICE])
    admin = AdminServicer(core.workers, core.registry, core.readings, core.metrics)
    methods = {}
    for method in _METHODS:
        if method in _READING_METHODS and not isinstance(core.readings, SharedReadings):
            continue
        behavior = check if method.name == "Check" else getattr(admin if method in _READING_METHODS else core.servicer, method.name)
        make, attribute = _handler_maker(method)
        handler = make(behavior, request_deserializer=GetMessageClass(method.input_type).FromString)
        guarded = boundary.guard(f"/{method.containing_service.full_name}/{method.name}", handler)
        methods[method.name] = getattr(guarded, attribute)
    return methods


def _serve_metrics(core: ScoringCore, settings: ServerSettings, local_rank: int) -> int:
    """Starts an HTTP server for a replica's metrics and returns its port.

    The port is ``metrics_port`` plus the replica's number on its machine. Any free port is used if that port is taken or ``metrics_port``
    is 0.
    """
    if settings.metrics_port:
        with contextlib.suppress(StartupError):
            return core.metrics.serve(settings.metrics_host, settings.metrics_port + local_rank)
    return core.metrics.serve(settings.metrics_host, 0)
