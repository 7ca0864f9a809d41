"""Our agent loops in verl's base classes, with a real policy."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig
from plain_forward import Probed
from policy_of_verl import TinyPolicy
from verl.experimental.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, DictConfigWrap
from verl.utils import hf_tokenizer
from verl.utils.dataset.rl_dataset import RLHFDataset

from probescore_adapters.verl import RESPONSE_MASK, TokenRewards
from probescore_adapters.verl_agent_loop import ProbeAgentLoop, ProbeToolAgentLoop, TokenRewardOutput


@pytest.fixture(scope="module")
def config(probed: Probed) -> DictConfig:
    example = runpy.run_path(str(Path(__file__).parents[3] / "examples/trainers/verl_grpo.py"))
    small = ["actor_rollout_ref.rollout.prompt_length=16", "actor_rollout_ref.rollout.response_length=8"]
    found: DictConfig = example["configuration"](str(probed.model), "localhost:1", "[]", *small)
    return found


def output_of(reward: float) -> AgentLoopOutput:
    output = AgentLoopOutput(prompt_ids=[1, 5], response_ids=[6, 7, 2], response_mask=[1, 0, 1], metrics=AgentLoopMetrics())
    carrying = TokenRewardOutput.of(output)
    carrying.reward_score = reward
    return carrying


def test_rewards_of_tokens_become_rm_scores() -> None:
    assert output_of(TokenRewards(np.array([0.5, 0.0, 2.0]))).as_dict()["rm_scores"].tolist() == [0.5, 0.0, 2.0]


def test_a_reward_of_a_rollout_stays_at_the_last_token() -> None:
    assert output_of(1.5).as_dict()["rm_scores"].tolist() == [0.0, 0.0, 1.5]


def test_a_plain_output_has_the_sum_at_the_last_token() -> None:
    output = AgentLoopOutput(prompt_ids=[1, 5], response_ids=[6, 7, 2], response_mask=[1, 0, 1], metrics=AgentLoopMetrics())
    output.reward_score = TokenRewards(np.array([0.5, 0.0, 2.0]))
    assert output.as_dict()["rm_scores"].tolist() == [0.0, 0.0, 2.5]


def test_the_response_mask_is_sent_along_and_not_kept() -> None:
    output = output_of(1.0)
    assert output.extra_fields[RESPONSE_MASK] == [1, 0, 1]
    assert RESPONSE_MASK not in output.as_dict()["extra_fields"]


@pytest.mark.parametrize("kind", [ProbeAgentLoop, ProbeToolAgentLoop])
async def test_a_loop_answers_as_verls_own(kind: Any, config: DictConfig, probed: Probed) -> None:
    loop = kind(
        trainer_config=DictConfigWrap(config),
        server_manager=TinyPolicy(config),
        tokenizer=hf_tokenizer(str(probed.model)),
        processor=None,
        dataset_cls=RLHFDataset,
        data_config=DictConfigWrap(config.data),
    )
    output = await loop.run({}, raw_prompt=[{"role": "user", "content": "w5 w6"}])
    assert isinstance(output, TokenRewardOutput)
    assert 1 <= len(output.response_ids) <= 8
    assert output.extra_fields[RESPONSE_MASK] == [1] * len(output.response_ids)
