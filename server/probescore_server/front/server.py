"""Runs the gRPC server of the front process, with its port, health service, metrics and worker processes. It never imports torch."""

from __future__ import annotations

import asyncio
import importlib
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from probescore.v1 import activations_pb2_grpc, admin_pb2_grpc, scoring_pb2_grpc
from probescore_server.errors import CoreError, StartupError, WorkerUnavailable
from probescore_server.front.activation_service import ACTIVATION_SERVICE, ActivationServicer
from probescore_server.front.admin_service import ADMIN_SERVICE, AdminServicer
from probescore_server.front.error_interceptor import ErrorInterceptor
from probescore_server.front.health import SCORING_SERVICE, HealthService
from probescore_server.front.scoring_core import ScoringCore
from probescore_server.settings import ServerSettings, join_host_port

logger = structlog.get_logger(__name__)

CUDA_DRIVER = Path("/dev/nvidiactl")
# Calls that wait when a server stops are told to retry after these seconds.
RETRY_SECONDS = 1.0


async def serve(settings: ServerSettings) -> None:
    """Runs a server until SIGTERM or SIGINT, and then until the accepted RPCs are finished. A second signal ends the server at once. SIGHUP
    brings the served probes up to date with the probe files on disk.

    Raises:
        StartupError: an address is taken, an interceptor cannot be imported, or a worker cannot load the model or a probe.
    """
    drain, now = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, lambda: (now if drain.is_set() else drain).set())
    reload = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload.set)
    await Server(settings, await find_devices(settings.devices)).run(drain, now, reload)


