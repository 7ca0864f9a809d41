"""Defines ``ProbeSignal``, which says what a probe's scores do to a reward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Union

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probescore import Calibration, OutputPer, ProbeInfo, Reduction, ScoreUnit
from probescore_adapters.arrays import as_numbers
from probescore_adapters.errors import SignalError

Floats = NDArray[np.float64]
TransformFunction = Callable[[Floats], ArrayLike]
MaskFunction = Callable[[NDArray[np.int64]], ArrayLike]


class Mode(str, Enum):
    """Says how a signal acts on the reward of a rollout."""

    REWARD = "reward"
    """Adds the signal's term to the reward."""
    PENALTY = "penalty"
    """Subtracts the signal's term from the reward."""
    SCREEN = "screen"
    """Removes a flagged rollout from training."""
    GATE = "gate"
    """Multiplies the task's reward by less than 1, with weight 1 by 0, if the rollout is flagged."""
    MONITOR = "monitor"
    """Changes nothing: the numbers are only logged."""
    DENSE = "dense"
    """Adds a term to each token."""


class Transform(str, Enum):
    """Names the function from a probe's number to what is weighted."""

    IDENTITY = "identity"
    """Is the number itself."""
    SIGMOID = "sigmoid"
    """Is ``1 / (1 + exp(-number))``."""
    FLAG = "flag"
    """Is 1 at or above the threshold, else 0."""
    EXCESS = "excess"
    """Is how far the number is above the threshold, else 0."""
    FLAG_AND_EXCESS = "flag_and_excess"
    """Is the sum of ``FLAG`` and ``EXCESS``."""


class MaskKind(str, Enum):
    """Says which tokens of a completion count."""

    GIVEN = "given"
    """Counts the tokens of the mask that the trainer has, such as without the output of tools; all where it has none."""
    ALL = "all"
    """Counts every token."""


_DEFAULT_TRANSFORMS = {
    Mode.REWARD: Transform.IDENTITY,
    Mode.PENALTY: Transform.FLAG,
    Mode.SCREEN: Transform.FLAG,
    Mode.GATE: Transform.FLAG,
    Mode.MONITOR: Transform.IDENTITY,
    Mode.DENSE: Transform.IDENTITY,
}
_THRESHOLDED = (Transform.FLAG, Transform.EXCESS, Transform.FLAG_AND_EXCESS)


