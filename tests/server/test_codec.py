"""What crosses the pipe is the same on the other side: batches and what they bring back, through pickle, as the pipe sends them."""

from __future__ import annotations

import pickle
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from probescore.reductions import Reduction
from probescore.types import CompletionScores, CompletionStatus, Pool, ProbeScores, ReadingScores, Scope, Span, Tap, Usage
from probescore_server.rollouts import (
    ActivationReads,
    CheckedRollout,
    Continuation,
    PinnedReading,
    ResolvedOptions,
    RolloutResult,
    ScoredBatch,
)
from probescore_server.workers.messages import BatchScored, ScoreBatch

NAMES = st.text(max_size=3)
COUNTS = st.integers(0, 3)
FLOATS = st.floats(width=32)
IDS = arrays.arrays(np.int32, COUNTS, elements=st.integers(0, 2**31 - 1))
SPANS = st.lists(st.builds(Span, NAMES, COUNTS, COUNTS), max_size=2).map(tuple)
TEXTS = st.none() | st.lists(NAMES, max_size=3).map(tuple)

EVERY_OPTION = {
    "probes": st.lists(NAMES, max_size=3).map(tuple),
    "reductions": st.lists(st.sampled_from(["mean", "topk_mean(8)", "ema_max(0.1)"]).map(Reduction.parse), max_size=2).map(tuple),
    "token_scores": st.frozensets(NAMES, max_size=2),
    "scope": st.sampled_from(Scope),
    "return_token_ids": st.booleans(),
    "return_token_texts": st.booleans(),
    "activations": st.none()
    | st.builds(
        ActivationReads,
        taps=st.lists(st.builds(Tap, NAMES, st.none() | COUNTS), max_size=2).map(tuple),
        pools=st.lists(st.sampled_from(Pool), max_size=2).map(tuple),
        tokens=st.booleans(),
        dtype=st.sampled_from(["float32", "bfloat16"]),
    ),
    "adapters": st.frozensets(NAMES, max_size=2),
    "readings": st.lists(st.builds(PinnedReading, NAMES, NAMES), max_size=2).map(tuple),
}
OPTIONS = st.builds(ResolvedOptions, **EVERY_OPTION)


def continuations(follow_ups: st.SearchStrategy[tuple[Continuation, ...]]) -> st.SearchStrategy[Continuation]:
    masks = st.none() | arrays.arrays(np.bool_, COUNTS)
    return st.builds(Continuation, IDS, masks, SPANS, follow_ups, NAMES, st.booleans())


def completion_scores(follow_ups: st.SearchStrategy[tuple[CompletionScores, ...]]) -> st.SearchStrategy[CompletionScores]:
    reduced = arrays.arrays(np.float32, st.tuples(COUNTS, COUNTS, COUNTS), elements=FLOATS)
    tokens = st.none() | arrays.arrays(np.float32, st.tuples(COUNTS, COUNTS), elements=FLOATS)
    status, scores = st.sampled_from(CompletionStatus), st.dictionaries(NAMES, st.builds(ProbeScores, reduced, tokens), max_size=3)
    return st.builds(
        CompletionScores,
        id=NAMES,
        status=status,
        scores=scores,
        status_message=NAMES,
        prompt_ids=st.none() | IDS,
        completion_ids=st.none() | IDS,
        inexact_ids=st.booleans(),
        follow_ups=follow_ups,
        prompt_texts=TEXTS,
        completion_texts=TEXTS,
        readings=st.dictionaries(NAMES, st.builds(ReadingScores, status, scores, NAMES), max_size=2),
    )


