"""A scripted server: real gRPC on a real socket, whose answers a test writes down. It stands for the wire, not for the product's server."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from probescore import (
    AsyncProbeClient,
    CompletionScores,
    CompletionStatus,
    GroupScores,
    OutputPer,
    ProbeScores,
    Reduction,
    RolloutGroup,
    ScoredProbe,
    ScoreResult,
    ScoreUnit,
    ScoringInfo,
    StreamedCompletion,
)
from probescore._messages import groups_from_request, result_to_proto, streamed_to_proto
from probescore.v1 import admin_pb2, admin_pb2_grpc, probes_pb2, scoring_pb2, scoring_pb2_grpc

INFO = ScoringInfo(
    model_fingerprint="sha256:model",
    tokenizer_fingerprint="sha256:tokenizer",
    probes=(
        ScoredProbe(
            name="sum",
            version="1",
            graph_sha256="sha256:graph",
            manifest_sha256="sha256:manifest",
            unit=ScoreUnit.VALUE,
            output_per=OutputPer.TOKEN,
            labels=("sum",),
            reductions=(Reduction.parse("sum"),),
        ),
    ),
)


def sum_of_ids(completion: Any) -> CompletionScores:
    """The score of the scripted probe: the sum of a completion's ids, so that an answer says what it answers."""
    reduced = np.full((1, 1, 1), np.sum(completion.tokens), np.float32)
    return CompletionScores(completion.id, CompletionStatus.OK, {"sum": ProbeScores(reduced)})


def answer(request: scoring_pb2.ScoreRequest) -> scoring_pb2.ScoreResponse:
    groups = tuple(GroupScores(tuple(map(sum_of_ids, group.completions))) for group in groups_from_request(request))
    return result_to_proto(ScoreResult(groups, INFO))


def answer_in_pieces(request: scoring_pb2.ScoreRequest) -> Iterator[scoring_pb2.ScoreStreamResponse]:
    """One message per completion, the last one first."""
    for group_index, group in reversed(list(enumerate(groups_from_request(request)))):
        for completion_index, completion in reversed(list(enumerate(group.completions))):
            yield streamed_to_proto([(group_index, completion_index, sum_of_ids(completion))], INFO)


@dataclass(eq=False)
class Refusal(Exception):
    """A status to fail a call with."""

    code: grpc.StatusCode
    message: str = "refused"
    details: tuple[Message, ...] = ()
    raw_details: bytes | None = None

    def abort(self, context: grpc.ServicerContext) -> None:
        packed = []
        for detail in self.details:
            entry = any_pb2.Any()
            entry.Pack(detail)
            packed.append(entry)
        raw = self.raw_details
        if packed:
            raw = status_pb2.Status(code=self.code.value[0], message=self.message, details=packed).SerializeToString()
        trailing: list[tuple[str, str | bytes]] = [] if raw is None else [("grpc-status-details-bin", raw)]
        for detail in self.details:  # as the product's server does, for gRPC's own retries
            if isinstance(detail, error_details_pb2.RetryInfo):
                trailing.append(("grpc-retry-pushback-ms", str(detail.retry_delay.ToMilliseconds())))
        if trailing:
            context.set_trailing_metadata(tuple(trailing))
        context.abort(self.code, self.message)


def error_info(reason: str, domain: str = "probescore") -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain=domain)


def retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    return error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9)))


def unavailable(retry_seconds: float = 0.01) -> Refusal:
    details = (error_info("WORKER_UNAVAILABLE"), retry_info(retry_seconds))
    return Refusal(grpc.StatusCode.UNAVAILABLE, "the worker is starting again", details)


def queue_full(retry_seconds: float = 0.01) -> Refusal:
    return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "5 tokens are waiting", (error_info("QUEUE_FULL"), retry_info(retry_seconds)))


