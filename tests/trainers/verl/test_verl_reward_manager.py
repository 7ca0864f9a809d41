"""verl's ``load_reward_manager`` with ours, against a live server."""

from __future__ import annotations

import asyncio
import math
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import tiny_tokenizer
from plain_forward import THRESHOLD, TOLERANCE, Probed, random_rollouts
from ray import cloudpickle
from rollouts_of_verl import configuration, padded, streamed
from running_server import RunningServer
from verl.trainer.ppo.reward import load_reward_manager
from verl.utils import hf_tokenizer

from probescore import MismatchError, ProbescoreError
from probescore_adapters import SignalError
from probescore_adapters.verl import ProbeRewardManager, TokenRewards
from probescore_audit.record import read_record

Manager = Callable[..., ProbeRewardManager]

MONITOR = {"probe": "cheating", "mode": "monitor"}
PENALTY = {"probe": "cheating", "mode": "penalty", "weight": 2.0}


@pytest.fixture
def manager(probed: Probed, served: RunningServer, tmp_path: Path) -> Manager:
    def load(*signals: dict[str, Any], **settings: Any) -> ProbeRewardManager:
        config = configuration(tmp_path, **{"address": served.address, "signals": list(signals), **settings})
        return load_reward_manager(config, hf_tokenizer(str(probed.model)))

    return load


async def run_all(manager: ProbeRewardManager, rows: list[Any]) -> list[dict[str, Any]]:
    return await asyncio.gather(*(manager.run_single(row) for row in rows))


