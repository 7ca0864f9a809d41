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
from conditions import CONDITIONS, POLICY, READINGS
from datasets import Dataset
from evaluation import evaluate
from recording import RunRecord
from run_problems import RunProblems
from training_settings import RunSettings
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from probescore_adapters import ProbeScorer
from probescore_adapters.trl import ProbeTrainerMixin
from probescore_adapters.trl_readings import ReadingCallback

LAYER = 1  # of the probe's tap


class ProbeInLoss:
    """The mean of the probe's logit over the tokens that were sampled, on the policy itself, with its gradient."""

    def __init__(self, model: Any, direction: Path) -> None:  # noqa: ANN401 - of transformers
        arrays = np.load(direction)
        self._weight = torch.tensor(arrays["weight"], dtype=torch.float32)
        self._bias = float(arrays["bias"])
        self._states: torch.Tensor
        model.model.layers[LAYER].register_forward_hook(self._keep)

    def _keep(self, module: object, inputs: object, output: Any) -> None:  # noqa: ANN401 - of transformers
        self._states = output[0] if isinstance(output, tuple) else output

    def __call__(self, completion_mask: torch.Tensor) -> torch.Tensor:
        """Of the forward pass that was the last, for ``completion_mask (B, T)``."""
        states = self._states[:, -completion_mask.shape[1] :]
        return ((states @ self._weight + self._bias) * completion_mask).sum() / completion_mask.sum()


class ExperimentTrainer(ProbeTrainerMixin, GRPOTrainer):  # type: ignore[misc] # TRL's classes are not typed
    """GRPO with the shipped adapter; it records each step, and can have the probe in its loss."""

    def __init__(
        self,
        *args: Any,  # noqa: ANN401 - the trainer's
        record: RunRecord,
        problems: RunProblems,
        in_loss: ProbeInLoss | None,
        loss_weight: float,
        **kwargs: Any,  # noqa: ANN401 - the trainer's
    ) -> None:
        super().__init__(*args, **kwargs)
        self._record, self._problems, self._in_loss, self._loss_weight = record, problems, in_loss, loss_weight

    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[Any], completions: list[Any], completion_ids: list[list[int]]
    ) -> torch.Tensor:
        rewards: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        step, truth = self.state.global_step, self._problems.truth(prompts, completions, completion_ids)
        scores = {reading: self._outcome.values[reading] for reading in READINGS}
        paid = rewards[:, :-1].nansum(dim=1).tolist(), rewards.nansum(dim=1).tolist()
        self._record.write(step, self._prompt_ids, completion_ids, scores, paid, truth)
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
    scorer = ProbeScorer(condition.signals, settings.address, run_id=folder.name)
    record = RunRecord(settings, condition)
    trainer = ExperimentTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[problems.buggy_checker, *([problems.ground_truth] if condition.truth_penalty else [])],
        probes=scorer,
        record=record,
        problems=problems,
        in_loss=ProbeInLoss(model, base / "direction.npz") if condition.loss_weight else None,
        loss_weight=condition.loss_weight,
        callbacks=[ReadingCallback(scorer, every=settings.read_every, name=POLICY)],
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
    record.close()
    evaluate(model, tokenizer, problems.fresh, settings, condition)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
