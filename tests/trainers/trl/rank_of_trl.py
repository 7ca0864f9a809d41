"""One rank of a run under torchrun: ``rank_of_trl.py <kind> <policy's folder> <address> <folder of results>``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import training
from sorting_policy import SortingPolicy

from probescore_adapters import ProbeScorer, ProbeSignal
from probescore_adapters.trl import ProbeReward

# with groups of four, one group is on both ranks
COUNT = 6


def main(kind: str, folder: str, address: str, results: str) -> None:
    reward = ProbeSignal("cheating", mode="reward", weight=-0.5)
    policy = SortingPolicy(Path(folder))
    options = {"max_steps": 4, "per_device_train_batch_size": COUNT, "num_generations": 4}
    if kind == "ProbedGRPO":
        signals = [reward, ProbeSignal("cheating", mode="screen", name="screen"), ProbeSignal("cheating", mode="dense", name="dense")]
        trainer = training.new_trainer(
            training.ProbedGRPO, policy, Path(results), [training.digits_in_order], probes=ProbeScorer(signals, address), **options
        )
    else:
        rewards = [training.digits_in_order, ProbeReward(ProbeScorer(reward, address))]
        trainer = training.new_trainer(training.PlainGRPO, policy, Path(results), rewards, **options)
    trainer.train()
    found = {
        "generated": trainer.generated,
        "column": trainer.column.tolist(),
        "count": COUNT,
        "means": [log["probescore/cheating/mean"] for log in trainer.state.log_history if "probescore/cheating/mean" in log],
    }
    Path(results, f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
    training.leave_ranks()
