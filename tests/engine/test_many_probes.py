"""Many probes at once: whatever is asked, stacked probes answer as the sessions of their graphs do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from engine_probes import Array, Probe, linear, pooled_mean, running_mean
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BOS, EOS, HIDDEN_SIZE, tiny_model

from probescore.types import Completion, CompletionScores, CompletionStatus, RolloutGroup, Scope, ScoreUnit, Span, Tap
from probescore_probes.exporting import linear_probe, onnx_probe
from probescore_probes.reference import ReferenceModel
from probescore_server import Engine
from probescore_server.backbone.base import Activations
from probescore_server.backbone.forest import Forest, ProbeReads
from probescore_server.probes.format.manifest import FollowUp
from probescore_server.probes.format.probe_file import read_probe_file
from probescore_server.probes.loading.loader import LoadedProbe, StackMember
from probescore_server.probes.loading.onnx_session import ProbeSession
from probescore_server.probes.scoring.batch_scorer import BatchScorer
from probescore_server.probes.scoring.cancellation import WantedRollouts
from probescore_server.validation.options import resolve_options
from probescore_server.validation.rollouts import resolve_rollouts

RANDOM = np.random.default_rng(5)
FEATURES, LARGEST = 16, 5


def weights(*shape: int) -> Array:
    return (RANDOM.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def several(name: str, labels: int = 1, tap: str = "resid_post.1", **fields: object) -> Probe:
    """A linear probe of random weights."""
    names = {"labels": tuple(f"label-{i}" for i in range(labels))} if labels > 1 else {}
    function = linear_probe(weights(labels, HIDDEN_SIZE), weights(labels), unit=ScoreUnit.LOGIT)
    return Probe(name, function, (tap,), {**names, **fields})


def graph(name: str, body: str, score: Callable[[Array], Array], **arrays: Array) -> Probe:
    text = f'<ir_version: 9, opset_import: ["" : 18]> probe (float[tokens, {HIDDEN_SIZE}] x) => (float[tokens, 1] scores) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, key) for key, array in arrays.items())
    model.graph.input[0].name = "resid_post.1"
    for node in model.graph.node:
        node.input[:] = ["resid_post.1" if each == "x" else each for each in node.input]
    return Probe(name, onnx_probe(model, lambda inputs: score(next(iter(inputs.values()))), unit=ScoreUnit.VALUE))


def perceptron(name: str) -> Probe:
    first, second = weights(4, HIDDEN_SIZE).T.copy(), weights(1, 4).T.copy()
    return graph(name, "h = MatMul(x, A) a = Tanh(h) scores = MatMul(a, B)", lambda x: np.tanh(x @ first) @ second, A=first, B=second)


ENCODER = weights(FEATURES, HIDDEN_SIZE).T.copy()


def feature(name: str) -> Probe:
    """A read-out of the largest features of one encoder."""
    readout = weights(1, FEATURES).T.copy()
    body = f"""pre = MatMul(x, E) k = Constant<value_ints = [{LARGEST}]>() zero = Constant<value_float = 0.0>() off = Mul(pre, zero)
        largest, where = TopK<axis = 1>(pre, k) features = ScatterElements<axis = 1>(off, where, largest) scores = MatMul(features, R)"""

    def score(x: Array) -> Array:
        pre = x @ ENCODER
        return np.where(pre >= np.sort(pre, axis=1)[:, -LARGEST, None], pre, 0) @ readout

    return graph(name, body, score, E=ENCODER, R=readout)


PROBES = (
    several("one"),
    several("two", 3),
    several("three", reduction="max"),
    several("four", reduce_on=ScoreUnit.PROBABILITY),
    several("five", tap="resid_post.2"),
    several("six", exclude_special_tokens=True),
    several("seven", follow_up=FollowUp(token_ids=[60, 61])),
    several("eight", 2, follow_up=FollowUp(token_ids=[60, 61]), reduce_on=ScoreUnit.PROBABILITY, tap="resid_post.2"),
    perceptron("mlp-a"),
    perceptron("mlp-b"),
    feature("feature-a"),
    feature("feature-b"),
    running_mean(sees_prompt=True),
    pooled_mean(),
)


@dataclass(frozen=True)
class Engines:
    """The same model and probes, run in stacks and run in sessions."""

    stacked: Engine
    sessions: Engine


@pytest.fixture(scope="module")
def engines(reference: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    paths = [probe.write(tmp_path_factory.mktemp("probes"), reference) for probe in PROBES]
    stacked = Engine.load(str(tiny_model()), paths)
    sessions = copy.copy(stacked)
    files = map(read_probe_file, paths)
    sessions._served = stacked._served.with_loaded(
        {file.manifest.key: LoadedProbe.of(file.manifest, ProbeSession(file, torch.device("cpu"))) for file in files}
    )
    return Engines(stacked, sessions)


def test_all_but_contextual_probes_are_stacked(engines: Engines) -> None:
    in_sessions = {key for key, probe in engines.stacked._served.loaded.items() if not isinstance(probe.runs, StackMember)}
    assert in_sessions == {"running-mean@1", "pooled-mean@1"}


# ------------------------------------------------------------------------------------------------------------ whatever is asked

token_ids = st.lists(st.sampled_from([BOS, EOS, *range(4, 96)]), max_size=7)


@st.composite
def completion(draw: st.DrawFn, *, depth: int = 0, masked: bool = True) -> Completion:
    ids = draw(token_ids)
    mask = draw(st.none() | st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))) if masked else None
    ends = st.integers(0, len(ids))
    bounds = draw(st.lists(st.tuples(ends, ends).map(sorted), max_size=2)) if masked else []
    spans = tuple(Span(f"s{index}", start, end) for index, (start, end) in enumerate(bounds))
    follow_ups = draw(st.lists(completion(depth=depth + 1), max_size=2)) if depth < 2 else []
    return Completion(ids, mask=mask, spans=spans, follow_ups=tuple(follow_ups))


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[RolloutGroup], dict[str, object]]:
    scope = draw(st.sampled_from(Scope))
    completions = st.lists(completion(masked=scope is not Scope.PROMPT), min_size=1, max_size=3)
    groups = draw(st.lists(st.builds(RolloutGroup, token_ids, completions), min_size=1, max_size=2))
    probes = draw(st.lists(st.sampled_from([probe.name for probe in PROBES]), min_size=1, unique=True))
    reductions = draw(st.lists(st.sampled_from(["mean", "max", "last", "topk_mean(2)", "softmax_mean(1.0)"]), max_size=3))
    wanted = [probe for probe in draw(st.lists(st.sampled_from(probes), unique=True)) if probe != "pooled-mean"]
    return groups, {"probes": probes, "reductions": reductions, "token_scores": wanted, "scope": scope}


def pairs(left: CompletionScores, right: CompletionScores) -> Iterator[tuple[CompletionScores, CompletionScores]]:
    yield left, right
    for each in zip(left.follow_ups, right.follow_ups, strict=True):
        yield from pairs(*each)


def assert_same(engines: Engines, groups: list[RolloutGroup], **options: object) -> None:
    found, expected = (engine.score(groups, **options) for engine in (engines.stacked, engines.sessions))  # type: ignore[arg-type]
    for of_found, of_expected in zip(found.groups, expected.groups, strict=True):
        for completions in zip(of_found, of_expected, strict=True):
            for scored, wanted in pairs(*completions):
                assert (scored.status, list(scored.scores)) == (wanted.status, list(wanted.scores))
                for name, scores in wanted.scores.items():
                    np.testing.assert_allclose(scored[name].reduced, scores.reduced, rtol=0, atol=2e-5)
                    if scores.tokens is None:
                        assert scored[name].tokens is None
                    else:
                        np.testing.assert_allclose(scored[name].tokens, scores.tokens, rtol=0, atol=2e-5)  # type: ignore[arg-type]


@settings(max_examples=60)
@given(request=requests())
def test_any_mixture_of_probes_scores_in_stacks_as_in_sessions(
    engines: Engines, request: tuple[list[RolloutGroup], dict[str, object]]
) -> None:
    groups, options = request
    assert_same(engines, groups, **options)


GROUPS = [RolloutGroup([BOS, 40, 41], [[50, 51, 52, EOS], Completion([53, 54], mask=[0, 1], follow_ups=(Completion([70, 71]),)), []])]


@pytest.mark.parametrize("limit", ["MAX_SCORES", "MAX_REDUCED_SCORES"])
@pytest.mark.parametrize("scope", Scope)
def test_what_is_held_at_once_changes_nothing(engines: Engines, monkeypatch: pytest.MonkeyPatch, limit: str, scope: Scope) -> None:
    groups = GROUPS if scope is not Scope.PROMPT else [RolloutGroup([BOS, 40, 41], [[50, 51]])]
    monkeypatch.setattr(f"probescore_server.probes.scoring.stacked_scores.{limit}", 20)
    assert_same(engines, groups, scope=scope, token_scores=["two", "four"], reductions=["mean", "max"])


def test_requests_for_other_probes_and_reductions_share_a_batch(engines: Engines) -> None:
    asked = [
        {"probes": ["one", "two", "mlp-a"], "reductions": ["max"]},
        {"probes": ["two", "one", "running-mean"], "reductions": ["max", "min"], "scope": "all"},
        {"probes": ["five", "feature-b", "seven"], "token_scores": ["five"]},
    ]
    engine = engines.stacked
    rollouts = []
    for options in asked:
        resolved = resolve_options(engine.info, **options)  # type: ignore[arg-type]
        rollouts += [rollout for group in resolve_rollouts(GROUPS, engine.info, resolved) for rollout in group]
    for rollout, together in zip(rollouts, engine.score_rollouts(rollouts), strict=True):
        (alone,) = engine.score_rollouts([rollout])
        assert together is not None
        assert alone is not None
        assert list(together.scores.scores) == [key.partition("@")[0] for key in rollout.options.probes]
        for name, scores in alone.scores.scores.items():
            np.testing.assert_allclose(together.scores[name].reduced, scores.reduced, rtol=0, atol=2e-5)


def test_scores_per_token_hold_no_others_in_memory(engines: Engines) -> None:
    tokens = engines.stacked.score(GROUPS, token_scores=["one"]).groups[0][0]["one"].tokens
    assert tokens is not None
    assert tokens.base is None or tokens.base.nbytes == tokens.nbytes


# ------------------------------------------------------------------------------------------------------------- numeric faults


def test_nan_in_one_stacked_probe_fails_it_and_no_other(reference: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> None:
    # given a probe that overflows where activations are far larger than usual
    huge = Probe("huge", linear_probe(np.full(HIDDEN_SIZE, 1e35), unit=ScoreUnit.VALUE), ("resid_post.1",))
    directory = tmp_path_factory.mktemp("probes")
    engine = Engine.load(str(tiny_model()), [probe.write(directory, reference) for probe in (huge, linear())])
    assert all(isinstance(probe.runs, StackMember) for probe in engine._served.loaded.values())
    batches = []
    for probes in (["linear"], ["linear", "huge"]):
        options = resolve_options(engine.info, probes=probes)
        (rollouts,) = resolve_rollouts([RolloutGroup([BOS], [[50, 51], [52]])], engine.info, options)
        batches += rollouts
    forest = Forest.build(batches, {key: ProbeReads() for key in engine._served.loaded})
    activations = Activations.empty(forest, [Tap("resid_post", 1)], HIDDEN_SIZE, torch.device("cpu"))
    activations.rows[Tap("resid_post", 1)][:] = 1.0
    # when the second token is one of those
    activations.rows[Tap("resid_post", 1)][1] = 1e4

    wanted = WantedRollouts(lambda _: False)
    found = BatchScorer(engine.info, engine._served.loaded, np.zeros(0, np.int32), batches, forest, activations, wanted).score(range(4))

    ok, bad = CompletionStatus.OK, CompletionStatus.NON_FINITE
    assert [found[index].status for index in range(4)] == [ok, ok, bad, ok]
    assert found[2].status_message == "probe huge@1 gives NaN or an infinity"
