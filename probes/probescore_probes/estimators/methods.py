"""Calls the scoring methods of scikit-learn estimators on rows of activations."""

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
    """Calls a method of an estimator on rows, and silences the warning that the estimator was fitted on named columns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="X does not have valid feature names")
        said: NDArray[Any] = getattr(estimator, method)(rows)
    return said


def scoring(estimator: Estimator, method: str) -> Function:
    """Returns a function that calls a scoring method of a scikit-learn estimator on rows ``(N, width)`` and always returns ``(N, columns)``
    float64.
    """
    return lambda rows: np.asarray(called(estimator, method, rows), np.float64).reshape(len(rows), -1)
