"""How far scores are from those that they should be, in units of the standard deviation: one measure for every check of golden scores."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def deviations(found: ArrayLike, expected: ArrayLike, scale: ArrayLike) -> NDArray[np.float64]:
    """``|found − expected| / scale`` of every score.

    Args:
        found: ``(rows, labels)``.
        expected: of the same shape.
        scale: ``(labels,)``, the standard deviations.

    Returns:
        ``(rows, labels)``; infinite wherever one of the numbers is not finite, or a scale is none: no arithmetic makes two scores alike.
    """
    found, expected, scale = (np.asarray(numbers, np.float64) for numbers in (found, expected, scale))
    with np.errstate(all="ignore"):
        measured = np.abs(found - expected) / scale
    known = np.isfinite(found) & np.isfinite(expected) & np.isfinite(scale) & (scale >= np.finfo(np.float64).tiny)
    return np.where(known & np.isfinite(measured), measured, np.inf)


def largest_deviation(found: ArrayLike, expected: ArrayLike, scale: ArrayLike) -> float:
    """The largest of ``deviations``; infinite if there is no score."""
    return float(deviations(found, expected, scale).max(initial=-np.inf)) if np.size(found) else np.inf
