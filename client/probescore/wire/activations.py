"""Converts requests for activations, and the parts in which a server sends activations, to and from protobuf messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probescore.types import ActivationsInfo, CompletionScores, Pool, Reading, Scope, Usage
from probescore.v1 import activations_pb2
from probescore.wire.enums import POOLS, SCOPES, STATUSES, member_of
from probescore.wire.number_formats import NUMBER_FORMATS
from probescore.wire.readings import reading_from_proto, reading_to_proto
from probescore.wire.requests import checked_integer, checked_string
from probescore.wire.responses import usage_from_proto, usage_to_proto
from probescore.wire.tensors import BFLOAT16, FLOAT16, FLOAT32, INT32, MessageError, array_to_tensor, tensor_to_array

FORMATS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16}
"""Maps the names of the formats in which activations are sent to the contract's numbers."""


@dataclass(frozen=True)
class ActivationOptions:
    """Value object with all fields of a ``ReadActivationsRequest`` (request for a model's activations) except the rollout groups; the
    comments in the ``.proto`` file define each field.
    """

    taps: tuple[str, ...]
    pools: tuple[Pool, ...]
    dtype: str = "float32"
    scope: Scope = Scope.COMPLETION
    expected_model_fingerprint: str = ""
    expected_tokenizer_fingerprint: str = ""
    priority: int = 0
    run_id: str = ""
    reading: str = ""


# ---------------------------------------------------------------------------------------------------------------------- writing


def activation_options_to_proto(options: ActivationOptions) -> activations_pb2.ReadActivationsRequest:
    """Converts the options of a request for activations to a ``ReadActivationsRequest`` message without rollout groups.

    Raises:
        MessageError: a text field is not a valid string, the format is not known, or an integer is out of the range of its field.
    """
    if options.dtype not in FORMATS:
        raise MessageError("dtype", f"{options.dtype!r} is none of {', '.join(FORMATS)}")
    return activations_pb2.ReadActivationsRequest(
        taps=[checked_string(tap, f"taps[{index}]") for index, tap in enumerate(options.taps)],
        pools=[POOLS[pool] for pool in options.pools],
        dtype=FORMATS[options.dtype],
        scope=SCOPES[options.scope],
        expected_model_fingerprint=checked_string(options.expected_model_fingerprint, "expected_model_fingerprint"),
        expected_tokenizer_fingerprint=checked_string(options.expected_tokenizer_fingerprint, "expected_tokenizer_fingerprint"),
        priority=checked_integer(options.priority, "priority", -(2**31), 2**31 - 1),
        run_id=checked_string(options.run_id, "run_id"),
        reading=checked_string(options.reading, "reading"),
    )


def begin_to_proto(group: int, completion: int, follow_up: Sequence[int], read: CompletionScores) -> activations_pb2.ActivationPart:
    """Returns the part of a response with which the activations of a completion begin, or those of a follow-up (token ids appended to a
    completion), which has a path of indices ``follow_up``. The token ids of ``read`` are the tokens in scope.
    """
    prompt, own = (np.zeros(0, np.int32) if ids is None else ids for ids in (read.prompt_ids, read.completion_ids))
    return activations_pb2.ActivationPart(
        begins=activations_pb2.CompletionRead(
            group_index=group,
            completion_index=completion,
            follow_up=follow_up,
            id=read.id,
            status=STATUSES[read.status],
            status_message=read.status_message,
            token_ids=array_to_tensor(np.concatenate([prompt, own]), INT32),
            prompt_tokens=len(prompt),
            inexact_ids=read.inexact_ids,
        )
    )


def rows_to_proto(tap: str, pool: Pool, first_row: int, rows: NDArray[np.generic], dtype: str) -> activations_pb2.ActivationPart:
    """Returns a part of a response with consecutive rows of activations at a tap (place in the model) under a way of pooling tokens,
    ``(rows, hidden_size)`` in the number format ``dtype``.
    """
    return activations_pb2.ActivationPart(
        rows=activations_pb2.ActivationRows(tap=tap, pool=POOLS[pool], first_row=first_row, rows=array_to_tensor(rows, FORMATS[dtype]))
    )


def activations_info_to_proto(
    model_fingerprint: str,
    tokenizer_fingerprint: str,
    taps: Sequence[str],
    pools: Sequence[Pool],
    dtype: str,
    usage: Usage,
    reading: Reading | None = None,
) -> activations_pb2.ActivationsInfo:
    """Returns a message that describes what produced the activations of a response: model, tokenizer, places in the model, poolings, number
    format, work done, and the reading (whose activations these are) if the request named one.
    """
    return activations_pb2.ActivationsInfo(
        model_fingerprint=model_fingerprint,
        tokenizer_fingerprint=tokenizer_fingerprint,
        taps=taps,
        pools=[POOLS[pool] for pool in pools],
        dtype=FORMATS[dtype],
        usage=usage_to_proto(usage),
        reading=None if reading is None else reading_to_proto(reading),
    )


# ---------------------------------------------------------------------------------------------------------------------- reading


def activation_options_from_request(request: activations_pb2.ReadActivationsRequest) -> ActivationOptions:
    """Returns the options of a request for activations, a ``ReadActivationsRequest`` message.

    Raises:
        MessageError: the scope, a pool or the format is unknown.
    """
    return ActivationOptions(
        taps=tuple(request.taps),
        pools=tuple(member_of(POOLS, pool, f"pools[{index}]") for index, pool in enumerate(request.pools)),
        dtype=member_of(FORMATS, request.dtype, "dtype") if request.dtype else "float32",
        scope=member_of(SCOPES, request.scope, "scope") if request.scope else Scope.COMPLETION,
        expected_model_fingerprint=request.expected_model_fingerprint,
        expected_tokenizer_fingerprint=request.expected_tokenizer_fingerprint,
        priority=request.priority,
        run_id=request.run_id,
        reading=request.reading,
    )


def activations_info_from_proto(message: activations_pb2.ActivationsInfo) -> ActivationsInfo:
    """Converts a message to a description of what produced the activations of a response, such as the model and the places in it.

    Raises:
        MessageError: a pool, the format or the kind of the reading is unknown.
    """
    return ActivationsInfo(
        model_fingerprint=message.model_fingerprint,
        tokenizer_fingerprint=message.tokenizer_fingerprint,
        taps=tuple(message.taps),
        pools=tuple(member_of(POOLS, pool, f"info.pools[{index}]") for index, pool in enumerate(message.pools)),
        dtype=member_of(FORMATS, message.dtype, "info.dtype"),
        usage=usage_from_proto(message.usage),
        reading=reading_from_proto(message.reading, "info.reading") if message.HasField("reading") else None,
    )


def rows_from_proto(rows: activations_pb2.ActivationRows, dtype: str, field: str) -> NDArray[np.float32]:
    """Returns the rows of activations in one part of a response as float32, ``(rows, hidden_size)``.

    Raises:
        MessageError: the rows are not of the format ``dtype``, or the tensor violates the contract.
    """
    stored: NDArray[Any] = tensor_to_array(rows.rows, f"{field}.rows", (FORMATS[dtype],), rank=2)
    return NUMBER_FORMATS[dtype].decode(stored)
