"""A server with readings, spoken to by plain messages; what it must answer is what an engine of this process says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from calls import TIMEOUT, details, violated_field
from google.rpc import error_details_pb2
from read_twice import GROUPS
from running_server import RunningServer

from probescore import RolloutGroup
from probescore.types import CompletionScores, LoadedReading, Reading, ScoreResult, ServerInfo, StreamedCompletion
from probescore.v1 import admin_pb2, admin_pb2_grpc, scoring_pb2, scoring_pb2_grpc
from probescore.wire import (
    RequestOptions,
    loaded_reading_from_proto,
    reading_from_proto,
    request_to_proto,
    result_from_proto,
    server_info_from_proto,
    streamed_from_proto,
)


@dataclass(frozen=True)
class Failed:
    """How a call ended: its status, the reason, the field at fault if any, the text, and after how many seconds to try again."""

    code: str
    reason: str
    field: str
    text: str
    retry_seconds: float | None


@dataclass(frozen=True, eq=False)
class ReadingsClient:
    """What a client of readings asks of a server."""

    scoring: scoring_pb2_grpc.ScoringServiceStub
    admin: admin_pb2_grpc.ProbeAdminServiceStub

    @classmethod
    @contextmanager
    def of(cls, server: RunningServer) -> Iterator[ReadingsClient]:
        """A client on a connection of its own."""
        with grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            yield cls(scoring_pb2_grpc.ScoringServiceStub(channel), admin_pb2_grpc.ProbeAdminServiceStub(channel))

    def score(self, *readings: str, groups: Sequence[RolloutGroup] = GROUPS, **options: Any) -> ScoreResult:
        """Scores on readings; without any, as a client that knows of none."""
        message = request_to_proto(groups, RequestOptions(**{"token_scores": "all", "readings": readings, **options}))
        return result_from_proto(self.scoring.Score(message, timeout=TIMEOUT))

    def stream(self, *readings: str, groups: Sequence[RolloutGroup] = GROUPS, **options: Any) -> Iterator[StreamedCompletion]:
        """The same, in pieces."""
        message = request_to_proto(groups, RequestOptions(**{"token_scores": "all", "readings": readings, **options}))
        for answer in self.scoring.ScoreStream(scoring_pb2.ScoreStreamRequest(request=message), timeout=TIMEOUT):
            yield from streamed_from_proto(answer)

    def load(self, name: str, path: Path | str, **fields: Any) -> LoadedReading:
        """Loads a reading."""
        request = admin_pb2.LoadReadingRequest(name=name, path=str(path), **fields)
        return loaded_reading_from_proto(self.admin.LoadReading(request, timeout=TIMEOUT))

    def unload(self, name: str) -> Reading:
        """Unloads it."""
        return reading_from_proto(self.admin.UnloadReading(admin_pb2.UnloadReadingRequest(name=name), timeout=TIMEOUT).removed, "removed")

    def info(self) -> ServerInfo:
        """What the server says of itself."""
        return server_info_from_proto(self.scoring.GetServerInfo(scoring_pb2.GetServerInfoRequest(), timeout=TIMEOUT))

    def readings(self) -> dict[str, Reading]:
        """By name, what can be asked for."""
        return {reading.name: reading for reading in self.info().readings}


def failure(call: Callable[[], object]) -> Failed:
    """How a call ends that must fail."""
    try:
        call()
    except grpc.RpcError as error:
        return failed_with(error)
    raise AssertionError("it did not fail")


def failed_with(error: grpc.RpcError) -> Failed:
    """What an error of gRPC's says."""
    (info,) = details(error, error_details_pb2.ErrorInfo)
    retry = details(error, error_details_pb2.RetryInfo)
    field = violated_field(error) if details(error, error_details_pb2.BadRequest) else ""
    seconds = retry[0].retry_delay.ToTimedelta().total_seconds() if retry else None
    return Failed(error.code().name, info.reason, field, error.details() or "", seconds)


def numbers(scores: Sequence[CompletionScores], reading: str) -> np.ndarray:
    """All scores of completions on a reading: of every probe and token, and reduced."""
    found = [own for scored in scores for own in scored.on(reading).scores.values()]
    return np.concatenate([each.ravel() for own in found for each in (own.reduced, own.tokens) if each is not None])


def of(result: ScoreResult, reading: str) -> np.ndarray:
    """The same of a whole answer."""
    return numbers([scored for group in result.groups for scored in group], reading)
