"""Requests and small observations that the end-to-end tests of the server share."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from running_server import RunningServer

from probescore.v1 import scoring_pb2, scoring_pb2_grpc, tensor_pb2

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
TIMEOUT = 60.0


@contextmanager
def connected(server: RunningServer) -> Iterator[scoring_pb2_grpc.ScoringServiceStub]:
    """A stub on a channel of its own: a connection that no other test shares."""
    with grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield scoring_pb2_grpc.ScoringServiceStub(channel)


def health(server: RunningServer, service: str = "") -> int:
    with grpc.insecure_channel(server.address) as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT).status


def ids(*values: int) -> tensor_pb2.Tensor:
    array = np.array(values, "<i4")
    return tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_INT32, shape=array.shape, data=array.tobytes())


def group(prompt: Sequence[int], *completions: Sequence[int]) -> scoring_pb2.RolloutGroup:
    return scoring_pb2.RolloutGroup(
        prompt=scoring_pb2.Prompt(ids=ids(*prompt)),
        completions=[scoring_pb2.Completion(ids=ids(*completion)) for completion in completions],
    )


def request(*groups: scoring_pb2.RolloutGroup, **fields: object) -> scoring_pb2.ScoreRequest:
    return scoring_pb2.ScoreRequest(groups=groups or [group([1, 5, 6], [7, 8, 9])], **fields)


def numbers(tensor: tensor_pb2.Tensor) -> np.ndarray:
    return np.frombuffer(tensor.data, "<f4").reshape(tuple(tensor.shape))


def details(error: grpc.RpcError, kind: type) -> list:
    """The details of one kind in an error's google.rpc.Status."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            found = []
            for packed in status_pb2.Status.FromString(value).details:
                detail = kind()
                if packed.Unpack(detail):
                    found.append(detail)
            return found
    return []


def violated_field(error: grpc.RpcError) -> str:
    (bad,) = details(error, error_details_pb2.BadRequest)
    return bad.field_violations[0].field


def scrape(server: RunningServer) -> dict[str, float]:
    """Every sample, as ``name{label="value",…}``; the parser refuses what Prometheus would."""
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=TIMEOUT) as answer:
        text = answer.read().decode()
    return {
        sample.name + "{" + ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items())) + "}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(server: RunningServer, name: str, *parts: str) -> float:
    """Sum of the samples of `name` whose labels contain all `parts`."""
    return sum(value for sample, value in scrape(server).items() if sample.startswith(name + "{") and all(part in sample for part in parts))


def eventually(condition: Callable[[], bool], seconds: float = TIMEOUT) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)
