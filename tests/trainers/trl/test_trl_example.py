"""The file that the documentation shows, as it is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from sorting_policy import SortingPolicy

EXAMPLE = Path(__file__).parents[3] / "examples" / "trainers" / "trl_grpo.py"


def test_the_example_trains_with_the_probe_in_its_log(policy: SortingPolicy, address: str, tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLE, "--model", policy.model, "--address", address, "--steps", "5", "--output", tmp_path, "--cpu"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    logs = [ast.literal_eval(line) for line in done.stdout.splitlines() if line.startswith("{'loss'")]
    assert len(logs) == 5
    assert all(float(log["probescore/inexact_ids"]) == 0 for log in logs)
    assert all({"probescore/cheating/mean", "probescore/blatant/screened", "rewards/probescore/mean"} <= set(log) for log in logs)
