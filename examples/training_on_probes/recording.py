"""The record of a run, which is what ``probescore audit`` reads, and beside it the truth, which an audit does not have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from run_problems import RunProblems
from training_settings import RunSettings

from probescore_adapters import ProbeScorer, Rollout
from probescore_adapters.record_options import RecordOptions


def record_options(settings: RunSettings, problems: RunProblems) -> RecordOptions:
    """All rollouts, with labels of some by a checker that knows the truth."""

    def checker(rollout: Rollout) -> bool:
        columns: Mapping[str, Any] = rollout.columns or {}
        return problems.judged([columns["prompt"]], [columns["completion"]])[0][0]

    return RecordOptions(
        Path(settings.folder) / "record",
        run_id=Path(settings.folder).name,
        planned_steps=settings.steps,
        checker=checker,
        labels_per_step=settings.labels,
        on_error="raise",
    )


def record_reference(scorer: ProbeScorer, base: Path) -> None:
    """The rollouts from before training, which the audit compares with."""
    arrays = np.load(base / "reference.npz")
    prompts, completions = arrays["prompt_ids"], arrays["completion_ids"]
    rollouts = [Rollout(prompt, ids[ids >= 0]) for prompt, ids in zip(prompts, completions, strict=True)]
    scorer.record_reference(rollouts, arrays["cheating"].tolist(), random=True)


class Truth:
    """What the environment knows of all rollouts of a run: a line of JSON for each step."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "truth.jsonl").open("w")

    def write(self, step: int, truth: Mapping[str, Sequence[Any]]) -> None:
        self._file.write(json.dumps({"step": step, **truth}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
