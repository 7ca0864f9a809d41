"""Compares the rollouts of a request with those on which the thresholds of the requested probes were found.

A threshold holds for rollouts like those that it was found on. The probe's manifest (the description in its file) may say what those were
like: the lengths of prompts and completions, and the form of the prompts. Lengths and form can be seen from token ids alone, so that a
trainer's token ids and a text are compared alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from probescore.types import (
    CalibratedRollouts,
    Calibration,
    CalibrationCondition,
    OutputPer,
    OutsideCalibration,
    ProbeInfo,
    PromptShape,
    Scope,
    ScoredProbe,
    UnmetCondition,
)
from probescore_server.rollouts import CheckedRollout, EngineInfo, ResolvedOptions

CalibrationsOfProbes = tuple[tuple[Calibration, ...], ...]
"""For each probe of a request, its calibrations for the request's reductions whose conditions are known."""


def prompt_shape(
    prompt_ids: NDArray[np.int32],
    completion_ids: NDArray[np.int32],
    *,
    bos_token_id: int | None,
    generation_prompt_ids: Sequence[int],
) -> PromptShape:
    """Returns the form of a prompt as its token ids show it: empty, ended by the model's chat template, or other text, each with or without
    a BOS token at the start.

    Args:
        prompt_ids: the prompt, ``(P,)``.
        completion_ids: the completion, ``(T,)``; its first id is looked at if the prompt is empty.
        bos_token_id: id of the token that begins a sequence (BOS); ``None`` = there is none.
        generation_prompt_ids: the ids with which the model's chat template ends a prompt; empty = there is no template.
    """
    ending = len(generation_prompt_ids)
    if not len(prompt_ids):
        shape = PromptShape.EMPTY
    elif ending and prompt_ids[-ending:].tolist() == list(generation_prompt_ids):
        shape = PromptShape.TEMPLATE
    else:
        shape = PromptShape.TEXT
    first = prompt_ids if len(prompt_ids) else completion_ids
    starts_with_bos = bos_token_id is not None and len(first) > 0 and int(first[0]) == bos_token_id
    return PromptShape(f"bos {shape.value}") if starts_with_bos else shape


def calibrations_with_conditions(info: EngineInfo, options: ResolvedOptions) -> CalibrationsOfProbes:
    """Returns, for each probe of a request, those of its calibrations (thresholds) that are for the request's reductions and say on what
    rollouts the threshold was found.

    Of several calibrations for one reduction and label, only the first counts.
    """
    by_key = {probe.key: probe for probe in info.probes}
    return tuple(_applied(by_key[key], options) for key in options.probes)


def _applied(probe: ProbeInfo, options: ResolvedOptions) -> tuple[Calibration, ...]:
    pools = probe.output_per is OutputPer.ROLLOUT
    used = (None,) if pools else options.reductions or (probe.default_reduction,)
    first: dict[tuple[object, str], Calibration] = {}
    for calibration in probe.calibrations:
        reduction = None if pools else calibration.reduction or probe.default_reduction
        if reduction in used:
            first.setdefault((reduction, calibration.label), calibration)
    return tuple(calibration for calibration in first.values() if calibration.conditions is not None)


