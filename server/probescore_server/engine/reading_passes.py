"""Divides a batch of rollouts among forward passes, one for each reading that must be computed, and puts their scores together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from probescore.types import FROZEN, CompletionScores, CompletionStatus, ReadingScores, Usage, score_keys
from probescore_server.engine.reading_set import ReadingSet
from probescore_server.engine.served_probes import ServedProbes
from probescore_server.rollouts import CheckedRollout, EngineInfo, PinnedReading, ResolvedOptions, RolloutResult


class Pass(NamedTuple):
    """Value object that says whose activations a forward pass reads.

    Attributes:
        id: of the version of a reading; empty = the frozen model's.
        brought: whether probes bring that reading's adapter, so that no request names it.
    """

    id: str = ""
    brought: bool = False


FROZEN_PASS = Pass()


@dataclass(frozen=True, eq=False)
class _Division:
    """What the rollouts of one request need.

    Attributes:
        probes: the keys ``name@version`` of the probes that each pass scores with; the pass of the frozen model comes first.
        of_reading: a dictionary, keyed by the name of each reading of the request, of the pass that each probe is scored in, in the
            request's order.
        is_plain: whether the frozen model's pass is all that is needed, with all probes of the request.
    """

    probes: Mapping[Pass, tuple[str, ...]]
    of_reading: Mapping[str, Mapping[str, Pass]]
    is_plain: bool

    @classmethod
    def of(cls, options: ResolvedOptions, probes: ServedProbes, readings: ReadingSet) -> _Division:
        plain = [key for key in options.probes if key not in probes.adapted]
        of_reading: dict[str, dict[str, Pass]] = {}
        for reading in options.readings or (PinnedReading(FROZEN),):
            if reading.id:  # a probe that brings an adapter is not read on anything else
                changed = readings.version(reading.id).changes(probes.taps_of(plain))
                of_reading[reading.name] = dict.fromkeys(plain, Pass(reading.id) if changed else FROZEN_PASS)
            else:
                of_reading[reading.name] = {key: own_pass(key, probes) for key in options.probes}
        scored: dict[Pass, set[str]] = {FROZEN_PASS: set()}
        for key, each in (entry for passes in of_reading.values() for entry in passes.items()):
            scored.setdefault(each, set()).add(key)
        if not any(scored.values()):  # an answer is due, if one without scores
            scored = {own_pass(key, probes): {key} for key in options.probes[:1]}
        by_pass = {each: tuple(key for key in options.probes if key in keys) for each, keys in scored.items() if keys}
        return cls(by_pass, of_reading, not options.readings and [*by_pass] == [FROZEN_PASS])


class ReadingPasses:
    """Forward passes that a batch of rollouts needs: the frozen model's first, one for each other version that is asked for, and one for
    each adapter that probes bring, with the probes that bring it.

    A version that changes nothing that the rollout's probes see is answered from the frozen model's pass. Probes that bring an adapter are
    read with it as part of the frozen reading, and with nothing else.

    Args:
        rollouts: the batch.
        probes: the probes that it is scored with.
        readings: the readings that are loaded.

    Attributes:
        rollouts: a dictionary, keyed by pass, the frozen model's first, of the indices of the rollouts that need it.
    """

    def __init__(self, rollouts: Sequence[CheckedRollout], probes: ServedProbes, readings: ReadingSet) -> None:
        self._all = rollouts
        self._info = probes.info
        self._divisions: list[_Division] = []
        needed: dict[Pass, list[int]] = {FROZEN_PASS: []}
        known: dict[ResolvedOptions, _Division] = {}
        for index, rollout in enumerate(rollouts):
            options = rollout.options
            if options not in known:
                known[options] = _Division.of(options, probes, readings)
            self._divisions.append(known[options])
            for each in known[options].probes:
                needed.setdefault(each, []).append(index)
        self.rollouts = {each: indices for each, indices in needed.items() if indices}

    def of(self, each: Pass) -> list[CheckedRollout]:
        """Returns the rollouts that need a pass, each with the probes that are scored in it."""
        options: dict[ResolvedOptions, ResolvedOptions] = {}
        found = []
        for index in self.rollouts[each]:
            rollout, keys = self._all[index], self._divisions[index].probes[each]
            if keys != rollout.options.probes:
                whole = rollout.options
                if whole not in options:
                    options[whole] = replace(whole, probes=keys, token_scores=whole.token_scores.intersection(keys))
                rollout = replace(rollout, options=options[whole])
            found.append(rollout)
        return found

    def together(self, results: Mapping[Pass, Sequence[RolloutResult | None]]) -> list[RolloutResult | None]:
        """Returns the result of each rollout of the batch.

        Args:
            results: a dictionary, keyed by pass, of the results of the rollouts that need it, in order.
        """
        if all(division.is_plain for division in self._divisions):
            return [*results[FROZEN_PASS]] if self._divisions else []
        by_rollout = {each: dict(zip(self.rollouts[each], found, strict=True)) for each, found in results.items()}
        return [
            _result(division, rollout.options, {each: by_rollout[each][index] for each in division.probes}, self._info)
            for index, (division, rollout) in enumerate(zip(self._divisions, self._all, strict=True))
        ]


def own_pass(key: str, probes: ServedProbes) -> Pass:
    """Returns the pass in which a probe is scored where no reading is named: the frozen model's, or that of the adapter that it brings."""
    model = probes.adapted.get(key)
    if model is None or not model.version.changes(probes.taps_of((key,))):
        return FROZEN_PASS
    return Pass(model.version.id, brought=True)


