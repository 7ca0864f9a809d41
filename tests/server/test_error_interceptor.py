"""What every call crosses, around a servicer that does what ours never should."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from probescore.v1 import probes_pb2, scoring_pb2, scoring_pb2_grpc
from probescore_server.errors import DeadlineExpired, ModelRefused, QueueFull
from probescore_server.front.error_interceptor import ErrorInterceptor
from probescore_server.front.metrics import Metrics

TIMEOUT = 30.0


class Servicer(scoring_pb2_grpc.ScoringServiceServicer):
    """Misbehaves as the request's `run_id` says."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def Score(self, request: scoring_pb2.ScoreRequest, context: grpc.aio.ServicerContext) -> scoring_pb2.ScoreResponse:
        match request.run_id:
            case "fault":
                raise RuntimeError("secret of /etc/passwd")
            case "startup":
                raise ModelRefused("secret of /etc/passwd")
            case "full":
                raise QueueFull(1, 2, 0.5)
            case "late":
                raise DeadlineExpired("too late for the device")
            case "late answer" | "late error":
                await asyncio.sleep(context.time_remaining() - 0.002)
                if request.run_id == "late error":
                    raise DeadlineExpired("too late for the device")
            case "abort":
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, "not you")
            case "wait":
                self.entered.set()
                try:
                    await asyncio.sleep(3600)
                finally:
                    self.cancelled.set()
        return scoring_pb2.ScoreResponse()

    async def ScoreStream(
        self, request: scoring_pb2.ScoreStreamRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[scoring_pb2.ScoreStreamResponse]:
        yield scoring_pb2.ScoreStreamResponse()
        yield scoring_pb2.ScoreStreamResponse()
        if request.request.run_id == "fault":
            raise RuntimeError("secret of /etc/passwd")

    async def ListProbes(self, request: probes_pb2.ListProbesRequest, context: grpc.aio.ServicerContext) -> probes_pb2.ListProbesResponse:
        return probes_pb2.ListProbesResponse()


class Served:
    """A stub, and what the server beside it counts."""

    def __init__(self, channel: grpc.aio.Channel, metrics: Metrics, servicer: Servicer) -> None:
        self.channel = channel
        self.stub = scoring_pb2_grpc.ScoringServiceStub(channel)
        self.metrics = metrics
        self.servicer = servicer

    async def score(self, run_id: str) -> scoring_pb2.ScoreResponse:
        return await self.stub.Score(scoring_pb2.ScoreRequest(run_id=run_id), timeout=TIMEOUT)

    def count(self, name: str, method: str = "Score", kind: str = "unary", **labels: str) -> float:
        found = {"grpc_type": kind, "grpc_service": "probescore.v1.ScoringService", "grpc_method": method, **labels}
        return self.metrics.registry.get_sample_value(name, found) or 0.0

    async def ended(self, code: str) -> float:
        """The number of calls that ended with a status; waits for the first, since a client may have it before the server counts it."""
        for _ in range(1000):
            if self.count("grpc_server_handled_total", grpc_code=code):
                break
            await asyncio.sleep(0.01)
        return self.count("grpc_server_handled_total", grpc_code=code)


class Broken(grpc.aio.ServerInterceptor):
    """An interceptor of somebody else's."""

    async def intercept_service(self, continuation: object, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        raise RuntimeError("secret of /etc/passwd")


class Deny(grpc.aio.ServerInterceptor):
    """An interceptor that answers itself, whatever is asked for."""

    async def intercept_service(self, continuation: object, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def deny(request: object, context: grpc.aio.ServicerContext) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")

        return grpc.unary_unary_rpc_method_handler(deny)


@asynccontextmanager
async def served(*interceptors: grpc.aio.ServerInterceptor) -> AsyncIterator[Served]:
    metrics, servicer = Metrics(), Servicer()
    boundary = ErrorInterceptor(metrics, ["probescore.v1.ScoringService", reflection.SERVICE_NAME])
    server = grpc.aio.server(interceptors=[boundary, *interceptors])
    scoring_pb2_grpc.add_ScoringServiceServicer_to_server(servicer, server)
    reflection.enable_server_reflection((reflection.SERVICE_NAME,), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Served(channel, metrics, servicer)
    await server.stop(None)


async def test_an_unexpected_exception_is_internal_without_its_text_and_logged_under_the_incident(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as running:
        for call in (running.score("fault"), read(running, "fault")):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await call
            assert failed.value.code() is grpc.StatusCode.INTERNAL
            assert "secret" not in repr(failed.value)
            assert "incident" in failed.value.details()
        assert await running.ended("INTERNAL") == 1


async def test_an_error_for_the_operator_is_internal_without_its_text() -> None:
    async with served() as running:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await running.score("startup")
        assert failed.value.code() is grpc.StatusCode.INTERNAL
        assert "incident" in failed.value.details()
        assert "secret" not in failed.value.details()
        assert await running.ended("INTERNAL") == 1


async def test_an_interceptor_that_breaks_shows_no_more_than_an_incident() -> None:
    async with served(Broken()) as running:
        for call in (running.score(""), read(running, "")):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await call
            assert failed.value.code() is grpc.StatusCode.INTERNAL
            assert "secret" not in repr(failed.value)


async def read(running: Served, run_id: str) -> int:
    asked = scoring_pb2.ScoreStreamRequest(request=scoring_pb2.ScoreRequest(run_id=run_id))
    return len([message async for message in running.stub.ScoreStream(asked, timeout=TIMEOUT)])


async def test_our_errors_become_their_status_and_are_counted_by_reason() -> None:
    async with served() as running:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await running.score("full")
        assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert running.metrics.registry.get_sample_value("probescore_refused_total", {"reason": "QUEUE_FULL"}) == 1


@pytest.mark.parametrize("run_id", ["late answer", "late error"])
async def test_what_would_come_too_late_is_not_sent_since_grpc_would_keep_it(run_id: str, caplog: pytest.LogCaptureFixture) -> None:
    code = "CANCELLED" if run_id == "late answer" else "DEADLINE_EXCEEDED"
    async with served() as running:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await running.stub.Score(scoring_pb2.ScoreRequest(run_id=run_id), timeout=0.3)
        assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await running.ended(code) == 1
    assert running.count("grpc_server_msg_sent_total") == 0
    assert running.count("grpc_server_handled_total", grpc_code="OK") == 0
    # asyncio's own records are of gRPC's poller, which may still name the closed event loop of an earlier test
    assert not [record for record in caplog.records if record.name != "asyncio"]


async def test_a_deadline_that_grpc_does_not_know_of_is_answered() -> None:
    async with served() as running:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await running.stub.Score(scoring_pb2.ScoreRequest(run_id="late"))
        assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert failed.value.details() == "too late for the device"


async def test_a_status_that_a_servicer_or_an_interceptor_chose_stays() -> None:
    async with served() as running:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await running.score("abort")
        assert (failed.value.code(), failed.value.details()) == (grpc.StatusCode.PERMISSION_DENIED, "not you")
        assert await running.ended("PERMISSION_DENIED") == 1


async def test_a_cancelled_call_ends_in_the_servicer_and_is_counted() -> None:
    async with served() as running:
        call = asyncio.create_task(running.score("wait"))
        await running.servicer.entered.wait()
        assert running.metrics.registry.get_sample_value("probescore_rpcs_in_flight") == 1
        call.cancel()
        await running.servicer.cancelled.wait()
        await asyncio.sleep(0)
        assert running.metrics.registry.get_sample_value("probescore_rpcs_in_flight") == 0
        assert running.metrics.registry.get_sample_value("probescore_cancelled_total") == 1
        assert await running.ended("CANCELLED") == 1


async def test_a_cancellation_goes_on_to_grpc_which_would_leak_the_call_otherwise() -> None:
    servicer = Servicer()
    handler = grpc.unary_unary_rpc_method_handler(servicer.Score, scoring_pb2.ScoreRequest.FromString)

    async def continuation(details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return handler

    details = type("Details", (), {"method": "/probescore.v1.ScoringService/Score"})()
    guarded = await ErrorInterceptor(Metrics()).intercept_service(continuation, details)
    call = asyncio.create_task(guarded.unary_unary(scoring_pb2.ScoreRequest(run_id="wait").SerializeToString(), None))
    await servicer.entered.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


@pytest.mark.parametrize("size", [3, 1 << 20])
async def test_bytes_that_are_no_message_are_the_clients_fault(size: int) -> None:
    async with served() as running:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await running.channel.unary_unary("/probescore.v1.ScoringService/Score")(b"\xff" * size, timeout=TIMEOUT)
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert running.count("grpc_server_msg_received_total") == 1


async def test_messages_are_counted_both_ways() -> None:
    async with served() as running:
        await running.score("")
        assert await read(running, "") == 2
        assert running.count("grpc_server_msg_received_total") == running.count("grpc_server_msg_sent_total") == 1
        assert running.count("grpc_server_msg_sent_total", "ScoreStream", "server_stream") == 2
        assert running.count("grpc_server_handling_seconds_count") == 1


async def test_streams_of_requests_pass_too() -> None:
    async with served() as running:
        stub = reflection_pb2_grpc.ServerReflectionStub(running.channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = [answer async for answer in stub.ServerReflectionInfo(iter([asked]), timeout=TIMEOUT)]
        assert answer.list_services_response.service[0].name == reflection.SERVICE_NAME


async def test_a_method_that_does_not_exist_is_unimplemented_and_makes_no_label() -> None:
    async with served() as running:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await running.channel.unary_unary("/probescore.v1.ScoringService/Invented")(b"", timeout=TIMEOUT)
        assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert running.count("grpc_server_started_total", "Invented") == 0


@pytest.mark.parametrize("interceptor", [Deny(), Broken()])
async def test_a_name_that_a_client_made_up_makes_no_label_though_an_interceptor_answers(interceptor: grpc.aio.ServerInterceptor) -> None:
    async with served(interceptor) as running:
        for path in ("/probescore.v1.ScoringService/Invented", "/invented/Invented", "/invented"):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await running.channel.unary_unary(path)(b"", timeout=TIMEOUT)
            assert failed.value.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INTERNAL)
        named = [sample for family in running.metrics.registry.collect() for sample in family.samples if sample.labels]
        assert not [sample for sample in named if "nvented" in "".join(sample.labels.values())]
        unknown = {"grpc_type": "unary", "grpc_service": "unknown", "grpc_method": "unknown"}
        assert running.metrics.registry.get_sample_value("grpc_server_started_total", unknown) == 3
