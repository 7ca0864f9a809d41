"""Measures how well a probe's scores separate rollouts with a behaviour from rollouts without it.

The measures are thresholds at a stated false-positive rate, and AUROC. Each number comes with its 95% interval.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import binomtest, mannwhitneyu, norm

from probescore_audit import arguments
from probescore_audit.estimates import Auroc, CalibratedThreshold

_CONFIDENCE = 0.95
_LARGEST = float(np.finfo(np.float32).max)


def calibrate(
    negatives: ArrayLike, *, false_positive_rate: float, dataset: str, reduction: str | None = "mean", label: str = ""
) -> CalibratedThreshold:
    """Finds the lowest threshold that flags at most a stated share of negative rollouts, which are rollouts without the behaviour.

    The 95% interval of the share that is flagged is that of Clopper and Pearson (1934, Biometrika 26:404), which is exact, so that its
    coverage is at least 95%. The interval holds for new rollouts from the same source. The negatives must not be rollouts on which the
    probe was fitted.

    Args:
        negatives: reduced scores of negative rollouts, ``(n,)``, in the unit that the probe's manifest (the description in its file) names
            as ``reduce_on``.
        false_positive_rate: largest share of the negatives that may be flagged, in (0, 1).
        dataset: description of the negatives, in words.
        reduction: the reduction that made the scores; ``None`` for a probe that pools by itself.
        label: label of the scores, if the probe has several.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there are too few negatives for even one to be flagged at this rate, a score is not finite, the threshold would lie
            beyond float32, or there is no reduction of the given name.
    """
    scores = _finite(negatives, "negatives")
    false_positive_rate = arguments.number(false_positive_rate, "false_positive_rate", "a number in (0, 1), such as 0.01")
    dataset = _said(dataset, "dataset")
    reduction = None if reduction is None else arguments.reduction(reduction, "reduction")
    label = arguments.text(label, "label")
    if not 0 < false_positive_rate < 1:
        raise ValueError(f"false_positive_rate must be in (0, 1), got {false_positive_rate:g}; give one such as 0.01")
    allowed = math.floor(false_positive_rate * len(scores) + 1e-9)
    if allowed < 1:
        needed = math.ceil(1 / false_positive_rate - 1e-9)
        raise ValueError(
            f"{len(scores)} negatives cannot support a false-positive rate of {false_positive_rate:g}; it takes at least {needed}"
        )
    highest_passed = np.sort(scores)[-1 - allowed]
    above = scores[scores > highest_passed]
    # The threshold lies half-way to the next score, so that rounding moves no rollout across; just above the score where there is no next.
    threshold = (highest_passed + above.min()) / 2 if len(above) else np.nextafter(np.float32(highest_passed), np.float32(np.inf))
    if not abs(threshold) <= _LARGEST:
        raise ValueError(
            f"negatives: scores up to {np.abs(scores).max():g} take a threshold beyond float32, which ends at {_LARGEST:g} and in which a "
            "server sends scores; give the scores that it sent"
        )
    flagged = int((scores >= threshold).sum())
    interval = binomtest(flagged, len(scores)).proportion_ci(_CONFIDENCE, method="exact")
    return CalibratedThreshold(
        threshold=float(threshold),
        false_positive_rate=flagged / len(scores),
        false_positive_rate_low=float(interval.low),
        false_positive_rate_high=float(interval.high),
        negatives=len(scores),
        dataset=dataset,
        reduction=reduction,
        label=label,
    )


def evaluate_auroc(positives: ArrayLike, negatives: ArrayLike, *, dataset: str, dataset_sha256: str | None = None) -> Auroc:
    """Computes the AUROC: the chance that a rollout with the behaviour scores above a rollout without it; ties count half.

    The 95% interval of the AUROC is method 5 of Newcombe (2006, Statistics in Medicine 25:559): it inverts a normal test with the variance
    of Hanley and McNeil. The interval therefore has a width even if every positive rollout scores above every negative one.

    Args:
        positives: reduced scores of rollouts with the behaviour, ``(p,)``.
        negatives: reduced scores of rollouts without the behaviour, ``(n,)``.
        dataset: description of these rollouts, in words; the probe must not have been fitted on them.
        dataset_sha256: ``sha256:…`` of the dataset.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there are no positives or no negatives, a score is not finite, or ``dataset_sha256`` is not a digest of this form.
    """
    dataset = _said(dataset, "dataset")
    if dataset_sha256 is not None:
        rule = "'sha256:' and 64 lower-case hexadecimal digits"
        dataset_sha256 = arguments.named(dataset_sha256, "dataset_sha256", r"sha256:[0-9a-f]{64}", rule)
    with_it, without_it = _finite(positives, "positives"), _finite(negatives, "negatives")
    pairs = len(with_it) * len(without_it)
    auroc = float(mannwhitneyu(with_it, without_it, method="asymptotic").statistic) / pairs
    low, high = newcombe_interval(auroc, len(with_it), len(without_it))
    return Auroc(
        value=auroc,
        low=low,
        high=high,
        dataset=dataset,
        dataset_sha256=dataset_sha256,
        positives=len(with_it),
        negatives=len(without_it),
    )


def newcombe_interval(auroc: float, positives: float, negatives: float) -> tuple[float, float]:
    """Returns the 95% interval of an AUROC that was estimated from the given numbers of independent positives and negatives, by Newcombe's
    method 5 (``evaluate_auroc``).

    The numbers need not be whole: dependent rollouts count as fewer independent ones.
    """
    z = float(norm.ppf((1 + _CONFIDENCE) / 2))
    equal_size = max(0.0, (positives + negatives) / 2 - 1)

    def deviation(true: float) -> float:
        """Returns how far an estimated AUROC is from a supposed true AUROC, less z standard errors; zero at the ends of the AUROC's
        interval.
        """
        variance = true * (1 - true) * (1 + equal_size * ((1 - true) / (2 - true) + true / (1 + true))) / (positives * negatives)
        return abs(auroc - true) - z * math.sqrt(variance)

    # At 0 and 1 the variance vanishes, so that these are zeros of every deviation, and the search excludes them.
    low = 0.0 if auroc == 0 else float(brentq(deviation, 0, min(auroc, 1 - 1e-12)))
    high = 1.0 if auroc == 1 else float(brentq(deviation, max(auroc, 1e-12), 1))
    return low, high


def _said(dataset: str, argument: str) -> str:
    said = arguments.text(dataset, argument)
    if not said.strip():
        raise ValueError(f"{argument}: {said!r}; say which rollouts these scores are of")
    return said


def _finite(scores: ArrayLike, name: str) -> NDArray[np.float64]:
    array = arguments.real(scores, name, "reduced scores, one for each rollout (n,)")
    if array.size == 0:
        raise ValueError(f"{name}: no scores; give one for each rollout (n,)")
    if array.size != max(array.shape, default=1):
        raise ValueError(f"{name}: shape {array.shape}; give one score for each rollout (n,)")
    array = array.ravel()
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: {int((~np.isfinite(array)).sum())} of {len(array)} scores are not finite; leave out what was not scored")
    return array
