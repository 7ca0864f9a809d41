"""Returns the names of scikit-learn estimators, and lists groups of estimators that are handled alike, such as kernel machines."""

from __future__ import annotations

import inspect
from typing import Any

Estimator = Any  # scikit-learn's classes have no types

_METHODS = ("predict", "predict_proba", "decision_function", "transform")

KERNEL_MACHINES = frozenset({"SVC", "NuSVC", "SVR", "NuSVR", "OneClassSVM", "KernelRidge"})
SEARCHES = frozenset({"GridSearchCV", "RandomizedSearchCV", "HalvingGridSearchCV", "HalvingRandomSearchCV"})
DELEGATES = {"FixedThresholdClassifier": "estimator_", "TunedThresholdClassifierCV": "estimator_", "SelfTrainingClassifier": "estimator_",
              "FrozenEstimator": "estimator", "RANSACRegressor": "estimator_"}  # fmt: skip


def name_of(estimator: object) -> str:
    """Returns the name of an estimator's scikit-learn class; empty for a subclass that overrides how scores or transforms are computed."""
    kind = type(estimator)
    known = next((base for base in kind.__mro__ if base.__module__.split(".")[0] == "sklearn"), None)
    if known is None or any(
        inspect.getattr_static(kind, method, None) is not inspect.getattr_static(known, method, None) for method in _METHODS
    ):
        return ""
    return known.__name__


def described(estimator: object) -> str:
    """Returns an estimator's name as its author would write it, such as ``Pipeline(StandardScaler, SVC)``."""
    parts = [part for _, part in getattr(estimator, "steps", ())]
    if not parts:
        inner = getattr(estimator, "estimator", None)
        parts = [inner] if inner is not None and not isinstance(inner, str) else []
    names = ", ".join(part if isinstance(part, str) else described(part) for part in parts if part is not None)
    return f"{type(estimator).__name__}({names})" if names else type(estimator).__name__
