"""Chooses which rollouts of each training step are to be labelled, as the trainer records them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from probescore.types import FROZEN
from probescore_adapters.job import LaunchedProcess
from probescore_adapters.record_options import RecordOptions
from probescore_adapters.rollouts import Rollout
from probescore_audit.label_plan import Stratum, plan_labels
from probescore_audit.record import RecordedProbe, RolloutRow


@dataclass(frozen=True, eq=False)
class RecordedRollout:
    """Value object with a rollout that is in the record of the training run.

    Attributes:
        rollout: the rollout.
        row: its row in the record.
        reading_ids: a dictionary, keyed by name, of the ids of the readings (whose activations the probes read) that gave its scores; empty
            text for the frozen model.
    """

    rollout: Rollout
    row: RolloutRow
    reading_ids: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class PlannedRollout:
    """Value object with a recorded rollout that is to be labelled.

    Attributes:
        recorded: the rollout.
        probe: key of the probe by whose scores labels are shared out.
        reading: reading (whose activations the probe reads) of these scores.
        stratum: class of the rollout by score: ``"flagged"``, ``"near"`` or ``"rest"``.
        inclusion: probability with which the rollout was chosen, in (0, 1].
        floor: whether the rollout was drawn at random from all rollouts of its step.
    """

    recorded: RecordedRollout
    probe: str
    reading: str
    stratum: str
    inclusion: float
    floor: bool


class StepPlans:
    """Plans of which rollouts of each training step are to be labelled, among those that this process of the run records.

    Attributes:
        probes: the recorded probes; the scores of the first whose role is ``reward`` share out the labels.
    """

    def __init__(self, options: RecordOptions, run_id: str, process: LaunchedProcess) -> None:
        self.probes: Sequence[RecordedProbe] = ()
        self._options = options
        self._seed = (zlib.crc32(run_id.encode()), process.rank)
        self._labels = max(4, options.labels_per_step // process.world_size)
        self._waiting: dict[int, list[RecordedRollout]] = {}
        self._batches: dict[int, int] = {}

    def after(self, step: int, rollouts: Sequence[RecordedRollout]) -> list[PlannedRollout]:
        """Returns the rollouts that can be chosen after a batch of a training step was recorded: those of its step if the batch is the
        step's last, or else of steps that are over.
        """
        self._waiting.setdefault(step, []).extend(rollouts)
        self._batches[step] = self._batches.get(step, 0) + 1
        if self._options.batches_per_step:
            over = [step] if self._batches[step] >= self._options.batches_per_step else []
        else:
            over = [each for each in self._waiting if each < step - self._options.late_steps]
        return [planned for each in over for planned in self._of_step(each)]

    def of_what_is_left(self) -> list[PlannedRollout]:
        """Returns the rollouts that are chosen of the training steps that have no plan yet, since nothing more comes."""
        return [planned for step in list(self._waiting) for planned in self._of_step(step)]

    def _of_step(self, step: int) -> list[PlannedRollout]:
        self._batches.pop(step)
        waiting = self._waiting.pop(step)
        design = next((found for each in waiting if (found := self._design(each.row)) is not None), None)
        if design is None:
            return []
        probe, reading, reduction, threshold = design
        scored = [
            (each, score) for each in waiting if (score := each.row.scores.get(probe, {}).get(reading, {}).get(reduction)) is not None
        ]
        plan = plan_labels(
            [score for _, score in scored],
            [each.row.prompt for each, _ in scored],
            threshold,
            self._labels,
            rng=np.random.default_rng([*self._seed, step]),
        )
        return [
            PlannedRollout(scored[index][0], probe, reading, Stratum(stratum).name.lower(), inclusion, floor)
            for index, inclusion, stratum, floor in zip(  # noqa: B905 - Python 3.10
                plan.rollouts.tolist(), plan.inclusion.tolist(), plan.stratum.tolist(), plan.floor.tolist()
            )
        ]

    def _design(self, row: RolloutRow) -> tuple[str, str, str, float] | None:
        """Returns the probe, the reading (whose activations the probe reads), the reduction and the threshold of the scores by which labels
        are shared out: those that an audit takes first. ``None`` if a rollout has none of them.
        """
        for probe in sorted(self.probes, key=lambda each: each.role != "reward"):
            readings = row.scores.get(probe.key, {})
            for reading in sorted(readings, key=lambda name: name != FROZEN):
                thresholds = probe.thresholds_on(reading)
                for reduction in sorted(readings[reading], key=lambda name: name == "max"):
                    if reduction in thresholds:
                        return probe.key, reading, reduction, thresholds[reduction]
        return None