@dataclass
class Service(scoring_pb2_grpc.ScoringServiceServicer, admin_pb2_grpc.ProbeAdminServiceServicer):
    """Answers, or does what the next entry of its script says: raises a Refusal, or calls a function with the request.

    Attributes:
        script: what to do on the next calls, in their order; afterwards every call is answered.
        requests: what came.
        metadata: what came with each of them.
        admin: whether it takes sleep and wake.
    """

    script: list[Refusal | Callable[[Any], Any]] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    admin: bool = True
    lock: Any = field(default_factory=threading.Lock)

    def _act(self, request: Any, context: grpc.ServicerContext, otherwise: Callable[[Any], Any]) -> Any:
        with self.lock:
            self.requests.append(request)
            self.metadata.append({entry.key: entry.value for entry in context.invocation_metadata()})
            act = self.script.pop(0) if self.script else otherwise
        if isinstance(act, Refusal):
            act.abort(context)
        return act(request)

    def Score(self, request: Any, context: Any) -> Any:
        return self._act(request, context, answer)

    def ScoreStream(self, request: Any, context: Any) -> Any:
        try:
            yield from self._act(request.request, context, answer_in_pieces)
        except Refusal as refusal:
            refusal.abort(context)

    def GetServerInfo(self, request: Any, context: Any) -> Any:
        return self._act(request, context, lambda _: scoring_pb2.GetServerInfoResponse(server_version="9", probes=["sum@1"]))

    def ListProbes(self, request: Any, context: Any) -> Any:
        return self._act(request, context, lambda _: probes_pb2.ListProbesResponse())

    def Sleep(self, request: Any, context: Any) -> Any:
        moved = admin_pb2.Transfer(device="cuda:0", seconds=1.5, weight_bytes=8_000, device_bytes=9_000)
        return self._act(request, context, lambda _: admin_pb2.SleepResponse(transfers=[moved]))

    def Wake(self, request: Any, context: Any) -> Any:
        return self._act(request, context, lambda _: admin_pb2.WakeResponse(transfers=[admin_pb2.Transfer(device="cuda:0")]))


@contextmanager
def serving(service: Service, address: str = "127.0.0.1:0", **options: int) -> Iterator[str]:
    """Serves until the block ends, then drops what is under way; gives the address."""
    server = grpc.server(
        ThreadPoolExecutor(32), options=[("grpc.so_reuseport", 0), *((f"grpc.{key}", value) for key, value in options.items())]
    )
    scoring_pb2_grpc.add_ScoringServiceServicer_to_server(service, server)
    if service.admin:
        admin_pb2_grpc.add_ProbeAdminServiceServicer_to_server(service, server)
    port = server.add_insecure_port(address)
    server.start()
    try:
        yield address if address.startswith("unix:") else f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


class BlockingAsyncClient:
    """An ``AsyncProbeClient`` driven from outside its loop, so that one test can be run on both clients."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.client = AsyncProbeClient(*args, **options)
        self.loop = asyncio.new_event_loop()

    def __enter__(self) -> BlockingAsyncClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.run_until_complete(self.client.close())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **options: self.loop.run_until_complete(getattr(self.client, name)(*args, **options))

    @contextmanager
    def awake(self, **options: Any) -> Iterator[None]:
        block = self.client.awake(**options)
        self.loop.run_until_complete(block.__aenter__())
        try:
            yield
        finally:
            self.loop.run_until_complete(block.__aexit__(*sys.exc_info()))

    def score_stream(self, groups: Iterable[RolloutGroup] | AsyncIterable[RolloutGroup], **options: Any) -> Iterator[StreamedCompletion]:
        stream = self.client.score_stream(groups, **options)
        try:
            while (completion := self.loop.run_until_complete(anext(stream, None))) is not None:
                yield completion
        finally:
            self.loop.run_until_complete(stream.aclose())


def group(*completions: Sequence[int], prompt: Sequence[int] = (1, 2)) -> RolloutGroup:
    return RolloutGroup(list(prompt), [list(completion) for completion in completions])
