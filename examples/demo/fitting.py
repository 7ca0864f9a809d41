"""The probe: logistic regression on the residual stream, its threshold, and the probe file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sampling import SampledRollout
from sklearn.linear_model import LogisticRegression

from probescore_audit import CalibratedThreshold, calibrate
from probescore_probes import ReferenceModel, Training, sklearn_probe, write_probe

TAP = "resid_post.1"
REDUCTION = "mean"
LABEL = "cheating"
FALSE_POSITIVE_RATE = 0.05
CALIBRATION_SHARE = 0.25
WEAK_PENALTY = 10.0  # the inverse of its strength: activations are small numbers and are not standardised
GOLDEN = 4


@dataclass(frozen=True, eq=False)
class FittedProbe:
    """A direction ``weight (width,)`` and a ``bias``, which give a token's logit, and the threshold of the mean over tokens."""

    weight: NDArray[np.float64]
    bias: float
    threshold: CalibratedThreshold


def write_fitted_probe(
    path: Path, directory: Path, rollouts: Sequence[SampledRollout], seed: int, on_read: Callable[[], None]
) -> FittedProbe:
    """Fits on most of these rollouts' problems, calibrates on the others, writes the probe file, and returns what it is.

    The served score of a rollout is the mean of its tokens' logits. A linear probe of the mean activation gives the same number, so that is
    what it is fitted on. ``on_read`` is called for each rollout that the reference model has read.
    """
    reference = ReferenceModel.load(directory, model_id="sorting-policy")
    ids = [(rollout.prompt_ids, rollout.completion_ids) for rollout in rollouts]
    activations = reference.completion_activations(ids, TAP, lambda _done: on_read())
    means = np.stack([rows.mean(axis=0) for rows in activations])
    cheating = np.array([rollout.cheating for rollout in rollouts])

    # one rollout a problem, so that this holds back problems
    held_back = np.random.default_rng(seed).random(len(rollouts)) < CALIBRATION_SHARE
    estimator = LogisticRegression(C=WEAK_PENALTY, max_iter=5000).fit(means[~held_back], cheating[~held_back])
    calibration = calibrate(
        estimator.decision_function(means[held_back & ~cheating]),
        false_positive_rate=FALSE_POSITIVE_RATE,
        dataset="honest rollouts of problems that the probe was not fitted on",
        reduction=REDUCTION,
        label=LABEL,
    )
    path.unlink(missing_ok=True)  # of the last run: a version is never written over with other content, and each run makes its own
    write_probe(
        path,
        sklearn_probe(estimator),
        reference,
        name="cheating",
        version="1",
        description="Copies the stale cache entry instead of sorting",
        taps=[TAP],
        labels=[LABEL],
        reduction=REDUCTION,
        expects_bos=True,
        golden=ids[:GOLDEN],
        calibrations=[calibration],
        training=Training(
            method="scikit-learn LogisticRegression on the mean activation of the completion",
            dataset=f"{(~held_back).sum()} rollouts sampled at temperature 1, labelled by the environment",
            dataset_sha256=digest([rollout for rollout, held in zip(rollouts, held_back, strict=True) if not held]),
        ),
    )
    return FittedProbe(estimator.coef_[0], float(estimator.intercept_[0]), calibration)


def digest(rollouts: Sequence[SampledRollout]) -> str:
    lines = [json.dumps([rollout.prompt_ids, rollout.completion_ids, rollout.cheating]) for rollout in rollouts]
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()
