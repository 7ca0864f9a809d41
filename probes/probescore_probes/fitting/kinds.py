"""Fits a probe of any kind, chosen by the kind's name, to a table of activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probescore_probes.exporting import linear_probe
from probescore_probes.fitting.activation_pass import ActivationTable
from probescore_probes.fitting.cross_validation import Candidate, Labels
from probescore_probes.fitting.linear_kinds import LDA, LINEAR_KINDS, LOGISTIC, fit_linear
from probescore_probes.fitting.pooling_kinds import (
    MEAN_OF_SIGMOIDS,
    MLP,
    POOLING_KINDS,
    fit_mlp,
    mlp_function,
    score_mlp,
    score_sigmoids,
    sigmoids_function,
)
from probescore_probes.fitting.serving import FittedProbe
from probescore_probes.fitting.smoothed_kinds import SMOOTHED_KINDS, fit_smoothed, reduction_of, score_smoothed
from probescore_probes.fitting.sparse_features import SAE_FEATURE, SparseFeatures, choose_feature
from probescore_probes.fitting.token_kinds import ATTENTION, TOKEN_KINDS, WINDOW, fit_tokens, score_tokens, tokens_function

KINDS = (*LINEAR_KINDS, *POOLING_KINDS, *TOKEN_KINDS, *SMOOTHED_KINDS, SAE_FEATURE)
SEVERAL_TAPS = 6
"""Number of taps (places in the model) that a kind of probe of several layers reads."""

Indices = NDArray[np.int64]
Score = Callable[[Indices], NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Fit:
    """A probe that was fitted to some of the labelled examples in a table of activations.

    Attributes:
        score: computes the probe's scores of examples, given by their indices in the table.
        probe: makes the function that is written into a probe file.
    """

    score: Score
    probe: Callable[[], FittedProbe]


def pools_of(kind: str, pools: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the poolings over tokens that are tried for a kind of probe; for a kind that pools in a way of its own, only the mean."""
    return pools if kind in LINEAR_KINDS else ("mean",)


def taps_of_tokens(kind: str, taps: Sequence[str], candidate: Candidate) -> tuple[str, ...]:
    """Returns the taps (places in the model) at which a kind of probe is fitted on every token; none for a kind that is fitted on pooled
    activations.

    Args:
        kind: one of ``KINDS``.
        taps: all taps that were tried, in the order of the model's blocks.
        candidate: the tap that was chosen.
    """
    if kind in SMOOTHED_KINDS:
        return _spread(taps)
    return (candidate.tap,) if kind in (*TOKEN_KINDS, SAE_FEATURE) else ()


def can_fit(kind: str, table: ActivationTable, candidate: Candidate) -> bool:
    """Returns whether a table has the activations that a kind of probe is fitted on."""
    return bool(table.features) if kind == SAE_FEATURE else {*taps_of_tokens(kind, table.taps, candidate)} <= {*table.tokens}


def fit_kind(
    kind: str,
    table: ActivationTable,
    labels: Labels,
    fitted: Indices,
    candidate: Candidate,
    seed: int = 0,
    autoencoder: SparseFeatures | None = None,
) -> Fit:
    """Fits a probe of one kind to some of the examples in a table of activations.

    Args:
        kind: name of the kind of probe, one of ``KINDS``.
        table: activations of all examples, with those that ``can_fit`` asks for.
        labels: labels of all examples.
        fitted: indices of the examples to fit on.
        candidate: tap (place in the model), pooling and strength; ``mean-of-sigmoids`` and the kinds of ``SMOOTHED_KINDS`` read several
            taps of the table.
        seed: seed of a neural network's initial weights, and of batches.
        autoencoder: the autoencoder of the table's features, for the function of an ``sae-feature``.
    """
    some = labels.of(fitted)
    if kind in LINEAR_KINDS:
        return _linear(kind, table, some, fitted, candidate)
    if kind == MLP:
        return _mlp(table, some, fitted, candidate, seed)
    if kind in TOKEN_KINDS:
        return _over_tokens(kind, table, some, fitted, candidate, seed)
    if kind in SMOOTHED_KINDS:
        return _smoothed(kind, table, some, fitted, seed)
    if kind == SAE_FEATURE:
        return _feature(table, some, fitted, candidate, autoencoder)
    return _sigmoids(table, some, fitted, candidate)


