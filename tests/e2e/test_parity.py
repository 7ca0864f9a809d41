"""A served score is the score that plain Hugging Face gives: every hook, every kind of probe, many architectures, over a real socket.

The bound: the largest difference is at most 1e-4 of the standard deviation of the reference's scores, label by label. A bound is worth
something only if what it guards against would break it, so each shift by one is measured against it as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from parity_bound import BOUND, further_than_plain_float32
from parity_cases import (
    GROUPS,
    SHIFTS,
    Author,
    Shift,
    all_probes,
    answered,
    expected,
    in_deviations,
    rollouts,
    served_scores,
    shallow_probes,
)
from parity_models import ARCHITECTURES, LAYERS, write_model
from parity_probes import FEATURES, JUMP_RELU, KINDS, LINEAR, MLP, TOP_K_SAE, Kind, above_threshold, among_top_k
from parity_reference import Reference
from running_server import start_server

from probescore import ProbeClient
from probescore.types import ScoreResult
from probescore_server import Engine

MIN_SHIFT = 100
MIN_ROUTING_MARGIN = 1e-5


@dataclass(frozen=True, eq=False)
class Scored:
    """One architecture, with what a real server answered for all its probes."""

    author: Author
    result: ScoreResult

    @property
    def reference(self) -> Reference:
        return self.author.reference


@pytest.fixture(scope="module", params=ARCHITECTURES)
def scored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    author = Author(write_model(tmp_path_factory.mktemp(request.param), request.param))
    probes = tmp_path_factory.mktemp(f"{request.param}-probes")
    for probe in all_probes():
        author.write(probes, probe)
    with start_server(author.model, [probes]) as server, ProbeClient(server.address) as client:
        return Scored(author, client.score(GROUPS, token_scores="all"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_scores_equal_plain_hugging_face(scored: Scored, kind: Kind) -> None:
    differences = {
        probe.name: in_deviations(answered(scored.result, probe), expected(scored.reference, probe))
        for probe in all_probes()
        if probe.kind is kind
    }
    assert {name: difference for name, difference in differences.items() if not difference <= BOUND} == {}


def test_scores_are_no_further_from_float64_than_plain_float32_is(scored: Scored) -> None:
    exact = Reference(scored.author.model, torch.float64)
    further = {}
    for probe in all_probes():
        if probe.kind in (LINEAR, MLP):
            columns = zip(
                *(x.T for x in (answered(scored.result, probe), expected(scored.reference, probe), expected(exact, probe))), strict=True
            )
            further[probe.name] = [further_than_plain_float32(*column) for column in columns]
    assert {name: labels for name, labels in further.items() if any(labels)} == {}


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
def test_a_shift_by_one_breaks_the_bound_a_hundredfold(scored: Scored, shift: Shift) -> None:
    missed = {}
    for probe in all_probes():
        if shift.applies_to(probe):
            shifted, wanted = expected(scored.reference, probe, shift), expected(scored.reference, probe)
            smallest = (np.abs(shifted - answered(scored.result, probe)).max(axis=0) / wanted.std(axis=0)).min()
            if not smallest >= MIN_SHIFT * BOUND:
                missed[probe.name] = smallest
    assert missed == {}


@pytest.mark.parametrize(("kind", "select"), [(JUMP_RELU, above_threshold), (TOP_K_SAE, among_top_k)], ids=["jumprelu", "topk"])
def test_a_readout_of_thresholded_features_follows_from_their_pre_activations(
    scored: Scored, kind: Kind, select: Callable[[NDArray[np.float32]], NDArray[np.bool_]]
) -> None:
    for probe in all_probes():
        if probe.kind is kind:
            scores = np.concatenate(served_scores(scored.result, probe))
            pre, readout = scores[:, :FEATURES], scores[:, FEATURES:]
            np.testing.assert_allclose(readout, np.where(select(pre), pre, 0) @ kind.weights["D"], atol=1e-5, err_msg=probe.name)


def test_experts_are_chosen_by_a_margin_that_rounding_does_not_cross(scored: Scored) -> None:
    for rollout in rollouts():
        scored.reference.activations([*rollout[0], *rollout[1]])
    assert scored.reference.routing_margin > MIN_ROUTING_MARGIN


def test_the_reference_reads_what_is_added_to_the_residual_stream(scored: Scored) -> None:
    prefix, own = next(rollouts())
    read = scored.reference.activations([*prefix, *own])
    for layer in range(LAYERS):
        total = read[f"resid_pre.{layer}"] + read[f"attn_out.{layer}"] + read[f"mlp_out.{layer}"]
        np.testing.assert_allclose(total, read[f"resid_post.{layer}"], atol=1e-5)


def test_a_backbone_cut_at_the_deepest_tap_scores_the_same(scored: Scored, tmp_path: Path) -> None:
    files = [scored.author.write(tmp_path, probe) for probe in shallow_probes()]
    engine = Engine.load(str(scored.author.model), files)
    assert engine.info.model.num_loaded_layers == 2
    result = engine.score(GROUPS, token_scores="all")
    for probe in shallow_probes():
        assert in_deviations(answered(result, probe), expected(scored.reference, probe)) <= BOUND, probe.name
