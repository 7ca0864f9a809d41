"""What an estimator's own code says of rows of activations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probescore_probes.estimators.names import Estimator

Rows = NDArray[np.float64]
Function = Callable[[Rows], NDArray[Any]]


def called(estimator: Estimator, method: str, rows: Rows) -> NDArray[Any]:
    """What a method says of rows, without warnings that it was fitted on named columns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="X does not have valid feature names")
        said: NDArray[Any] = getattr(estimator, method)(rows)
    return said


def scoring(estimator: Estimator, method: str) -> Function:
    """The estimator's own method, always ``(N, columns)``."""
    return lambda rows: np.asarray(called(estimator, method, rows), np.float64).reshape(len(rows), -1)