def _result(
    division: _Division, options: ResolvedOptions, results: Mapping[Pass, RolloutResult | None], info: EngineInfo
) -> RolloutResult | None:
    """Returns one rollout's result from those of its passes; ``None`` if one of them was cancelled."""
    found = {each: result for each, result in results.items() if result is not None}
    if len(found) < len(results):
        return None
    if division.is_plain:
        return found[FROZEN_PASS]
    usage = Usage.total(result.usage for result in found.values())
    refused_by = next((result.refused_by for result in found.values() if result.refused_by), "")
    names = _names(options.probes, options, info)
    by_pass = {each: _names(keys, options, info) for each, keys in division.probes.items()}
    scores = _together({each: result.scores for each, result in found.items()}, division, names, by_pass)
    return RolloutResult(scores, usage, refused_by)


def _names(keys: tuple[str, ...], options: ResolvedOptions, info: EngineInfo) -> dict[str, str]:
    """Returns the names of probes in an answer to a request for just these probes: they depend on which others there are."""
    return dict(zip(keys, score_keys(info.scored_probes(replace(options, probes=keys))), strict=True))


def _together(
    scores: Mapping[Pass, CompletionScores], division: _Division, names: Mapping[str, str], by_pass: Mapping[Pass, Mapping[str, str]]
) -> CompletionScores:
    """Returns one completion's scores: the frozen reading's as they are, those of the other readings apart.

    Args:
        scores: the completion's scores in each pass.
        division: what the request needs.
        names: the name of each probe in the answer.
        by_pass: the name of each probe in the scores of each pass.
    """
    any_pass = next(iter(scores.values()))
    answers = {}
    for reading, passes in division.of_reading.items():
        failed = next((scores[each] for each in passes.values() if scores[each].status is not CompletionStatus.OK), None)
        if failed is not None:
            answers[reading] = ReadingScores(failed.status, {}, failed.status_message)
        else:
            found = {names[key]: scores[each].scores[by_pass[each][key]] for key, each in passes.items()}
            answers[reading] = ReadingScores(CompletionStatus.OK, found)
    frozen = answers.pop(FROZEN, ReadingScores(CompletionStatus.OK, {}))
    return replace(
        any_pass,
        status=frozen.status,
        scores=frozen.scores,
        status_message=frozen.status_message,
        readings=answers,
        follow_ups=tuple(
            _together({each: own.follow_ups[place] for each, own in scores.items()}, division, names, by_pass)
            for place in range(len(any_pass.follow_ups))
        ),
    )
