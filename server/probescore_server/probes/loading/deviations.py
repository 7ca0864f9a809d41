"""Measures how far a probe's scores are from expected ones, in standard deviations; every check of golden scores (those of the author's
code) uses this measure.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def deviations(found: ArrayLike, expected: ArrayLike, scale: ArrayLike) -> NDArray[np.float64]:
    """Computes the deviation ``|found − expected| / scale`` of every score of a probe.

    Args:
        found: the scores to judge, ``(rows, labels)``.
        expected: the expected scores, ``(rows, labels)``.
        scale: standard deviation of each label's scores, ``(labels,)``.

    Returns:
        The deviations, ``(rows, labels)`` float64; infinite wherever a number is not finite or the scale is 0, so that such scores never
            pass as equal.
    """
    found, expected, scale = (np.asarray(numbers, np.float64) for numbers in (found, expected, scale))
    with np.errstate(all="ignore"):
        measured = np.abs(found - expected) / scale
    known = np.isfinite(found) & np.isfinite(expected) & np.isfinite(scale) & (scale >= np.finfo(np.float64).tiny)
    return np.where(known & np.isfinite(measured), measured, np.inf)


def largest_deviation(found: ArrayLike, expected: ArrayLike, scale: ArrayLike) -> float:
    """Returns the largest deviation of a probe's scores from the expected ones, in standard deviations; infinite if there are no scores."""
    return float(deviations(found, expected, scale).max(initial=-np.inf)) if np.size(found) else np.inf
