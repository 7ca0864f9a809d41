"""Converts rollout groups and scoring options to and from ``ScoreRequest`` messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probescore.reductions import Reduction
from probescore.types import Chat, ChatMessage, Completion, RolloutGroup, Scope, Span, Text, TokenIds
from probescore.v1 import activations_pb2, scoring_pb2, tensor_pb2
from probescore.wire.contract import MAX_FOLLOW_UP_DEPTH
from probescore.wire.enums import SCOPES, member_of, reduction_from_proto, reduction_to_proto
from probescore.wire.tensors import BOOL, INT32, INT64, UINT32, MessageError, array_to_tensor, tensor_to_array

TokenScores = Union[Literal["all"], tuple[str, ...]]

_INT32_MAX = 2**31 - 1
_UINT32_MAX = 2**32 - 1


@dataclass(frozen=True)
class RequestOptions:
    """Value object with all fields of a ``ScoreRequest`` (request for scores) except the rollout groups; the comments in the ``.proto``
    file define each field.
    """

    probes: tuple[str, ...] = ()
    reductions: tuple[Reduction, ...] = ()
    token_scores: TokenScores = ()
    scope: Scope = Scope.COMPLETION
    expected_model_fingerprint: str = ""
    expected_tokenizer_fingerprint: str = ""
    return_token_ids: bool = False
    return_token_texts: bool = False
    priority: int = 0
    run_id: str = ""
    step: int | None = None
    readings: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------------------------------- writing


def request_to_proto(groups: Sequence[RolloutGroup], options: RequestOptions) -> scoring_pb2.ScoreRequest:
    """Converts rollout groups and options to a whole ``ScoreRequest`` message.

    Raises:
        MessageError: a value cannot be represented in the contract; the error names the field.
    """
    request = options_to_proto(options)
    request.groups.extend(group_to_proto(group, f"groups[{index}]") for index, group in enumerate(groups))
    return request


def options_to_proto(options: RequestOptions) -> scoring_pb2.ScoreRequest:
    """Converts options to a ``ScoreRequest`` message without rollout groups.

    Raises:
        MessageError: a text field is not a valid string, or an integer is out of the range of its field.
    """
    names = () if isinstance(options.token_scores, str) else options.token_scores
    return scoring_pb2.ScoreRequest(
        probes=[checked_string(probe, f"probes[{index}]") for index, probe in enumerate(options.probes)],
        reductions=[reduction_to_proto(reduction) for reduction in options.reductions],
        token_scores=scoring_pb2.TokenScores(
            all=isinstance(options.token_scores, str),
            probes=[checked_string(probe, f"token_scores.probes[{index}]") for index, probe in enumerate(names)],
        ),
        scope=SCOPES[options.scope],
        expected_model_fingerprint=checked_string(options.expected_model_fingerprint, "expected_model_fingerprint"),
        expected_tokenizer_fingerprint=checked_string(options.expected_tokenizer_fingerprint, "expected_tokenizer_fingerprint"),
        return_token_ids=options.return_token_ids,
        return_token_texts=options.return_token_texts,
        priority=checked_integer(options.priority, "priority", -(2**31), _INT32_MAX),
        run_id=checked_string(options.run_id, "run_id"),
        step=None if options.step is None else checked_integer(options.step, "step", -(2**63), 2**63 - 1),
        readings=[checked_string(reading, f"readings[{index}]") for index, reading in enumerate(options.readings)],
    )


def group_to_proto(group: RolloutGroup, field: str) -> scoring_pb2.RolloutGroup:
    """Converts one rollout group to a message; ``field`` is the path of the group in the request, for error messages.

    Raises:
        MessageError: token ids are not integers in one dimension, a mask has values other than 0 and 1, a text is not a valid string, or a
            span is out of range.
    """
    completions = [entry if isinstance(entry, Completion) else Completion(entry) for entry in group.completions]
    return scoring_pb2.RolloutGroup(
        prompt=_prompt_to_proto(group.prompt, f"{field}.prompt"),
        completions=[_completion_to_proto(completion, f"{field}.completions[{index}]") for index, completion in enumerate(completions)],
    )


def _prompt_to_proto(prompt: TokenIds | str | Text | Chat, field: str) -> scoring_pb2.Prompt:
    if isinstance(prompt, str):
        prompt = Text(prompt)
    if isinstance(prompt, Text):
        text = checked_string(prompt.text, f"{field}.text.text")
        return scoring_pb2.Prompt(text=scoring_pb2.Text(text=text, add_special_tokens=prompt.add_special_tokens))
    if isinstance(prompt, Chat):
        messages = [
            scoring_pb2.ChatMessage(
                role=checked_string(message.role, f"{field}.chat.messages[{index}].role"),
                content=checked_string(message.content, f"{field}.chat.messages[{index}].content"),
            )
            for index, message in enumerate(prompt.messages)
        ]
        return scoring_pb2.Prompt(chat=scoring_pb2.Chat(messages=messages))
    return scoring_pb2.Prompt(ids=_ids_to_tensor(prompt, f"{field}.ids"))


def _completion_to_proto(completion: Completion, field: str, depth: int = 0) -> scoring_pb2.Completion:
    if depth > MAX_FOLLOW_UP_DEPTH:
        raise MessageError(field, f"follow-ups nest more than {MAX_FOLLOW_UP_DEPTH} deep")
    message = scoring_pb2.Completion(
        id=checked_string(completion.id, f"{field}.id"),
        mask=None if completion.mask is None else _mask_to_tensor(completion.mask, f"{field}.mask"),
        spans=[_span_to_proto(span, f"{field}.spans[{index}]") for index, span in enumerate(completion.spans)],
        follow_ups=[
            _completion_to_proto(follow_up, f"{field}.follow_ups[{index}]", depth + 1)
            for index, follow_up in enumerate(completion.follow_ups)
        ],
    )
    if isinstance(completion.tokens, str):
        message.text = checked_string(completion.tokens, f"{field}.text")
    else:
        message.ids.CopyFrom(_ids_to_tensor(completion.tokens, f"{field}.ids"))
    return message


def _span_to_proto(span: Span, field: str) -> scoring_pb2.Span:
    return scoring_pb2.Span(
        name=checked_string(span.name, f"{field}.name"),
        start=checked_integer(span.start, f"{field}.start", 0, _UINT32_MAX),
        end=checked_integer(span.end, f"{field}.end", 0, _UINT32_MAX),
    )


def _array(values: ArrayLike, field: str) -> NDArray[Any]:
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, OverflowError) as error:
        raise MessageError(field, f"not an array: {error}") from None
    if array.ndim != 1:
        raise MessageError(field, f"has {array.ndim} axes; expected 1")
    return array


def ids_array(ids: ArrayLike, field: str) -> NDArray[Any]:
    """Converts token ids to an array ``(T,)`` of integers; an empty array may have any dtype.

    Args:
        ids: the token ids, as a sequence or array that numpy can read.
        field: path of the ids in the request, which errors name.

    Raises:
        MessageError: the token ids are not integers, or do not have exactly one axis.
    """
    array = _array(ids, field)
    if array.size and array.dtype.kind not in "iu":
        raise MessageError(field, f"token ids are integers, got {array.dtype}")
    return array


def _ids_to_tensor(ids: ArrayLike, field: str) -> tensor_pb2.Tensor:
    array = ids_array(ids, field)
    if array.size == 0:
        return array_to_tensor(array, INT32)
    low, high = int(array.min()), int(array.max())
    if low < -_INT32_MAX or high > 2**63 - 1:
        raise MessageError(field, f"token id {low if low < 0 else high} is out of range")
    return array_to_tensor(array, INT32 if high <= _INT32_MAX else INT64)


def _mask_to_tensor(mask: ArrayLike, field: str) -> tensor_pb2.Tensor:
    array = _array(mask, field)
    # trainers keep masks as bool, int or float
    if array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise MessageError(field, "a mask holds 0 and 1 only")
    return array_to_tensor(array, BOOL)


def checked_string(value: object, field: str) -> str:
    """Returns a value for a text field of a protobuf message unchanged; raises ``MessageError``, which names the field, if the value is not
    a string that UTF-8 can express.
    """
    if not isinstance(value, str):
        raise MessageError(field, f"expected str, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise MessageError(field, f"cannot be written as UTF-8: lone surrogate at index {error.start}") from None
    return value


def checked_integer(value: object, field: str, low: int, high: int) -> int:
    """Returns a value for an integer field of a protobuf message as an ``int``; raises ``MessageError``, which names the field, if the
    value is no integer in ``[low, high]``.
    """
    if not isinstance(value, (int, np.integer)):
        raise MessageError(field, f"expected an integer, got {type(value).__name__}")
    number = int(value)
    if not low <= number <= high:
        raise MessageError(field, f"{number} is not between {low} and {high}")
    return number


# ---------------------------------------------------------------------------------------------------------------------- reading


def options_from_request(request: scoring_pb2.ScoreRequest) -> RequestOptions:
    """Returns the options of a ``ScoreRequest`` message.

    Raises:
        MessageError: the scope or a reduction is unknown, or token scores are requested both for all probes and for named probes.
    """
    if request.token_scores.all and request.token_scores.probes:
        raise MessageError("token_scores.probes", "must be empty where token_scores.all is true")
    unspecified = request.scope == scoring_pb2.SCOPE_UNSPECIFIED
    return RequestOptions(
        probes=tuple(request.probes),
        reductions=tuple(reduction_from_proto(message, f"reductions[{index}]") for index, message in enumerate(request.reductions)),
        token_scores="all" if request.token_scores.all else tuple(request.token_scores.probes),
        scope=Scope.COMPLETION if unspecified else member_of(SCOPES, request.scope, "scope"),
        expected_model_fingerprint=request.expected_model_fingerprint,
        expected_tokenizer_fingerprint=request.expected_tokenizer_fingerprint,
        return_token_ids=request.return_token_ids,
        return_token_texts=request.return_token_texts,
        priority=request.priority,
        run_id=request.run_id,
        step=request.step if request.HasField("step") else None,
        readings=tuple(request.readings),
    )


def groups_from_request(request: scoring_pb2.ScoreRequest | activations_pb2.ReadActivationsRequest) -> list[RolloutGroup]:
    """Returns the rollout groups of a request message. Token ids keep the dtype in which they were sent (int32, int64 or uint32). The
    server, and not this function, checks whether ids are in the model's vocabulary and whether mask and spans fit their completion.

    Raises:
        MessageError: a tensor violates the contract.
    """
    groups = []
    for index, group in enumerate(request.groups):
        field = f"groups[{index}]"
        completions = tuple(
            _completion_from_proto(completion, f"{field}.completions[{position}]") for position, completion in enumerate(group.completions)
        )
        groups.append(RolloutGroup(_prompt_from_proto(group.prompt, f"{field}.prompt"), completions))
    return groups


def _prompt_from_proto(message: scoring_pb2.Prompt, field: str) -> NDArray[Any] | Text | Chat:
    form = message.WhichOneof("form")
    if form == "text":
        return Text(message.text.text, message.text.add_special_tokens)
    if form == "chat":
        return Chat(tuple(ChatMessage(entry.role, entry.content) for entry in message.chat.messages))
    return _ids_from_proto(message, form, field)


def _completion_from_proto(message: scoring_pb2.Completion, field: str) -> Completion:
    form = message.WhichOneof("form")
    has_mask = message.HasField("mask")
    return Completion(
        tokens=message.text if form == "text" else _ids_from_proto(message, form, field),
        mask=tensor_to_array(message.mask, f"{field}.mask", (BOOL,), rank=1) if has_mask else None,
        spans=tuple(Span(span.name, span.start, span.end) for span in message.spans),
        follow_ups=tuple(
            _completion_from_proto(follow_up, f"{field}.follow_ups[{index}]") for index, follow_up in enumerate(message.follow_ups)
        ),
        id=message.id,
    )


def _ids_from_proto(message: scoring_pb2.Prompt | scoring_pb2.Completion, form: str | None, field: str) -> NDArray[Any]:
    if form == "ids":
        return tensor_to_array(message.ids, f"{field}.ids", (INT32, INT64, UINT32), rank=1)
    return np.array(message.id_list.ids, np.uint32)  # empty if neither form was set
