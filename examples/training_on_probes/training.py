"""One run: GRPO in TRL under one condition, with the probe at a running server; a program of its own, in TRL's environment.

    python training.py RUN/settings.json

It prints a line for each step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "demo"))

import numpy as np
import torch
from conditions import CONDITIONS, POLICY
from datasets import Dataset
from evaluation import evaluate
from probe_in_loss import ProbeInLoss
from recording import Truth, record_options, record_reference
from run_problems import RunProblems
from training_settings import RunSettings
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from probescore_adapters import ProbeScorer
from probescore_adapters.trl import ProbeTrainerMixin
from probescore_adapters.trl_readings import ReadingCallback


class ReferenceCallback(TrainerCallback):  # type: ignore[misc] # of transformers
    """Records the rollouts from before training, once the policy can be read."""

    def __init__(self, scorer: ProbeScorer, base: Path) -> None:
        self._scorer, self._base = scorer, base

    def on_train_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        record_reference(self._scorer, self._base)


class ExperimentTrainer(ProbeTrainerMixin, GRPOTrainer):  # type: ignore[misc] # TRL's classes are not typed
    """GRPO with the shipped adapter; it writes down the truth of each step, and can have the probe in its loss."""

    def __init__(
        self,
        *args: Any,  # noqa: ANN401 - the trainer's
        truth: Truth,
        problems: RunProblems,
        in_loss: ProbeInLoss | None,
        loss_weight: float,
        **kwargs: Any,  # noqa: ANN401 - the trainer's
    ) -> None:
        super().__init__(*args, **kwargs)
        self._truth, self._problems, self._in_loss, self._loss_weight = truth, problems, in_loss, loss_weight

    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[Any], completions: list[Any], completion_ids: list[list[int]]
    ) -> torch.Tensor:
        rewards: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        step, truth = self.state.global_step, self._problems.truth(prompts, completions, completion_ids)
        self._truth.write(step, truth)
        print(json.dumps({"step": step + 1, "cheating": float(np.mean(truth["cheating"]))}), flush=True)
        return rewards

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:  # noqa: ANN401 - the trainer's
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        return loss if self._in_loss is None else loss + self._loss_weight * self._in_loss(inputs["completion_mask"])


def main(path: Path) -> None:
    settings = RunSettings(**json.loads(path.read_text()))
    condition, base, folder = CONDITIONS[settings.condition], Path(settings.base), Path(settings.folder)
    torch.set_num_threads(1)
    problems = RunProblems(settings, condition)
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    model = AutoModelForCausalLM.from_pretrained(base / "model", dtype=torch.float32)
    scorer = ProbeScorer(condition.signals, settings.address, run_id=folder.name, record=record_options(settings, problems))
    truth = Truth(folder)
    reading = ReadingCallback(scorer, every=settings.read_every, name=POLICY)
    trainer = ExperimentTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[problems.buggy_checker, *([problems.ground_truth] if condition.truth_penalty else [])],
        probes=scorer,
        truth=truth,
        problems=problems,
        in_loss=ProbeInLoss(model, base / "direction.npz") if condition.loss_weight else None,
        loss_weight=condition.loss_weight,
        callbacks=[reading, ReferenceCallback(scorer, base)],
        train_dataset=Dataset.from_dict({"prompt": [problem.prompt for problem in problems.trained]}),
        args=GRPOConfig(
            output_dir=str(folder / "trained"),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.prompts * settings.samples,
            num_generations=settings.samples,
            max_completion_length=8,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
            seed=settings.seed,
        ),
    )
    trainer.train()
    scorer.close()
    truth.close()
    evaluate(model, tokenizer, problems.fresh, settings, condition)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
