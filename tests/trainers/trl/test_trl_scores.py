"""20 steps of real training: what reaches the trainer is what a plain Hugging Face forward says of the ids that were sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sorting_policy import TOLERANCE, SortingPolicy
from training import BATCH, GENERATIONS, PlainGRPO, PlainRLOO, ProbedGRPO, ProbedRLOO, digits_in_order, new_trainer

from probescore_adapters import GuardRails, ProbeScorer, ProbeSignal, SignalError
from probescore_adapters.trl import ProbeReward

STEPS = 20
REWARD = ProbeSignal("cheating", mode="reward", weight=-0.5)


def assert_equal(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE * expected.std()


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("kind", [PlainGRPO, PlainRLOO])
def test_a_reward_function_gives_what_a_plain_forward_gives(
    kind: type, chat: bool, policy: SortingPolicy, address: str, tmp_path: Path
) -> None:
    trainer = new_trainer(kind, policy, tmp_path, [digits_in_order, ProbeReward(ProbeScorer(REWARD, address))], chat=chat)
    trainer.train()
    assert len(trainer.generated) == STEPS * BATCH
    assert_equal(trainer.column, -0.5 * policy.scores(trainer.generated))


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("kind", [ProbedGRPO, ProbedRLOO])
def test_the_mixin_gives_what_a_plain_forward_gives(kind: type, chat: bool, policy: SortingPolicy, address: str, tmp_path: Path) -> None:
    trainer = new_trainer(kind, policy, tmp_path, [digits_in_order], probes=ProbeScorer(REWARD, address), chat=chat)
    trainer.train()
    assert_equal(trainer.column, -0.5 * policy.scores(trainer.generated))
    assert {log["probescore/inexact_ids"] for log in trainer.state.log_history[:-1]} == {0.0}


@pytest.mark.parametrize("kind", [PlainGRPO, ProbedGRPO])
def test_metrics_are_in_the_trainers_log(kind: type, policy: SortingPolicy, address: str, tmp_path: Path) -> None:
    scorer = ProbeScorer(REWARD, address)
    if kind is PlainGRPO:
        trainer = new_trainer(kind, policy, tmp_path, [digits_in_order, ProbeReward(scorer)], max_steps=3)
    else:
        trainer = new_trainer(kind, policy, tmp_path, [digits_in_order], probes=scorer, max_steps=3)
    trainer.train()
    expected = policy.scores(trainer.generated).reshape(3, BATCH).mean(axis=1)
    found = [log["probescore/cheating/mean"] for log in trainer.state.log_history[:3]]
    assert found == pytest.approx(expected.tolist(), rel=1e-3)
    assert {f"probescore/{key}" for key in ("seconds", "failures", "unscorable", "tokens", "inexact_ids")} <= set(
        trainer.state.log_history[0]
    )
    assert list(trainer._logs["extra"]["probescore/cheating"]) == pytest.approx((trainer.column[-BATCH:] / -0.5).tolist(), rel=1e-5)


def test_exact_prompt_ids_of_a_column_are_taken(policy: SortingPolicy, address: str, tmp_path: Path) -> None:
    trainer = new_trainer(PlainGRPO, policy, tmp_path, [digits_in_order, ProbeReward(ProbeScorer(REWARD, address))], max_steps=2)
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in trainer.train_dataset["prompt"]]
    trainer.train_dataset = trainer.train_dataset.add_column("exact_prompt_ids", ids)
    trainer.train()
    assert trainer.state.log_history[0]["probescore/inexact_ids"] == 0.0
    assert_equal(trainer.column, -0.5 * policy.scores(trainer.generated))


def test_dense_terms_are_added_to_the_advantages_of_their_tokens(policy: SortingPolicy, address: str, tmp_path: Path) -> None:
    probes = ProbeScorer(ProbeSignal("cheating", mode="dense", weight=-0.1), address)
    trainer = new_trainer(ProbedGRPO, policy, tmp_path, [digits_in_order], probes=probes)
    trainer.train()
    found, expected = [], []
    for number, output in enumerate(trainer.outputs):
        rewards = trainer.rewards[number][:, 0].reshape(-1, GENERATIONS)
        spread = rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4
        advantages = ((rewards - rewards.mean(axis=1, keepdims=True)) / spread).ravel()
        for row, (prompt, completion) in enumerate(trainer.generated[number * BATCH : (number + 1) * BATCH]):
            found += (output["advantages"][row, : len(completion)].double().numpy() - advantages[row]).tolist()
            expected += (-0.1 * policy.token_scores(prompt, completion)).tolist()
    assert_equal(np.array(found), np.array(expected))
    assert trainer.state.log_history[0]["grad_norm"] > 0


@pytest.mark.parametrize("kind", [ProbedGRPO, ProbedRLOO])
def test_a_screened_rollout_moves_neither_its_group_nor_the_weights(
    kind: type, policy: SortingPolicy, address: str, tmp_path: Path
) -> None:
    probes = ProbeScorer(ProbeSignal("cheating", mode="screen"), address)
    trainer = new_trainer(kind, policy, tmp_path, [digits_in_order], probes=probes)
    trainer.train()
    removed = np.isnan(trainer.column).reshape(STEPS, BATCH)
    assert 0 < removed.mean() < 0.5
    for rewards, gone, output in zip(trainer.rewards, removed, trainer.outputs, strict=True):
        kept = output["completion_mask"] * output.get("tool_mask", torch.ones_like(output["completion_mask"]))
        assert (kept.sum(dim=1).numpy() == 0).tolist() == gone.tolist()
        assert (output["advantages"].numpy()[gone] == 0).all()
        if kind is ProbedGRPO:
            assert output["num_items_in_batch"] == kept.sum()
            for group in range(0, BATCH, GENERATIONS):
                stay = [index for index in range(group, group + GENERATIONS) if not gone[index]]
                if stay:
                    own = rewards[stay, 0]
                    expected = (own - own.mean()) / (own.std(ddof=1) + 1e-4)
                    assert output["advantages"].numpy()[stay] == pytest.approx(expected, abs=1e-4)
    assert all(np.isfinite(log["grad_norm"]) for log in trainer.state.log_history[:-1])


def test_screened_is_whoever_a_plain_forward_puts_above_the_threshold(policy: SortingPolicy, address: str, tmp_path: Path) -> None:
    rails = GuardRails(max_screened_share=1.0, max_screened_share_of_group=1.0, drop_degenerate_groups=False)
    probes = ProbeScorer(ProbeSignal("cheating", mode="screen", threshold=0.0), address, rails=rails)
    trainer = new_trainer(ProbedGRPO, policy, tmp_path, [digits_in_order], probes=probes)
    trainer.train()
    assert np.isnan(trainer.column).tolist() == (policy.scores(trainer.generated) >= 0).tolist()


def test_a_gate_takes_the_task_reward_of_whom_it_flags(policy: SortingPolicy, address: str, tmp_path: Path) -> None:
    probes = ProbeScorer(ProbeSignal("cheating", mode="gate", threshold=0.0), address)
    trainer = new_trainer(ProbedGRPO, policy, tmp_path, [digits_in_order], probes=probes)
    trainer.train()
    rewards = np.concatenate(trainer.rewards)
    flagged = policy.scores(trainer.generated) >= 0
    assert rewards.sum(axis=1) == pytest.approx(np.where(flagged, 0.0, rewards[:, 0]), abs=1e-6)


def test_several_iterations_and_batches_of_one_generation_keep_their_advantages(
    policy: SortingPolicy, address: str, tmp_path: Path
) -> None:
    signals = [ProbeSignal("cheating", mode="screen"), ProbeSignal("cheating", mode="dense", weight=-0.1, name="dense")]
    options = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 8}
    trainer = new_trainer(ProbedGRPO, policy, tmp_path, [digits_in_order], probes=ProbeScorer(signals, address), **options)
    trainer.train()
    assert len(trainer.outputs) == 2
    assert all(np.isfinite(log["grad_norm"]) for log in trainer.state.log_history[:-1])


def test_tokens_that_the_policy_did_not_sample_do_not_count(policy: SortingPolicy, address: str, tmp_path: Path) -> None:
    completion, sampled = [9, 16, 16, 12, 13, 2], [1, 0, 0, 1, 1, 1]

    def roll_out(prompts: list[str], trainer: Any) -> dict[str, Any]:
        count = len(prompts)
        ids = trainer.processing_class(prompts)["input_ids"]
        return {"prompt_ids": ids, "completion_ids": [completion] * count, "logprobs": None, "env_mask": [sampled] * count}

    probes = ProbeScorer(REWARD, address)
    trainer = new_trainer(ProbedGRPO, policy, tmp_path, [digits_in_order], probes=probes, rollout_func=roll_out, max_steps=2)
    trainer.train()
    counted = np.array([policy.token_scores(*rollout)[np.array(sampled) == 1].mean() for rollout in trainer.generated])
    assert_equal(trainer.column, -0.5 * counted)


@pytest.mark.parametrize("mode", ["screen", "gate", "relative_gate", "dense"])
def test_a_reward_function_refuses_what_it_cannot_do(mode: str) -> None:
    with pytest.raises(SignalError, match=f"{mode} cannot be done here.*ProbeTrainerMixin"):
        ProbeReward(ProbeScorer(ProbeSignal("cheating", mode=mode)))


def test_rloo_refuses_dense(policy: SortingPolicy, tmp_path: Path) -> None:
    with pytest.raises(SignalError, match="RLOO has one advantage"):
        new_trainer(ProbedRLOO, policy, tmp_path, [digits_in_order], probes=ProbeScorer(ProbeSignal("cheating", mode="dense")))


def test_the_mixin_refuses_to_be_without_task_rewards(policy: SortingPolicy, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are none"):
        new_trainer(ProbedRLOO, policy, tmp_path, [], probes=ProbeScorer(REWARD))