@dataclass(frozen=True, eq=False)
class OutsideRollouts:
    """Value object that says which of the ``n`` rollouts of a request are unlike those on which the thresholds of the requested probes were
    found.

    Attributes:
        starts: the place of the first rollout of each group (a prompt with its completions) among all rollouts of the request.
        compared: which rollouts are compared, ``(n,)`` bool: those with at least one scored token that counts.
        unmet: for each probe, a dictionary from each condition that some rollout does not meet (such as the length of the prompt) to
            whether each rollout fails it, ``(n,)`` bool.
        has_conditions: for each probe, whether a threshold of the probe says on what rollouts it was found.
    """

    starts: tuple[int, ...]
    compared: NDArray[np.bool_]
    unmet: tuple[Mapping[UnmetCondition, NDArray[np.bool_]], ...]
    has_conditions: tuple[bool, ...]

    @classmethod
    def of(
        cls, groups: Sequence[Sequence[CheckedRollout]], calibrations: CalibrationsOfProbes, scope: Scope, bos_token_id: int | None
    ) -> OutsideRollouts | None:
        """Compares the rollouts of a request, given by group, with those on which the thresholds of the requested probes were found;
        returns ``None`` if no probe says what those were like.
        """
        if not any(calibrations):
            return None
        rollouts = _RolloutFacts.of(groups, scope, bos_token_id)
        known: dict[CalibratedRollouts, dict[CalibrationCondition, NDArray[np.bool_]]] = {}
        unmet: list[dict[UnmetCondition, NDArray[np.bool_]]] = []
        for of_probe in calibrations:
            unmet.append({})
            for calibration in of_probe:
                conditions = calibration.conditions
                if conditions is None:
                    continue
                if conditions not in known:
                    known[conditions] = rollouts.outside(conditions)
                for condition, outside in known[conditions].items():
                    unmet[-1][UnmetCondition(condition.value, calibration.reduction, calibration.label)] = outside
        starts = tuple(accumulate((len(group) for group in groups), initial=0))
        return cls(starts, rollouts.selects_any, tuple(unmet), tuple(map(bool, calibrations)))

    def places(self, completions: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
        """Returns the place of each given completion among all rollouts of the request, ``(m,)``. A completion is given by the index of its
        group (a prompt with its completions) and its index within the group.
        """
        return np.array([self.starts[group] + completion for group, completion in completions], np.int64)

    def noted(self, probes: Sequence[ScoredProbe], places: NDArray[np.int64]) -> tuple[ScoredProbe, ...]:
        """Returns the probes of a response, each with those completions of the response that are unlike the rollouts on which the probe's
        thresholds were found.

        Args:
            probes: the probes of the request.
            places: the places, among the rollouts of the request, of the response's completions ``(m,)``, in the order of the response; -1
                for a completion without scores.
        """
        return tuple(_noted(probe, unmet, places) if unmet else probe for probe, unmet in zip(probes, self.unmet, strict=True))


def _noted(probe: ScoredProbe, unmet: Mapping[UnmetCondition, NDArray[np.bool_]], places: NDArray[np.int64]) -> ScoredProbe:
    scored = places >= 0
    found = ((condition, np.flatnonzero(outside[places] & scored)) for condition, outside in unmet.items())
    outside = tuple(OutsideCalibration(condition, tuple(where.tolist())) for condition, where in found if len(where))
    return replace(probe, outside_calibration=outside) if outside else probe


@dataclass(frozen=True, eq=False)
class _RolloutFacts:
    """Value object with the facts about the ``n`` rollouts of a request that are compared with those on which thresholds were found.

    Attributes:
        scope: the tokens that are scored: completion, prompt or all.
        prompt_tokens: number of tokens of each prompt, ``(n,)``.
        counted_tokens: number of tokens of each completion that count under its mask, ``(n,)``.
        selects_any: whether at least one token of the scope counts, for each rollout, ``(n,)`` bool.
        rollouts: the rollouts.
        bos_token_id: id of the token that begins a sequence (BOS); ``None`` = there is none.
    """

    scope: Scope
    prompt_tokens: NDArray[np.int64]
    counted_tokens: NDArray[np.int64]
    selects_any: NDArray[np.bool_]
    rollouts: Sequence[CheckedRollout]
    bos_token_id: int | None

    @classmethod
    def of(cls, groups: Sequence[Sequence[CheckedRollout]], scope: Scope, bos_token_id: int | None) -> _RolloutFacts:
        rollouts = [rollout for group in groups for rollout in group]
        prompts = np.array([len(rollout.prompt_ids) for rollout in rollouts], np.int64)
        counted = np.array([counted_tokens(rollout.completion.token_ids, rollout.completion.mask) for rollout in rollouts], np.int64)
        selected = {Scope.COMPLETION: counted, Scope.PROMPT: prompts, Scope.ALL: prompts + counted}[scope]
        return cls(scope, prompts, counted, selected > 0, rollouts, bos_token_id)

    def outside(self, conditions: CalibratedRollouts) -> dict[CalibrationCondition, NDArray[np.bool_]]:
        """Compares the rollouts of a request with the conditions that rollouts must meet for a threshold to hold, and returns a dictionary
        from each condition that some rollout does not meet to whether each rollout fails it, ``(n,)`` bool.
        """
        if self.scope is not Scope.COMPLETION:
            return {CalibrationCondition.SCOPE: self.selects_any} if self.selects_any.any() else {}
        found = {
            CalibrationCondition.COMPLETION_LENGTH: (self.counted_tokens < conditions.shortest_completion)
            | (self.counted_tokens > conditions.longest_completion),
            CalibrationCondition.PROMPT_LENGTH: (self.prompt_tokens < conditions.shortest_prompt)
            | (self.prompt_tokens > conditions.longest_prompt),
        }
        if conditions.prompt_shapes:
            found[CalibrationCondition.PROMPT_SHAPE] = ~np.array(
                [shape in conditions.prompt_shapes for shape in self._shapes(conditions.generation_prompt_ids)], np.bool_
            )
        return {condition: unlike for condition, outside in found.items() if (unlike := outside & self.selects_any).any()}

    def _shapes(self, generation_prompt_ids: Sequence[int]) -> list[str]:
        shapes: dict[int, str] = {}  # a group's rollouts share one array
        found = []
        for rollout in self.rollouts:
            prompt = id(rollout.prompt_ids)
            if prompt not in shapes or not len(rollout.prompt_ids):
                shapes[prompt] = prompt_shape(
                    rollout.prompt_ids,
                    rollout.completion.token_ids,
                    bos_token_id=self.bos_token_id,
                    generation_prompt_ids=generation_prompt_ids,
                ).value
            found.append(shapes[prompt])
        return found


def counted_tokens(token_ids: NDArray[np.int32], mask: NDArray[np.bool_] | None) -> int:
    """Returns how many tokens of a completion count, given the completion's mask of the tokens that count, ``(T,)`` bool; ``None`` = all
    count.
    """
    return len(token_ids) if mask is None else int(np.count_nonzero(mask))
