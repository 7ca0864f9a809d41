"""A legacy rubric of verifiers with our function, and ``ProbeRubric``, against a live server."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import verifiers as vf
from plain_forward import THRESHOLD, TOLERANCE, Ids, Probed, random_rollouts
from running_server import RunningServer

from probescore import ProbescoreError
from probescore_adapters import Policy, ProbeScorer, ProbeSignal, SignalError
from probescore_adapters.verifiers_legacy import ProbeRubric, reward_function

EXAMPLE = str(Path(__file__).parents[3] / "examples/trainers/verifiers_rubric.py")

REWARD = ProbeSignal("cheating", mode="reward")
NOWHERE = "127.0.0.1:1"


async def two(completion: Any) -> float:
    return 2.0


def turn(prompt: list[int], completion: list[int]) -> dict[str, Any]:
    tokens = {
        "prompt_ids": prompt,
        "prompt_mask": [0] * len(prompt),
        "completion_ids": completion,
        "completion_mask": [1] * len(completion),
        "completion_logprobs": [0.0] * len(completion),
    }
    return {"tokens": tokens, "reward": None, "advantage": None}


def state_of(*turns: Ids) -> vf.State:
    trajectory = [turn(*ids) for ids in turns]
    return vf.State(prompt="?", completion="!", answer="", info={}, trajectory=trajectory, reward=None, metrics=None)


def expected_of(probed: Probed, rollouts: list[Ids]) -> np.ndarray[Any, Any]:
    return np.array([scores.mean() for scores in probed.scores(rollouts)])


async def test_a_function_of_a_rubric_equals_the_plain_forward(probed: Probed, served: RunningServer) -> None:
    rollouts = random_rollouts(8)
    function = reward_function(ProbeScorer(REWARD, served.address, policy=Policy(on_failure=-1.0)))
    rubric = vf.Rubric(funcs=[two, function], weights=[1.0, 0.5])
    states = [state_of(ids) for ids in rollouts]
    for state in states:
        await rubric.score_rollout(state)
    found, expected = np.array([state["metrics"]["probescore"] for state in states]), expected_of(probed, rollouts)
    assert np.abs(found - expected).max() <= TOLERANCE * expected.std()
    assert states[0]["reward"] == 2.0 + 0.5 * found[0]


async def test_a_probe_rubric_equals_the_plain_forward(probed: Probed, served: RunningServer) -> None:
    rollouts = random_rollouts(8)
    states = [state_of(ids) for ids in rollouts]
    await ProbeRubric(ProbeScorer(REWARD, served.address), funcs=[two]).score_group(states)
    found, expected = np.array([state["reward"] - 2.0 for state in states]), expected_of(probed, rollouts)
    assert np.abs(found - expected).max() <= TOLERANCE * expected.std()
    assert states[0]["advantage"] == pytest.approx(found[0] - found.mean())


async def test_a_probe_rubric_has_the_metrics_of_each_rollout(probed: Probed, served: RunningServer) -> None:
    (ids,) = random_rollouts(1)
    state = state_of(ids)
    await ProbeRubric(ProbeScorer(ProbeSignal("cheating"), served.address)).score_rollout(state)
    (mean,) = expected_of(probed, [ids])
    assert state["metrics"]["probescore/cheating/mean"] == pytest.approx(mean, abs=1e-5)
    assert state["metrics"]["probescore/cheating/flagged"] == float(mean >= THRESHOLD)


async def test_turns_that_continue_each_other_are_one_rollout(probed: Probed, served: RunningServer) -> None:
    # given a turn, what a tool says to it, and another turn
    state = state_of(([1, 20, 21], [30, 31]), ([1, 20, 21, 30, 31, 40, 41], [50, 51, 2]))
    await ProbeRubric(ProbeScorer(REWARD, served.address)).score_rollout(state)
    (scores,) = probed.scores([([1, 20, 21], [30, 31, 40, 41, 50, 51, 2])])
    assert state["reward"] == pytest.approx(scores[[0, 1, 4, 5, 6]].mean(), abs=1e-5)


async def test_of_turns_with_a_rewritten_history_the_least_counts(probed: Probed, served: RunningServer) -> None:
    turns = [([1, 20, 21], [30, 31]), ([1, 60, 61, 62], [50, 51, 2])]
    state = state_of(*turns)
    await ProbeRubric(ProbeScorer(REWARD, served.address)).score_rollout(state)
    assert state["reward"] == pytest.approx(expected_of(probed, turns).min(), abs=1e-5)


async def test_a_probe_rubric_raises_where_verifiers_would_score_0() -> None:
    state = state_of(*random_rollouts(1))
    with pytest.raises(ProbescoreError):
        await ProbeRubric(ProbeScorer(REWARD, NOWHERE, policy=Policy(timeout=0.5)), funcs=[two]).score_rollout(state)
    assert state["reward"] is None


async def test_a_named_number_stands_in_without_a_server() -> None:
    state = state_of(*random_rollouts(1))
    await ProbeRubric(ProbeScorer(REWARD, NOWHERE, policy=Policy(on_failure=-3.0, timeout=0.5)), funcs=[two]).score_rollout(state)
    assert state["reward"] == -1.0
    assert state["metrics"]["probescore/failures"] == 1.0
    assert math.isnan(state["metrics"]["probescore/cheating/mean"])


async def test_a_function_gives_the_named_number_whatever_fails(served: RunningServer) -> None:
    # given a probe that is not loaded, which is no failure of transport
    function = reward_function(ProbeScorer(ProbeSignal("other"), served.address, policy=Policy(on_failure=-3.0)))
    state = state_of(*random_rollouts(1))
    await vf.Rubric(funcs=[function]).score_rollout(state)
    assert state["reward"] == -3.0


def test_a_function_without_a_named_number_is_refused() -> None:
    with pytest.raises(ValueError, match="ProbeRubric"):
        reward_function(ProbeScorer(REWARD))


async def test_a_turn_without_token_ids_is_an_error(served: RunningServer) -> None:
    state = state_of(*random_rollouts(1))
    state["trajectory"][0]["tokens"] = None
    with pytest.raises(ValueError, match="no token ids"):
        await ProbeRubric(ProbeScorer(REWARD, served.address)).score_rollout(state)


@pytest.mark.parametrize("mode", ["screen", "gate", "relative_gate", "dense"])
def test_what_a_rubric_cannot_do_is_refused(mode: str) -> None:
    with pytest.raises(SignalError, match="rubric"):
        ProbeRubric(ProbeScorer(ProbeSignal("cheating", mode=mode)))


async def test_the_examples_environment_scores(probed: Probed, served: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBESCORE_ADDRESS", served.address)
    monkeypatch.setenv("PROBESCORE_SIGNALS", '{"probe": "cheating", "mode": "reward"}')
    environment = runpy.run_path(EXAMPLE)["load_environment"]()
    (ids,) = random_rollouts(1)
    state = state_of(ids)
    state["completion"], state["answer"] = [{"role": "assistant", "content": "it is 5"}], "5"
    await environment.rubric.score_rollout(state)
    assert state["reward"] == pytest.approx(1.0 + expected_of(probed, [ids])[0], abs=1e-5)
