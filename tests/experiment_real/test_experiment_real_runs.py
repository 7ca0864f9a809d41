"""`make experiment-real` on a few steps, from the probe to the tables, with a real server and TRL; one run is killed and taken up again."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from probescore_audit.record import read_record

REPOSITORY = Path(__file__).parents[2]
PROGRAM = REPOSITORY / "examples" / "training_on_probes" / "real" / "experiment_real.py"
SEED, STEPS, CHECKPOINT, PROMPTS, SAMPLES = 1, 7, 5, 2, 4


def started(folder: Path, *conditions: str) -> subprocess.Popen[str]:
    sizes = ["--probe-prompts", "8", "--reference-prompts", "8", "--steps", str(STEPS)]
    sizes += ["--prompts", str(PROMPTS), "--samples", str(SAMPLES)]
    command = [sys.executable, str(PROGRAM), "--folder", str(folder), "--seeds", str(SEED), *sizes, "--conditions", *conditions]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("experiment")
    runpy.run_path(str(REPOSITORY / "examples" / "truth" / "smollm2.py"))["save_smollm2"](made / "model")
    return made


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("condition", ["penalty", "loss"])
def test_a_run_that_was_killed_goes_on_and_each_step_counts_once(folder: Path, condition: str) -> None:
    told = []
    if condition == "penalty":
        with started(folder, condition) as process:
            for line in process.stdout or ():
                told.append(line)
                if f"step {CHECKPOINT + 1} of {STEPS}" in line:
                    os.killpg(process.pid, signal.SIGKILL)  # the server and the trainer with it, as where a machine ends
        assert process.returncode < 0, "".join(told)

    with started(folder, condition) as process:
        output = process.stdout.read() if process.stdout else ""
    assert process.returncode == 0, output
    assert f"step {STEPS} of {STEPS}" in output
    if condition == "penalty":
        assert f"step {CHECKPOINT} of {STEPS}" not in output  # it went on from there
        assert f"step {CHECKPOINT + 1} of {STEPS}" in output

    run = folder / f"seed-{SEED}" / condition
    record = read_record(run / "record")
    assert Counter(row.step for row in record.rollouts) == dict.fromkeys(range(STEPS), PROMPTS * SAMPLES)
    assert all(set(row.scores["untrue@1"]) == {"frozen", "policy"} for row in record.rollouts)
    assert all(row.task_reward is not None and row.total_reward is not None for row in record.rollouts)
    assert set(Counter(label.step for label in record.labels)) == set(range(STEPS))
    assert record.references
    first = [row for row in record.rollouts if row.step == 0]  # the adapter changes nothing yet
    assert all(abs(row.scores["untrue@1"]["frozen"]["mean"] - row.scores["untrue@1"]["policy"]["mean"]) < 1e-3 for row in first)
    last = [row for row in record.rollouts if row.step == STEPS - 1]
    assert any(abs(row.scores["untrue@1"]["frozen"]["mean"] - row.scores["untrue@1"]["policy"]["mean"]) > 0.01 for row in last)

    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["condition"] == condition]
    assert (line["steps"], line["seed"]) == (STEPS, SEED)
    assert {said["reading"] for said in line["audit"]} == {"frozen", "policy"}
    parts = line["seconds"]
    assert 0 < parts["scoring"] + parts["loading"] + parts["recording"] < parts["seconds"]
    assert "| condition |" in (folder / "tables.md").read_text()

    with started(folder, condition) as process:
        again = process.stdout.read() if process.stdout else ""
    assert process.returncode == 0, again
    assert "step 1 of" not in again  # what is finished is kept
    assert len((folder / "results.jsonl").read_text().splitlines()) == len(lines)
