"""Compares taps (places in the model), poolings and kinds of probes on the training examples, by cross-validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from probescore_audit import Estimate
from probescore_probes.fitting.activation_pass import ActivationTable
from probescore_probes.fitting.baselines import shuffled_labels
from probescore_probes.fitting.cross_validation import (
    Candidate,
    CurvePoint,
    Features,
    Nested,
    Selection,
    held_out_auroc,
    held_out_scores,
    learning_curve,
    nested,
    select,
)
from probescore_probes.fitting.fitting_data import FittingData
from probescore_probes.fitting.kinds import KINDS, can_fit, fit_kind, pools_of
from probescore_probes.fitting.labelled_rollouts import TRAIN
from probescore_probes.fitting.linear_kinds import DIFFERENCE_OF_MEANS, LINEAR_KINDS, LOGISTIC, USUAL_STRENGTHS
from probescore_probes.fitting.options import FitOptions

Indices = NDArray[np.int64]
Scorer = Callable[[Indices], NDArray[np.float64]]


class Comparisons:
    """Compares candidates for a probe (tap, pooling and strength of regularisation) by cross-validation, from the activations of the
    training examples alone.

    Attributes:
        choosing: the linear kind of probe that the tap (place in the model) is chosen with: the kind that is fitted if it is linear, else
            logistic regression.
    """

    def __init__(self, options: FitOptions, table: ActivationTable, data: FittingData) -> None:
        self._kind, self._seed = options.kind, options.seed
        self._table, self._labels = table.of(data.splits[TRAIN]), data.labels.of(data.splits[TRAIN])
        self._features: Features = {
            (tap, pool): self._table.pooled[tap, pool] for tap in table.taps for pool in pools_of(options.kind, options.pools)
        }
        self.choosing = options.kind if options.kind in LINEAR_KINDS else LOGISTIC

    def selection(self) -> Selection:
        """Chooses the tap (place in the model), the pooling and the strength of regularisation of a probe by cross-validation."""
        return select(self._features, self._labels, kind=self.choosing, seed=self._seed)

    def nested(self) -> Nested:
        """Estimates how good a probe is by nested cross-validation, in which each fold chooses the tap anew."""
        return nested(
            self._features, self._labels, kind=self.choosing, seed=self._seed, fit=lambda fitted, at: self._scorer(self._kind, fitted, at)
        )

    def curves(self, selection: Selection) -> dict[str, tuple[CurvePoint, ...]]:
        """Returns the AUROC at each tap (place in the model) and pooling, for the kind of probe that the tap was chosen with and for a
        difference of means.
        """
        other = select(self._features, self._labels, kind=DIFFERENCE_OF_MEANS, seed=self._seed)
        return {self.choosing: selection.curve, DIFFERENCE_OF_MEANS: other.curve}

    def kinds(self, candidate: Candidate) -> dict[str, Estimate]:
        """Returns the AUROC of each kind of probe at a tap (place in the model), if the activations for it were read."""
        found = {}
        for kind in KINDS:
            if not can_fit(kind, self._table, candidate):
                continue
            at = candidate if kind in LINEAR_KINDS else replace(candidate, pool="mean")
            chooses = kind if kind in LINEAR_KINDS else LOGISTIC
            if chooses != self.choosing:  # a strength of one kind says nothing to another
                at = replace(at, strength=USUAL_STRENGTHS[chooses])

            def fit(fitted: Indices, kind: str = kind, at: Candidate = at) -> Scorer:
                return self._scorer(kind, fitted, at)

            found[kind] = held_out_auroc(held_out_scores(fit, self._labels, seed=self._seed), self._labels, self._seed)
        return found

    def learning(self, candidate: Candidate) -> tuple[tuple[int, Estimate], ...]:
        """Returns the learning curve of the linear probe at a tap (place in the model)."""
        rows = self._table.pooled[candidate.tap, candidate.pool]
        return tuple(learning_curve(rows, self._labels, candidate, self.choosing, seed=self._seed))

    def shuffled(self, candidate: Candidate) -> Estimate:
        """Returns the AUROC of the linear probe at a tap (place in the model) fitted to shuffled labels."""
        return shuffled_labels(self._table.pooled[candidate.tap, candidate.pool], self._labels, candidate, self.choosing, self._seed)

    def _scorer(self, kind: str, fitted: Indices, candidate: Candidate) -> Scorer:
        return fit_kind(kind, self._table, self._labels, fitted, candidate, self._seed).score
