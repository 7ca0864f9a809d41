"""What is promised of scores in float32, which has a rounding error of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BOUND = 1e-4
"""Of the standard deviation of the scores."""

FACTOR = 1.5
"""Where plain float32 is itself further from float64 than ``BOUND``: how much further ours may be."""

_SHARES = {"p50": 0.5, "p99": 0.99, "maximum": 1.0}

Scores = NDArray[np.floating[Any]]


def further_than_plain_float32(found: Scores, float32: Scores, float64: Scores) -> dict[str, str]:
    """Where scores break the promise: neither within ``BOUND`` of float64 nor within ``FACTOR`` times plain float32's distance from it.

    Args:
        found: ``(N,)``, ours.
        float32: of plain Hugging Face in float32.
        float64: of plain Hugging Face in float64.

    Returns:
        By share of the scores, both distances as multiples of the standard deviation; empty if the promise is kept.
    """
    ours, plain = ((np.abs(scores - float64) / float64.std()) for scores in (found, float32))
    distances = {name: (np.quantile(ours, share), np.quantile(plain, share)) for name, share in _SHARES.items()}
    return {name: f"{a:.2g}, plain {b:.2g}" for name, (a, b) in distances.items() if not a <= max(BOUND, FACTOR * b)}