def means_of(results: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
    return np.array([result["reward_extra_info"]["probescore/cheating/mean"] for result in results])


def assert_equal_scores(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    assert np.abs(found - expected).max() <= TOLERANCE * expected.std()


async def test_streamed_rollouts_are_scored_exactly(manager: Manager, probed: Probed) -> None:
    rollouts = random_rollouts(8)
    results = await run_all(manager(MONITOR), [streamed(ids) for ids in rollouts])
    assert_equal_scores(means_of(results), np.array([scores.mean() for scores in probed.scores(rollouts)]))


async def test_padding_is_not_scored(manager: Manager, probed: Probed) -> None:
    rollouts = random_rollouts(8)
    batch = padded(rollouts)
    results = await run_all(manager(MONITOR), [batch[index : index + 1] for index in range(len(batch))])
    assert_equal_scores(means_of(results), np.array([scores.mean() for scores in probed.scores(rollouts)]))


async def test_the_last_of_an_agent_loops_outputs_is_scored(manager: Manager, probed: Probed) -> None:
    # given outputs of which the last has the shorter prompt, padded as verl pads them: apart, and the joined mask too
    first, last = ([1, *range(10, 20)], [30, 31, 2]), ([1, 40, 41], [50, 51, 52, 53, 2])
    outputs = padded([first, last])
    outputs.batch["prompts"][1] = outputs.batch["prompts"].new_tensor(last[0] + [0] * 8)
    outputs.batch["attention_mask"][1] = outputs.batch["attention_mask"].new_tensor([1] * 8 + [0] * 8)
    outputs.non_tensor_batch.update(prompt_len=np.array([11, 3]), response_len=np.array([3, 5]))
    result = await manager(MONITOR).run_single(outputs)
    assert means_of([result]) == pytest.approx(probed.scores([last])[0].mean(), abs=1e-5)


@pytest.mark.parametrize("place", ["batch", "agent loop"])
async def test_tool_output_is_not_scored(manager: Manager, probed: Probed, place: str) -> None:
    rollouts = random_rollouts(8)
    masks = [[0 if 1 <= index <= 2 else 1 for index in range(len(completion))] for _, completion in rollouts]
    batch = padded(rollouts, masks)
    rows = (
        [batch[index : index + 1] for index in range(8)]
        if place == "batch"
        else [streamed(ids, probescore_response_mask=mask) for ids, mask in zip(rollouts, masks, strict=True)]
    )
    results = await run_all(manager(MONITOR), rows)
    expected = [scores[np.array(mask) == 1].mean() for scores, mask in zip(probed.scores(rollouts), masks, strict=True)]
    assert_equal_scores(means_of(results), np.array(expected))


async def test_tools_without_a_mask_are_warned_of(manager: Manager) -> None:
    row = streamed(random_rollouts(1)[0])
    row.non_tensor_batch["__num_turns__"] = np.array([4])
    with pytest.warns(UserWarning, match="tool output counts"):
        await manager(MONITOR).run_single(row)


async def test_one_turn_without_a_mask_is_not_warned_of(manager: Manager) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        await manager(MONITOR).run_single(streamed(random_rollouts(1)[0]))


async def test_a_penalty_is_subtracted_from_the_tasks_reward(manager: Manager, probed: Probed) -> None:
    rollouts = random_rollouts(8)
    results = await run_all(manager(PENALTY), [streamed(ids) for ids in rollouts])
    flagged = np.array([scores.mean() >= THRESHOLD for scores in probed.scores(rollouts)])
    assert 0 < flagged.sum() < len(flagged)
    words = np.array([result["reward_extra_info"]["words"] for result in results])
    assert [result["reward_score"] for result in results] == (words - 2.0 * flagged).tolist()


async def test_an_async_task_reward_is_awaited(manager: Manager) -> None:
    async def compute_score(**_: Any) -> float:
        await asyncio.sleep(0)
        return 3.0

    found = manager(MONITOR)
    found = ProbeRewardManager(found.config, found.tokenizer, compute_score)
    assert (await found.run_single(streamed(random_rollouts(1)[0])))["reward_score"] == 3.0


async def test_a_dense_signal_gives_each_token_its_score(manager: Manager, probed: Probed) -> None:
    rollouts = random_rollouts(8)
    signal = {"probe": "cheating", "mode": "dense", "weight": -0.5}
    results = await run_all(manager(signal, rails={"clip": 1000.0}), [streamed(ids) for ids in rollouts])
    for result, scores, (_, completion) in zip(results, probed.scores(rollouts), rollouts, strict=True):
        reward = result["reward_score"]
        expected = -0.5 * scores + np.eye(len(completion))[-1] * result["reward_extra_info"]["words"]
        assert isinstance(reward, TokenRewards)
        assert_equal_scores(reward.tokens, expected)
        assert reward == pytest.approx(expected.sum(), rel=1e-4)


async def test_tool_output_has_no_dense_reward(manager: Manager) -> None:
    prompt, completion = random_rollouts(1)[0]
    mask = [1] + [0] * (len(completion) - 2) + [1]
    result = await manager({"probe": "cheating", "mode": "dense"}).run_single(streamed((prompt, completion), probescore_response_mask=mask))
    assert (result["reward_score"].tokens != 0).tolist() == [bool(one) for one in mask]


async def test_dense_rewards_are_assembled_into_rm_scores(manager: Manager, probed: Probed) -> None:
    rollouts = random_rollouts(5)
    batch = padded(rollouts)
    found = manager({"probe": "cheating", "mode": "dense"})
    results = await run_all(found, [batch[index : index + 1] for index in range(5)])
    rm_scores = ProbeRewardManager.assemble_rm_scores(batch, [result["reward_score"] for result in results])
    assert rm_scores.shape == batch.batch["responses"].shape
    for row, result in zip(rm_scores.numpy(), results, strict=True):
        tokens = result["reward_score"].tokens
        np.testing.assert_allclose(row[: len(tokens)], tokens, rtol=1e-6)
        assert not row[len(tokens) :].any()


async def test_rewards_of_rollouts_are_assembled_as_verl_does(manager: Manager) -> None:
    batch = padded(random_rollouts(5))
    found = manager(MONITOR)
    ours = found.assemble_rm_scores(batch, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert ours.equal(super(ProbeRewardManager, found).assemble_rm_scores(batch, [1.0, 2.0, 3.0, 4.0, 5.0]))


def test_rewards_of_tokens_survive_pickling() -> None:
    rewards = cloudpickle.loads(cloudpickle.dumps(TokenRewards(np.array([0.5, 1.0]))))
    assert rewards == 1.5
    assert rewards.tokens.tolist() == [0.5, 1.0]


async def test_the_keys_are_the_same_without_a_server(manager: Manager) -> None:
    row = streamed(random_rollouts(1)[0])
    scored = await manager(PENALTY).run_single(row)
    failed = await manager(PENALTY, address="127.0.0.1:1", on_failure=-2.0, timeout=1.0).run_single(row)
    assert list(failed["reward_extra_info"]) == list(scored["reward_extra_info"])
    assert failed["reward_extra_info"]["probescore/failures"] == 1.0
    assert math.isnan(failed["reward_extra_info"]["probescore/cheating/mean"])
    assert failed["reward_score"] == failed["reward_extra_info"]["words"] - 2.0


async def test_the_keys_are_the_same_for_an_unscorable_rollout(manager: Manager) -> None:
    prompt, completion = random_rollouts(1)[0]
    found = manager(PENALTY)
    scored, too_long = await run_all(found, [streamed((prompt, completion)), streamed((prompt, completion * 100))])
    assert list(too_long["reward_extra_info"]) == list(scored["reward_extra_info"])
    assert too_long["reward_extra_info"]["probescore/unscorable"] == 1.0
    assert too_long["reward_score"] == too_long["reward_extra_info"]["words"] - 2.0


async def test_without_a_server_a_call_raises_unless_told_otherwise(manager: Manager) -> None:
    with pytest.raises(ProbescoreError):
        await manager(PENALTY, address="127.0.0.1:1", timeout=1.0).run_single(streamed(random_rollouts(1)[0]))


async def test_without_settings_the_environment_counts(
    probed: Probed, served: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROBESCORE_ADDRESS", served.address)
    monkeypatch.setenv("PROBESCORE_SIGNALS", '{"probe": "cheating", "mode": "reward"}')
    found = load_reward_manager(configuration(tmp_path), hf_tokenizer(str(probed.model)))
    (ids,) = random_rollouts(1)
    result = await found.run_single(streamed(ids))
    assert result["reward_score"] - result["reward_extra_info"]["words"] == pytest.approx(probed.scores([ids])[0].mean(), abs=1e-5)


async def test_another_tokenizer_is_refused(manager: Manager, served: RunningServer, tmp_path: Path) -> None:
    config = configuration(tmp_path, address=served.address, signals=[MONITOR])
    found = load_reward_manager(config, tiny_tokenizer(vocab_size=50))
    with pytest.raises(MismatchError):
        await found.run_single(streamed(random_rollouts(1)[0]))


@pytest.mark.parametrize("mode", ["screen", "relative_gate"])
def test_what_needs_more_than_one_rollout_is_refused(manager: Manager, mode: str) -> None:
    with pytest.raises(SignalError, match=f"{mode} cannot be done here"):
        manager({"probe": "cheating", "mode": mode})


def test_a_setting_that_does_not_exist_is_refused(manager: Manager) -> None:
    with pytest.raises(TypeError, match="adress"):
        manager(MONITOR, adress="localhost:1")


def test_a_pickled_manager_scores(manager: Manager) -> None:
    row = streamed(random_rollouts(1)[0])
    found = manager(PENALTY)
    copy = cloudpickle.loads(cloudpickle.dumps(found))
    assert asyncio.run(copy.run_single(row))["reward_score"] == asyncio.run(found.run_single(row))["reward_score"]


def test_two_event_loops_share_a_manager(manager: Manager) -> None:
    found, rows = manager(PENALTY), [streamed(ids) for ids in random_rollouts(8)]
    alone = [result["reward_score"] for result in asyncio.run(run_all(found, rows))]
    rewards: dict[int, list[float]] = {}

    def train(index: int) -> None:
        rewards[index] = [result["reward_score"] for result in asyncio.run(run_all(found, rows))]

    threads = [threading.Thread(target=train, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rewards == {0: alone, 1: alone}


async def test_rollouts_are_recorded_with_verls_step(manager: Manager, probed: Probed, tmp_path: Path) -> None:
    """As verl's agent loops of version 1 say it; those before do not, and steps are then counted."""
    rollouts = random_rollouts(8)

    def stepped(ids: Any, step: int) -> Any:
        data = streamed(ids)
        data.non_tensor_batch["global_steps"] = np.array([step])
        return data

    one = manager(PENALTY, record={"directory": str(tmp_path / "a")})
    results = [await one.run_single(stepped(ids, index // 4)) for index, ids in enumerate(rollouts)]
    counted = manager(PENALTY, record={"directory": str(tmp_path / "b"), "rollouts_per_step": 4})
    for ids in rollouts:
        await counted.run_single(streamed(ids))
    for name in ("a", "b"):
        rows = read_record(tmp_path / name).rollouts
        assert [row.step for row in rows] == [0] * 4 + [1] * 4
        assert_equal_scores(
            np.array([row.scores["cheating@1"]["frozen"]["mean"] for row in rows]),
            np.array([scores.mean() for scores in probed.scores(rollouts)]),
        )
        assert [row.total_reward for row in rows] == pytest.approx([result["reward_score"] for result in results])
    with pytest.raises(ValueError, match="the record needs the training step"):
        await manager(PENALTY, record=str(tmp_path / "c")).run_single(streamed(rollouts[0]))
