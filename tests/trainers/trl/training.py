"""Real trainers, with a record of what they generated and of the rewards that reached them."""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed
from datasets import Dataset
from sorting_policy import DEMO, SortingPolicy
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from probescore_adapters.trl import ProbeTrainerMixin

GENERATIONS = 4
BATCH = 8
OF_TRAINER = ("probes", "rollout_func", "processing_class", "peft_config", "callbacks")


class Recorded:
    """Keeps what passes through a trainer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.generated: list[tuple[list[int], list[int]]] = []
        self.rewards: list[np.ndarray[Any, Any]] = []
        self.outputs: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _generate(self, prompts: list[Any]) -> Any:
        generated = super()._generate(prompts)
        self.generated += zip([list(ids) for ids in generated[0]], [list(ids) for ids in generated[1]], strict=True)
        return generated

    def _calculate_rewards(self, *args: Any) -> Any:
        rewards = super()._calculate_rewards(*args)
        self.rewards.append(rewards.cpu().numpy().astype(np.float64))
        return rewards

    def _generate_and_score_completions(self, inputs: list[Any]) -> Any:
        output = super()._generate_and_score_completions(inputs)
        self.outputs.append({key: value.clone() for key, value in output.items()})
        return output

    @property
    def column(self) -> np.ndarray[Any, Any]:
        """The last reward function's, of every rollout."""
        return np.concatenate([rewards[:, -1] for rewards in self.rewards])


class PlainGRPO(Recorded, GRPOTrainer):
    pass


class PlainRLOO(Recorded, RLOOTrainer):
    pass


class ProbedGRPO(Recorded, ProbeTrainerMixin, GRPOTrainer):
    pass


class ProbedRLOO(Recorded, ProbeTrainerMixin, RLOOTrainer):
    pass


def digits_in_order(completions: list[Any], **_: Any) -> list[float]:
    """The task's reward: the share of neighbours that are in order."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    words = [text.split() for text in texts]
    return [sum(a <= b for a, b in itertools.pairwise(row)) / max(1, len(row) - 1) for row in words]


def new_trainer(kind: type, policy: SortingPolicy, folder: Path, rewards: list[Any], *, chat: bool = False, **options: Any) -> Any:
    """A trainer of 20 steps; `options` are the configuration's, and those of the trainer itself in ``OF_TRAINER``."""
    sys.path.append(str(DEMO))
    from task import draw_distinct_problems

    prompts: list[Any] = [problem.prompt for problem in draw_distinct_problems(random.Random("trl"), 64)]
    if chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    own = {name: options.pop(name) for name in OF_TRAINER if name in options}
    configuration = RLOOConfig if issubclass(kind, RLOOTrainer) else GRPOConfig
    settings = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": BATCH,
        "num_generations": GENERATIONS,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "seed": 0,
    }
    own.setdefault("processing_class", AutoTokenizer.from_pretrained(policy.model))
    return kind(
        model=AutoModelForCausalLM.from_pretrained(policy.model),
        reward_funcs=rewards,
        args=configuration(**settings | options),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        **own,
    )


def leave_ranks() -> None:
    """Ends what the ranks share, when all of them are done.

    Gloo's threads may otherwise let go of Python's objects while the interpreter ends, and abort the process: two ranks that only
    ``all_gather`` do so as well.
    """
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
