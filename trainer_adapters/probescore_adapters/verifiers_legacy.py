"""Connects the library verifiers, before 0.4, with probes: provides ``ProbeRubric``, and a reward function for a user's own rubric.

A rubric of verifiers gives the score 0.0 if one of its reward functions raises an error, but 0.0 would mean "did not cheat".
``ProbeRubric`` raises the error instead; a reward function cannot do so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import verifiers as vf

from probescore_adapters.outcome import Outcome
from probescore_adapters.rollouts import Rollout
from probescore_adapters.scorer import ProbeScorer
from probescore_adapters.signals import Mode

# the standard library's: a trainer's process has its own way of showing logs
logger = logging.getLogger("probescore_adapters")

STATE_KEY = "probescore"
"""Key in a rollout's state dictionary under which the number that the signals (rules from probe scores to rewards) add to the reward is
stored.
"""

State = dict[str, Any]


class ProbeRubric(vf.Rubric):
    """Rubric of the library verifiers with one additional reward function, ``probescore``, which turns probe scores into a reward, and with
    its metrics.

    Args:
        scorer: the scorer; its signals (rules from probe scores to rewards) must have the modes ``reward``, ``penalty`` or ``monitor``.
        funcs: the task's reward functions.
        weights: weights of the task's reward functions; 1 by default.
        parser: parser that is passed to ``vf.Rubric``.

    Raises:
        SignalError: a signal has another mode.
    """

    def __init__(
        self,
        scorer: ProbeScorer,
        funcs: Sequence[Callable[..., Any]] = (),
        weights: Sequence[float] = (),
        parser: vf.Parser | None = None,
    ) -> None:
        super().__init__(funcs=list(funcs), weights=list(weights), parser=parser)
        _refuse_impossible_modes(scorer)
        self.scorer = scorer
        self.add_reward_func(_read)

    async def score_rollout(self, state: State) -> None:
        """Scores one rollout with probes and the task's reward functions, and stores the rewards in its state; raises the errors of
        ``ProbeScorer.score``, and ``ValueError`` if the state has no token ids.
        """
        outcome = await self._score(state)
        await super().score_rollout(state)
        state["metrics"].update(outcome.rollout_metrics)

    async def score_group(self, states: list[State]) -> None:
        """Scores the rollouts of one prompt with probes and the task's reward functions, and stores the rewards in their states; raises the
        same errors as ``score_rollout``.
        """
        outcomes = await asyncio.gather(*map(self._score, states))
        await super().score_group(states)
        for state, outcome in zip(states, outcomes, strict=True):
            state["metrics"].update(outcome.rollout_metrics)

    async def _score(self, state: State) -> Outcome:
        outcome = await self.scorer.score_async(rollouts_of(state))
        state[STATE_KEY] = _lowest_reward(outcome)
        return outcome


async def _read(state: State) -> float:
    found: float = state[STATE_KEY]
    return found


_read.__name__ = STATE_KEY


def reward_function(scorer: ProbeScorer) -> Callable[[State], Coroutine[Any, Any, float]]:
    """Returns a reward function for ``vf.Rubric(funcs=[…])``, which is called ``probescore`` in the rubric's metrics.

    Args:
        scorer: the scorer; its signals (rules from probe scores to rewards) must have the modes ``reward``, ``penalty`` or ``monitor``. Its
            policy's ``on_failure`` must be a number, which is returned instead of the reward after any failure, since the function cannot
            raise errors. Each failure is logged as an error.

    Raises:
        SignalError: a signal has another mode.
        ValueError: ``on_failure`` is not a number.
    """
    _refuse_impossible_modes(scorer)
    on_failure = scorer.policy.on_failure
    if isinstance(on_failure, str):
        raise ValueError(
            f"on_failure: a rubric scores 0.0 where a function raises: name a number instead of {on_failure!r}, or use ProbeRubric"
        )

    async def probescore(state: State) -> float:
        try:
            return _lowest_reward(await scorer.score_async(rollouts_of(state)))
        except Exception as error:
            logger.error("no scores: a rollout gets %g instead: %s", on_failure, error)
            return float(on_failure)

    return probescore


def rollouts_of(state: State) -> list[Rollout]:
    """Joins the turns in a state (record of an episode) of the library verifiers into rollouts: a turn whose prompt continues the tokens
    before it belongs to the same rollout, and any other turn begins another rollout.

    Raises:
        ValueError: the state has no turn, or a turn without token ids.
    """
    rollouts: list[tuple[list[int], list[int], list[int]]] = []
    for step in state["trajectory"]:
        tokens = step["tokens"]
        if tokens is None:
            raise ValueError("a turn has no token ids: probes need a client that keeps them")
        prompt = list(tokens["prompt_ids"])
        before = rollouts[-1][0] + rollouts[-1][1] if rollouts else None
        if before is None or prompt[: len(before)] != before:
            before = prompt
            rollouts.append((prompt, [], []))
        between = prompt[len(before) :]
        rollouts[-1][1].extend([*between, *tokens["completion_ids"]])
        rollouts[-1][2].extend([*[0] * len(between), *tokens["completion_mask"]])
    if not rollouts:
        raise ValueError("the state has no turn")
    return [Rollout(*rollout) for rollout in rollouts]


def _refuse_impossible_modes(scorer: ProbeScorer) -> None:
    because = "a rubric's function gives a rollout a number, without the task's reward"
    scorer.refuse_modes(Mode.SCREEN, Mode.GATE, Mode.RELATIVE_GATE, Mode.DENSE, because=because)


def _lowest_reward(outcome: Outcome) -> float:
    return float(outcome.rewards.min())
