"""Rollouts in the shapes in which verl hands them to a reward manager, and the configuration that names ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from plain_forward import Ids
from tensordict import TensorDict
from verl import DataProto

TASK = '''
def compute_score(data_source, solution_str, ground_truth, extra_info):
    """What the task says of a text: a reward, and something to log."""
    return {"score": float(len(solution_str.split())), "words": len(solution_str.split())}
'''


def streamed(ids: Ids, **extra: Any) -> DataProto:
    """One rollout, as an agent loop's worker sends it to a worker of the reward loop: without padding."""
    prompt, completion = (torch.tensor([part]) for part in ids)
    both = torch.cat([prompt, completion], dim=1)
    tensors = {"prompts": prompt, "responses": completion, "input_ids": both, "attention_mask": torch.ones_like(both)}
    return DataProto(
        batch=TensorDict(tensors, batch_size=1),
        non_tensor_batch={
            **_of_the_dataset(1),
            "__num_turns__": np.array([2]),
            "tool_extra_fields": np.array([extra], dtype=object),
            "prompt_len": np.array([len(ids[0])]),
            "response_len": np.array([len(ids[1])]),
        },
    )


def padded(rollouts: Sequence[Ids], masks: Sequence[Sequence[int]] | None = None) -> DataProto:
    """A batch after generation: prompts padded on the left, responses on the right."""
    longest = [max(len(rollout[part]) for rollout in rollouts) for part in (0, 1)]
    prompts = torch.tensor([[0] * (longest[0] - len(prompt)) + prompt for prompt, _ in rollouts])
    responses = torch.tensor([completion + [0] * (longest[1] - len(completion)) for _, completion in rollouts])
    attends = [
        [0] * (longest[0] - len(prompt)) + [1] * (len(prompt) + len(completion)) + [0] * (longest[1] - len(completion))
        for prompt, completion in rollouts
    ]
    tensors = {"prompts": prompts, "responses": responses, "attention_mask": torch.tensor(attends)}
    if masks is not None:
        tensors["response_mask"] = torch.tensor([list(mask) + [0] * (longest[1] - len(mask)) for mask in masks])
    return DataProto(batch=TensorDict(tensors, batch_size=len(rollouts)), non_tensor_batch=_of_the_dataset(len(rollouts)))


def _of_the_dataset(count: int) -> dict[str, Any]:
    return {
        "data_source": np.array(["test"] * count, dtype=object),
        "reward_model": np.array([{"ground_truth": ""}] * count, dtype=object),
        "extra_info": np.array([{} for _ in range(count)], dtype=object),
    }


def configuration(folder: Path, **probescore: Any) -> DictConfig:
    """verl's configuration, as far as rewards are concerned, with a task reward that counts words."""
    task = folder / "task.py"
    task.write_text(TASK)
    return OmegaConf.create(
        {
            "reward": {
                "num_workers": 2,
                "reward_manager": {
                    "source": "importlib",
                    "name": "ProbeRewardManager",
                    "module": {"path": "pkg://probescore_adapters.verl"},
                },
                "custom_reward_function": {"path": str(task), "name": "compute_score"},
                "reward_model": {"enable": False},
                "reward_kwargs": {"probescore": probescore},
            }
        }
    )