def _linear(kind: str, table: ActivationTable, labels: Labels, fitted: Indices, candidate: Candidate) -> Fit:
    rows = table.pooled[candidate.tap, candidate.pool]
    linear = fit_linear(kind, rows[fitted], labels.positive, labels.weights, candidate.strength)
    strength = {LOGISTIC: f", C = {candidate.strength:g}", LDA: f", shrinkage {1 - candidate.strength:g}"}.get(kind, "")
    return Fit(
        lambda indices: linear.score(rows[indices]),
        lambda: FittedProbe(
            kind,
            (candidate.tap,),
            candidate.pool,
            linear_probe(linear.weight, linear.bias, unit=linear.unit),
            f"{kind} on the {candidate.pool} activation{strength}, scaler folded in",
        ),
    )


def _mlp(table: ActivationTable, labels: Labels, fitted: Indices, candidate: Candidate, seed: int) -> Fit:
    means = table.pooled[candidate.tap, "mean"]
    module = fit_mlp(means[fitted], labels.positive, labels.weights, seed)
    return Fit(
        lambda indices: score_mlp(module, means[indices]),
        lambda: FittedProbe(
            MLP, (candidate.tap,), None, mlp_function(module), "MLP with one hidden layer on the mean, pooled in its graph"
        ),
    )


def _sigmoids(table: ActivationTable, labels: Labels, fitted: Indices, candidate: Candidate) -> Fit:
    taps = _spread(table.taps)
    read = [table.pooled[tap, "mean"] for tap in taps]
    probes = [fit_linear(LOGISTIC, rows[fitted], labels.positive, labels.weights, candidate.strength) for rows in read]
    method = f"mean of the sigmoids of {len(taps)} taps, C = {candidate.strength:g}"
    return Fit(
        lambda indices: score_sigmoids(probes, [rows[indices] for rows in read]),
        lambda: FittedProbe(MEAN_OF_SIGMOIDS, taps, None, sigmoids_function(probes), method),
    )


def _over_tokens(kind: str, table: ActivationTable, labels: Labels, fitted: Indices, candidate: Candidate, seed: int) -> Fit:
    tokens = table.tokens[candidate.tap]
    network = fit_tokens(kind, [tokens[index] for index in fitted], labels.positive, labels.weights, seed)
    method = "attention over tokens" if kind == ATTENTION else f"maximum of attention-weighted means over {WINDOW} tokens"
    return Fit(
        lambda indices: score_tokens(network, [tokens[index] for index in indices]),
        lambda: FittedProbe(kind, (candidate.tap,), None, tokens_function(network), f"{method}, pooled in its graph"),
    )


def _smoothed(kind: str, table: ActivationTable, labels: Labels, fitted: Indices, seed: int) -> Fit:
    taps = _spread(table.taps)

    def rows(indices: Indices) -> list[NDArray[np.float32]]:
        return [np.concatenate([table.tokens[tap][index] for tap in taps], axis=1) for index in indices]

    probe = fit_smoothed(kind, rows(fitted), labels.positive, labels.weights, seed)
    reduction = str(reduction_of(kind))
    return Fit(
        lambda indices: score_smoothed(kind, probe, rows(indices)),
        lambda: FittedProbe(
            kind,
            taps,
            reduction,
            linear_probe(probe.weight, probe.bias, unit=probe.unit),
            f"linear in the activations at {len(taps)} taps, fitted through {reduction} over tokens, scaler folded in",
        ),
    )


def _feature(table: ActivationTable, labels: Labels, fitted: Indices, candidate: Candidate, autoencoder: SparseFeatures | None) -> Fit:
    features = {reduction: rows[fitted] for reduction, rows in table.features.items()}
    reduction, column, _ = choose_feature(features, labels.positive, labels.weights)
    chosen = table.features[reduction][:, column]

    def probe() -> FittedProbe:
        if autoencoder is None:
            raise ValueError("autoencoder: not given; the function of a feature is that of its encoder")
        feature = autoencoder.features[column]
        method = f"feature {feature} of a sparse autoencoder, {reduction} over tokens"
        return FittedProbe(SAE_FEATURE, (candidate.tap,), reduction, autoencoder.function([feature]), method)

    return Fit(lambda indices: chosen[indices].astype(np.float64), probe)


def _spread(taps: Sequence[str]) -> tuple[str, ...]:
    """Returns ``SEVERAL_TAPS`` taps (places in the model), evenly spread over the given ones; all of them if there are fewer."""
    places = np.unique(np.linspace(0, len(taps) - 1, min(SEVERAL_TAPS, len(taps))).round().astype(int))
    return tuple(taps[place] for place in places)
