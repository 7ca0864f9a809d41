"""Converts scores, and descriptions of the model and probes that produced them, to and from protobuf response messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

from probescore.types import (
    FROZEN,
    CompletionScores,
    CompletionStatus,
    GroupScores,
    OutsideCalibration,
    ProbeScores,
    ReadingScores,
    ScoredProbe,
    ScoreResult,
    ScoringInfo,
    StreamedCompletion,
    UnmetCondition,
    Usage,
    score_keys,
    with_unmet_conditions,
)
from probescore.v1 import probes_pb2, scoring_pb2
from probescore.wire.enums import OUTPUTS, STATUSES, UNITS, member_of, reduction_from_proto, reduction_to_proto
from probescore.wire.readings import reading_from_proto, reading_to_proto
from probescore.wire.tensors import FLOAT32, INT32, MessageError, array_to_tensor, tensor_to_array

MAX_KNOWN_PROBES = 4096
"""Maximum number of probe descriptions whose messages are cached, at about 1 kB each. Most responses name the same probes as earlier
responses, perhaps a thousand of them."""

MAX_KNOWN_REDUCTIONS = 8
"""Maximum number of reductions (rules from token scores to one number) that a probe's description may name if its message is to
be cached.
"""

# ---------------------------------------------------------------------------------------------------------------------- writing


def result_to_proto(result: ScoreResult) -> scoring_pb2.ScoreResponse:
    """Converts the scores of a whole request to the response of the RPC ``Score``."""
    keys = score_keys(result.info.probes)
    return scoring_pb2.ScoreResponse(
        groups=[scoring_pb2.GroupScores(completions=[_completion_to_proto(scored, keys) for scored in group]) for group in result.groups],
        info=_info_to_proto(result.info),
    )


def streamed_to_proto(completions: Iterable[tuple[int, int, CompletionScores]], info: ScoringInfo) -> scoring_pb2.ScoreStreamResponse:
    """Converts completions that finished together, each as (group index, completion index, scores), to one message of the response of the
    RPC ``ScoreStream``.
    """
    keys = score_keys(info.probes)
    return scoring_pb2.ScoreStreamResponse(
        completions=[
            scoring_pb2.StreamedCompletion(
                group_index=group_index, completion_index=completion_index, scores=_completion_to_proto(scored, keys)
            )
            for group_index, completion_index, scored in completions
        ],
        info=_info_to_proto(info),
    )


def _completion_to_proto(scored: CompletionScores, keys: Sequence[str]) -> scoring_pb2.CompletionScores:
    return scoring_pb2.CompletionScores(
        id=scored.id,
        status=STATUSES[scored.status],
        status_message=scored.status_message,
        scores=_scores_to_proto(scored.scores if scored.status is CompletionStatus.OK else {}, keys),
        prompt_ids=None if scored.prompt_ids is None else array_to_tensor(scored.prompt_ids, INT32),
        completion_ids=None if scored.completion_ids is None else array_to_tensor(scored.completion_ids, INT32),
        inexact_ids=scored.inexact_ids,
        follow_ups=[_completion_to_proto(follow_up, keys) for follow_up in scored.follow_ups],
        prompt_texts=scored.prompt_texts,
        completion_texts=scored.completion_texts,
        readings=[
            scoring_pb2.ReadingScores(
                status=STATUSES[own.status], status_message=own.status_message, scores=_scores_to_proto(own.scores, keys)
            )
            for own in scored.readings.values()
        ],
    )


def _scores_to_proto(scores: Mapping[str, ProbeScores], keys: Sequence[str]) -> list[scoring_pb2.ProbeScores]:
    return [
        scoring_pb2.ProbeScores(
            reduced=array_to_tensor(scores[key].reduced, FLOAT32),
            tokens=None if (tokens := scores[key].tokens) is None else array_to_tensor(tokens, FLOAT32),
        )
        for key in (keys if scores else ())
    ]


def _info_to_proto(info: ScoringInfo) -> scoring_pb2.ScoringInfo:
    return scoring_pb2.ScoringInfo(
        model_fingerprint=info.model_fingerprint,
        tokenizer_fingerprint=info.tokenizer_fingerprint,
        probes=[_probe_to_proto(probe) for probe in info.probes],
        usage=usage_to_proto(info.usage),
        readings=[reading_to_proto(reading) for reading in info.readings],
    )


def usage_to_proto(usage: Usage) -> scoring_pb2.Usage:
    """Converts the counts of the work that a server did for a response to a protobuf message."""
    return scoring_pb2.Usage(
        tokens_computed=usage.tokens_computed,
        tokens_shared=usage.tokens_shared,
        tokens_cached=usage.tokens_cached,
        queue_seconds=usage.queue_seconds,
        compute_seconds=usage.compute_seconds,
    )


def _probe_to_proto(probe: ScoredProbe) -> probes_pb2.ScoredProbe:
    if probe.outside_calibration:
        message = probes_pb2.ScoredProbe()
        message.CopyFrom(_probe_to_proto(replace(probe, outside_calibration=())))
        message.outside_calibration.extend(map(_outside_to_proto, probe.outside_calibration))
        return message
    # reductions are the client's to choose, as many as it likes: what is remembered must not grow with them
    return _known_probe_to_proto(probe) if len(probe.reductions) <= MAX_KNOWN_REDUCTIONS else _scored_probe_to_proto(probe)


def _outside_to_proto(outside: OutsideCalibration) -> probes_pb2.OutsideCalibration:
    unmet = outside.unmet
    return probes_pb2.OutsideCalibration(
        reduction=None if unmet.reduction is None else reduction_to_proto(unmet.reduction),
        label=unmet.label,
        condition=unmet.condition,
        completions=outside.completions,
    )


@lru_cache(MAX_KNOWN_PROBES)
def _known_probe_to_proto(probe: ScoredProbe) -> probes_pb2.ScoredProbe:
    """Returns a probe's description as a protobuf message, which is kept in a cache. The message must not be changed, since later responses
    share it.
    """
    return _scored_probe_to_proto(probe)


def _scored_probe_to_proto(probe: ScoredProbe) -> probes_pb2.ScoredProbe:
    return probes_pb2.ScoredProbe(
        name=probe.name,
        version=probe.version,
        graph_sha256=probe.graph_sha256,
        manifest_sha256=probe.manifest_sha256,
        reading=probe.reading,
        unit=UNITS[probe.unit],
        output_per=OUTPUTS[probe.output_per],
        labels=probe.labels,
        reductions=[reduction_to_proto(reduction) for reduction in probe.reductions],
        accepted_mismatches=probe.accepted_mismatches,
        follow_up_tokens=probe.follow_up_tokens,
        exclude_special_tokens=probe.exclude_special_tokens,
    )


# ---------------------------------------------------------------------------------------------------------------------- reading


def result_from_proto(message: scoring_pb2.ScoreResponse) -> ScoreResult:
    """Converts the response of the RPC ``Score`` to a ``ScoreResult``, whose arrays are read-only views of the message's bytes.

    Raises:
        MessageError: the message violates the contract.
    """
    info = _info_from_proto(message.info, sum(len(group.completions) for group in message.groups))
    layout = _Layout.of(info)
    completions = [
        _completion_from_proto(scored, layout, f"groups[{index}].completions[{position}]")
        for index, group in enumerate(message.groups)
        for position, scored in enumerate(group.completions)
    ]
    every = iter(with_unmet_conditions(completions, info.probes))
    return ScoreResult(tuple(GroupScores(tuple(islice(every, len(group.completions)))) for group in message.groups), info)


def streamed_from_proto(message: scoring_pb2.ScoreStreamResponse) -> tuple[StreamedCompletion, ...]:
    """Returns the scored completions in one message of the response of the RPC ``ScoreStream``.

    Raises:
        MessageError: the message violates the contract.
    """
    info = _info_from_proto(message.info, len(message.completions))
    layout = _Layout.of(info)
    completions = [
        _completion_from_proto(entry.scores, layout, f"completions[{index}].scores") for index, entry in enumerate(message.completions)
    ]
    return tuple(
        StreamedCompletion(group_index=entry.group_index, completion_index=entry.completion_index, scores=scores, info=info)
        for entry, scores in zip(message.completions, with_unmet_conditions(completions, info.probes), strict=True)
    )


@dataclass(frozen=True)
class _Layout:
    """Value object that says what each completion of a response has: the keys of its probes' scores, whether it has scores on the frozen
    reading, and the names of the other readings.
    """

    keys: Sequence[str]
    is_frozen_read: bool
    others: Sequence[str]

    @classmethod
    def of(cls, info: ScoringInfo) -> _Layout:
        names = [reading.name for reading in info.readings] or [FROZEN]
        return cls(score_keys(info.probes), FROZEN in names, [name for name in names if name != FROZEN])


def _completion_from_proto(message: scoring_pb2.CompletionScores, layout: _Layout, field: str) -> CompletionScores:
    status = member_of(STATUSES, message.status, f"{field}.status")
    if len(message.readings) != len(layout.others):
        raise MessageError(f"{field}.readings", f"has {len(message.readings)} entries; expected {len(layout.others)}")
    return CompletionScores(
        id=message.id,
        status=status,
        scores=_scores_from_proto(message.scores, layout.keys if layout.is_frozen_read else (), status, f"{field}.scores"),
        status_message=message.status_message,
        prompt_ids=(
            tensor_to_array(message.prompt_ids, f"{field}.prompt_ids", (INT32,), rank=1) if message.HasField("prompt_ids") else None
        ),
        completion_ids=(
            tensor_to_array(message.completion_ids, f"{field}.completion_ids", (INT32,), rank=1)
            if message.HasField("completion_ids")
            else None
        ),
        inexact_ids=message.inexact_ids,
        follow_ups=tuple(
            _completion_from_proto(follow_up, layout, f"{field}.follow_ups[{index}]") for index, follow_up in enumerate(message.follow_ups)
        ),
        # on the wire, no pieces and none asked for are the same
        prompt_texts=tuple(message.prompt_texts) or None,
        completion_texts=tuple(message.completion_texts) or None,
        readings={
            name: _reading_scores(own, layout.keys, f"{field}.readings[{index}]")
            for index, (name, own) in enumerate(zip(layout.others, message.readings, strict=True))
        },
    )


def _reading_scores(message: scoring_pb2.ReadingScores, keys: Sequence[str], field: str) -> ReadingScores:
    status = member_of(STATUSES, message.status, f"{field}.status")
    return ReadingScores(status, _scores_from_proto(message.scores, keys, status, f"{field}.scores"), message.status_message)


def _scores_from_proto(
    messages: Sequence[scoring_pb2.ProbeScores], keys: Sequence[str], status: CompletionStatus, field: str
) -> dict[str, ProbeScores]:
    if status is not CompletionStatus.OK:
        keys = ()
    if len(messages) != len(keys):
        raise MessageError(field, f"has {len(messages)} entries; expected {len(keys)}")
    return {key: _probe_scores(scores, f"{field}[{index}]") for index, (key, scores) in enumerate(zip(keys, messages, strict=True))}


def _probe_scores(message: scoring_pb2.ProbeScores, field: str) -> ProbeScores:
    return ProbeScores(
        reduced=tensor_to_array(message.reduced, f"{field}.reduced", (FLOAT32,), rank=3),
        tokens=tensor_to_array(message.tokens, f"{field}.tokens", (FLOAT32,), rank=2) if message.HasField("tokens") else None,
    )


def _info_from_proto(message: scoring_pb2.ScoringInfo, completions: int) -> ScoringInfo:
    return ScoringInfo(
        model_fingerprint=message.model_fingerprint,
        tokenizer_fingerprint=message.tokenizer_fingerprint,
        probes=tuple(_scored_probes(message, completions)),
        usage=usage_from_proto(message.usage),
        readings=tuple(reading_from_proto(reading, f"info.readings[{index}]") for index, reading in enumerate(message.readings)),
    )


def usage_from_proto(message: scoring_pb2.Usage) -> Usage:
    """Converts a protobuf message to the counts of the work that a server did for a response."""
    return Usage(
        tokens_computed=message.tokens_computed,
        tokens_shared=message.tokens_shared,
        tokens_cached=message.tokens_cached,
        queue_seconds=message.queue_seconds,
        compute_seconds=message.compute_seconds,
    )


def _scored_probes(message: scoring_pb2.ScoringInfo, completions: int) -> Iterator[ScoredProbe]:
    for index, probe in enumerate(message.probes):
        try:
            yield _probe_with_outside(probe, completions) if probe.outside_calibration else _scored_probe(probe.SerializeToString())
        except MessageError as error:
            raise MessageError(f"info.probes[{index}].{error.field}", error.problem) from None


def _probe_with_outside(message: probes_pb2.ScoredProbe, completions: int) -> ScoredProbe:
    bare = probes_pb2.ScoredProbe()
    bare.CopyFrom(message)
    bare.ClearField("outside_calibration")  # it differs from response to response, and the rest is known already
    outside = tuple(
        _outside_from_proto(entry, f"outside_calibration[{index}]", completions) for index, entry in enumerate(message.outside_calibration)
    )
    return replace(_scored_probe(bare.SerializeToString()), outside_calibration=outside)


def _outside_from_proto(message: probes_pb2.OutsideCalibration, field: str, completions: int) -> OutsideCalibration:
    places = tuple(message.completions)
    for before, place in zip((-1, *places), places, strict=False):
        if not before < place < completions:
            raise MessageError(f"{field}.completions", f"has {place} after {before}; expected ascending places below {completions}")
    reduction = reduction_from_proto(message.reduction, f"{field}.reduction") if message.HasField("reduction") else None
    return OutsideCalibration(UnmetCondition(message.condition, reduction, message.label), places)


@lru_cache(MAX_KNOWN_PROBES)
def _scored_probe(packed: bytes) -> ScoredProbe:
    message = probes_pb2.ScoredProbe.FromString(packed)
    return ScoredProbe(
        name=message.name,
        version=message.version,
        graph_sha256=message.graph_sha256,
        manifest_sha256=message.manifest_sha256,
        unit=member_of(UNITS, message.unit, "unit"),
        output_per=member_of(OUTPUTS, message.output_per, "output_per"),
        labels=tuple(message.labels),
        reductions=tuple(reduction_from_proto(entry, f"reductions[{index}]") for index, entry in enumerate(message.reductions)),
        accepted_mismatches=tuple(message.accepted_mismatches),
        reading=message.reading,
        follow_up_tokens=message.follow_up_tokens,
        exclude_special_tokens=message.exclude_special_tokens,
    )
