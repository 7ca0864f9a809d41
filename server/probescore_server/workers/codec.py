"""Encodes rollouts and their results as tuples of bytes, numbers and strings, which are then pickled and sent between the server's front
process, which owns the port, and a worker process.

Pickling the objects themselves, of a dozen classes and with many small arrays, would take three times as long.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from probescore.types import CompletionScores, CompletionStatus, Pool, ProbeScores, ReadingScores, Scope, Span, Usage
from probescore_server.rollouts import ActivationArrays, CheckedRollout, Continuation, ResolvedOptions, RolloutResult

Encoded: TypeAlias = tuple[Any, ...]

# --------------------------------------------------------------------------------------------------------------------- rollouts


def encode_rollouts(rollouts: Sequence[CheckedRollout]) -> Encoded:
    """Encodes the rollouts of a batch as tuples of plain values, for a message to a worker process. Prompts and options that several
    rollouts share are encoded once.
    """
    prompts: dict[int, tuple[int, bytes]] = {}
    options: dict[int, tuple[int, Encoded]] = {}
    encoded = []
    for rollout in rollouts:
        prompt, asked = id(rollout.prompt_ids), id(rollout.options)
        if prompt not in prompts:
            prompts[prompt] = len(prompts), _bytes_of(rollout.prompt_ids, np.int32)
        if asked not in options:
            options[asked] = len(options), _encode_options(rollout.options)
        cost = rollout.appended_tokens, rollout.reread_tokens
        encoded.append((prompts[prompt][0], _encode_continuation(rollout.completion), options[asked][0], cost))
    return [ids for _, ids in prompts.values()], [each for _, each in options.values()], encoded


def decode_rollouts(encoded: Encoded) -> list[CheckedRollout]:
    """Decodes rollouts from the tuples of plain values that ``encode_rollouts`` made. Arrays are read-only, and rollouts that shared a
    prompt or options share them again.
    """
    encoded_prompts, encoded_options, encoded_rollouts = encoded
    prompts = [np.frombuffer(ids, np.int32) for ids in encoded_prompts]
    options = [_decode_options(each) for each in encoded_options]
    return [
        CheckedRollout(prompts[prompt], _decode_continuation(completion), options[asked], *cost)
        for prompt, completion, asked, cost in encoded_rollouts
    ]


def _encode_options(options: ResolvedOptions) -> Encoded:
    return (
        options.probes,
        options.reductions,
        options.token_scores,
        options.scope.value,
        options.return_token_ids,
        options.return_token_texts,
        options.activations,
        options.readings,
        options.adapters,
    )


def _decode_options(encoded: Encoded) -> ResolvedOptions:
    probes, reductions, token_scores, scope, *others = encoded
    return ResolvedOptions(probes, reductions, token_scores, Scope(scope), *others)


def _encode_continuation(continuation: Continuation) -> Encoded:
    return (
        _bytes_of(continuation.token_ids, np.int32),
        _encode_array(continuation.mask, np.bool_),
        [(span.name, span.start, span.end) for span in continuation.spans],
        [_encode_continuation(follow_up) for follow_up in continuation.follow_ups],
        continuation.id,
        continuation.inexact_ids,
    )


def _decode_continuation(encoded: Encoded) -> Continuation:
    token_ids, mask, spans, follow_ups, echoed, inexact_ids = encoded
    return Continuation(
        np.frombuffer(token_ids, np.int32),
        _decode_array(mask, np.bool_),
        tuple([Span(*span) for span in spans]),
        tuple([_decode_continuation(follow_up) for follow_up in follow_ups]),
        echoed,
        inexact_ids,
    )


# ---------------------------------------------------------------------------------------------------------------------- results


def encode_results(results: Sequence[RolloutResult | None]) -> Encoded:
    """Encodes the results of a batch of rollouts as tuples of plain values. ``None``, the result of a cancelled rollout, stays ``None``."""
    return tuple([None if result is None else _encode_result(result) for result in results])


def decode_results(encoded: Encoded) -> tuple[RolloutResult | None, ...]:
    """Decodes the results of a batch of rollouts from the tuples of plain values that ``encode_results`` made. Arrays are read-only."""
    return tuple([None if result is None else _decode_result(result) for result in encoded])


def _encode_result(result: RolloutResult) -> Encoded:
    usage = result.usage
    tokens = usage.tokens_computed, usage.tokens_shared, usage.tokens_cached
    return _encode_scores(result.scores), tokens, result.refused_by, _encode_activations(result.activations)


def _decode_result(encoded: Encoded) -> RolloutResult:
    scores, tokens, refused_by, activations = encoded
    return RolloutResult(_decode_scores(scores), Usage(*tokens), refused_by, _decode_activations(activations))


def _encode_activations(views: Sequence[ActivationArrays]) -> Encoded:
    """Encodes the activations of a rollout, which may have megabytes, as one buffer, which is sent over the socket without being copied."""
    layouts = [
        [(tap, pool.value, rows.dtype.str, rows.shape[0], rows.shape[1]) for (tap, pool), rows in arrays.items()] for arrays in views
    ]
    if not any(layouts):
        return layouts, None
    content = b"".join([rows.reshape(-1).view(np.uint8).data for arrays in views for rows in arrays.values()])
    return layouts, pickle.PickleBuffer(content)


def _decode_activations(encoded: Encoded) -> tuple[ActivationArrays, ...]:
    layouts, content = encoded
    views, start = [], 0
    for layout in layouts:
        arrays: dict[tuple[str, Pool], NDArray[Any]] = {}
        for tap, pool, dtype, rows, width in layout:
            arrays[tap, Pool(pool)] = np.frombuffer(content, dtype, rows * width, start).reshape(rows, width)
            start += arrays[tap, Pool(pool)].nbytes
        views.append(arrays)
    return tuple(views)


def _encode_scores(scores: CompletionScores) -> Encoded:
    return (
        scores.id,
        scores.status.value,
        _encode_probes(scores.scores),
        scores.status_message,
        _encode_array(scores.prompt_ids, np.int32),
        _encode_array(scores.completion_ids, np.int32),
        scores.inexact_ids,
        [_encode_scores(follow_up) for follow_up in scores.follow_ups],
        scores.prompt_texts,
        scores.completion_texts,
        [(name, own.status.value, _encode_probes(own.scores), own.status_message) for name, own in scores.readings.items()],
    )


def _decode_scores(encoded: Encoded) -> CompletionScores:
    echoed, status, probes, message, prompt_ids, completion_ids, inexact_ids, follow_ups, prompt_texts, completion_texts, readings = encoded
    return CompletionScores(
        echoed,
        CompletionStatus(status),
        _decode_probes(probes),
        message,
        _decode_array(prompt_ids, np.int32),
        _decode_array(completion_ids, np.int32),
        inexact_ids,
        tuple([_decode_scores(follow_up) for follow_up in follow_ups]),
        prompt_texts,
        completion_texts,
        {name: ReadingScores(CompletionStatus(own), _decode_probes(scores), problem) for name, own, scores, problem in readings},
    )


def _encode_probes(probes: Mapping[str, ProbeScores]) -> Encoded:
    reduced = [probe.reduced for probe in probes.values()]
    return (
        tuple(probes),
        [array.shape for array in reduced],
        b"".join([_bytes_of(array, np.float32) for array in reduced]),
        {key: (probe.tokens.shape, _bytes_of(probe.tokens, np.float32)) for key, probe in probes.items() if probe.tokens is not None},
    )


def _decode_probes(encoded: Encoded) -> dict[str, ProbeScores]:
    probes, shapes, numbers, tokens = encoded
    reduced = np.frombuffer(numbers, np.float32)
    scores, start = {}, 0
    for probe, shape in zip(probes, shapes, strict=True):
        end = start + math.prod(shape)
        scores[probe] = ProbeScores(reduced[start:end].reshape(shape), _decode_tokens(tokens[probe]) if probe in tokens else None)
        start = end
    return scores


def _decode_tokens(encoded: Encoded) -> NDArray[np.float32]:
    shape, numbers = encoded
    return np.frombuffer(numbers, np.float32).reshape(shape)


def _bytes_of(array: NDArray[Any], dtype: DTypeLike) -> bytes:
    """Returns an array's bytes; raises ``TypeError`` if the array has another dtype than ``dtype``, since its bytes would be decoded as
    wrong numbers.
    """
    if array.dtype != dtype:
        raise TypeError(f"an array of {array.dtype} where {np.dtype(dtype)} is read")
    return array.tobytes()


def _encode_array(array: NDArray[Any] | None, dtype: DTypeLike) -> bytes | None:
    return None if array is None else _bytes_of(array, dtype)


def _decode_array(encoded: bytes | None, dtype: DTypeLike) -> NDArray[Any] | None:
    return None if encoded is None else np.frombuffer(encoded, dtype)
