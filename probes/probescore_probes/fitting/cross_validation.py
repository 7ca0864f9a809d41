"""Which layer, pooling and strength, and how good the choice is: the choice is made again inside every fold that judges it.

Judged by what it was chosen by, the best of thirty layers on forty examples looked up to .985 good; nested, it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probescore_audit import Estimate, auroc, grouped_auroc
from probescore_probes.fitting.linear_kinds import LOGISTIC, STRENGTHS, Linear, fit_linear, fit_logistic
from probescore_probes.fitting.splits import folds

OUTER, INNER = 5, 4
FEW_GROUPS, REPEATS = 100, 3
"""With fewer groups than this an estimate hangs on how folds fell, so that it is made several times."""
_ROUGH = 1e-3
"""How exactly fits are solved that are only compared."""

Features = dict[tuple[str, str], NDArray[np.float32]]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Candidate:
    """Where a linear probe reads, how tokens are pooled, and how strongly it is held back."""

    tap: str
    pool: str
    strength: float = STRENGTHS[1]


Fitter = Callable[[Indices, Candidate], Callable[[Indices], NDArray[np.float64]]]


@dataclass(frozen=True)
class CurvePoint:
    """One tap and pooling: AUROC over the folds, at the best strength, with its standard error."""

    tap: str
    pool: str
    strength: float
    mean: float
    standard_error: float


@dataclass(frozen=True)
class Selection:
    """What cross-validation chose, and what it chose from.

    Attributes:
        chosen: the earliest tap within one standard error of the best.
        best: the best itself.
        curve: one point for each tap and pooling, in the order of the taps.
    """

    chosen: Candidate
    best: Candidate
    curve: tuple[CurvePoint, ...]


@dataclass(frozen=True, eq=False)
class Labels:
    """Of the examples that are fitted on: ``(n,)`` each."""

    positive: NDArray[np.bool_]
    groups: Indices
    weights: NDArray[np.float64]

    def of(self, indices: Indices) -> Labels:
        """Those of some of them."""
        return Labels(self.positive[indices], self.groups[indices], self.weights[indices])


@dataclass(frozen=True, eq=False)
class Nested:
    """What the whole procedure, choice included, gives on examples that it did not see.

    Attributes:
        estimate: of AUROC, over all held-out examples.
        scores: ``(n,)`` of each example from the fold that held it out, standardised by that fold.
        chosen: by outer fold.
        in_sample: mean AUROC of the same probes on what they were fitted on.
    """

    estimate: Estimate
    scores: NDArray[np.float64]
    chosen: tuple[Candidate, ...]
    in_sample: float


def select(features: Features, labels: Labels, *, kind: str = LOGISTIC, seed: int = 0, count: int = OUTER) -> Selection:
    """Chooses tap, pooling and strength by grouped cross-validation.

    Args:
        features: by tap and pool ``(n, width)``, taps in the order of the model's blocks.
        labels: of the same examples.
        kind: only ``logistic`` has several strengths.
        seed: of the folds.
        count: how many folds.
    """
    parts = [
        (fitted, held_out)
        for fitted, held_out in folds(labels.groups, labels.positive, count, seed)
        if _both(labels.positive[fitted]) and _both(labels.positive[held_out])
    ]
    if not parts:  # few groups, dealt out unluckily
        raise ValueError("cross-validation: no way to divide the groups so that each side has both classes; give more groups")
    strengths = STRENGTHS if kind == LOGISTIC else STRENGTHS[1:2]
    curve = []
    for (tap, pool), rows in features.items():
        found = np.empty((len(parts), len(strengths)))
        for row, (fitted, held_out) in enumerate(parts):
            for column, probe in enumerate(_fits(kind, rows[fitted], labels.of(fitted), strengths)):
                found[row, column] = auroc(probe.score(rows[held_out]), labels.positive[held_out], labels.weights[held_out])
        means = found.mean(axis=0)
        best = int(np.argmax(means))
        error = float(found[:, best].std(ddof=1) / np.sqrt(len(parts))) if len(parts) > 1 else 0.0
        curve.append(CurvePoint(tap, pool, strengths[best], float(means[best]), error))
    top = max(curve, key=lambda point: point.mean)
    chosen = next(point for point in curve if point.mean >= top.mean - top.standard_error)
    # Of one tap the better pooling.
    chosen = max((point for point in curve if point.tap == chosen.tap), key=lambda point: point.mean)
    return Selection(_candidate(chosen), _candidate(top), tuple(curve))


def nested(
    features: Features,
    labels: Labels,
    *,
    kind: str = LOGISTIC,
    seed: int = 0,
    outer: int = OUTER,
    inner: int = INNER,
    fit: Fitter | None = None,
    progress: Callable[[int], None] = lambda _done: None,
) -> Nested:
    """Estimates how good the procedure is: in each outer fold the choice is made by inner folds, and judged on what no one saw.

    Args:
        features: by tap and pool ``(n, width)``.
        labels: of the same examples.
        kind: what the choice is made with.
        seed: of the folds.
        outer: folds that judge.
        inner: folds that choose.
        fit: from indices to fit on and what was chosen to a function that scores others; the linear kind by default.
        progress: called after each outer fold with how many are done.
    """
    repeats = [
        _nested_once(features, labels, kind=kind, seed=seed + 10 * repeat, outer=outer, inner=inner, fit=fit, progress=progress)
        for repeat in range(REPEATS if len(np.unique(labels.groups)) < FEW_GROUPS else 1)
    ]
    values, lows, highs = (np.array([getattr(each.estimate, end) for each in repeats]) for end in ("value", "low", "high"))
    spread = float(values.std(ddof=1)) if len(repeats) > 1 else 0.0
    estimate = Estimate(float(values.mean()), max(0.0, float(lows.mean()) - spread), min(1.0, float(highs.mean()) + spread))
    chosen = tuple(candidate for each in repeats for candidate in each.chosen)
    return Nested(estimate, repeats[0].scores, chosen, float(np.mean([each.in_sample for each in repeats])))


def _nested_once(
    features: Features,
    labels: Labels,
    *,
    kind: str,
    seed: int,
    outer: int,
    inner: int,
    fit: Fitter | None,
    progress: Callable[[int], None],
) -> Nested:
    scores = np.full(len(labels.positive), np.nan)
    chosen, in_sample = [], []
    for done, (fitted, held_out) in enumerate(folds(labels.groups, labels.positive, outer, seed + 1), 1):
        some = labels.of(fitted)
        if _both(some.positive):
            candidate = select({key: rows[fitted] for key, rows in features.items()}, some, kind=kind, seed=seed + 2, count=inner).chosen
            score = (fit or _linear_fitter(kind, features, labels))(fitted, candidate)
            own = score(fitted)
            scores[held_out] = (score(held_out) - own.mean()) / (own.std() or 1.0)
            chosen.append(candidate)
            in_sample.append(auroc(own, some.positive, some.weights))
        progress(done)
    known = np.flatnonzero(~np.isnan(scores))
    estimate = grouped_auroc(scores[known], labels.positive[known], labels.groups[known], weights=labels.weights[known], seed=seed)
    return Nested(estimate, scores, tuple(chosen), float(np.mean(in_sample)) if in_sample else float("nan"))


def held_out_scores(
    fit: Callable[[Indices], Callable[[Indices], NDArray[np.float64]]], labels: Labels, *, seed: int = 0, count: int = OUTER
) -> NDArray[np.float64]:
    """Scores ``(n,)`` of each example by what was fitted without its group; standardised by fold, NaN where a fold lacked a class.

    Args:
        fit: from the indices to fit on to a function that scores others.
        labels: of all examples.
        seed: of the folds.
        count: how many folds.
    """
    scores = np.full(len(labels.positive), np.nan)
    for fitted, held_out in folds(labels.groups, labels.positive, count, seed):
        if _both(labels.positive[fitted]):
            score = fit(fitted)
            own = score(fitted)
            scores[held_out] = (score(held_out) - own.mean()) / (own.std() or 1.0)
    return scores


def held_out_auroc(scores: NDArray[np.float64], labels: Labels, seed: int = 0) -> Estimate:
    """AUROC of ``held_out_scores``."""
    known = np.flatnonzero(~np.isnan(scores))
    return grouped_auroc(scores[known], labels.positive[known], labels.groups[known], weights=labels.weights[known], seed=seed)


def learning_curve(
    rows: NDArray[np.float32],
    labels: Labels,
    candidate: Candidate,
    kind: str,
    *,
    shares: Sequence[float] = (0.1, 0.2, 0.4, 0.7, 1.0),
    seed: int = 0,
) -> list[tuple[int, Estimate]]:
    """AUROC on held-out groups by how many groups it was fitted on: ``[(groups, estimate), …]``."""
    random = np.random.default_rng(seed)
    points = []
    for share in shares:
        sizes: list[int] = []

        def fit(fitted: Indices, share: float = share, sizes: list[int] = sizes) -> Callable[[Indices], NDArray[np.float64]]:
            groups = np.unique(labels.groups[fitted])
            kept = random.permutation(groups)[: max(2, round(share * len(groups)))]
            some = fitted[np.isin(labels.groups[fitted], kept)]
            if not _both(labels.positive[some]):
                return lambda indices: np.full(len(indices), np.nan)
            sizes.append(len(kept))
            probe = fit_linear(kind, rows[some], labels.positive[some], labels.weights[some], candidate.strength)
            return lambda indices: probe.score(rows[indices])

        estimate = held_out_auroc(held_out_scores(fit, labels, seed=seed), labels, seed)
        if sizes:
            points.append((round(float(np.mean(sizes))), estimate))
    return points


def _fits(kind: str, rows: NDArray[np.float32], labels: Labels, strengths: Sequence[float]) -> list[Linear]:
    if kind == LOGISTIC:
        return fit_logistic(rows, labels.positive, labels.weights, tuple(strengths), tolerance=_ROUGH)
    return [fit_linear(kind, rows, labels.positive, labels.weights)]


def _linear_fitter(kind: str, features: Features, labels: Labels) -> Fitter:
    def fit(fitted: Indices, candidate: Candidate) -> Callable[[Indices], NDArray[np.float64]]:
        rows, some = features[candidate.tap, candidate.pool], labels.of(fitted)
        probe = fit_linear(kind, rows[fitted], some.positive, some.weights, candidate.strength)
        return lambda indices: probe.score(rows[indices])

    return fit


def _both(positive: NDArray[np.bool_]) -> bool:
    return bool(positive.any() and not positive.all())


def _candidate(point: CurvePoint) -> Candidate:
    return Candidate(point.tap, point.pool, point.strength)
