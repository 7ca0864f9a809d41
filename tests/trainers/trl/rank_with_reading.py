"""One rank of a run under torchrun whose policy is read.

``rank_with_reading.py <kind> <policy> <address> <readings> <results> <trains>``
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import training
from peft import LoraConfig
from sorting_policy import SortingPolicy

from probescore_adapters import Outcome, ProbeScorer, ProbeSignal
from probescore_adapters.trl import ProbeReward
from probescore_adapters.trl_readings import ReadingCallback

SIGNALS = [ProbeSignal("cheating", mode="reward", weight=-0.5), ProbeSignal("cheating", mode="monitor", reading="policy")]


READ: list[tuple[int | None, str]] = []
"""Which version of the policy has scored each batch, as this rank knows."""


def kept(outcome: Outcome) -> Outcome:
    READ.append((outcome.readings["policy"].step, outcome.readings["policy"].id))
    return outcome


class KeptScorer(ProbeScorer):
    """Scores the batches of its own rank."""

    async def score_async(self, *args: Any, **options: Any) -> Outcome:
        return kept(await super().score_async(*args, **options))


class KeptGRPO(training.ProbedGRPO):
    """Has rank 0 score the batches of all ranks."""

    def _scored(self, *args: Any) -> Outcome:
        return kept(super()._scored(*args))


def main(kind: str, folder: str, address: str, readings: str, results: str, trains: str) -> None:
    policy = SortingPolicy(Path(folder))
    options: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 6}
    if trains == "lora":
        lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        options |= {"peft_config": lora, "learning_rate": 1e-2}
    scorer = KeptScorer(SIGNALS, address)
    rewards: list[Any] = [training.digits_in_order]
    if kind == "ProbedGRPO":
        options["probes"] = scorer
    else:
        rewards.append(ProbeReward(scorer))
    trainer_of = KeptGRPO if kind == "ProbedGRPO" else training.PlainGRPO
    callbacks = [ReadingCallback(scorer, readings, every=2)]
    trainer = training.new_trainer(trainer_of, policy, Path(results), rewards, callbacks=callbacks, **options)
    trainer.train()
    # an error of rank 0 is raised on every rank
    elsewhere = ReadingCallback(scorer, Path(results) / "elsewhere", every=1)
    try:
        elsewhere.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    except Exception as error:
        refused = str(error)
    history = [log for log in trainer.state.log_history if "probescore/cheating/policy/drift" in log]
    found = {
        "steps": [log["probescore/cheating/policy/reading_step"] for log in history],
        "drift": [log["probescore/cheating/policy/drift"] for log in history],
        "read": READ,
        "refused": refused,
    }
    Path(results, f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
    training.leave_ranks()
