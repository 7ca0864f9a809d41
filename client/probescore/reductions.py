"""Reduces the scores that a probe gives to the selected tokens of a rollout to one number.

The server runs this module's code, and users can run the code on per-token scores; ``docs/explanation/scores.md`` gives the formulas.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray


class ReductionKind(str, Enum):
    """Enumeration of the ways to reduce a probe's scores of the selected tokens of a rollout to one number, such as ``mean``; each value is
    the name that a user writes.
    """

    MEAN = "mean"
    MAX = "max"
    MIN = "min"
    SUM = "sum"
    LAST = "last"
    TOPK_MEAN = "topk_mean"
    EMA_MAX = "ema_max"
    WINDOW_MAX_MEAN = "window_max_mean"
    SOFTMAX_MEAN = "softmax_mean"
    FRACTION_ABOVE = "fraction_above"


_PARAMETERS: dict[ReductionKind, str] = {
    ReductionKind.TOPK_MEAN: "k",
    ReductionKind.EMA_MAX: "alpha",
    ReductionKind.WINDOW_MAX_MEAN: "w",
    ReductionKind.SOFTMAX_MEAN: "temperature",
    ReductionKind.FRACTION_ABOVE: "threshold",
}
_WRITTEN = re.compile(r"\s*(?P<kind>[a-z_]+)\s*(?:\(\s*(?:(?P<name>[a-z]+)\s*=)?\s*(?P<parameter>[^()=]+?)\s*\))?\s*")


@dataclass(frozen=True)
class Reduction:
    """Value object with a way to reduce a probe's scores of the selected tokens of a rollout to one number, such as their mean, or the mean
    of the 8 highest: ``Reduction(ReductionKind.TOPK_MEAN, 8)`` or ``Reduction.parse("topk_mean(8)")``.

    Raises:
        ValueError: the kind's parameter is missing or out of range, or a parameter is given to a kind without one.
    """

    kind: ReductionKind
    parameter: float | None = None

    def __post_init__(self) -> None:
        name = _PARAMETERS.get(self.kind)
        if name is None:
            if self.parameter is not None:
                raise ValueError(f"reduction {self.kind.value!r} takes no parameter, got {self.parameter}")
            return
        if self.parameter is None:
            raise ValueError(f"reduction {self.kind.value!r} needs its parameter: write {self.kind.value}({name})")
        if not math.isfinite(self.parameter):
            raise ValueError(f"{name} of {self.kind.value} must be finite, got {self.parameter}")
        if name in ("k", "w") and not (self.parameter >= 1 and float(self.parameter).is_integer()):
            raise ValueError(f"{name} of {self.kind.value} must be an integer of at least 1, got {self.parameter:g}")
        if name == "alpha" and not 0 < self.parameter <= 1:
            raise ValueError(f"alpha of {self.kind.value} must be in (0, 1], got {self.parameter:g}")
        if name == "temperature" and not self.parameter > 0:
            raise ValueError(f"temperature of {self.kind.value} must be above 0, got {self.parameter:g}")

    @classmethod
    def parse(cls, written: str | Reduction) -> Reduction:
        """Converts the text form of a reduction (rule from per-token scores to one number) to a ``Reduction``: ``"mean"``,
        ``"topk_mean(8)"`` or ``"ema_max(alpha=0.2)"``.

        Raises:
            ValueError: the text names no reduction, or the parameter in the text is wrong.
        """
        if isinstance(written, Reduction):
            return written
        match = _WRITTEN.fullmatch(written)
        kinds = {kind.value: kind for kind in ReductionKind}
        if match is None or match["kind"] not in kinds:
            raise ValueError(f"unknown reduction {written!r}; one of {', '.join(kinds)}")
        kind = kinds[match["kind"]]
        name = _PARAMETERS.get(kind)
        if match["name"] is not None and match["name"] != name:
            raise ValueError(f"reduction {kind.value!r} has no parameter {match['name']!r}")
        if match["parameter"] is None:
            return cls(kind)
        try:
            parameter = float(match["parameter"])
        except ValueError:
            raise ValueError(f"the parameter of reduction {written!r} is not a number") from None
        return cls(kind, parameter)

    def __str__(self) -> str:
        if self.parameter is None:
            return self.kind.value
        # repr keeps every digit, so that what is written reads back as the same reduction
        return f"{self.kind.value}({repr(float(self.parameter)).removesuffix('.0')})"


def reduce_scores(scores: NDArray[np.float32], reduction: Reduction) -> NDArray[np.float32]:
    """Reduces the per-token scores of the selected tokens to one number for each label of a probe.

    Args:
        scores: ``(T, L)``, one row for each selected token in order, one column for each label.
        reduction: the reduction to compute.

    Returns:
        ``(L,)`` float32; NaN for every label when ``T == 0``: a selection without tokens has no score, never 0.
    """
    count = scores.shape[0]
    if count == 0:
        return np.full(scores.shape[1], np.nan, np.float32)
    # float64 inside, so that the sum over a long rollout does not depend on the order of summation
    x = scores.astype(np.float64)
    parameter = reduction.parameter if reduction.parameter is not None else math.nan
    match reduction.kind:
        case ReductionKind.MEAN:
            reduced = x.mean(axis=0)
        case ReductionKind.MAX:
            reduced = x.max(axis=0)
        case ReductionKind.MIN:
            reduced = x.min(axis=0)
        case ReductionKind.SUM:
            reduced = x.sum(axis=0)
        case ReductionKind.LAST:
            reduced = x[-1]
        case ReductionKind.TOPK_MEAN:
            k = min(int(parameter), count)
            reduced = np.partition(x, count - k, axis=0)[count - k :].mean(axis=0)
        case ReductionKind.EMA_MAX:
            reduced = _ema(x, parameter).max(axis=0)
        case ReductionKind.WINDOW_MAX_MEAN:
            w = min(int(parameter), count)
            reduced = _window_sums(x, w).max(axis=0) / w
        case ReductionKind.SOFTMAX_MEAN:
            # shifted before the division, so that a tiny temperature cannot overflow
            weights = np.exp((x - x.max(axis=0)) / parameter)
            reduced = (weights * x).sum(axis=0) / weights.sum(axis=0)
        case ReductionKind.FRACTION_ABOVE:
            reduced = (x > parameter).mean(axis=0)
    return np.asarray(reduced, np.float32)


def _ema(x: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """Computes the exponential moving average of each column of ``(T, L)`` numbers, whose first value is the first row; returns ``(T, L)``.

    The rows are divided into about √T blocks, which are computed in parallel as if each began with 0, in about √T steps of Python. Then the
    decayed last average of each block is added to the block after it.
    """
    count, labels = x.shape
    length = math.isqrt(count - 1) + 1
    average = np.zeros((-(-count // length), length, labels))
    flat = average.reshape(-1, labels)
    flat[:count] = alpha * x
    flat[0] = x[0]
    for step in range(1, length):
        average[:, step] += (1 - alpha) * average[:, step - 1]
    decay = (1 - alpha) ** np.arange(1, length + 1)[:, np.newaxis]
    for block in range(1, len(average)):
        average[block] += decay * average[block - 1, -1]
    return flat[:count]


def _window_sums(x: NDArray[np.float64], w: int) -> NDArray[np.float64]:
    """Computes the sums of ``w`` consecutive rows of ``(T, L)`` numbers; returns ``(T - w + 1, L)``. The cost is the same for every ``w``.

    Each window is the end of one block of ``w`` rows and the beginning of the next block, so that no subtraction, and no cancellation of
    digits, is needed.
    """
    count, labels = x.shape
    blocks = np.zeros((-(-count // w), w, labels))
    blocks.reshape(-1, labels)[:count] = x
    beginnings = blocks.cumsum(axis=1).reshape(-1, labels)[w - 1 : count]
    ends = blocks[:, ::-1].cumsum(axis=1)[:, ::-1].reshape(-1, labels)[: count - w + 1]
    ends[::w] = 0  # a whole block, which its beginning is already
    sums: NDArray[np.float64] = beginnings + ends
    return sums
