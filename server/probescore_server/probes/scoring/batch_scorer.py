"""Scores all completions of one batch: runs every requested probe, and collects the scores of each completion."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from probescore.reductions import Reduction
from probescore.types import CompletionScores, CompletionStatus, ProbeScores, Tap, score_keys
from probescore_server.activity import ACTIVITY
from probescore_server.backbone.base import Activations
from probescore_server.backbone.forest import Forest, Placement
from probescore_server.probes.loading.loader import LoadedProbe, StackMember
from probescore_server.probes.loading.onnx_session import ProbeSession, session_device
from probescore_server.probes.scoring.cancellation import ComputationCancelled, GraphCanceller, WantedRollouts
from probescore_server.probes.scoring.onnx_scores import SessionScores
from probescore_server.probes.scoring.selections import ProbeInputs, ScoreTarget, SegmentRows
from probescore_server.probes.scoring.stacked_scores import StackedProbe, StackedScores
from probescore_server.rollouts import CheckedRollout, EngineInfo, ResolvedOptions

_Answers = dict[Placement, dict[str, ProbeScores | str]]
"""Holds the results of a batch, keyed by a completion's place in the batch, then by the probe's ``name@version``.

A result is the probe's scores, or the reason for which there are none.
"""


@dataclass(frozen=True, eq=False)
class _AlikeCompletions:
    """Group of completions whose requests name the same probes and reductions.

    Attributes:
        reductions: the reductions of each probe, a dictionary keyed by ``name@version``.
        names: the name of each probe in the response, a dictionary keyed by ``name@version``, in the request's order.
        asked: the completions, and their follow-ups (token ids appended to a finished completion and scored as a fork of the completion).
    """

    reductions: Mapping[str, tuple[Reduction, ...]]
    names: Mapping[str, str]
    asked: list[ScoreTarget]


class BatchScorer:
    """Scorer of the completions of one batch, which computes all scores from the language model's activations.

    Args:
        info: description of the loaded model and probes.
        probes: the loaded probes, a dictionary keyed by ``name@version``.
        special_ids: ids of BOS, EOS and UNK, int32.
        rollouts: the rollouts of the batch.
        forest: the batch's token segments, runs of tokens arranged in trees so that shared prefixes are computed once, with each rollout's
            place among the segments.
        activations: activations of the segments at every tap (a point in the language model) of the requested probes.
        wanted: record of the rollouts for which a client still waits.

    Attributes:
        refused_by: dictionary keyed by a rollout's index in the batch, for rollouts that could not be scored: the ``name@version`` of the
            probe that could not score the rollout or one of its follow-ups (token ids appended to a completion).
    """

    def __init__(
        self,
        info: EngineInfo,
        probes: Mapping[str, LoadedProbe],
        special_ids: NDArray[np.int32],
        rollouts: Sequence[CheckedRollout],
        forest: Forest,
        activations: Activations,
        wanted: WantedRollouts,
    ) -> None:
        self._wanted = wanted
        self.refused_by: dict[int, str] = {}
        self._info = info
        self._probes = probes
        self._rollouts = rollouts
        self._forest = forest
        self._rows = SegmentRows(forest, dict(activations.starts))
        self._probe_inputs = ProbeInputs(forest, special_ids)
        self._activations, self._finite = _without_non_finite(activations.rows)

    def score(self, indices: Collection[int]) -> dict[int, CompletionScores]:
        """Computes the scores of some rollouts of the batch.

        The rollouts are given by their indices in the batch, which are also the keys of the result. The activations of all token segments
        of these rollouts must have been computed. Rollouts for which no client waits any more are left out.
        """
        requests: dict[tuple[object, ...], _AlikeCompletions] = {}
        roots = {}
        for index in indices:
            options = self._rollouts[index].options
            request = requests.get((options.probes, options.reductions))
            if request is None:
                request = requests[options.probes, options.reductions] = self._request(options)
            roots[index] = request
            request.asked.extend(_asked(self._forest.placements[index], options, index, is_follow_up=False))
        answers: _Answers = defaultdict(dict)
        self._run_sessions([*requests.values()], answers)
        ACTIVITY.begin("reductions", sum(rollout.tokens for rollout in self._rollouts))
        self._run_stacks([*requests.values()], answers)
        scores = {}
        for index, request in roots.items():
            if index in self._wanted.cancelled:
                continue
            placement = self._forest.placements[index]
            scores[index] = _completion(placement, self._rollouts[index], request.names, answers, is_follow_up=False)
            if refusing := _refusing(placement, request.names, answers):
                self.refused_by[index] = refusing
        return scores

    def _request(self, options: ResolvedOptions) -> _AlikeCompletions:
        applied = self._info.scored_probes(options)
        reductions = {key: probe.reductions for key, probe in zip(options.probes, applied, strict=True)}
        return _AlikeCompletions(reductions, dict(zip(options.probes, score_keys(applied), strict=True)), [])

    def _run_sessions(self, requests: Sequence[_AlikeCompletions], answers: _Answers) -> None:
        sessions = {key: run for request in requests for key in request.names if isinstance(run := self._probes[key].runs, ProbeSession)}
        taps = {tap for key in sessions for tap in self._probes[key].manifest.taps}
        activations = {tap: self._activations[tap].to(session_device(self._activations[tap].device)) for tap in taps}
        if not sessions:
            return
        with GraphCanceller(self._wanted) as watch:
            for key, session in sessions.items():
                rows = self._forest, self._probe_inputs, self._rows
                scores = SessionScores(self._probes[key], session, *rows, activations, self._finite, self._wanted, watch)
                asking = [request for request in requests if key in request.names]
                scores.run([each for request in asking for each in request.asked])
                for request in asking:
                    for each in request.asked:
                        with suppress(ComputationCancelled):
                            answers[each.placement][key] = scores.of(each, request.reductions[key])

    def _run_stacks(self, requests: Sequence[_AlikeCompletions], answers: _Answers) -> None:
        scores = StackedScores(self._probe_inputs, self._rows, self._activations, self._finite, self._wanted)
        for request in requests:
            stacked = [
                StackedProbe(self._probes[key], run, reductions)
                for key, reductions in request.reductions.items()
                if isinstance(run := self._probes[key].runs, StackMember)
            ]
            for each, key, answer in scores.of(request.asked, stacked):
                answers[each.placement][key] = answer


def _asked(placement: Placement, options: ResolvedOptions, rollout: int, *, is_follow_up: bool) -> Iterator[ScoreTarget]:
    yield ScoreTarget(placement, options, is_follow_up, rollout)
    for follow_up in placement.follow_ups:
        yield from _asked(follow_up, options, rollout, is_follow_up=True)


def _completion(
    placement: Placement, rollout: CheckedRollout, names: Mapping[str, str], answers: _Answers, *, is_follow_up: bool
) -> CompletionScores:
    own = answers[placement]
    scores: dict[str, ProbeScores] = {}
    problem = ""
    for key, name in names.items():
        answer = own[key]
        if isinstance(answer, str):
            problem = answer
            break
        scores[name] = answer
    continuation, options = placement.continuation, rollout.options
    return CompletionScores(
        id=continuation.id,
        status=CompletionStatus.NON_FINITE if problem else CompletionStatus.OK,
        scores={} if problem else scores,
        status_message=problem,
        prompt_ids=rollout.prompt_ids if options.return_token_ids and not is_follow_up else None,
        completion_ids=continuation.token_ids if options.return_token_ids else None,
        inexact_ids=continuation.inexact_ids,
        follow_ups=tuple(_completion(follow_up, rollout, names, answers, is_follow_up=True) for follow_up in placement.follow_ups),
    )


def _refusing(placement: Placement, keys: Iterable[str], answers: _Answers) -> str:
    """Returns the name of the first probe that cannot score a completion or one of its follow-ups; empty if every probe can.

    A follow-up is a list of token ids appended to a finished completion.
    """
    own = next((key for key in keys if isinstance(answers[placement][key], str)), "")
    return own or next(filter(None, (_refusing(follow_up, keys, answers) for follow_up in placement.follow_ups)), "")


def _without_non_finite(activations: Mapping[Tap, torch.Tensor]) -> tuple[dict[Tap, torch.Tensor], dict[Tap, NDArray[np.bool_]]]:
    """Replaces every row of activations that has NaN or an infinity with zeros.

    Otherwise a probe's graph could carry such numbers to other rows. Returns two dictionaries keyed by tap: the cleaned activations, and
    ``(N,)`` bool, which is true for the rows that were finite.
    """
    cleaned, finite = {}, {}
    for tap, rows in activations.items():
        good = torch.isfinite(rows).all(dim=1)
        finite[tap] = good.cpu().numpy()
        cleaned[tap] = rows if finite[tap].all() else torch.where(good[:, None], rows, torch.zeros_like(rows))
    return cleaned, finite
