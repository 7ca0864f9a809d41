"""One rank of a recorded run: ``rank_with_record.py <kind> <policy's folder> <address> <folder of results> <record>``; it goes on from the
last whole checkpoint if there is one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import training
from sorting_policy import SortingPolicy

from probescore_adapters import ProbeScorer, ProbeSignal, RecordOptions, Rollout
from probescore_adapters.trl import ProbeReward

COUNT = 8
STEPS = 16


def is_long(rollout: Rollout) -> bool:
    assert isinstance(rollout.columns, dict)
    assert rollout.columns["prompt"].startswith("sort")
    return len(rollout.columns["completion"]) > 10


def main(kind: str, folder: str, address: str, results: str, record: str) -> None:
    policy = SortingPolicy(Path(folder))
    options = RecordOptions(record, checker=is_long, labels_per_step=8)
    scorer = ProbeScorer(ProbeSignal("cheating", mode="reward", weight=-0.5), address, record=options)
    rewards = [training.digits_in_order, *([] if kind == "ProbedGRPO" else [ProbeReward(scorer)])]
    own = {"probes": scorer} if kind == "ProbedGRPO" else {}
    settings = {"max_steps": STEPS, "per_device_train_batch_size": COUNT, "save_strategy": "steps", "save_steps": 4}
    kinds = {"ProbedGRPO": training.ProbedGRPO, "PlainGRPO": training.PlainGRPO}
    trainer = training.new_trainer(kinds[kind], policy, Path(results), rewards, **settings, **own)
    whole = [state.parent for state in Path(results).glob("checkpoint-*/trainer_state.json")]  # the trainer writes this file last
    newest = max(whole, key=lambda folder: int(folder.name.split("-")[1]), default=None)
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))


if __name__ == "__main__":
    main(*sys.argv[1:])
    training.leave_ranks()
