"""How a graph is tried: no arithmetic of its scores lets it pass, and rounding does not fail it. Graphs are Python functions here."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from crafted import HIDDEN, fields
from numpy.typing import NDArray
from random_graphs import TAP, Recipe, graph_of

from probescore.types import Tap
from probescore_server.errors import ProbeRefused
from probescore_server.probes.format.graph import CU_SEQLENS, POSITIONS, GraphFailed, GraphInputs
from probescore_server.probes.format.manifest import Manifest
from probescore_server.probes.loading.context_check import LARGEST_CALL, check_author_agrees, far_lengths, rows_tried
from probescore_server.probes.loading.random_sequences import RandomSequences

Scores = NDArray[np.float32]
WEIGHT = np.random.default_rng(0).standard_normal((HIDDEN, 1)).astype(np.float32)
POINTWISE = Recipe("pointwise", None, False, "", ())
CAUSAL = Recipe("causal", None, False, "", ())
DIGEST = "sha256:" + "0" * 64


def around(recipe: Recipe) -> RandomSequences:
    manifest = Manifest.model_validate_json(json.dumps(fields(**recipe.manifest, graph_sha256=DIGEST, manifest_sha256=DIGEST)))
    golden = {Tap("resid_post", 1): np.random.default_rng(1).standard_normal((20, HIDDEN)).astype(np.float32) + 1}
    return RandomSequences(manifest, golden, np.random.default_rng(0))


def tried(run: Callable[[GraphInputs], Scores], recipe: Recipe = POINTWISE) -> int:
    return rows_tried(run, graph_of(recipe), around(recipe), "probe.onnx")


def linear(inputs: GraphInputs) -> Scores:
    return inputs[TAP] @ WEIGHT


def with_many(effect: Callable[[Scores], Scores], rows: int = 50) -> Callable[[GraphInputs], Scores]:
    """Scores that change in long calls."""
    return lambda inputs: effect(linear(inputs)) if len(inputs[TAP]) > rows else linear(inputs)


def heavy_tailed(inputs: GraphInputs) -> Scores:
    """Every thirtieth row or so has an astronomical score, beside which all others seem equal."""
    scores = linear(inputs)
    return np.where(np.abs(scores) > 7, 1e30, scores + (len(scores) > 50)).astype(np.float32)


def constant(inputs: GraphInputs) -> Scores:
    """No spread at all, until there is company."""
    scores = np.zeros((len(inputs[TAP]), 1), np.float32)
    scores[-1] = 1e-6 * (len(scores) > 50)
    return scores


def fails_in_company(inputs: GraphInputs) -> Scores:
    if len(inputs[TAP]) > 100:
        raise GraphFailed("an operator fails")
    return linear(inputs)


def noisy() -> Callable[[GraphInputs], Scores]:
    random = np.random.default_rng(0)
    return lambda inputs: (linear(inputs) + 0.1 * random.standard_normal((len(inputs[TAP]), 1))).astype(np.float32)


def stateful() -> Callable[[GraphInputs], Scores]:
    calls: list[int] = []

    def run(inputs: GraphInputs) -> Scores:
        calls.append(1)
        return linear(inputs) + np.float32(len(calls) > 200)

    return run


REFUSED = {
    "a shift in company": with_many(lambda scores: scores + 1),
    "a shift in very long calls": with_many(lambda scores: scores + 1, 9_000),
    "a small shift": with_many(lambda scores: scores + 0.05),
    "one row of many": with_many(lambda scores: np.concatenate([scores[:-1], scores[-1:] + 1])),
    "two rows exchanged": with_many(lambda scores: np.concatenate([scores[1:2], scores[:1], scores[2:]])),
    "one for all": with_many(lambda scores: np.broadcast_to(scores.mean(keepdims=True), scores.shape)),
    "a row too few": with_many(lambda scores: scores[:-1]),
    "an infinity": with_many(lambda scores: np.concatenate([scores[:-1], np.full((1, 1), np.inf, np.float32)])),
    "NaN": with_many(lambda scores: scores * np.float32(np.nan)),
    "never finite": lambda inputs: linear(inputs) * np.float32(np.nan),
    "astronomical": with_many(lambda scores: scores + np.float32(3e38)),
    "astronomical scores of some rows": heavy_tailed,
    "constant scores": constant,
    "an error in company": fails_in_company,
    "chance": noisy(),
    "a state": stateful(),
    "largest number of a call": lambda inputs: linear(inputs) + (inputs[TAP].max() > 20),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_graph_is_refused_for(kind: str) -> None:
    with np.errstate(all="ignore"), pytest.raises(ProbeRefused) as refused:
        tried(REFUSED[kind])
    assert refused.value.field == "graph"


def rounded_by_company(inputs: GraphInputs) -> Scores:
    """As matrix products round: by the size of the call."""
    return linear(inputs) * np.float32(1 + 1e-7 * (len(inputs[TAP]) % 3))


ACCEPTED = {
    "linear": linear,
    "rounded otherwise in other calls": rounded_by_company,
    "thresholds": lambda inputs: np.floor(200 * rounded_by_company(inputs)) / 200,
    "mostly zero": lambda inputs: np.maximum(rounded_by_company(inputs) - 6, 0),
    "a large offset": lambda inputs: rounded_by_company(inputs) + np.float32(5000),
    "an overflow of large activations": lambda inputs: np.exp(rounded_by_company(inputs)),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_a_graph_is_accepted_with(kind: str) -> None:
    with np.errstate(all="ignore"):
        assert tried(ACCEPTED[kind]) == LARGEST_CALL


def causal_mean(inputs: GraphInputs, *, slope: float = 0.0) -> Scores:
    scores, bounds = linear(inputs), inputs[CU_SEQLENS]
    means = [scores[a:b].cumsum(0) / np.arange(1, 1 + b - a)[:, None] * (1 + slope * a) for a, b in pairwise(bounds)]
    return np.concatenate(means).astype(np.float32)


def test_what_only_company_rounds_is_scored_by_itself_at_last() -> None:
    assert tried(causal_mean, CAUSAL) == LARGEST_CALL
    assert tried(lambda inputs: causal_mean(inputs, slope=1e-7), CAUSAL) == 256
    # a sum over 12,288 rows may be off by less than what is no rounding
    with pytest.raises(ProbeRefused, match="do not depend on its neighbours"):
        tried(lambda inputs: causal_mean(inputs, slope=1e-4), CAUSAL)


def test_an_authors_code_must_agree_on_sequences_longer_than_every_example() -> None:
    def first_forty(inputs: GraphInputs) -> Scores:
        return causal_mean(inputs) + (np.arange(len(inputs[TAP])) >= 40)[:, None]

    check_author_agrees(causal_mean, causal_mean, around(CAUSAL), 10, 1e-4, "probe.onnx")
    with pytest.raises(ProbeRefused, match="scores of the author's code"):
        check_author_agrees(first_forty, causal_mean, around(CAUSAL), 10, 1e-4, "probe.onnx")


def test_an_authors_code_that_knows_no_such_rollouts_is_not_asked() -> None:
    def short_only(inputs: GraphInputs) -> Scores:
        if len(inputs[TAP]) > 12:
            raise IndexError("no such position")
        return causal_mean(inputs)

    check_author_agrees(causal_mean, short_only, around(CAUSAL), 10, 1e-4, "probe.onnx")


def test_an_authors_code_must_agree_at_positions_and_lengths_that_no_example_has() -> None:
    """Given a graph that is right for all that the golden rollouts are like, then far away it is compared all the same."""
    positions = Recipe("pointwise", None, True, "", ())

    def far(inputs: GraphInputs) -> Scores:
        return linear(inputs) + (inputs[POSITIONS] > 900)[:, None]

    def long(inputs: GraphInputs) -> Scores:
        return causal_mean(inputs) + (np.arange(len(inputs[TAP])) >= 10_000)[:, None]

    def clipped(inputs: GraphInputs) -> Scores:
        return np.clip(linear(inputs), -12, 12)

    for graph, author, recipe in ((far, linear, positions), (long, causal_mean, CAUSAL), (clipped, linear, POINTWISE)):
        with pytest.raises(ProbeRefused, match="scores of the author's code"):
            check_author_agrees(graph, author, around(recipe), 10, 1e-4, "probe.onnx", far_lengths(graph_of(CAUSAL)))


def test_two_implementations_that_round_otherwise_agree_on_massive_activations() -> None:
    golden = np.random.default_rng(0).standard_normal((50, HIDDEN)).astype(np.float32)
    golden[::2, :2] += 3000
    weight = WEIGHT.copy()
    weight[:2] = [[1], [-1]]  # what is massive cancels, but for what it was rounded by
    near = RandomSequences(around(POINTWISE).manifest, {Tap("resid_post", 1): golden}, np.random.default_rng(0))

    def in_float64(inputs: GraphInputs) -> Scores:
        return np.tanh(inputs[TAP].astype(np.float64) @ weight)

    def in_another_order(inputs: GraphInputs) -> Scores:
        return np.tanh((inputs[TAP][:, ::-1] * weight[::-1, 0]).cumsum(1)[:, -1:]).astype(np.float32)

    check_author_agrees(in_another_order, in_float64, near, 10, 1e-4, "probe.onnx")
