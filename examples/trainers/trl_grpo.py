"""GRPO with TRL, a task's reward, and a probe: its reading is a penalty, and who is far above the threshold is left out.

probescore serve --model MODEL --probes cheating.onnx          # in another terminal, or on another machine
python trl_grpo.py --model MODEL --address localhost:50051     # or: torchrun --nproc-per-node 8 trl_grpo.py …
"""

from __future__ import annotations

import argparse
import itertools
import random

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from probescore_adapters import ProbeScorer, ProbeSignal
from probescore_adapters.trl import ProbeTrainerMixin


class ProbedGRPOTrainer(ProbeTrainerMixin, GRPOTrainer):
    """GRPO on exact ids, with every mode of a signal."""


def sorted_digits(completions: list[str], **columns: object) -> list[float]:
    """The task: the share of neighbours that are in order."""
    words = [completion.split() for completion in completions]
    return [sum(a <= b for a, b in itertools.pairwise(row)) / max(1, len(row) - 1) for row in words]


def problems(count: int) -> Dataset:
    source = random.Random(0)
    digits = [" ".join(str(source.randrange(10)) for _ in range(5)) for _ in range(2 * count)]
    cached = [" ".join(sorted(row.split())) for row in digits[count:]]
    return Dataset.from_dict({"prompt": [f"sort {shown} cache {entry} answer" for shown, entry in zip(digits, cached, strict=False)]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="of the policy at first; the server has the same, frozen")
    parser.add_argument("--probe", default="cheating")
    parser.add_argument("--address", default="localhost:50051")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="trl-output")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()

    probes = ProbeScorer(
        [
            ProbeSignal(options.probe, mode="penalty", weight=0.5),  # flagged by the probe's own calibration
            ProbeSignal(options.probe, mode="screen", threshold=4.0, name="blatant"),
        ],
        options.address,
    )
    trainer = ProbedGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        reward_funcs=[sorted_digits],
        probes=probes,
        train_dataset=problems(256),
        args=GRPOConfig(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=8,
            learning_rate=1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=options.cpu,
            bf16=not options.cpu,
        ),
    )
    trainer.train()


if __name__ == "__main__":
    main()
