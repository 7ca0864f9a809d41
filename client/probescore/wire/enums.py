"""Converts enum numbers and reduction messages of the protobuf contract to and from Python values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from probescore.reductions import Reduction, ReductionKind
from probescore.types import CompletionStatus, OutputPer, Pool, ReadingKind, Scope, ScoreUnit
from probescore.v1 import activations_pb2, probes_pb2, scoring_pb2
from probescore.wire.tensors import MessageError

Member = TypeVar("Member")

KINDS = {kind: probes_pb2.ReductionKind.Value(f"REDUCTION_KIND_{kind.name}") for kind in ReductionKind}
UNITS = {unit: probes_pb2.ScoreUnit.Value(f"SCORE_UNIT_{unit.name}") for unit in ScoreUnit}
OUTPUTS = {per: probes_pb2.OutputPer.Value(f"OUTPUT_PER_{per.name}") for per in OutputPer}
POOLS = {pool: activations_pb2.Pool.Value(f"POOL_{pool.name}") for pool in Pool}
READING_KINDS = {kind: scoring_pb2.ReadingKind.Value(f"READING_KIND_{kind.name}") for kind in ReadingKind}
SCOPES = {scope: scoring_pb2.Scope.Value(f"SCOPE_{scope.name}") for scope in Scope}
STATUSES = {status: scoring_pb2.CompletionStatus.Value(f"COMPLETION_STATUS_{status.name}") for status in CompletionStatus}


def member_of(members: Mapping[Member, int], number: int, field: str) -> Member:
    """Returns the member of a Python enum that has a given number in the protobuf contract.

    Raises:
        MessageError: no member has the number; this includes a number that only a newer version of the contract defines.
    """
    for member, known in members.items():
        if known == number:
            return member
    raise MessageError(field, f"unknown value {number}; expected one of {', '.join(map(str, members.values()))}")


def reduction_to_proto(reduction: Reduction) -> probes_pb2.Reduction:
    """Converts a reduction (a rule from per-token scores to one number) to a protobuf message."""
    return probes_pb2.Reduction(kind=KINDS[reduction.kind], parameter=reduction.parameter)


def reduction_from_proto(message: probes_pb2.Reduction, field: str) -> Reduction:
    """Converts a protobuf message to a ``Reduction`` (rule from per-token scores to one number); ``field`` is the path of the message in
    the request or response, for error messages.

    Raises:
        MessageError: the reduction's kind is unknown, or its parameter is missing, superfluous or out of range.
    """
    kind = member_of(KINDS, message.kind, f"{field}.kind")
    try:
        return Reduction(kind, message.parameter if message.HasField("parameter") else None)
    except ValueError as error:
        raise MessageError(f"{field}.parameter", str(error)) from None
