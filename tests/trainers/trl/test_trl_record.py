"""The record of runs with TRL: two ranks, a run that was killed and goes on, evaluations."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import training
from rank_with_record import COUNT, STEPS
from sorting_policy import TOLERANCE, SortingPolicy

from probescore_adapters import ProbeScorer, ProbeSignal, RecordOptions
from probescore_adapters.trl import ProbeReward
from probescore_audit.record import Record, read_record

REWARD = ProbeSignal("cheating", mode="reward", weight=-0.5)


def launched(kind: str, policy: SortingPolicy, address: str, folder: Path) -> subprocess.Popen[str]:
    tests = Path(__file__).parent
    paths = f"{tests}:{tests.parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(tests / "rank_with_record.py"), kind, str(policy.folder), address]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command += [str(folder / "checkpoints"), str(folder / "record")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True)


def steps_of(record: Record) -> Counter[int]:
    return Counter(row.step for row in record.rollouts)


@pytest.mark.parametrize("kind", ["PlainGRPO", "ProbedGRPO"])
def test_two_ranks_that_are_killed_and_go_on_record_each_step_once(kind: str, policy: SortingPolicy, address: str, tmp_path: Path) -> None:
    first = launched(kind, policy, address, tmp_path)
    end = time.monotonic() + 200
    while time.monotonic() < end and first.poll() is None:
        if list((tmp_path / "record").glob("*.jsonl")) and max(steps_of(read_record(tmp_path / "record")), default=0) >= 5:
            break
        time.sleep(0.1)
    for process in [first.pid, *Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()]:
        os.kill(int(process), signal.SIGKILL)
    said = first.communicate()[0]
    killed = read_record(tmp_path / "record")
    assert set(steps_of(killed)) >= set(range(5)), said[-3000:]
    assert all(count == 2 * COUNT for step, count in steps_of(killed).items() if step < 5)
    assert killed.torn_lines <= 2

    second = launched(kind, policy, address, tmp_path)
    said = second.communicate(timeout=240)[0]
    assert second.returncode == 0, said[-3000:]
    record = read_record(tmp_path / "record")
    assert steps_of(record) == dict.fromkeys(range(STEPS), 2 * COUNT)
    assert record.header.planned_steps == STEPS
    assert record.header.world_size == (2 if kind == "PlainGRPO" else 1)
    assert record.void_rows > 0
    assert np.isfinite(record.table().scores["cheating@1", "frozen", "mean"]).all()
    labelled = Counter(label.step for label in record.labels)
    assert set(labelled) == set(range(STEPS))
    assert max(labelled.values()) <= 8
    rows = {(row.step, row.rollout) for row in record.rollouts}
    assert all((label.step, label.rollout) in rows for label in record.labels)
    if kind == "ProbedGRPO":
        table = record.table()
        assert np.isfinite(table.numbers["task_reward"]).all()
        scores = table.scores["cheating@1", "frozen", "mean"]
        np.testing.assert_allclose(table.numbers["total_reward"], table.numbers["task_reward"] - 0.5 * scores, rtol=1e-5)


@pytest.mark.parametrize("kind", [training.PlainGRPO, training.ProbedGRPO])
def test_what_is_generated_for_training_is_recorded_and_evaluations_are_not(
    kind: Any, policy: SortingPolicy, address: str, tmp_path: Path
) -> None:
    scorer = ProbeScorer(REWARD, address, record=RecordOptions(tmp_path / "record", ids=True))
    mixed = kind is training.ProbedGRPO
    rewards = [training.digits_in_order, *([] if mixed else [ProbeReward(scorer)])]
    trainer = training.new_trainer(kind, policy, tmp_path, rewards, max_steps=3, **({"probes": scorer} if mixed else {}))
    trainer.eval_dataset = trainer.train_dataset.select(range(2))
    trainer.evaluate()
    generated = len(trainer.generated)
    assert generated
    trainer.train()
    rows = read_record(tmp_path / "record").rollouts
    assert [row.completion_ids for row in rows] == [ids for _, ids in trainer.generated[generated:]]
    assert [row.step for row in rows] == np.repeat(range(3), training.BATCH).tolist()
    found = np.array([row.scores["cheating@1"]["frozen"]["mean"] for row in rows])
    expected = policy.scores(trainer.generated[generated:])
    assert np.abs(found - expected).max() <= TOLERANCE * expected.std()
