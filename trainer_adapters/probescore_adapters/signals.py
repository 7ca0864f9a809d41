"""Defines ``ProbeSignal``, a rule that changes a rollout's reward according to a probe's score."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Union

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probescore import Calibration, OutputPer, ProbeInfo, Reduction, ScoreUnit
from probescore.types import FROZEN, named_probe
from probescore.types.readings import name_problem
from probescore_adapters.arrays import as_numbers
from probescore_adapters.errors import SignalError

Floats = NDArray[np.float64]
TransformFunction = Callable[[Floats], ArrayLike]
MaskFunction = Callable[[NDArray[np.int64]], ArrayLike]
ReportFunction = Callable[[NDArray[np.int64]], Union[bool, None]]


class Mode(str, Enum):
    """Enumeration of the ways in which a signal (a rule from a probe's scores to rewards) acts on the reward of a rollout."""

    REWARD = "reward"
    """Mode: the probe's weighted score is added to the reward."""
    PENALTY = "penalty"
    """Mode: the probe's weighted score is subtracted from the reward."""
    SCREEN = "screen"
    """Mode: a flagged rollout (score at or above the threshold) is removed from training."""
    GATE = "gate"
    """Mode: the task's reward of a flagged rollout (score at or above the threshold) is multiplied by ``1 - weight``."""
    RELATIVE_GATE = "relative_gate"
    """Mode: the task's reward is multiplied by ``1 - weight * z``, limited to [0, 1], where ``z`` says by how many standard deviations the
    score is above the mean of its group. It needs no threshold, and cannot see what all rollouts of a group have in common.
    """
    AGREEMENT = "agreement"
    """Mode: ``weight`` is added if what the rollout reports of itself agrees with the probe: a report of yes and a flagged rollout, or a
    report of no and one that is not flagged. A rollout that reports nothing gets nothing.
    """
    MONITOR = "monitor"
    """Mode: no reward is changed, and the probe's scores are only logged."""
    DENSE = "dense"
    """Mode: the probe's weighted score of each token is added to the reward of that token."""


class Transform(str, Enum):
    """Enumeration of the functions that transform a probe's score before the score is multiplied by the signal's weight."""

    IDENTITY = "identity"
    """Transform: the probe's score itself."""
    SIGMOID = "sigmoid"
    """Transform: the sigmoid of the probe's score, ``1 / (1 + exp(-score))``."""
    FLAG = "flag"
    """Transform: 1 for a score at or above the threshold, else 0."""
    EXCESS = "excess"
    """Transform: the score minus the threshold for a score above the threshold, else 0."""
    FLAG_AND_EXCESS = "flag_and_excess"
    """Transform: 1 plus the score minus the threshold for a score at or above the threshold, else 0."""


class MaskKind(str, Enum):
    """Enumeration of the masks that determine which tokens of a completion count."""

    GIVEN = "given"
    """Mask: the one that the trainer gives, which for example leaves out the output of tools; all tokens count if the trainer
    gives none.
    """
    ALL = "all"
    """Mask: every token of a completion counts."""


_DEFAULT_TRANSFORMS = {
    Mode.REWARD: Transform.IDENTITY,
    Mode.PENALTY: Transform.FLAG,
    Mode.SCREEN: Transform.FLAG,
    Mode.GATE: Transform.FLAG,
    Mode.RELATIVE_GATE: Transform.IDENTITY,
    Mode.AGREEMENT: Transform.FLAG,
    Mode.MONITOR: Transform.IDENTITY,
    Mode.DENSE: Transform.IDENTITY,
}
_THRESHOLDED = (Transform.FLAG, Transform.EXCESS, Transform.FLAG_AND_EXCESS)


@dataclass(frozen=True)
class ProbeSignal:
    """A rule that changes a rollout's reward: selects a score of a probe, and determines how the score acts on the reward.

    Attributes:
        probe: the probe, as ``"name"`` or ``"name@version"``.
        reduction: reduction from per-token scores to one number per rollout, such as ``"mean"`` or ``"topk_mean(8)"``; ``None`` = the
            probe's default. Ignored by mode ``dense``, and for a probe that scores rollouts.
        mask: the tokens that count: ``"given"`` (the trainer's mask), ``"all"``, or a function from ``completion_ids (T,)`` to a 0/1 mask
            ``(T,)``, which is combined with the trainer's mask: a token must be 1 in both. A rollout of which no token counts is
            unscorable.
        transform: function applied to the score before weighting; a name, or a function from an array ``(n,)`` to an array ``(n,)``. The
            default is ``flag`` for ``penalty``, ``screen``, ``gate`` and ``agreement``, else ``identity``. Use ``flag`` for a fixed penalty
            from the threshold on, ``excess`` for a penalty that grows above the threshold, and ``flag_and_excess`` for both.
        weight: factor of the transformed score; above 0, except for ``reward`` and ``dense``, where the weight may be negative. For
            ``gate`` the weight is in (0, 1]: the share of the task's reward that a flagged rollout loses; for ``relative_gate`` it is the
            share that a rollout loses for each standard deviation. Ignored by ``screen`` and ``monitor``.
        mode: how the signal acts on the reward; a ``Mode``.
        threshold: threshold in the unit of the reduced score; a rollout is flagged if its score is at or above the threshold. ``None`` =
            the threshold of the probe's calibration for this reduction and label. Calibrations hold for the frozen model only: on another
            reading ``None`` = no threshold.
        label: label of the probe whose scores are used; "" = the first label.
        name: name of the signal in metrics; by default the probe's name, or ``probe/reading`` on another reading than the frozen one.
        reading: whose activations the probe reads: ``"frozen"``, or the name of a reading that is loaded at the server, such as
            ``"policy"``. A ``monitor`` of another reading also logs by how much its scores differ from those on the frozen model.
        report: function that finds what a rollout reports of itself, from ``completion_ids (T,)`` to true (it says that it has what the
            probe looks for), false (it says that it has not) or ``None`` (it does not say). Required by mode ``agreement``, which only
            knows the transforms ``flag`` and ``sigmoid``; other modes have none. The tokens of the report itself are best left out of
            ``mask``, since the probe would read what is said instead of what was done.

    Raises:
        SignalError: two fields contradict each other; the error names one of them.
    """

    probe: str
    reduction: Union[str, Reduction, None] = None
    mask: Union[MaskKind, str, MaskFunction] = MaskKind.GIVEN
    transform: Union[Transform, str, TransformFunction, None] = None
    weight: float = 1.0
    mode: Union[Mode, str] = Mode.PENALTY
    threshold: Union[float, None] = None
    label: str = ""
    name: str = ""
    reading: str = FROZEN
    report: Union[ReportFunction, None] = None

    def __post_init__(self) -> None:
        def put(field: str, value: object) -> None:
            object.__setattr__(self, field, value)

        if not isinstance(self.probe, str) or not self.probe:
            raise SignalError("probe", f"expected a name, got {self.probe!r}")
        if problem := name_problem(self.reading):
            raise SignalError("reading", problem)
        put("mode", _choice("mode", self.mode, Mode))
        put("name", self.name or (f"{self.probe}/{self.reading}" if self.reads_other_weights else self.probe))
        if not callable(self.mask):
            put("mask", _choice("mask", self.mask, MaskKind))
        if self.transform is None:
            put("transform", _DEFAULT_TRANSFORMS[Mode(self.mode)])
        elif not callable(self.transform):
            put("transform", _choice("transform", self.transform, Transform))
        if self.reduction is not None:
            if self.mode is Mode.DENSE:
                raise SignalError("reduction", "a dense signal has a number per token and none per rollout")
            try:
                put("reduction", Reduction.parse(self.reduction))
            except ValueError as error:
                raise SignalError("reduction", str(error)) from None
        self._check_numbers()

    def _check_numbers(self) -> None:
        if not _is_finite(self.weight) or self.weight == 0:
            raise SignalError("weight", f"expected a finite number other than 0, got {self.weight!r}")
        if self.weight < 0 and self.mode not in (Mode.REWARD, Mode.DENSE):
            raise SignalError("weight", f"expected a number above 0 for the mode {Mode(self.mode).value}, got {self.weight!r}")
        if self.weight > 1 and self.mode is Mode.GATE:
            raise SignalError("weight", f"expected a share in (0, 1] for the mode gate, got {self.weight!r}")
        if self.threshold is not None and not _is_finite(self.threshold):
            raise SignalError("threshold", f"expected a finite number, got {self.threshold!r}")
        if self.mode is Mode.SCREEN and self.transform is not Transform.FLAG:
            raise SignalError("transform", "the mode screen knows flagged and not flagged only: the transform is flag")
        if self.mode is Mode.AGREEMENT and self.transform not in (Transform.FLAG, Transform.SIGMOID):
            raise SignalError("transform", "the mode agreement compares a report with a number in [0, 1]: the transform is flag or sigmoid")
        if (self.mode is Mode.AGREEMENT) != (self.report is not None) or not (self.report is None or callable(self.report)):
            problem = f"the mode agreement needs a function from completion_ids, and no other mode has one, got {self.report!r}"
            raise SignalError("report", problem)
        if self.reads_other_weights and self.needs_threshold and self.threshold is None:
            problem = f"calibrations hold for the frozen model only, and this signal reads {self.reading!r}: give a threshold found on it"
            raise SignalError("threshold", problem, self.name)

    @property
    def reads_other_weights(self) -> bool:
        """Returns whether the probe reads the activations of other weights than the frozen model's."""
        return self.reading != FROZEN

    @property
    def logs_drift(self) -> bool:
        """Returns whether the signal needs its probe's scores on the frozen model, too, to log by how much its own scores differ."""
        return self.reads_other_weights and self.mode is Mode.MONITOR

    @property
    def needs_threshold(self) -> bool:
        """Returns whether the signal (rule from probe scores to rewards) cannot be computed without a threshold."""
        return self.transform in _THRESHOLDED


def _choice(field: str, value: object, choices: type[Enum]) -> Enum:
    try:
        return choices(value)
    except ValueError:
        raise SignalError(field, f"{value!r} is none of {', '.join(str(choice.value) for choice in choices)}") from None


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class PinnedProbe:
    """The version of a probe that a scorer reads, with digests by which a replacement of the probe is noticed.

    Attributes:
        probe: ``name@version``.
        graph_sha256: digest of the probe's graph.
        manifest_sha256: digest of the probe's manifest (description in its file), calibrations included.
    """

    probe: str
    graph_sha256: str
    manifest_sha256: str

    @classmethod
    def of(cls, probe: ProbeInfo) -> PinnedProbe:
        """Returns the name and version of a loaded probe, with digests by which a replacement of the probe is noticed."""
        return cls(probe.key, probe.graph_sha256, probe.manifest_sha256)


@dataclass(frozen=True)
class BoundSignal:
    """A signal (a rule from a probe's scores to rewards) together with the loaded probe whose scores the signal uses.

    Attributes:
        pin: the version of the probe with its digests, so that another version, graph or calibration is noticed.
        reduction: the signal's reduction or the probe's default; ``None`` for a probe that scores rollouts.
        label: index of the label in the probe's labels.
        threshold: the threshold of the signal or of the probe's calibration; NaN if there is none.
        calibration: the calibration that the threshold is taken from; ``None`` if it is the signal's own, or there is none.
        bounds: the least and the greatest value that a transformed score can have.
    """

    signal: ProbeSignal
    pin: PinnedProbe
    reduction: Union[Reduction, None]
    label: int
    threshold: float
    calibration: Union[Calibration, None]
    bounds: tuple[float, float]

    @property
    def probe(self) -> str:
        """Returns the name and version of the probe that a signal (rule from probe scores to rewards) uses, as ``"name@version"``."""
        return self.pin.probe

    @classmethod
    def bind(cls, signal: ProbeSignal, probes: tuple[ProbeInfo, ...]) -> BoundSignal:
        """Finds the probe of a signal (a rule from a probe's scores to rewards) among the probes that a server has loaded; a name without a
        version means the highest version.

        Raises:
            SignalError: no loaded probe matches, or the probe lacks the label, a threshold, or the per-token scores that ``dense`` needs.
        """
        probe = named_probe(signal.probe, probes)
        if probe is None:
            known = ", ".join(probe.key for probe in probes) or "none"
            raise SignalError("probe", f"{signal.probe!r}: it is not loaded; the server has {known}", signal.name)
        return cls.to(signal, probe)

    @classmethod
    def to(cls, signal: ProbeSignal, probe: ProbeInfo) -> BoundSignal:
        """Joins a signal (a rule from a probe's scores to rewards) with a loaded probe, after a check that the probe has what the signal
        uses.

        Raises:
            SignalError: the probe lacks the label, a threshold, or the per-token scores that ``dense`` needs.
        """
        if signal.label and signal.label not in probe.labels:
            raise SignalError("label", f"{signal.label!r} is none of {', '.join(probe.labels) or 'none'}", signal.name)
        if signal.mode is Mode.DENSE and probe.output_per is not OutputPer.TOKEN:
            raise SignalError("mode", f"{probe.key} pools by itself and has no scores per token", signal.name)
        calibration = _calibration(signal, probe) if signal.threshold is None and not signal.reads_other_weights else None
        threshold = signal.threshold if calibration is None else calibration.threshold
        if threshold is None and signal.needs_threshold:
            raise SignalError("threshold", f"{probe.key} has no calibration for this reduction and label: give one", signal.name)
        label = probe.labels.index(signal.label) if signal.label else 0
        reduction = (
            None if probe.output_per is OutputPer.ROLLOUT else Reduction.parse(signal.reduction or probe.default_reduction or "mean")
        )
        known = math.nan if threshold is None else threshold
        return cls(signal, PinnedProbe.of(probe), reduction, label, known, calibration, _bounds(signal, probe.unit))

    def flags(self, values: Floats) -> NDArray[np.bool_]:
        """Returns for each of several probe scores whether the score is at or above the threshold of a signal (rule from probe scores to
        rewards); false for all if there is no threshold.
        """
        return values >= self.threshold

    def transformed(self, values: Floats) -> Floats:
        """Applies a signal's transform (the function before weighting) to probe scores, and returns the results in an array of the same
        shape as the scores.

        Raises:
            SignalError: the user's transform function failed, or returned another shape.
        """
        transform = self.signal.transform
        if callable(transform) and not isinstance(transform, Transform):
            try:
                found = as_numbers(transform(values), "what it gave")
            except (TypeError, ValueError) as error:
                raise SignalError("transform", f"it failed or gave no numbers: {error}", self.signal.name) from error
            if found.shape != values.shape:
                raise SignalError("transform", f"it gave the shape {found.shape} for {values.shape}", self.signal.name)
            return found
        if transform is Transform.IDENTITY:
            return values
        if transform is Transform.SIGMOID:
            return 0.5 * (1 + np.tanh(0.5 * values))
        flag = self.flags(values).astype(np.float64)
        if transform is Transform.FLAG:
            return flag
        excess = np.maximum(values - self.threshold, 0.0)
        return excess if transform is Transform.EXCESS else flag + excess


def _calibration(signal: ProbeSignal, probe: ProbeInfo) -> Calibration | None:
    wanted = signal.reduction or probe.default_reduction
    label = signal.label or (probe.labels[0] if probe.labels else "")

    def fits(calibration: Calibration) -> bool:
        same_reduction = probe.output_per is OutputPer.ROLLOUT or (calibration.reduction or probe.default_reduction) == wanted
        return same_reduction and calibration.label in ("", label)

    return next(filter(fits, probe.calibrations), None) if signal.mode is not Mode.DENSE else None


def _bounds(signal: ProbeSignal, unit: ScoreUnit) -> tuple[float, float]:
    if signal.transform in (Transform.FLAG, Transform.SIGMOID):
        return 0.0, 1.0
    if signal.transform in (Transform.EXCESS, Transform.FLAG_AND_EXCESS):
        return 0.0, math.inf
    summed = isinstance(signal.reduction, Reduction) and signal.reduction.kind.value == "sum"
    if signal.transform is Transform.IDENTITY and unit is ScoreUnit.PROBABILITY and not summed:
        return 0.0, 1.0
    return -math.inf, math.inf
