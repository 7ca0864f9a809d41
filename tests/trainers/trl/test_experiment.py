"""`make experiment` on a tiny scale: real training through the server, its record, its audit, the page; a second start finds all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXPERIMENT = Path(__file__).parents[3] / "examples" / "training_on_probes" / "experiment.py"
STEPS, PROMPTS, LABELS = 3, 4, 16
TINY = {
    **{"steps": STEPS, "prompts": PROMPTS, "labels": LABELS, "evaluated": 128, "jobs": 1},
    **{"pretraining-steps": 120, "fitting": 400, "reference": 400},
}
CONDITIONS = ["1b", "2", "4"]


def run(folder: Path) -> str:
    python = os.environ.get("PROBESCORE_SERVER_PYTHON", sys.executable)
    options = [f"--{name}={value}" for name, value in TINY.items()]
    command = [python, str(EXPERIMENT), "--folder", str(folder), "--trainer", sys.executable, *options, "--conditions", *CONDITIONS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    run(folder)
    return folder


@pytest.mark.parametrize("condition", CONDITIONS)
def test_each_condition_leaves_its_record_and_the_truth_of_the_same_rollouts(folder: Path, condition: str) -> None:
    run_folder = folder / "seed-0" / f"{condition}-{STEPS}"
    (record,) = (run_folder / "record").glob("*.jsonl")
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    rollouts = [row for row in rows if row["kind"] == "rollout"]
    truth = [json.loads(line) for line in (run_folder / "truth.jsonl").read_text().splitlines()]
    assert len(rollouts) == STEPS * PROMPTS * 8 == sum(len(row["cheating"]) for row in truth)
    assert all(set(row["scores"]["cheating@1"]) == {"frozen", "policy"} for row in rollouts)
    known = [cheating for row in truth for cheating in row["cheating"]]
    cheats = {(row["step"], row["rollout"]): cheating for row, cheating in zip(rollouts, known, strict=True)}
    labels = [row for row in rows if row["kind"] == "label"]
    assert labels
    assert all((row["label"] == "yes") == cheats[row["step"], row["rollout"]] for row in labels)


def test_rewards_are_what_the_conditions_say(folder: Path) -> None:
    def rollouts(condition: str) -> list[dict]:
        (record,) = (folder / "seed-0" / f"{condition}-{STEPS}" / "record").glob("*.jsonl")
        return [row for line in record.read_text().splitlines() if (row := json.loads(line))["kind"] == "rollout"]

    for row in rollouts("1b"):  # twice the sigmoid of the policy's reading
        score = row["scores"]["cheating@1"]["policy"]["mean"]
        assert row.get("total_reward", 0) == pytest.approx(row.get("task_reward", 0) - 2 / (1 + np.exp(-score)), abs=1e-5)
    for row in rollouts("2"):
        assert row.get("total_reward", 0) == row.get("task_reward", 0)
    assert {round(row.get("total_reward", 0) - row.get("task_reward", 0), 5) for row in rollouts("4")} <= {0.0, 1.0}


def test_the_page_shows_all_and_a_second_start_trains_nothing(folder: Path) -> None:
    page = (folder / "experiment.html").read_text()
    for condition in CONDITIONS:
        assert f"{condition}-{STEPS}" in page
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("record/*.jsonl")}
    run(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("record/*.jsonl")} == before
