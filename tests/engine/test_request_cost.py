"""What a request is said to cost is what it costs: the numbers in its answer, and what its spans read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from engine_probes import linear, pooled_mean, running_mean
from hypothesis import given, settings
from hypothesis import strategies as st
from models import HIDDEN_SIZE, tiny_model

from probescore.types import Completion, CompletionScores, RolloutGroup, Scope, Span
from probescore_probes.exporting import linear_probe
from probescore_probes.reference import ReferenceModel
from probescore_probes.writing import write_probe
from probescore_server import Engine
from probescore_server.errors import LimitExceeded
from probescore_server.probes.format.manifest import FollowUp
from probescore_server.request_cost import RequestCost
from probescore_server.validation.options import resolve_options
from probescore_server.validation.rollouts import resolve_rollouts

REDUCTIONS = ("mean", "max", "topk_mean(2)")
PROBES = ("linear", "labels", "pooled-mean", "pooled-sees", "running-mean", "asks", "asks-pooled")


@pytest.fixture(scope="module")
def engine(reference: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    directory = tmp_path_factory.mktemp("probes")
    asks = FollowUp(token_ids=(30, 31, 32))
    probes = [
        linear(),
        pooled_mean(),
        pooled_mean("pooled-sees", sees_prompt=True),
        running_mean(),
        linear("asks", follow_up=asks),
        pooled_mean("asks-pooled", follow_up=asks),
    ]
    files = [probe.write(directory, reference) for probe in probes]
    weight = np.random.default_rng(1).standard_normal((3, HIDDEN_SIZE))
    golden = [([1, 20, 33], [9, 60, 2]), ([1, 5], [70, 12])]
    path = directory / "labels.onnx"
    write_probe(
        path, linear_probe(weight), reference, name="labels", version="1", taps=["resid_post.1"], labels=["a", "b", "c"], golden=golden
    )
    return Engine.load(str(tiny_model()), [*files, path])


@st.composite
def completions(draw: st.DrawFn, depth: int = 0) -> Completion:
    ids = draw(st.lists(st.integers(4, 60), max_size=5))
    ends = st.integers(0, len(ids))
    bounds = draw(st.lists(st.tuples(ends, ends), max_size=3)) if depth or draw(st.booleans()) else []
    spans = tuple(Span(f"s{index}", min(pair), max(pair)) for index, pair in enumerate(bounds))
    follow_ups = draw(st.lists(completions(depth + 1), max_size=2)) if depth < 2 else []
    return Completion(ids, spans=spans, follow_ups=tuple(follow_ups))


def numbers(scored: CompletionScores) -> Iterator[int]:
    for scores in scored.scores.values():
        yield scores.reduced.size
        yield 0 if scores.tokens is None else scores.tokens.size
    for follow_up in scored.follow_ups:
        yield from numbers(follow_up)


@settings(max_examples=60)
@given(
    st.lists(completions(), min_size=1, max_size=3),
    st.sets(st.sampled_from(PROBES), min_size=1),
    st.lists(st.sampled_from(REDUCTIONS), unique=True),
    st.sampled_from(Scope),
    st.booleans(),
)
def test_the_numbers_in_an_answer_are_counted_before_it_is_computed(
    engine: Engine, completed: list[Completion], probes: set[str], reductions: list[str], scope: Scope, wants_tokens: bool
) -> None:
    if scope is Scope.PROMPT:
        completed = [Completion(each.tokens, follow_ups=each.follow_ups) for each in completed]
    groups = [RolloutGroup([1, 70, 71], completed)]
    token_scores = "all" if wants_tokens else ()
    resolved = resolve_options(engine.info, probes=sorted(probes), reductions=reductions, scope=scope, token_scores=token_scores)
    (rollouts,) = resolve_rollouts(groups, engine.info, resolved)
    cost = RequestCost.of(engine.info, resolved)
    scored = engine.score(groups, probes=sorted(probes), reductions=reductions, scope=scope, token_scores=token_scores)
    for rollout, found in zip(rollouts, scored.groups[0], strict=True):
        assert cost.values(rollout) == sum(numbers(found))
    whole = sum(map(cost.values, rollouts))
    resolve_rollouts(groups, engine.info, resolved, max_request_values=whole)
    with pytest.raises(LimitExceeded, match="max_request_values"):
        resolve_rollouts(groups, engine.info, resolved, max_request_values=whole - 1)


def spans_cost(engine: Engine, completion: Completion, *probes: str, reductions: int = 1) -> tuple[int, int]:
    """Scores that spans read, and tokens that they read again, after a prompt of three tokens."""
    resolved = resolve_options(engine.info, probes=probes, reductions=REDUCTIONS[:reductions])
    ((rollout,),) = resolve_rollouts([RolloutGroup([1, 70, 71], [completion])], engine.info, resolved)
    return RequestCost.of(engine.info, resolved).scores_of_spans(rollout), rollout.reread_tokens


def test_what_spans_read(engine: Engine) -> None:
    spans = (Span("a", 0, 4), Span("b", 1, 4), Span("c", 2, 2))
    ids = [50, 51, 52, 53]
    once = Completion(ids, spans=spans)
    assert spans_cost(engine, once, "linear") == (7, 4)  # the empty one counts for one
    assert spans_cost(engine, once, "linear", "labels", reductions=2) == (7 * 2 * 4, 4)
    assert spans_cost(engine, once, "pooled-mean", reductions=3) == (7 * HIDDEN_SIZE, 4)
    assert spans_cost(engine, once, "pooled-sees") == ((7 + 3 * 3) * HIDDEN_SIZE, 4 + 3 * 3)
    assert spans_cost(engine, once, "asks", "asks-pooled") == (0, 4)  # scores none of those tokens
    assert spans_cost(engine, Completion(ids, spans=spans[:1]), "linear") == (4, 0)  # read once, as without
    nested = Completion(ids, spans=spans, follow_ups=(Completion([9, 9], spans=(Span("d", 0, 2),)),))
    assert spans_cost(engine, nested, "linear") == (9, 4)
    assert spans_cost(engine, nested, "pooled-sees") == ((7 + 9 + 2 + 7) * HIDDEN_SIZE, 8 + 9 + 2 + 7 - 6)


@pytest.mark.parametrize("path", ["plain", "with a follow-up"])
def test_spans_that_read_again_take_room_in_a_batch(engine: Engine, path: str) -> None:
    follow_ups = (Completion([9], spans=(Span("x", 0, 1), Span("y", 0, 1))),) if path != "plain" else ()
    plain = resolve_rollouts([RolloutGroup([1, 70], [Completion([50, 51, 52])])], engine.info, resolve_options(engine.info))[0][0]
    spans = tuple(Span(f"s{index}", 0, 3) for index in range(10))
    completion = Completion([50, 51, 52], spans=spans, follow_ups=follow_ups)
    resolved = resolve_options(engine.info, probes=["linear"])
    ((rollout,),) = resolve_rollouts([RolloutGroup([1, 70], [completion])], engine.info, resolved)
    assert rollout.tokens == 5 + 27 + (2 if follow_ups else 0)
    assert plain.reread_tokens == 0


def test_spans_that_read_again_count_as_tokens_of_the_request(engine: Engine) -> None:
    spans = tuple(Span(f"s{index}", 0, 3) for index in range(10))
    groups = [RolloutGroup([1, 70], [Completion([50, 51, 52], spans=spans), [50]])]
    resolved = resolve_options(engine.info, probes=["linear"])
    resolve_rollouts(groups, engine.info, resolved, max_request_tokens=2 + 3 + 27 + 1)
    with pytest.raises(LimitExceeded, match="33 tokens; the limit max_request_tokens is 32"):
        resolve_rollouts(groups, engine.info, resolved, max_request_tokens=2 + 3 + 27)