@dataclass(frozen=True)
class ProbeSignal:
    """Says which number of which probe counts, and what it does to a reward.

    Attributes:
        probe: ``"name"``, or ``"name@version"``.
        reduction: from a score per token to a number per rollout, ``"mean"`` or ``"topk_mean(8)"``; ``None`` = the probe's own. Of no
            meaning to ``dense``, and to a probe that pools by itself.
        mask: which tokens count: ``"given"`` (the trainer's mask), ``"all"``, or a function from ``completion_ids (T,)`` to a 0/1 mask
            ``(T,)``, which counts within the trainer's mask. A rollout of which nothing counts is unscorable.
        transform: from the number to what is weighted; a name, or a function of an array ``(n,)`` to one ``(n,)``. By default ``flag``
            for ``penalty``, ``screen`` and ``gate``, else ``identity``. For a penalty by threshold take ``flag``, for a progressive one
            ``excess``, for both ``flag_and_excess``.
        weight: times the transformed number; above 0, except that rewards (``reward``, ``dense``) may weigh less than 0. For ``gate`` in
            (0, 1]: the share of the task's reward that a flagged rollout loses. Of no meaning to ``screen`` and ``monitor``.
        mode: what it acts on; ``Mode``.
        threshold: in the unit of what the reduction gives; at or above it a rollout is flagged. ``None`` = the probe's own calibration for
            this reduction and label.
        label: of a probe with several, which one; "" = the first.
        name: in metrics; the probe's by default.

    Raises:
        SignalError: a field does not go with another; names it.
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

    def __post_init__(self) -> None:
        def put(field: str, value: object) -> None:
            object.__setattr__(self, field, value)

        if not isinstance(self.probe, str) or not self.probe:
            raise SignalError("probe", f"expected a name, got {self.probe!r}")
        put("mode", _choice("mode", self.mode, Mode))
        put("name", self.name or self.probe)
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

    @property
    def needs_threshold(self) -> bool:
        """Says whether the signal means nothing without a threshold."""
        return self.transform in _THRESHOLDED


def _choice(field: str, value: object, choices: type[Enum]) -> Enum:
    try:
        return choices(value)
    except ValueError:
        raise SignalError(field, f"{value!r} is none of {', '.join(str(choice.value) for choice in choices)}") from None


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class BoundSignal:
    """Holds a signal and the loaded probe whose scores it takes.

    Attributes:
        probe: ``"name@version"``, so that another version is never read in its place.
        digests: of its graph and of its manifest, so that neither is another graph or another calibration.
        reduction: the signal's or the probe's own; ``None`` for a probe that pools by itself.
        label: index of the label.
        threshold: the signal's or the calibration's; NaN if there is none.
        bounds: what a transformed number can be.
    """

    signal: ProbeSignal
    probe: str
    digests: tuple[str, str]
    reduction: Union[Reduction, None]
    label: int
    threshold: float
    bounds: tuple[float, float]

    @classmethod
    def bind(cls, signal: ProbeSignal, probes: tuple[ProbeInfo, ...]) -> BoundSignal:
        """Finds a signal's probe among those that a server has loaded.

        Raises:
            SignalError: there is none or more than one, or it has no such label, no threshold, or no scores per token for ``dense``.
        """
        matching = [probe for probe in probes if signal.probe in (probe.name, probe.key)]
        if len(matching) != 1:
            known = ", ".join(probe.key for probe in matching or probes) or "none"
            found = "several versions are loaded" if matching else "it is not loaded"
            raise SignalError("probe", f"{signal.probe!r}: {found}; the server has {known}", signal.name)
        (probe,) = matching
        if signal.label and signal.label not in probe.labels:
            raise SignalError("label", f"{signal.label!r} is none of {', '.join(probe.labels) or 'none'}", signal.name)
        if signal.mode is Mode.DENSE and probe.output_per is not OutputPer.TOKEN:
            raise SignalError("mode", f"{probe.key} pools by itself and has no scores per token", signal.name)
        threshold = signal.threshold if signal.threshold is not None else _calibrated(signal, probe)
        if threshold is None and signal.needs_threshold:
            raise SignalError("threshold", f"{probe.key} has no calibration for this reduction and label: give one", signal.name)
        label = probe.labels.index(signal.label) if signal.label else 0
        reduction = (
            None if probe.output_per is OutputPer.ROLLOUT else Reduction.parse(signal.reduction or probe.default_reduction or "mean")
        )
        digests = (probe.graph_sha256, probe.manifest_sha256)
        return cls(signal, probe.key, digests, reduction, label, math.nan if threshold is None else threshold, _bounds(signal, probe.unit))

    def flags(self, values: Floats) -> NDArray[np.bool_]:
        """Returns which numbers are at or above the threshold; none if there is no threshold."""
        return values >= self.threshold

    def transformed(self, values: Floats) -> Floats:
        """Returns the transform of each number, in the same shape.

        Raises:
            SignalError: a function that the user gave returned another shape.
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


def _calibrated(signal: ProbeSignal, probe: ProbeInfo) -> float | None:
    wanted = signal.reduction or probe.default_reduction
    label = signal.label or (probe.labels[0] if probe.labels else "")

    def fits(calibration: Calibration) -> bool:
        same_reduction = probe.output_per is OutputPer.ROLLOUT or (calibration.reduction or probe.default_reduction) == wanted
        return same_reduction and calibration.label in ("", label)

    fitting = [calibration.threshold for calibration in probe.calibrations if fits(calibration)]
    return fitting[0] if fitting and signal.mode is not Mode.DENSE else None


def _bounds(signal: ProbeSignal, unit: ScoreUnit) -> tuple[float, float]:
    if signal.transform in (Transform.FLAG, Transform.SIGMOID):
        return 0.0, 1.0
    if signal.transform in (Transform.EXCESS, Transform.FLAG_AND_EXCESS):
        return 0.0, math.inf
    summed = isinstance(signal.reduction, Reduction) and signal.reduction.kind.value == "sum"
    if signal.transform is Transform.IDENTITY and unit is ScoreUnit.PROBABILITY and not summed:
        return 0.0, 1.0
    return -math.inf, math.inf
