"""Fits a probe of any kind, chosen by the kind's name, to a table of activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probescore_probes.exporting import linear_probe
from probescore_probes.fitting.activation_pass import ActivationTable
from probescore_probes.fitting.cross_validation import Candidate, Labels
from probescore_probes.fitting.linear_kinds import LINEAR_KINDS, LOGISTIC, fit_linear
from probescore_probes.fitting.pooling_kinds import (
    MLP,
    POOLING_KINDS,
    SIGMOID_TAPS,
    fit_mlp,
    mlp_function,
    score_mlp,
    score_sigmoids,
    sigmoids_function,
)
from probescore_probes.fitting.serving import FittedProbe
from probescore_probes.fitting.token_kinds import ATTENTION, TOKEN_KINDS, WINDOW, fit_tokens, score_tokens, tokens_function

KINDS = (*LINEAR_KINDS, *POOLING_KINDS, *TOKEN_KINDS)

Indices = NDArray[np.int64]
Score = Callable[[Indices], NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Fit:
    """A probe that was fitted on some of the examples in a table of activations.

    Attributes:
        score: computes the probe's scores of examples, given by their indices in the table.
        probe: makes the function that is written into a probe file.
    """

    score: Score
    probe: Callable[[], FittedProbe]


def pools_of(kind: str, pools: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the poolings of activations that a kind of probe can be fitted on; a kind that pools inside its graph is fitted on means."""
    return pools if kind in LINEAR_KINDS else ("mean",)


def fit_kind(kind: str, table: ActivationTable, labels: Labels, fitted: Indices, candidate: Candidate, seed: int = 0) -> Fit:
    """Fits a probe of one kind to some of the examples in a table of activations.

    Args:
        kind: one of ``KINDS``.
        table: activations of all examples, including those of single tokens if the kind is fitted on tokens.
        labels: labels of all examples.
        fitted: indices of the examples to fit on.
        candidate: tap (place in the model) and pooling to fit on; a kind fitted on tokens reads the tap of the table's tokens,
            ``mean-of-sigmoids`` several taps.
        seed: seed of a neural network's initial weights.
    """
    some = labels.of(fitted)
    if kind in LINEAR_KINDS:
        rows = table.pooled[candidate.tap, candidate.pool]
        linear = fit_linear(kind, rows[fitted], some.positive, some.weights, candidate.strength)
        strength = f", C = {candidate.strength:g}" if kind == LOGISTIC else ""
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
    if kind == MLP:
        means = table.pooled[candidate.tap, "mean"]
        module = fit_mlp(means[fitted], some.positive, some.weights, seed)
        return Fit(
            lambda indices: score_mlp(module, means[indices]),
            lambda: FittedProbe(
                kind, (candidate.tap,), None, mlp_function(module), "MLP with one hidden layer on the mean, pooled in its graph"
            ),
        )
    if kind in TOKEN_KINDS:
        tokens = table.tokens or ()
        network = fit_tokens(kind, [tokens[index] for index in fitted], some.positive, some.weights, seed)
        method = "attention over tokens" if kind == ATTENTION else f"maximum of attention-weighted means over {WINDOW} tokens"
        return Fit(
            lambda indices: score_tokens(network, [tokens[index] for index in indices]),
            lambda: FittedProbe(kind, (candidate.tap,), None, tokens_function(network), f"{method}, pooled in its graph"),
        )
    places = np.unique(np.linspace(0, len(table.taps) - 1, min(SIGMOID_TAPS, len(table.taps))).round().astype(int))
    taps = tuple(table.taps[place] for place in places)
    read = [table.pooled[tap, "mean"] for tap in taps]
    probes = [fit_linear(LOGISTIC, rows[fitted], some.positive, some.weights, candidate.strength) for rows in read]
    return Fit(
        lambda indices: score_sigmoids(probes, [rows[indices] for rows in read]),
        lambda: FittedProbe(
            kind, taps, None, sigmoids_function(probes), f"mean of the sigmoids of {len(taps)} taps, C = {candidate.strength:g}"
        ),
    )
