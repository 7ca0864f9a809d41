"""Short sequences as the rows of one forward: which, how they are padded, and that each is what it is alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB_SIZE, tiny_model

from probescore.types import Scope, Tap
from probescore_server.backbone.forest import Forest
from probescore_server.backbone.kv_cache import KeyValueCache
from probescore_server.backbone.model_loading import load_decoder
from probescore_server.backbone.selection import universal_backbone
from probescore_server.backbone.taps import TapReader
from probescore_server.backbone.universal.backbone import UniversalBackbone
from probescore_server.backbone.universal.rows import FEW_TOKENS, MAX_FORWARD_TOKENS, MAX_PADDING, MAX_ROW_TOKENS, Row, together
from probescore_server.rollouts import CheckedRollout, Continuation, ResolvedOptions

TAPS = [Tap("resid_post", 2), Tap("attn_out", 1), Tap("resid_pre", 1)]
ARCHITECTURES = [("llama", None), ("mistral", 8), ("gemma2", 8), ("gpt_neox", None), ("gpt2", None)]


def opened(architecture: str = "llama", window: int | None = None) -> UniversalBackbone:
    decoder = load_decoder(tiny_model(architecture, sliding_window=window), num_layers=3)
    return universal_backbone(decoder, TapReader(decoder, TAPS))


def ids(random: np.random.Generator, count: int) -> np.ndarray:
    return random.integers(4, VOCAB_SIZE, count, np.int32)


def random_forest(seed: int, scope: Scope) -> Forest:
    """Prompts of all lengths with completions of all lengths, some of the same prompt, some beginning alike, some with follow-ups."""
    random = np.random.default_rng(seed)
    lengths = (0, 1, 2, 7, 30, MAX_ROW_TOKENS - 8, MAX_ROW_TOKENS + 5)
    beginning, rollouts = ids(random, 20), []
    options = ResolvedOptions(probes=(), scope=scope)
    for _ in range(12):
        prompt = np.concatenate([beginning[: random.choice((0, 0, 12, 20))], ids(random, random.choice(lengths))])
        for _ in range(random.choice((1, 1, 3))):
            follow_ups = tuple(Continuation(ids(random, 3)) for _ in range(random.choice((0, 0, 1, 2))))
            rollouts.append(CheckedRollout(prompt, Continuation(ids(random, random.choice(lengths)), follow_ups=follow_ups), options))
    return Forest.build(rollouts, {})


def forwards(backbone: UniversalBackbone, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The ids of each forward from now on, ``(rows, T)``."""
    seen: list[np.ndarray] = []
    run = backbone.read_rows

    def record(token_ids: np.ndarray, *rest: Any) -> None:
        seen.append(token_ids)
        run(token_ids, *rest)

    monkeypatch.setattr(backbone, "read_rows", record)
    return seen


