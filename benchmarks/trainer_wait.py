"""How much longer a TRL step takes for its probe: beside the same rollouts sent by the client directly, and what the server says it took.

    python benchmarks/trainer_wait.py MODEL ADDRESS [PROBE]

with a server at ADDRESS that has the same model and keeps nothing (`--kv-cache-bytes 0`), or the client would find computed what the
trainer asked for before. 64 rollouts a step: 8 prompts, 8 completions each.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from typing import Any
from urllib.request import urlopen

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from probescore import Completion, ProbeClient, RolloutGroup, Text
from probescore_adapters import ProbeScorer, ProbeSignal
from probescore_adapters.trl import ProbeReward

ROLLOUTS, GENERATIONS, STEPS, WARM_UP = 64, 8, 40, 5


class TimedTrainer(GRPOTrainer):
    """Notes how long rewards take, and what was scored."""

    waited: list[float]
    asked: list[tuple[list[Any], list[list[int]]]]

    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[Any], completions: list[Any], completion_ids: list[list[int]]
    ) -> torch.Tensor:
        started = time.perf_counter()
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        self.waited.append(time.perf_counter() - started)
        self.asked.append((prompts, [list(ids) for ids in completion_ids]))
        return rewards


def one(prompts: list[Any], **_columns: object) -> list[float]:
    return [1.0] * len(prompts)


def train(model: str, reward_funcs: list[Any], prompts: list[str]) -> TimedTrainer:
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedTrainer(
            model=AutoModelForCausalLM.from_pretrained(model),
            processing_class=AutoTokenizer.from_pretrained(model),
            reward_funcs=reward_funcs,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            args=GRPOConfig(
                output_dir=folder,
                max_steps=STEPS,
                per_device_train_batch_size=ROLLOUTS,
                num_generations=GENERATIONS,
                max_completion_length=64,
                learning_rate=0.0,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
                logging_steps=STEPS,
            ),
        )
        trainer.waited, trainer.asked = [], []
        trainer.train()
    return trainer


def direct(address: str, probe: str, asked: list[tuple[list[Any], list[list[int]]]]) -> tuple[list[float], list[float]]:
    """Seconds of the same calls without trainer and adapter, and of them those that the server computed or had them wait."""
    waited, served = [], []
    with ProbeClient(address) as client:
        for prompts, completion_ids in asked:
            groups: dict[str, list[Completion]] = {}
            for prompt, ids in zip(prompts, completion_ids, strict=True):
                groups.setdefault(prompt, []).append(Completion(ids))
            sent = [RolloutGroup(Text(prompt, add_special_tokens=True), completions) for prompt, completions in groups.items()]
            started = time.perf_counter()
            usage = client.score(sent, probes=[probe]).info.usage
            waited.append(time.perf_counter() - started)
            served.append(usage.queue_seconds + usage.compute_seconds)
    return waited, served


def handling_seconds(metrics_address: str) -> float:
    """Of all calls of adapters so far."""
    with urlopen(f"http://{metrics_address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    sums = [line for line in lines if line.startswith("grpc_server_handling_seconds_sum") and '"ScoreStream"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in sums)


def main(model: str, address: str, metrics_address: str, probe: str = "cheating") -> None:
    source = random.Random(0)  # noqa: S311 - no secret
    words = [" ".join(str(source.randrange(10)) for _ in range(10)) for _ in range(256)]
    prompts = [f"sort {word[:9]} cache {word[10:]} answer" for word in words]
    reward = ProbeReward(ProbeScorer(ProbeSignal(probe, mode="reward"), address))
    without = train(model, [one], prompts).waited
    before = handling_seconds(metrics_address)
    probed = train(model, [one, reward], prompts)
    handled = (handling_seconds(metrics_address) - before) / STEPS
    called, served = direct(address, probe, probed.asked)
    extra = statistics.median(probed.waited[WARM_UP:]) - statistics.median(without[WARM_UP:])
    call, server = statistics.median(called[WARM_UP:]), statistics.median(served[WARM_UP:])
    print(f"{ROLLOUTS} rollouts a step, {STEPS - WARM_UP} steps, medians, milliseconds")
    print(f"extra wait of the trainer      {1000 * extra:8.2f}")
    print(f"the same call of the client    {1000 * call:8.2f}")
    print(f"queue and batches              {1000 * server:8.2f}")
    print(f"from call to answer (mean)     {1000 * handled:8.2f}")
    for name, needed in (("client", call), ("server", handled)):
        allowed = 1.1 * needed + 0.005
        print(f"{name} + 10 % + 5 ms         {1000 * allowed:8.2f}  {'kept' if extra <= allowed else 'exceeded'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
