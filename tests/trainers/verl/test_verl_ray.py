"""verl's reward loop and agent loop in Ray's workers, with verl's own configuration, against a live server."""

from __future__ import annotations

import asyncio
import os
import runpy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import transfer_queue
from omegaconf import DictConfig
from plain_forward import TOLERANCE, Probed, random_rollouts
from policy_of_verl import TinyPolicy
from rollouts_of_verl import padded
from running_server import RunningServer
from verl.experimental.reward_loop import RewardLoopManager
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ
from verl.utils import tensordict_utils

pytestmark = pytest.mark.slow

DENSE = "[{probe:cheating,mode:dense,weight:-0.5}]"
PENALTY = "[{probe:cheating,mode:penalty,weight:2.0}]"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    here = Path(__file__).parent
    search = os.pathsep.join(map(str, (here, here.parent, here.parents[1])))
    ray.init(num_cpus=5, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"}})
    yield
    ray.shutdown()


def configuration(probed: Probed, served: RunningServer, signals: str) -> DictConfig:
    """The example's, small."""
    example = runpy.run_path(str(Path(__file__).parents[3] / "examples/trainers/verl_grpo.py"))
    small = [
        "reward.num_workers=2",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "actor_rollout_ref.rollout.n=3",
        "actor_rollout_ref.rollout.prompt_length=16",
        "actor_rollout_ref.rollout.response_length=12",
        "actor_rollout_ref.rollout.agent.num_workers=1",
    ]
    config: DictConfig = example["configuration"](str(probed.model), served.address, signals, *small)
    return config


def kill_workers(manager: RewardLoopManager) -> None:
    for worker in manager.reward_loop_workers:
        ray.kill(worker)


def test_the_reward_loop_gives_what_the_probe_says(cluster: None, probed: Probed, served: RunningServer) -> None:
    rollouts = random_rollouts(8)
    manager = RewardLoopManager(configuration(probed, served, PENALTY))
    try:
        scored = manager.compute_rm_score(padded(rollouts))
    finally:
        kill_workers(manager)
    found = scored.non_tensor_batch["probescore/cheating/mean"]
    expected = np.array([scores.mean() for scores in probed.scores(rollouts)])
    assert np.abs(found - expected).max() <= TOLERANCE * expected.std()
    flagged = scored.non_tensor_batch["probescore/cheating/flagged"]
    assert scored.batch["rm_scores"].sum(dim=1).tolist() == (scored.non_tensor_batch["acc"] - 2.0 * flagged).tolist()


def test_dense_scores_arrive_through_the_reward_loop(cluster: None, probed: Probed, served: RunningServer) -> None:
    rollouts = random_rollouts(8)
    manager = RewardLoopManager(configuration(probed, served, DENSE))
    try:
        scored = manager.compute_rm_score(padded(rollouts))
    finally:
        kill_workers(manager)
    rewards = scored.non_tensor_batch["acc"]
    assert_dense(scored.batch["rm_scores"].numpy(), rewards, probed.scores(rollouts))


def test_dense_scores_arrive_from_an_agent_loop(cluster: None, probed: Probed, served: RunningServer) -> None:
    config = configuration(probed, served, DENSE)
    manager = RewardLoopManager(config)
    transfer_queue.init(config.transfer_queue)
    try:
        agents = AgentLoopManagerTQ.create(
            config=config, llm_client=TinyPolicy(config), reward_loop_worker_handles=manager.reward_loop_worker_handles
        )
        agents = asyncio.run(agents) if asyncio.iscoroutine(agents) else agents
        keys = generate(agents, ["w5 w6 w7", "w8 w9"])
        fields = ["prompts", "responses", "response_mask", "rm_scores", "extra_fields"]
        data = transfer_queue.kv_batch_get(keys=keys, partition_id="train", select_fields=fields)
    finally:
        transfer_queue.close()
        kill_workers(manager)
    rollouts = [(prompt.tolist(), response.tolist()) for prompt, response in zip(data["prompts"], data["responses"], strict=True)]
    extra = [getattr(one, "data", one) for one in data["extra_fields"]]
    assert len(rollouts) == 6
    assert not any("probescore_response_mask" in one for one in extra)
    rewards = np.array([one["reward_extra_info"]["acc"] for one in extra])
    assert_dense([row.numpy() for row in data["rm_scores"]], rewards, probed.scores(rollouts))


def generate(agents: AgentLoopManagerTQ, questions: list[str]) -> list[str]:
    """Has every question answered ``rollout.n`` times, and returns the keys of the answers."""
    uids = [f"q{index}" for index in range(len(questions))]
    fields: dict[str, Any] = {
        "uid": uids,
        "raw_prompt": [[{"role": "user", "content": question}] for question in questions],
        "data_source": ["test"] * len(questions),
        "reward_model": [{"ground_truth": ""}] * len(questions),
        "extra_info": [{}] * len(questions),
        "index": list(range(len(questions))),
    }
    batch = tensordict_utils.get_tensordict(fields, non_tensor_dict={"global_steps": 1})
    transfer_queue.kv_batch_put(keys=uids, partition_id="train", tags=[{"is_prompt": True, "status": "pending"} for _ in uids])
    agents.generate_sequences(batch)
    end = time.monotonic() + 120
    while time.monotonic() < end:
        tags = transfer_queue.kv_list("train")["train"]
        if all(tags[uid]["status"] == "finished" for uid in uids):
            return sorted(key for key in tags if key not in uids)
        assert not any(tags[uid]["status"] == "failure" for uid in uids)
        time.sleep(0.1)
    raise TimeoutError(tags)


def assert_dense(rm_scores: Any, rewards: np.ndarray[Any, Any], scores: list[np.ndarray[Any, Any]]) -> None:
    """Each token has its score, and the last the task's reward as well."""
    for row, reward, per_token in zip(rm_scores, rewards, scores, strict=True):
        expected = -0.5 * per_token + reward * np.eye(len(per_token))[-1]
        assert np.abs(row[: len(expected)] - expected).max() <= TOLERANCE * np.concatenate(scores).std()
        assert not np.any(row[len(expected) :])
