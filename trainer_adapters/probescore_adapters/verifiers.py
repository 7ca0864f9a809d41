"""Adapts verifiers 0.4 and later, from which prime-rl takes its rewards: a reward and a metric of a ``Task``.

verifiers scores one trace at a time, and gives exact ids and which of them the policy sampled. ``probe_reward`` and ``probe_metric`` need
no code: ``fn = "probescore_adapters.verifiers:probe_reward"``, and the environment says the rest.
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
    """Offers signals as functions that verifiers takes as a reward or a metric, by name or in a ``Task``.

    ``reward`` records the metrics too: take one of the two. An error is verifiers' ``TaskError``, and the trace is dropped.

    Args:
        scorer: its modes are ``reward``, ``penalty`` or ``monitor``.

    Raises:
        SignalError: a signal has another mode: verifiers gives a reward function neither the task's reward nor other traces, and assigns
            rewards to traces, not tokens.
    """

    def __init__(self, scorer: ProbeScorer) -> None:
        scorer.refuse_modes(
            Mode.SCREEN, Mode.GATE, Mode.DENSE, because="verifiers has one trace scored at a time, without the task's reward, as a whole"
        )
        self.scorer = scorer

    async def reward(self, trace: Trace[Any, Any, Any]) -> float:
        """Returns what the signals add to a trace: of several branches the least.

        Raises:
            ProbescoreError, SignalError, Unscorable: as ``ProbeScorer.score``.
            ValueError: the trace has no token ids.
        """
        outcome = await self._outcome(trace)
        trace.record_metrics(outcome.rollout_metrics)
        return float(outcome.rewards.min())

    async def metric(self, trace: Trace[Any, Any, Any]) -> dict[str, float]:
        """Returns what there is to log of a trace, always under the same names; raises what ``reward`` raises."""
        return (await self._outcome(trace)).rollout_metrics

    async def _outcome(self, trace: Trace[Any, Any, Any]) -> Outcome:
        return await self.scorer.score_async(rollouts_of(trace))


async def probe_reward(trace: Trace[Any, Any, Any]) -> float:
    """Returns what the signals of the environment add to a trace: ``TraceProbes.reward`` of ``scorer_from_environment``."""
    return await _from_environment().reward(trace)


async def probe_metric(trace: Trace[Any, Any, Any]) -> dict[str, float]:
    """Returns what there is to log of a trace: ``TraceProbes.metric`` of ``scorer_from_environment``."""
    return await _from_environment().metric(trace)


@functools.cache
def _from_environment() -> TraceProbes:
    return TraceProbes(scorer_from_environment())


def rollouts_of(trace: Trace[Any, Any, Any]) -> list[Rollout]:
    """Returns a rollout for each branch that is trained on; its completion begins with the first token that the policy sampled.

    Raises:
        ValueError: there is none, because the model's server gave no token ids.
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
