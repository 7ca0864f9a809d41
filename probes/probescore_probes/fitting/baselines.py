"""Computes baselines that need no probe: words, length, the model's own log-probability, random directions and shuffled labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from probescore_audit import Estimate, auroc, grouped_auroc
from probescore_probes.fitting.cross_validation import Candidate, Labels, held_out_auroc, held_out_scores
from probescore_probes.fitting.labelled_rollouts import Example
from probescore_probes.fitting.linear_kinds import Scaler, fit_linear

RANDOM_DIRECTIONS = 20
SHUFFLES = 5

Indices = NDArray[np.int64]


def bag_of_words(ids: Sequence[NDArray[np.int32]], labels: Labels, seed: int = 0) -> Estimate:
    """Computes the AUROC over held-out groups of a logistic regression on which tokens occur in a text.

    Args:
        ids: for each example the token ids of the completion, or of the prompt.
        labels: labels of the same examples.
        seed: seed of the folds.
    """
    known = {token: column for column, token in enumerate(sorted({int(token) for each in ids for token in each}))}
    rows = [sorted({known[int(token)] for token in each}) for each in ids]
    ends = np.cumsum([0, *map(len, rows)])
    columns = np.array([column for row in rows for column in row], np.int64)
    occurs = csr_matrix((np.ones(len(columns)), columns, ends), shape=(len(ids), max(1, len(known))))

    def fit(fitted: Indices) -> Callable[[Indices], NDArray[np.float64]]:
        model = LogisticRegression(max_iter=500).fit(occurs[fitted], labels.positive[fitted], sample_weight=labels.weights[fitted])
        return lambda indices: model.decision_function(occurs[indices])

    return held_out_auroc(held_out_scores(fit, labels, seed=seed), labels, seed)


def oriented(numbers: NDArray[np.float64], labels: Labels, fitted: Indices, tested: Indices, seed: int = 0) -> Estimate:
    """Computes the AUROC on ``tested`` of a number known without a probe, such as length, with the sign that is better on ``fitted``."""
    known = np.isfinite(numbers)
    fitted, tested = fitted[known[fitted]], tested[known[tested]]
    sign = 1.0 if not auroc(numbers[fitted], labels.positive[fitted], labels.weights[fitted]) < 0.5 else -1.0
    some = labels.of(tested)
    return grouped_auroc(sign * numbers[tested], some.positive, some.groups, weights=some.weights, seed=seed)


def random_directions(rows: NDArray[np.float32], labels: Labels, fitted: Indices, tested: Indices, seed: int = 0) -> Estimate:
    """Computes the AUROC on ``tested`` of the one of ``RANDOM_DIRECTIONS`` random directions whose AUROC on ``fitted`` is highest."""
    some = labels.of(fitted)
    scaled = Scaler.of(rows[fitted], some.weights).scaled(rows)
    scores = scaled @ np.random.default_rng(seed).standard_normal((rows.shape[1], RANDOM_DIRECTIONS))
    off = [abs(auroc(scores[fitted, column], some.positive, some.weights) - 0.5) for column in range(RANDOM_DIRECTIONS)]
    return oriented(scores[:, int(np.argmax(off))], labels, fitted, tested, seed)


def shuffled_labels(rows: NDArray[np.float32], labels: Labels, candidate: Candidate, kind: str, seed: int = 0) -> Estimate:
    """Computes the mean AUROC over held-out groups for shuffled labels, with an interval of two standard deviations of the mean."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(SHUFFLES):
        shuffled = Labels(random.permutation(labels.positive), labels.groups, labels.weights)

        def fit(fitted: Indices, shuffled: Labels = shuffled) -> Callable[[Indices], NDArray[np.float64]]:
            probe = fit_linear(kind, rows[fitted], shuffled.positive[fitted], shuffled.weights[fitted], candidate.strength)
            return lambda indices: probe.score(rows[indices])

        found.append(held_out_auroc(held_out_scores(fit, shuffled, seed=seed), shuffled, seed).value)
    # The spread of the shuffles is taken to be no smaller than that of as many independent examples.
    error = max(float(np.std(found, ddof=1)), 0.5 / np.sqrt(len(labels.positive))) / np.sqrt(SHUFFLES)
    mean = float(np.mean(found))
    return Estimate(mean, mean - 2 * error, mean + 2 * error)


def paired_accuracy(surprise: NDArray[np.float64], examples: Sequence[Example]) -> tuple[float, int]:
    """Computes a baseline without a probe from pairs of completions of one prompt, one with the behaviour and one without. Returns the
    share of pairs in which the model gives the one with the behaviour the lower probability, and the number of pairs.

    If the model gives it the higher probability in most pairs, the share of those pairs is returned instead.
    """
    by_prompt: dict[bytes, tuple[list[float], list[float]]] = {}
    for value, example in zip(surprise, examples, strict=True):
        if np.isfinite(value):
            by_prompt.setdefault(example.prompt_ids.tobytes(), ([], []))[int(example.positive)].append(float(value))
    pairs = [(negative, positive) for negatives, positives in by_prompt.values() for negative in negatives for positive in positives]
    if not pairs:
        return float("nan"), 0
    less_likely = float(np.mean([1.0 if positive > negative else 0.5 if positive == negative else 0.0 for negative, positive in pairs]))
    return max(less_likely, 1 - less_likely), len(pairs)