def some(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(strategy, max_size=2).map(tuple)


CONTINUATIONS = st.recursive(continuations(st.just(())), lambda inner: continuations(some(inner)), max_leaves=4)
COMPLETION_SCORES = st.recursive(completion_scores(st.just(())), lambda inner: completion_scores(some(inner)), max_leaves=4)
STORED = st.sampled_from([np.dtype("<f4"), np.dtype("<f2"), np.dtype("<u2")])
ROWS = STORED.flatmap(lambda dtype: arrays.arrays(dtype, st.tuples(COUNTS, st.integers(1, 3))))
ACTIVATIONS = some(st.dictionaries(st.tuples(NAMES, st.sampled_from(Pool)), ROWS, max_size=3))
RESULTS = st.builds(RolloutResult, COMPLETION_SCORES, st.builds(Usage, COUNTS, COUNTS, COUNTS), NAMES, ACTIVATIONS)


def assert_same(ours: Any, theirs: Any) -> None:
    """Types, shapes and bits included."""
    assert type(ours) is type(theirs)
    if isinstance(ours, np.ndarray):
        assert (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())
    elif is_dataclass(ours):
        for field in fields(ours):
            assert_same(getattr(ours, field.name), getattr(theirs, field.name))
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        assert_same(list(ours.values()), list(theirs.values()))
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            assert_same(our, their)
    else:
        assert ours == theirs


@given(st.lists(st.builds(CheckedRollout, IDS, CONTINUATIONS, OPTIONS, COUNTS), max_size=3))
def test_a_batch_reaches_the_worker_as_it_was_sent(rollouts: list[CheckedRollout]) -> None:
    assert_same(pickle.loads(pickle.dumps(ScoreBatch(7, rollouts))), ScoreBatch(7, rollouts))


@given(st.lists(st.none() | RESULTS, max_size=3).map(tuple))
def test_results_come_back_as_the_worker_sent_them(results: tuple[RolloutResult | None, ...]) -> None:
    sent = BatchScored(7, ScoredBatch(results, 0.5))
    assert_same(pickle.loads(pickle.dumps(sent, pickle.HIGHEST_PROTOCOL)), sent)


def test_every_option_of_a_request_is_drawn_here() -> None:
    # an option that is left out where options are packed by hand would be answered as if nobody had asked for it
    assert set(EVERY_OPTION) == {option.name for option in fields(ResolvedOptions)}


def test_what_rollouts_share_is_sent_once_and_shared_again() -> None:
    options = ResolvedOptions(("p@1",))
    prompt, completion = np.arange(1000, dtype=np.int32), Continuation(np.arange(3, dtype=np.int32))
    sent = pickle.dumps(ScoreBatch(1, [CheckedRollout(prompt, completion, options) for _ in range(10)]))
    assert len(sent) < 2 * prompt.nbytes
    arrived = pickle.loads(sent).rollouts
    assert len({id(rollout.prompt_ids) for rollout in arrived}) == len({id(rollout.options) for rollout in arrived}) == 1


def test_an_array_that_is_not_contiguous_is_sent_as_it_reads() -> None:
    reduced = np.arange(12, dtype=np.float32).reshape(3, 4, 1)[:, ::2]
    scores = CompletionScores("", CompletionStatus.OK, {"p": ProbeScores(reduced)})
    arrived = pickle.loads(pickle.dumps(BatchScored(1, ScoredBatch((RolloutResult(scores, Usage()),), 0.5))))
    np.testing.assert_array_equal(arrived.batch.results[0].scores.scores["p"].reduced, reduced)


def test_numbers_of_another_type_are_refused_instead_of_read_as_others() -> None:
    ids, options = np.arange(2, dtype=np.int32), ResolvedOptions(("p@1",))
    scores = CompletionScores("", CompletionStatus.OK, {"p": ProbeScores(np.zeros((1, 1, 1)))})
    for message in (
        ScoreBatch(1, [CheckedRollout(ids.astype(np.int64), Continuation(ids), options)]),
        ScoreBatch(1, [CheckedRollout(ids, Continuation(ids.astype(np.int64)), options)]),
        ScoreBatch(1, [CheckedRollout(ids, Continuation(ids, ids), options)]),
        BatchScored(1, ScoredBatch((RolloutResult(scores, Usage()),), 0.5)),
    ):
        with pytest.raises(TypeError, match="is read"):
            pickle.dumps(message)
