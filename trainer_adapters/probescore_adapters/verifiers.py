"""Connects the library verifiers, 0.4 and later, with probes; the trainer prime-rl takes its rewards from verifiers. The module provides a
reward function and a metric function of a ``Task``.

verifiers scores one trace (record of an episode) at a time, and passes exact token ids and a mask of the tokens that the policy sampled.
``probe_reward`` and ``probe_metric`` need no code: set ``fn = "probescore_adapters.verifiers:probe_reward"``, and configure the scorer by
environment variables.
"""

from __future__ import annotations

import functools
from typing import Any

from verifiers.v1.trace import Trace

from probescore_adapters.arrays import as_ids, as_mask
from probescore_adapters.environment import scorer_from_environment
from probescore_adapters.outcome import Outcome
from probescore_adapters.rollouts import Rollout
from probescore_adapters.scorer import ProbeScorer
from probescore_adapters.signals import Mode


class TraceProbes:
    """Offers the signals (rules from probe scores to rewards) of a scorer as functions that verifiers takes as a reward or a metric, by
    name or in a ``Task``.

    ``reward`` records the metrics too, so that only one of ``reward`` and ``metric`` is needed. verifiers turns an error into a
    ``TaskError`` and drops the trace (record of an episode).

    Args:
        scorer: the scorer; its signals must have the modes ``reward``, ``penalty`` or ``monitor``.

    Raises:
        SignalError: a signal has another mode; verifiers passes neither the task's reward nor other traces to a reward function, and
            assigns rewards to traces and not to tokens.
    """

    def __init__(self, scorer: ProbeScorer) -> None:
        scorer.refuse_modes(
            Mode.SCREEN,
            Mode.GATE,
            Mode.RELATIVE_GATE,
            Mode.DENSE,
            because="verifiers has one trace scored at a time, without the task's reward, as a whole",
        )
        self.scorer = scorer

    async def reward(self, trace: Trace[Any, Any, Any]) -> float:
        """Returns the number that the signals (rules from probe scores to rewards) add to the reward of a trace (record of an episode); for
        a trace with several branches, the lowest number.

        Raises:
            ProbescoreError, SignalError, Unscorable: the errors of ``ProbeScorer.score``.
            ValueError: the trace has no token ids.
        """
        outcome = await self._outcome(trace)
        trace.record_metrics(outcome.rollout_metrics)
        return float(outcome.rewards.min())

    async def metric(self, trace: Trace[Any, Any, Any]) -> dict[str, float]:
        """Returns the metrics of a trace (record of an episode), as a dictionary that always has the same keys; raises the same errors as
        the method ``reward``.
        """
        return (await self._outcome(trace)).rollout_metrics

    async def _outcome(self, trace: Trace[Any, Any, Any]) -> Outcome:
        return await self.scorer.score_async(rollouts_of(trace))


async def probe_reward(trace: Trace[Any, Any, Any]) -> float:
    """Returns the number that the signals (rules from probe scores to rewards), configured by environment variables, add to the reward of a
    trace (record of an episode): ``TraceProbes.reward`` of ``scorer_from_environment``.
    """
    return await _from_environment().reward(trace)


async def probe_metric(trace: Trace[Any, Any, Any]) -> dict[str, float]:
    """Returns the metrics of a trace (record of an episode) for the signals (rules from probe scores to rewards) configured by environment
    variables: ``TraceProbes.metric`` of ``scorer_from_environment``.
    """
    return await _from_environment().metric(trace)


@functools.cache
def _from_environment() -> TraceProbes:
    return TraceProbes(scorer_from_environment())


def rollouts_of(trace: Trace[Any, Any, Any]) -> list[Rollout]:
    """Returns one rollout for each branch, if it is trained on, of a trace (record of an episode); the completion begins with the first
    token that the policy sampled.

    Raises:
        ValueError: the trace has no token ids, because the server of the policy model returned none.
    """
    rollouts = []
    for branch in trace.branches:
        ids = as_ids(branch.token_ids, "token_ids")
        sampled = as_mask(branch.sampled_mask, len(ids), "sampled_mask")
        if branch.trainable and sampled.any():
            start = int(sampled.argmax())
            rollouts.append(Rollout(ids[:start], ids[start:], sampled[start:]))
    if not rollouts:
        raise ValueError("the trace has no token ids: probes need a client that keeps them, such as verifiers' renderer client")
    return rollouts
