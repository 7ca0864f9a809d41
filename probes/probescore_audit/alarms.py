"""Raises an alarm during training when a probe begins to miss the behaviour, with a bounded chance of any false alarm in the whole run.

Each monitor bets against the hypothesis that the probe is as good as before training. The monitor's evidence is a nonnegative martingale
under that hypothesis: a mean over several sizes of the bet, and over the planned training steps at which the probe may have become worse,
with equal weights (Shin, Ramdas and Rinaldo 2022, e-detectors; Waudby-Smith and Ramdas 2024). By Ville's inequality the evidence ever
exceeds ``1 / alpha`` with a chance of at most ``alpha``, however often one looks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from probescore_audit.label_plan import Floats

_RECALL_BETS = (0.15, 0.5, 0.75, 0.9)  # recall after the change, as a share of the lowest recall that is acceptable
_MISSED_BETS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)  # shares of the evidence that are bet


class _Evidence:
    """Record of a monitor's evidence that a probe has become worse, in logarithms, and of the first training step at which the evidence was
    enough for an alarm.
    """

    def __init__(self, bets: int, planned_steps: int, alpha: float) -> None:
        if planned_steps < 1:
            raise ValueError(f"planned_steps: {planned_steps}; give the number of training steps that the run is planned for")
        if not 0 < alpha < 1:
            raise ValueError(f"alpha: {alpha:g}; give the largest chance of a false alarm in the whole run, such as 0.05")
        self._started = np.full(bets, -np.inf)
        self._planned = planned_steps
        self._enough = -math.log(alpha)
        self._steps = 0
        self.alarm_step: int | None = None

    def update(self, log_factors: Floats, step: int) -> float:
        """Multiplies the evidence that a probe has become worse by what each bet won or lost at a training step, ``(bets,)`` logarithms,
        and returns the logarithm of the new evidence.
        """
        self._steps += 1
        if self._steps <= self._planned:
            self._started = np.logaddexp(self._started, -math.log(self._planned))
        self._started = self._started + log_factors
        to_come = max(0.0, 1 - self._steps / self._planned)
        evidence = float(np.logaddexp.reduce(self._started) - math.log(len(self._started)))
        evidence = float(np.logaddexp(evidence, math.log(to_come) if to_come else -math.inf))
        if evidence >= self._enough and self.alarm_step is None:
            self.alarm_step = step
        return evidence


class RecallMonitor:
    """Monitor that raises an alarm when the recall of a probe (the share of the positive rollouts that the probe flags) falls. It watches
    the rollouts that were drawn at random for labelling.

    Args:
        floor: the lowest acceptable recall, in (0, 1); the hypothesis is that recall is at least this.
        planned_steps: number of training steps of the run.
        alpha: largest chance of a false alarm in the whole run.
    """

    def __init__(self, floor: float, planned_steps: int, alpha: float) -> None:
        if not 0 < floor < 1:
            raise ValueError(f"floor: {floor:g}; give the lowest acceptable recall, in (0, 1)")
        bets = floor * np.array(_RECALL_BETS)
        self._caught, self._missed = np.log(bets / floor), np.log((1 - bets) / (1 - floor))
        self._evidence = _Evidence(len(bets), planned_steps, alpha)

    @property
    def alarm_step(self) -> int | None:
        """Returns the first training step at which the monitor raised an alarm; ``None`` if there was none."""
        return self._evidence.alarm_step

    def update(self, step: int, caught: int, missed: int) -> float:
        """Updates, with those positive rollouts of a training step that were drawn at random for labelling, the evidence that a probe's
        recall has fallen, and returns the logarithm of the evidence.

        Args:
            step: the training step.
            caught: number of positive rollouts that the probe flags.
            missed: number of positive rollouts that the probe does not flag.
        """
        return self._evidence.update(caught * self._caught + missed * self._missed, step)


class MissedMonitor:
    """Monitor that raises an alarm when the missed rate of a probe (the share of all rollouts that are positive and not flagged) rises. It
    watches every label.

    Args:
        ceiling: the highest acceptable missed rate, in (0, 1); the hypothesis is that the missed rate is at most this.
        planned_steps: number of training steps of the run.
        alpha: largest chance of a false alarm in the whole run.
    """

    def __init__(self, ceiling: float, planned_steps: int, alpha: float) -> None:
        if not 0 < ceiling < 1:
            raise ValueError(f"ceiling: {ceiling:g}; give the highest acceptable missed rate, in (0, 1)")
        self._ceiling, self._stakes = ceiling, np.array(_MISSED_BETS) / ceiling
        self._evidence = _Evidence(len(self._stakes), planned_steps, alpha)

    @property
    def alarm_step(self) -> int | None:
        """Returns the first training step at which the monitor raised an alarm; ``None`` if there was none."""
        return self._evidence.alarm_step

    def update(self, step: int, missed_inclusions: Sequence[float], rollouts: int) -> float:
        """Updates, with the labels of a training step, the evidence that a probe's missed rate has risen, and returns the logarithm of the
        evidence.

        Args:
            step: the training step.
            missed_inclusions: for each labelled rollout that is positive and not flagged, the probability with which it was chosen for
                labelling.
            rollouts: number of rollouts of the step, labelled or not.
        """
        estimated = sum(1 / inclusion for inclusion in missed_inclusions) / rollouts
        return self._evidence.update(np.log1p(self._stakes * (estimated - self._ceiling)), step)
