"""Every kind of probe by its name: fitted on pooled activations, scored as it was fitted, and as it goes into a file."""

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
    """A probe of some kind, fitted on some examples of a table.

    Attributes:
        score: of examples of the table, by their indices, as it was fitted.
        probe: makes what goes into a file.
    """

    score: Score
    probe: Callable[[], FittedProbe]


def pools_of(kind: str, pools: tuple[str, ...]) -> tuple[str, ...]:
    """The poolings that a kind can be fitted on: what pools inside its graph takes means."""
    return pools if kind in LINEAR_KINDS else ("mean",)


def fit_kind(kind: str, table: ActivationTable, labels: Labels, fitted: Indices, candidate: Candidate, seed: int = 0) -> Fit:
    """Fits a probe.

    Args:
        kind: one of ``KINDS``.
        table: of all examples, with their tokens for a kind that is fitted on these.
        labels: of all examples.
        fitted: indices of those that are fitted on.
        candidate: where it reads, which for tokens is where they were read; a mean of sigmoids reads taps over the whole sweep.
        seed: of a network's first weights.
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
