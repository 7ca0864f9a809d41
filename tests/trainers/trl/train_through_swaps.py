"""A GRPO run that goes on until it is told to stop, for ``make swaps``: python train_through_swaps.py MODEL ADDRESS FOLDER pinned|following

Into ``FOLDER/batches.jsonl`` goes a line for each batch that was scored: the version that scored it, what was generated, and the numbers
that reached the trainer. It ends, as a run does, after the step in which ``FOLDER/stop`` is there, and writes ``FOLDER/gradients.json``.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from training import BATCH, ProbedGRPO, digits_in_order, new_trainer
from transformers import TrainerCallback, TrainerControl, TrainerState

from probescore_adapters import ProbeScorer, ProbeSignal

WEIGHT = -0.05  # so little that no guard rail has anything to limit


class WritingGRPO(ProbedGRPO):
    """Writes each batch down as soon as its rewards are there."""

    batches: Path

    def _calculate_rewards(self, *args: Any) -> Any:
        rewards = super()._calculate_rewards(*args)
        ((_, pin),) = self._probes.state_dict()["probes"].items()
        line = {"probe": pin["probe"], "rollouts": self.generated[-BATCH:], "rewards": self.rewards[-1][:, -1].tolist()}
        with self.batches.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        return rewards


class StopFile(TrainerCallback):
    """Ends the run as a user's callback would."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_training_stop = control.should_training_stop or self._path.exists()


class ModelOf:
    """What ``new_trainer`` needs of a policy."""

    def __init__(self, model: Path) -> None:
        self.model = model


def main(model: Path, address: str, folder: Path, follow: bool) -> None:
    scorer = ProbeScorer(ProbeSignal("swap", mode="reward", weight=WEIGHT), address, follow=follow)
    trainer = new_trainer(WritingGRPO, ModelOf(model), folder / "run", [digits_in_order], probes=scorer, max_steps=100_000)
    draw = random.Random(0)
    prompts = [" ".join(f"w{draw.randrange(4, 90)}" for _ in range(draw.randrange(3, 8))) for _ in range(64)]
    trainer.train_dataset = Dataset.from_dict({"prompt": prompts})
    trainer.batches = folder / "batches.jsonl"
    trainer.add_callback(StopFile(folder / "stop"))
    trainer.train()
    norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    (folder / "gradients.json").write_text(json.dumps(norms))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4] == "following")
