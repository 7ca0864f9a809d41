"""Adapts verifiers before 0.4: ``ProbeRubric``, or a function for a rubric of one's own.

A rubric scores 0.0 where a function of it raises, and 0.0 would mean "did not cheat". ``ProbeRubric`` raises instead; a function cannot.
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
"""Is the key under which a state has what the signals add to its reward."""

State = dict[str, Any]


class ProbeRubric(vf.Rubric):
    """Is a rubric with one more reward function, ``probescore``, and the metrics of its signals.

    Args:
        scorer: its modes are ``reward``, ``penalty`` or ``monitor``.
        funcs: the task's reward functions.
        weights: of these; 1 by default.
        parser: as for ``vf.Rubric``.

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
        """Scores one rollout; raises what ``ProbeScorer.score`` raises, and ``ValueError`` if the state has no token ids."""
        outcome = await self._score(state)
        await super().score_rollout(state)
        state["metrics"].update(outcome.rollout_metrics)

    async def score_group(self, states: list[State]) -> None:
        """Scores the rollouts of one prompt; raises what ``score_rollout`` raises."""
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
    """Returns a function for ``vf.Rubric(funcs=[…])``, called ``probescore`` in its metrics.

    Args:
        scorer: its modes are ``reward``, ``penalty`` or ``monitor``. Its policy's ``on_failure`` is a number, which stands in for scores
            whatever fails, since nothing can be raised; each time is logged as an error.

    Raises:
        SignalError: a signal has another mode.
        ValueError: ``on_failure`` is no number.
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
    """Returns the turns of a state as one rollout, as long as each prompt continues what came before; another begins where one does not.

    Raises:
        ValueError: there is no turn, or one without token ids.
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
    scorer.refuse_modes(Mode.SCREEN, Mode.GATE, Mode.DENSE, because=because)


def _lowest_reward(outcome: Outcome) -> float:
    return float(outcome.rewards.min())