class Server:
    """gRPC server with its port, its services and its worker processes.

    Args:
        settings: the server's settings.
        devices: the devices, such as ``cuda:0``, each of which gets a worker process.

    Raises:
        StartupError: an interceptor that the settings name cannot be imported.
    """

    def __init__(self, settings: ServerSettings, devices: tuple[str, ...]) -> None:
        self._settings = settings
        self._offered = [ACTIVATION_SERVICE] * bool(settings.allow_activations)
        self._health = HealthService(self._offered)
        self._core = ScoringCore(settings, devices, self._workers_changed)
        self._grpc = self._make_grpc_server()
        self._announcing: set[asyncio.Task[None]] = set()

    async def run(self, drain: asyncio.Event, now: asyncio.Event, reload: asyncio.Event) -> None:
        """Serves until ``drain`` is set, and then until the accepted RPCs are done or ``now`` is set. Whenever ``reload`` is set, the
        served probes are brought up to date with the probe files on disk.

        Raises:
            StartupError: an address is taken, or a worker cannot load the model or a probe.
        """
        await self._health.set_serving(False)
        address = self._listen()
        metrics_port = self._core.metrics.serve(self._settings.metrics_host, self._settings.metrics_port)
        await self._grpc.start()
        logger.info("listening", address=address, metrics_address=join_host_port(self._settings.metrics_host, metrics_port))
        scoring = asyncio.create_task(self._core.run())
        draining = asyncio.create_task(drain.wait())
        reloading = asyncio.create_task(self._reload_when(reload))
        try:
            await asyncio.wait([draining, scoring], return_when=asyncio.FIRST_COMPLETED)
            if scoring.done():
                scoring.result()
            await self._drain(now)
        finally:
            for task in (draining, reloading, scoring):
                task.cancel()
            await asyncio.gather(draining, reloading, scoring, return_exceptions=True)
            await self._grpc.stop(None)

    async def _reload_when(self, asked: asyncio.Event) -> None:
        while True:
            await asked.wait()
            asked.clear()
            with suppress(CoreError):  # It is logged, and counted.
                await self._core.registry.reload("SIGHUP")

    async def _drain(self, now: asyncio.Event) -> None:
        logger.info("draining", at_most_seconds=self._settings.drain_seconds)
        await self._health.drain()
        if all(worker.asleep for worker in self._core.workers):
            # A server that drains takes no call that could wake it.
            self._core.scheduler.fail_waiting(WorkerUnavailable("the server stops while it sleeps", RETRY_SECONDS))
        stopping = asyncio.create_task(self._grpc.stop(self._settings.drain_seconds))
        hurrying = asyncio.create_task(now.wait())
        await asyncio.wait([stopping, hurrying], return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        await self._grpc.stop(None)
        await stopping
        logger.info("stopped")

    def _workers_changed(self) -> None:
        announcing = asyncio.create_task(self._announce())
        self._announcing.add(announcing)
        announcing.add_done_callback(self._announcing.discard)

    async def _announce(self) -> None:
        serving = self._core.serving
        await self._health.set_serving(serving)
        logger.info("serving" if serving else "not serving")

    # ------------------------------------------------------------------------------------------------------------------ the port

    def _make_grpc_server(self) -> grpc.aio.Server:
        settings = self._settings
        keepalive = int(1000 * settings.keepalive_seconds)
        options: list[tuple[str, int]] = [
            ("grpc.so_reuseport", 0),  # Otherwise a second server would share the port unnoticed.
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", settings.max_calls_per_connection),
            ("grpc.max_allowed_incoming_connections", settings.max_connections),
            ("grpc.keepalive_time_ms", keepalive),
            ("grpc.keepalive_timeout_ms", keepalive),
            ("grpc.http2.ping_timeout_ms", keepalive),  # Otherwise gRPC's own minute counts.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", int(1000 * settings.min_client_ping_seconds)),
        ]
        if settings.max_connection_age_seconds:
            options.append(("grpc.max_connection_age_ms", int(1000 * settings.max_connection_age_seconds)))
            options.append(("grpc.max_connection_age_grace_ms", int(1000 * settings.drain_seconds)))
        services = [SCORING_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME, *self._offered] + [ADMIN_SERVICE] * settings.admin
        bounded = [SCORING_SERVICE, *self._offered]
        boundary = ErrorInterceptor(self._core.metrics, services, self._core.under_way, bounded)
        server = grpc.aio.server(interceptors=[boundary, *map(_import_interceptor, settings.interceptors)], options=options)
        scoring_pb2_grpc.add_ScoringServiceServicer_to_server(self._core.servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._offered:
            core = self._core
            reading = ActivationServicer(settings, core.workers, core.scheduler, core.registry, core.readings, core.metrics)
            activations_pb2_grpc.add_ActivationServiceServicer_to_server(reading, server)
        if settings.admin:
            admin_pb2_grpc.add_ProbeAdminServiceServicer_to_server(
                AdminServicer(self._core.workers, self._core.registry, self._core.readings, self._core.metrics), server
            )
        reflection.enable_server_reflection(services, server)
        return server

    def _listen(self) -> str:
        """Binds the server's address and returns the address, with the actual port if the settings say 0."""
        settings = self._settings
        if settings.unix_socket is not None:
            _free_unix_socket(settings.unix_socket)
        try:
            port = self._grpc.add_insecure_port(settings.address)
        except RuntimeError:
            raise StartupError(f"cannot listen on {settings.address}: it is taken, or not an address of this machine") from None
        return settings.address if settings.unix_socket is not None else join_host_port(settings.host, port)


async def find_devices(devices: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the devices that the setting ``devices`` names. ``auto`` stands for every CUDA device of the machine, or for the CPU if there
    is none.

    Raises:
        StartupError: the machine has a CUDA driver, but torch cannot count its devices.
    """
    if devices != ("auto",):
        return devices
    if not await asyncio.to_thread(CUDA_DRIVER.exists):
        return ("cpu",)
    # A process of its own counts them, since this one stays free of torch.
    question = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    answer = await asyncio.to_thread(subprocess.run, question, capture_output=True, text=True)
    if answer.returncode != 0:
        raise StartupError(f"devices auto: cannot count the CUDA devices; name them instead. {answer.stderr.strip()[-300:]}")
    return tuple(f"cuda:{index}" for index in range(int(answer.stdout))) or ("cpu",)


def _import_interceptor(reference: str) -> grpc.aio.ServerInterceptor:
    module, _, attribute = reference.partition(":")
    try:
        interceptor = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise StartupError(f"interceptors: cannot import {reference}: {error}") from None
    if not isinstance(interceptor, grpc.aio.ServerInterceptor):
        raise StartupError(f"interceptors: {reference} is not a grpc.aio.ServerInterceptor")
    return interceptor


def _free_unix_socket(path: Path) -> None:
    """Removes the Unix socket at a path if no server listens on the socket. Without this check, gRPC would silently take over the socket of
    a running server.

    Raises:
        StartupError: another server listens on the socket, or the path is not a socket.
    """
    if not path.exists():
        return
    if not path.is_socket():
        raise StartupError(f"unix_socket {path}: exists and is not a socket")
    with socket.socket(socket.AF_UNIX) as probing:
        try:
            probing.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise StartupError(f"cannot listen on unix_socket {path}: another server does")
