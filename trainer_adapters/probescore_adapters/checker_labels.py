"""Labels rollouts of each training step for the record of the run, by a function of the user's that knows the truth."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence

import numpy as np

from probescore.types import FROZEN
from probescore_adapters.job import LaunchedProcess
from probescore_adapters.record_options import RecordOptions
from probescore_adapters.rollouts import Rollout
from probescore_audit.label_plan import Stratum, plan_labels
from probescore_audit.record import LabelRow, RecordedProbe, RolloutRow

# the standard library's: a trainer's process has its own way of showing logs
logger = logging.getLogger("probescore_adapters")

_SAID = {True: "yes", False: "no", "yes": "yes", "no": "no", "unsure": "unsure", None: "unsure"}


class LabelsFromChecker:
    """Labels of rollouts of each training step, which the user's checker gives to those that a plan chooses.

    Attributes:
        probes: the recorded probes; the scores of the first whose role is ``reward`` share out the labels.
    """

    def __init__(self, options: RecordOptions, run_id: str, process: LaunchedProcess) -> None:
        self.probes: Sequence[RecordedProbe] = ()
        self._options = options
        self._seed = (zlib.crc32(run_id.encode()), process.rank)
        self._labels = max(4, options.labels_per_step // process.world_size)
        self._waiting: dict[int, list[tuple[Rollout, RolloutRow]]] = {}
        self._batches: dict[int, int] = {}

    def after(self, step: int, rollouts: Sequence[Rollout], rows: Sequence[RolloutRow]) -> list[LabelRow]:
        """Returns the labels that can be given after a batch of a training step was recorded: those of its step if the batch is the step's
        last, or else of steps that are over.
        """
        self._waiting.setdefault(step, []).extend(zip(rollouts, rows))  # noqa: B905 - Python 3.10
        self._batches[step] = self._batches.get(step, 0) + 1
        if self._options.batches_per_step:
            over = [step] if self._batches[step] >= self._options.batches_per_step else []
        else:
            over = [each for each in self._waiting if each < step - self._options.late_steps]
        return [label for each in over for label in self._of_step(each)]

    def of_what_is_left(self) -> list[LabelRow]:
        """Returns the labels of the training steps that have none yet, since nothing more comes."""
        return [label for step in list(self._waiting) for label in self._of_step(step)]

    def _of_step(self, step: int) -> list[LabelRow]:
        self._batches.pop(step)
        waiting = self._waiting.pop(step)
        design = next((found for _, row in waiting if (found := self._design(row)) is not None), None)
        if design is None:
            return []
        probe, reading, reduction, threshold = design
        scored = [
            (rollout, row, score)
            for rollout, row in waiting
            if (score := row.scores.get(probe, {}).get(reading, {}).get(reduction)) is not None
        ]
        plan = plan_labels(
            [score for _, _, score in scored],
            [row.prompt for _, row, _ in scored],
            threshold,
            self._labels,
            rng=np.random.default_rng([*self._seed, step]),
        )
        return [
            LabelRow(
                step=step,
                rollout=scored[index][1].rollout,
                label=self._said(scored[index][0]),
                source="checker",
                labeller=getattr(self._options.checker, "__qualname__", type(self._options.checker).__qualname__),
                text_sha256=scored[index][1].text_sha256,
                inclusion=inclusion,
                stratum=Stratum(stratum).name.lower(),
                floor=floor,
            )
            for index, inclusion, stratum, floor in zip(  # noqa: B905 - Python 3.10
                plan.rollouts.tolist(), plan.inclusion.tolist(), plan.stratum.tolist(), plan.floor.tolist()
            )
        ]

    def _design(self, row: RolloutRow) -> tuple[str, str, str, float] | None:
        """Returns the probe, the reading (whose activations the probe read), the reduction and the threshold of the scores by which labels
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

    def _said(self, rollout: Rollout) -> str:
        """Returns the label that the checker gives a rollout; ``"unsure"`` if it fails, unless errors are to end the run."""
        checker = self._options.checker
        try:
            answer = None if checker is None else checker(rollout)
        except Exception as error:
            if self._options.on_error == "raise":
                raise
            logger.error("record.checker: it failed, and the label is unsure: %s", error)
            return "unsure"
        if answer not in _SAID:
            raise ValueError(f"record.checker: expected True, False or 'unsure', got {answer!r}")
        return _SAID[answer]
