"""Divides a batch of rollouts among forward passes, one for each reading that must be computed, and puts their scores together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from probescore.types import FROZEN, CompletionScores, CompletionStatus, ReadingScores, Tap, Usage
from probescore_server.engine.reading_set import ReadingSet
from probescore_server.engine.served_probes import ServedProbes
from probescore_server.rollouts import CheckedRollout, ResolvedOptions, RolloutResult

FROZEN_PASS = ""
"""Key of the forward pass of the frozen model; the others' is the id of their version."""

_FROZEN_ALONE = {FROZEN: FROZEN_PASS}


class ReadingPasses:
    """Forward passes that a batch of rollouts needs: the frozen model's first, and one for each other version that is asked for.

    A version that changes nothing that the rollout's probes see is answered from the frozen model's pass.

    Args:
        rollouts: the batch.
        probes: the probes that it is scored with.
        readings: the readings that are loaded.

    Attributes:
        rollouts: a dictionary, keyed by pass, the frozen model's first, of the indices of the rollouts that need it.
    """

    def __init__(self, rollouts: Sequence[CheckedRollout], probes: ServedProbes, readings: ReadingSet) -> None:
        self._passes_of: list[dict[str, str]] = []
        needed: dict[str, list[int]] = {FROZEN_PASS: []}
        known: dict[ResolvedOptions, dict[str, str]] = {}
        for index, rollout in enumerate(rollouts):
            options = rollout.options
            if options not in known:
                read = probes.taps_of(options.probes) if options.readings else ()
                known[options] = {wanted.name: _pass_of(wanted.id, read, readings) for wanted in options.readings} or _FROZEN_ALONE
            self._passes_of.append(known[options])
            for each in dict.fromkeys(known[options].values()):
                needed.setdefault(each, []).append(index)
        self.rollouts = {each: indices for each, indices in needed.items() if indices}

    def together(self, results: Mapping[str, Sequence[RolloutResult | None]]) -> list[RolloutResult | None]:
        """Returns the result of each rollout of the batch.

        Args:
            results: a dictionary, keyed by pass, of the results of the rollouts that need it, in order.
        """
        if all(passes is _FROZEN_ALONE for passes in self._passes_of):
            return [*results[FROZEN_PASS]] if self._passes_of else []
        by_rollout = {each: dict(zip(self.rollouts[each], found, strict=True)) for each, found in results.items()}
        return [
            _result(passes, {each: by_rollout[each][index] for each in passes.values()}) for index, passes in enumerate(self._passes_of)
        ]


def _result(passes: Mapping[str, str], results: Mapping[str, RolloutResult | None]) -> RolloutResult | None:
    """Returns one rollout's result from those of its passes; ``None`` if one of them was cancelled.

    Args:
        passes: a dictionary from the names of the readings that it asks for to their passes.
        results: a dictionary, keyed by pass.
    """
    found = {each: result for each, result in results.items() if result is not None}
    if len(found) < len(results):
        return None
    usage = Usage.total(result.usage for result in found.values())
    refused_by = next((result.refused_by for result in found.values() if result.refused_by), "")
    return RolloutResult(_together({name: found[each].scores for name, each in passes.items()}), usage, refused_by)


def _pass_of(reading_id: str, taps: Collection[Tap], readings: ReadingSet) -> str:
    if not reading_id:
        return FROZEN_PASS
    return reading_id if readings.version(reading_id).changes(taps) else FROZEN_PASS


def _together(scores: Mapping[str, CompletionScores]) -> CompletionScores:
    """Returns one completion's scores: the frozen model's as they are, those of the other readings apart.

    Args:
        scores: a dictionary, keyed by the reading's name, of the completion's scores on each reading.
    """
    any_reading = next(iter(scores.values()))
    frozen = scores.get(FROZEN) or replace(any_reading, status=CompletionStatus.OK, scores={}, status_message="")
    others = {name: own for name, own in scores.items() if name != FROZEN}
    if not others:
        return frozen
    return replace(
        frozen,
        readings={name: ReadingScores(own.status, own.scores, own.status_message) for name, own in others.items()},
        follow_ups=tuple(
            _together({name: own.follow_ups[place] for name, own in scores.items()}) for place in range(len(frozen.follow_ups))
        ),
    )