@pytest.mark.parametrize(("architecture", "window"), ARCHITECTURES)
def test_any_forest_gives_what_it_gives_one_by_one(architecture: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = opened(architecture, window)
    assert backbone.runs_together
    for seed in range(2):
        for scope in (Scope.COMPLETION, Scope.ALL):
            cache = KeyValueCache(1 << 26)
            for known in (None, cache, cache):
                found = backbone.forward(random_forest(seed, scope), TAPS, cache=known)
                with monkeypatch.context() as patch:
                    patch.setattr(backbone, "runs_together", False)
                    expected = backbone.forward(random_forest(seed, scope), TAPS)
                assert found.starts == expected.starts
                for tap in TAPS:
                    errors = (found.rows[tap] - expected.rows[tap]).abs().max() / expected.rows[tap].std()
                    assert errors <= 1e-4, (seed, scope, tap)


@given(st.lists(st.integers(1, MAX_ROW_TOKENS), max_size=60))
def test_every_row_runs_once_within_the_bounds(lengths: list[int]) -> None:
    rows = [Row((index,), length) for index, length in enumerate(lengths)]
    batches = list(together(rows))
    assert sorted(row.segments for batch in batches for row in batch) == [row.segments for row in rows]
    for batch in batches:
        size = len(batch) * max(row.tokens for row in batch)
        padding = size - sum(row.tokens for row in batch)
        assert size <= MAX_FORWARD_TOKENS
        assert size <= FEW_TOKENS or padding <= MAX_PADDING * size


def statements(count: int, seed: int = 0, prompt_tokens: int = 0) -> Forest:
    random = np.random.default_rng(seed)
    options = ResolvedOptions(probes=())
    return Forest.build(
        [CheckedRollout(ids(random, prompt_tokens), Continuation(ids(random, random.integers(7, 14))), options) for _ in range(count)], {}
    )


@pytest.mark.parametrize("prompt_tokens", [0, 5])
def test_short_rollouts_without_a_shared_prompt_take_few_forwards(prompt_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = opened()
    seen = forwards(backbone, monkeypatch)
    forest = statements(32, prompt_tokens=prompt_tokens)
    backbone.forward(forest, TAPS, cache=KeyValueCache(1 << 24))
    assert len(seen) <= 3
    assert sum(forest.usage(index).tokens_computed for index in range(32)) == sum(len(segment.token_ids) for segment in forest.segments)


def pairs(count: int, scope: Scope = Scope.COMPLETION) -> Forest:
    """Statements as probes of truth are fitted on: a short prompt, of one of four lengths, with a true and a false end."""
    random = np.random.default_rng(3)
    options = ResolvedOptions(probes=(), scope=scope)
    prompts = [ids(random, 5 + index % 4) for index in range(count)]
    ends = [(prompt, ids(random, random.integers(1, 4))) for prompt in prompts for _ in range(2)]
    return Forest.build([CheckedRollout(prompt, Continuation(end), options) for prompt, end in ends], {})


@pytest.mark.parametrize("scope", [Scope.COMPLETION, Scope.ALL])
def test_short_prompts_with_a_few_completions_each_take_few_forwards(scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = opened()
    seen = forwards(backbone, monkeypatch)
    forest = pairs(24, scope)
    found = backbone.forward(forest, TAPS, cache=KeyValueCache(1 << 24))
    assert len(seen) <= 2 * 4  # prompts of each length, and what continues them
    assert sum(forest.usage(index).tokens_computed for index in range(48)) == sum(len(segment.token_ids) for segment in forest.segments)
    monkeypatch.setattr(backbone, "runs_together", False)
    expected = backbone.forward(pairs(24, scope), TAPS)
    torch.testing.assert_close(found.rows[TAPS[0]], expected.rows[TAPS[0]], atol=1e-4, rtol=1e-4)


@settings(max_examples=20)
@given(st.sets(st.integers(0, 23)))
def test_of_prompts_that_run_together_only_what_is_wanted_is_run(unwanted: set[int]) -> None:
    backbone = opened()
    forest = pairs(12)
    skipped = {index for index, segment in enumerate(forest.segments) if segment.rollouts <= unwanted}
    with pytest.MonkeyPatch.context() as patch:
        seen = forwards(backbone, patch)
        found = backbone.forward(forest, TAPS, skip=skipped.__contains__)
    assert sum(map(len, seen)) == len(forest.segments) - len(skipped)
    whole = backbone.forward(pairs(12), TAPS)
    for index in found.starts.keys() - skipped:
        part = slice(found.starts[index], found.starts[index] + len(forest.segments[index].token_ids))
        torch.testing.assert_close(found.rows[TAPS[0]][part], whole.rows[TAPS[0]][part], atol=1e-4, rtol=1e-4)


def test_a_row_is_padded_behind_with_a_token_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = opened()
    seen = forwards(backbone, monkeypatch)
    forest = statements(10)
    backbone.forward(forest, TAPS)
    assert any(len(token_ids) > 1 for token_ids in seen)
    for row in (row for token_ids in seen for row in token_ids):
        own = next(segment.token_ids for segment in forest.segments if (row[: len(segment.token_ids)] == segment.token_ids).all())
        assert (row[len(own) :] == own[-1]).all()


def test_what_rows_leave_in_the_cache_is_read_by_the_next_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = opened()
    cache = KeyValueCache(1 << 26)
    first = statements(6, prompt_tokens=4)
    backbone.forward(first, TAPS, cache=cache)
    random = np.random.default_rng(9)
    turns = [
        CheckedRollout(first.ids_up_to(placement.chain[-1]), Continuation(ids(random, 3)), ResolvedOptions(probes=()))
        for placement in first.placements
    ]
    again, fresh = Forest.build(turns, {}), Forest.build(turns, {})
    found, expected = backbone.forward(again, TAPS, cache=cache), backbone.forward(fresh, TAPS)
    assert all(
        again.segments[placement.context[0]].cached == len(rollout.prompt_ids)
        for placement, rollout in zip(again.placements, turns, strict=True)
    )
    torch.testing.assert_close(found.rows[TAPS[0]], expected.rows[TAPS[0]], atol=1e-4, rtol=1e-4)


@settings(max_examples=20)
@given(st.data())
def test_only_what_is_wanted_is_run(data: st.DataObject) -> None:
    backbone = opened()
    forest = statements(12, prompt_tokens=3)
    unwanted = data.draw(st.sets(st.integers(0, 11)))
    skipped = {index for index, segment in enumerate(forest.segments) if segment.rollouts <= unwanted}
    with pytest.MonkeyPatch.context() as patch:
        seen = forwards(backbone, patch)
        found = backbone.forward(forest, TAPS, skip=skipped.__contains__)
    assert sum(map(len, seen)) == 12 - len(unwanted)
    whole = backbone.forward(statements(12, prompt_tokens=3), TAPS)
    for index in found.starts.keys() - skipped:
        part = slice(found.starts[index], found.starts[index] + len(forest.segments[index].token_ids))
        torch.testing.assert_close(found.rows[TAPS[0]][part], whole.rows[TAPS[0]][part], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fault", ["other numbers", "an error"])
def test_a_model_that_is_other_with_several_rows_runs_them_one_by_one(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = UniversalBackbone.read_rows

    def faulty(backbone: UniversalBackbone, token_ids: np.ndarray, position: int, state: Any, into: Any, rows: Any = None) -> None:
        if len(token_ids) > 1:
            if fault == "an error":
                raise ValueError("one sequence at a time")
            token_ids = token_ids[::-1].copy()
        run(backbone, token_ids, position, state, into, rows)

    monkeypatch.setattr(UniversalBackbone, "read_rows", faulty)
    backbone = opened()
    assert not backbone.runs_together
    seen = forwards(backbone, monkeypatch)
    backbone.forward(statements(5), TAPS)
    assert [len(token_ids) for token_ids in seen] == [1] * 5
