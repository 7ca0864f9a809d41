"""What a text classifier that never sees the model's activations could tell: the same regression, on the completion's words or length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sampling import SampledRollout
from sklearn.linear_model import LogisticRegression
from vocabulary import WORDS


def words(rollout: SampledRollout) -> NDArray[np.int64]:
    """How often the completion has each word."""
    return np.bincount(rollout.completion_ids, minlength=len(WORDS))


def length(rollout: SampledRollout) -> NDArray[np.int64]:
    return np.array([len(rollout.completion_ids)])


BASELINES = {"bag of words": words, "completion length": length}


def baseline_scores(name: str, fitted_on: Sequence[SampledRollout], scored: Sequence[SampledRollout]) -> NDArray[np.float64]:
    features = BASELINES[name]
    estimator = LogisticRegression(max_iter=5000)
    estimator.fit(np.stack([features(rollout) for rollout in fitted_on]), [rollout.cheating for rollout in fitted_on])
    return estimator.decision_function(np.stack([features(rollout) for rollout in scored]))
