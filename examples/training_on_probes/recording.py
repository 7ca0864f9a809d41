"""The record of a run, which is what ``probescore audit`` reads, and beside it the truth, which an audit does not have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from conditions import PROBE, Condition
from training_settings import RunSettings

from probescore_audit import plan_labels
from probescore_audit.label_plan import Stratum
from probescore_audit.record import LabelRow, RecordedProbe, RecordWriter, ReferenceRow, RolloutRow, RunHeader

KEY = f"{PROBE}@1"


class RunRecord:
    """Writes the record of a run, and the truth beside it."""

    def __init__(self, settings: RunSettings, condition: Condition) -> None:
        folder = Path(settings.folder)
        direction, reference = np.load(Path(settings.base) / "direction.npz"), np.load(Path(settings.base) / "reference.npz")
        self._settings = settings
        self._threshold = float(direction["threshold"])
        role = "monitor" if condition.acting is None and not condition.loss_weight else "reward"
        header = RunHeader(
            run_id=f"{folder.parent.name}/{folder.name}",
            planned_steps=settings.steps,
            probes=[RecordedProbe(key=KEY, role=role, thresholds={"mean": self._threshold})],
            labels_per_step=settings.labels,
        )
        self._writer = RecordWriter(folder / "record", header, on_error="raise")
        self._writer.append(
            ReferenceRow(rollout=str(index), positive=bool(cheats), random=True, scores={KEY: {"frozen": {"mean": float(score)}}})
            for index, (cheats, score) in enumerate(zip(reference["cheating"], reference["scores"], strict=True))
        )
        self._truth = (folder / "truth.jsonl").open("w")
        self._rng = np.random.default_rng([settings.seed, 7])

    def write(
        self,
        step: int,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        scores: dict[str, np.ndarray[Any, Any]],
        rewards: tuple[Sequence[float], Sequence[float]],
        truth: dict[str, list[Any]],
    ) -> None:
        """Writes the rollouts of a step, the labels of those that the plan draws, and what all of them truly are."""
        digests = [
            hashlib.sha256(json.dumps([list(prompt), list(ids)]).encode()).hexdigest()
            for prompt, ids in zip(prompts, completions, strict=True)
        ]
        names = {tuple(prompt): str(number) for number, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        rows = [
            RolloutRow(
                step=step,
                rollout=str(index),
                prompt=names[tuple(prompts[index])],
                scores={KEY: {reading: {"mean": float(values[index])} for reading, values in scores.items() if np.isfinite(values[index])}},
                tokens=len(completions[index]),
                task_reward=float(rewards[0][index]),
                total_reward=float(rewards[1][index]),
                text_sha256=digests[index],
            )
            for index in range(len(completions))
        ]
        plan = plan_labels(scores["frozen"], [row.prompt for row in rows], self._threshold, self._settings.labels, rng=self._rng)
        labels = [
            LabelRow(
                step=step,
                rollout=str(index),
                label="yes" if truth["cheating"][index] else "no",
                source="checker",
                text_sha256=digests[index],
                inclusion=float(chance),
                stratum=Stratum(kind).name.lower(),
                floor=bool(floor),
            )
            for index, kind, chance, floor in zip(plan.rollouts.tolist(), plan.stratum.tolist(), plan.inclusion, plan.floor, strict=True)
        ]
        self._writer.append([*rows, *labels])
        self._truth.write(json.dumps({"step": step, **truth}) + "\n")
        self._truth.flush()

    def close(self) -> None:
        self._writer.close()
        self._truth.close()
