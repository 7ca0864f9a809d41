"""One run: GRPO in TRL with a LoRA adapter, under one condition, with the probe at a running server; a program of its own.

    python policy_training.py RUN/settings.json

It prints a line of JSON for each step. One that was killed goes on from its last checkpoint; the steps since then are trained again, and
the record counts them once.
"""

from __future__ import annotations

import fcntl
import json
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "truth"))
sys.path.append(str(Path(__file__).parents[1]))

import torch
import trl.trainer.utils
from claims import TRAINING_HALF, Judge, claims_of, drawn_claims, known_names
from datasets import Dataset
from fixed import CONDITIONS, FROZEN, KEY, LABELS_PER_STEP, LAYER, POLICY, RECIPE, Condition, Recipe
from peft import LoraConfig
from probe_in_loss import ProbeInLoss
from rewards import Rewards
from run_settings import RunSettings, last_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from probescore_adapters import ProbeScorer, ProbeSignal, RecordOptions
from probescore_adapters.recording import RunRecorder
from probescore_adapters.trl import ProbeTrainerMixin
from probescore_adapters.trl_readings import ReadingCallback

# On a device without Triton, TRL computes the logits of the prompt as well, with their gradients: eight times what an answer needs here.
trl.trainer.utils._use_triton = lambda device: True

TORCH_THREADS = 1
PARTS = 4


def signals_of(condition: Condition) -> list[ProbeSignal]:
    """The acting one, if any, and the probe on both readings, which every condition records."""
    penalty = ProbeSignal(KEY, name="penalty", mode="penalty", transform="sigmoid", weight=condition.penalty or 1.0)
    watching = [ProbeSignal(KEY, name=FROZEN, mode="monitor"), ProbeSignal(KEY, name=POLICY, mode="monitor", reading=POLICY)]
    return [penalty, *watching] if condition.penalty else watching


class TimedReadings(ReadingCallback):
    """Keeps how long the policy was saved and loaded after the last step."""

    seconds = 0.0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - of transformers
        started = time.perf_counter()
        super().on_step_end(*args, **kwargs)
        self.seconds = time.perf_counter() - started


class TimedRecorder(RunRecorder):
    """Keeps how long the last batch's rows and labels took."""

    seconds = 0.0

    def record(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the scorer's
        started = time.perf_counter()
        super().record(*args, **kwargs)
        self.seconds = time.perf_counter() - started


class PolicyTrainer(ProbeTrainerMixin, GRPOTrainer):  # type: ignore[misc] # TRL's classes are not typed
    """GRPO with the shipped adapter, which can have the probe in its loss, too."""

    def __init__(self, *args: Any, in_loss: ProbeInLoss | None, loss_weight: float, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._in_loss, self._loss_weight = in_loss, loss_weight
        self.adapter_seconds = 0.0  # of the last step: scores, rewards, record, labels

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:  # noqa: ANN401
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        if self._in_loss is None:
            return loss
        return loss + self._loss_weight * self._in_loss(inputs["completion_mask"]) / self.current_gradient_accumulation_steps

    def _scored(self, *args: Any) -> Any:  # noqa: ANN401
        started = time.perf_counter()
        outcome = super()._scored(*args)
        self.adapter_seconds = time.perf_counter() - started
        return outcome


class StepReport(TrainerCallback):  # type: ignore[misc]
    """Writes how long each step took, and for what, and prints a line of it."""

    def __init__(self, path: Path, readings: TimedReadings, recorder: TimedRecorder) -> None:
        self._path, self._readings, self._recorder = path, readings, recorder
        self.trainer: PolicyTrainer
        self._started = time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - of transformers
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401 - of transformers
        """Called after the readings' own, which stands before it in the list of callbacks."""
        taken = {
            "step": state.global_step,
            "seconds": round(time.perf_counter() - self._started, 3),
            "scoring": round(self.trainer.adapter_seconds - self._recorder.seconds, 3),
            "recording": round(self._recorder.seconds, 4),
            "loading": round(self._readings.seconds, 3),
        }
        line = json.dumps(taken)
        with self._path.open("a") as lines:
            lines.write(line + "\n")
        print(line, flush=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other process trains this run, such as one whose starter was killed, and which ends with its next step."""
    with (folder / "training.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def train(settings: RunSettings, recipe: Recipe) -> None:
    condition, folder, model_folder = CONDITIONS[settings.condition], Path(settings.folder), Path(settings.model)
    torch.set_num_threads(TORCH_THREADS)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    every = claims_of(settings.seed, condition.topics, TRAINING_HALF)
    claims = drawn_claims(every, recipe.prompts * recipe.steps, random.Random(f"prompts {settings.seed}"))
    rewards = Rewards(claims, Judge(known_names(settings.seed)), tokenizer.eos_token_id, condition)
    record = RecordOptions(
        folder / "record",
        run_id=folder.name,
        planned_steps=recipe.steps,
        ids=True,
        checker=rewards.says_what_is_false,
        labels_per_step=LABELS_PER_STEP,
        on_error="raise",
    )
    scorer = ProbeScorer(signals_of(condition), settings.address, run_id=folder.name)
    scorer.recorder = recorder = TimedRecorder(record, scorer.signals)  # what record=record would make, with a clock
    readings = TimedReadings(scorer, folder / "readings", every=recipe.read_every, name=POLICY)
    report = StepReport(folder / "steps.jsonl", readings, recorder)
    trainer = PolicyTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=rewards.functions(),
        probes=scorer,
        in_loss=ProbeInLoss(model, Path(settings.direction), LAYER) if condition.loss_weight else None,
        loss_weight=condition.loss_weight,
        peft_config=LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[readings, report],
        train_dataset=Dataset.from_dict({"prompt": [claim.prompt(tokenizer) for claim in claims], "claim": list(range(len(claims)))}),
        args=GRPOConfig(
            output_dir=str(folder / "trained"),
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.samples * recipe.prompts // PARTS,  # a gradient is summed over parts, for the memory's sake
            gradient_accumulation_steps=PARTS,
            num_generations=recipe.samples,
            max_completion_length=recipe.answer_tokens,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=0.0,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=recipe.clip,
            shuffle_dataset=False,
            logging_steps=1,
            save_steps=recipe.save_every,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            seed=settings.seed,
        ),
    )
    report.trainer = trainer
    before = last_checkpoint(folder / "trained")
    trainer.train(resume_from_checkpoint=None if before is None else str(before))
    scorer.close()


def main(path: Path) -> None:
    settings = RunSettings(**json.loads(path.read_text()))
    with alone(path.parent):
        train(settings, replace(RECIPE, steps=settings.steps, prompts=settings.prompts, samples=settings.samples))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
