"""The packed path gives what plain Hugging Face forwards give, one sequence at a time: here with a kernel in plain torch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
import varlen_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB_SIZE, tiny_model
from packed_models import PACKABLE, packable_decoder

from probescore.types import Scope, Tap
from probescore_server.backbone.base import Activations
from probescore_server.backbone.forest import Forest
from probescore_server.backbone.kv_cache import KeyValueCache
from probescore_server.backbone.model_loading import Decoder, load_decoder
from probescore_server.backbone.packed.attention import PackedPlan
from probescore_server.backbone.packed.backbone import KEYS_PER_TOKEN, PackedBackbone
from probescore_server.backbone.taps import TapReader
from probescore_server.backbone.universal.attention import UnknownAttention
from probescore_server.backbone.universal.backbone import UniversalBackbone
from probescore_server.rollouts import CheckedRollout, Continuation, ResolvedOptions

BOUND = 1e-4
TAPS = [Tap("resid_pre", 0), Tap("resid_pre", 2), Tap("resid_post", 1), Tap("attn_out", 3), Tap("mlp_out", 3), Tap("final_norm")]
DEEPEST = Tap("resid_post", 3)


class Kernel:
    """The reference kernel, with a record of what it was given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.keys: list[int] = []
        self.__signature__ = inspect.signature(varlen_reference.varlen_attn)

    def __call__(self, query: torch.Tensor, key: torch.Tensor, *others: Any, **options: Any) -> Any:
        self.tokens.append(len(query))
        self.keys.append(len(key))
        return varlen_reference.varlen_attn(query, key, *others, **options)


def some_ids(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, VOCAB_SIZE, count, np.int32)


def a_forest(scope: Scope = Scope.ALL) -> Forest:
    """Two prompts; of the first, three completions, one of them with two follow-ups. Longer than a window of 8."""
    options = ResolvedOptions(probes=(), scope=scope)
    forked = Continuation(some_ids(9, 1), follow_ups=(Continuation(some_ids(6, 2)), Continuation(some_ids(1, 3))))
    prompt = some_ids(20, 0)
    return Forest.build(
        [
            CheckedRollout(prompt, forked, options),
            CheckedRollout(some_ids(3, 4), Continuation(some_ids(14, 5)), options),
            CheckedRollout(prompt, Continuation(some_ids(5, 6)), options),
            CheckedRollout(prompt, Continuation(some_ids(1, 7)), options),
        ],
        {},
    )


def plain(decoder: Decoder, reader: TapReader, forest: Forest, taps: Sequence[Tap]) -> Activations:
    """Each sequence by itself, as Hugging Face runs it."""
    expected = Activations.empty(forest, taps, decoder.config.hidden_size, decoder.device)
    for index, start in expected.starts.items():
        ids = forest.ids_up_to(index)
        rows = {tap: torch.empty((len(ids), decoder.config.hidden_size)) for tap in taps}
        with reader.reading(rows), torch.inference_mode():
            output = decoder.model(input_ids=torch.from_numpy(ids).long().unsqueeze(0), use_cache=False)
        reader.read_final_norm(output, rows)
        own = len(forest.segments[index].token_ids)
        for tap in taps:
            expected.rows[tap][start : start + own] = rows[tap][-own:]
    return expected


def worst_error(found: Activations, expected: Activations) -> float:
    """The largest relative error of a row, at any tap; infinite if one is not a number."""
    errors = [(found.rows[tap] - rows).norm(dim=1) / rows.norm(dim=1) for tap, rows in expected.rows.items()]
    return float(torch.cat(errors).nan_to_num(torch.inf).max())


# ------------------------------------------------------------------------------------------------------------------ agreement


@pytest.mark.parametrize("architecture", PACKABLE)
def test_every_row_at_every_tap_is_that_of_a_plain_forward(architecture: str) -> None:
    decoder = packable_decoder(architecture)
    reader = TapReader(decoder, TAPS)
    forest = a_forest()
    found = PackedBackbone(decoder, reader, varlen_reference.varlen_attn).forward(forest, TAPS)
    assert worst_error(found, plain(decoder, reader, forest, TAPS)) < BOUND


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt_oss"])
@pytest.mark.parametrize("tokens", [1, 7, 29])
def test_passes_and_cuts_between_them_change_nothing(architecture: str, tokens: int) -> None:
    decoder = packable_decoder(architecture)
    reader = TapReader(decoder, [DEEPEST])
    forest = a_forest()
    found = PackedBackbone(decoder, reader, varlen_reference.varlen_attn, max_pass_tokens=tokens).forward(forest, [DEEPEST])
    assert worst_error(found, plain(decoder, reader, forest, [DEEPEST])) < BOUND


@functools.cache
def _tiny_mistral() -> tuple[Decoder, TapReader]:
    decoder = load_decoder(tiny_model("mistral", sliding_window=6), num_layers=2)
    return decoder, TapReader(decoder, [Tap("resid_post", 1)])


_lengths = st.integers(0, 9)
_continuations = st.recursive(
    _lengths.map(lambda n: Continuation(some_ids(n, n))),
    lambda inner: st.builds(lambda n, after: Continuation(some_ids(n, n), follow_ups=tuple(after)), _lengths, st.lists(inner, max_size=2)),
    max_leaves=4,
)


@settings(max_examples=40)
@given(
    rollouts=st.lists(st.tuples(_lengths, _continuations, st.sampled_from(list(Scope))), min_size=1, max_size=4), tokens=st.integers(1, 40)
)
def test_any_forest_in_any_passes(rollouts: list[tuple[int, Continuation, Scope]], tokens: int) -> None:
    decoder, reader = _tiny_mistral()
    tap = Tap("resid_post", 1)
    forest = Forest.build(
        [CheckedRollout(some_ids(n, n), after, ResolvedOptions(probes=(), scope=scope)) for n, after, scope in rollouts], {}
    )
    kernel = Kernel()
    found = PackedBackbone(decoder, reader, kernel, max_pass_tokens=tokens).forward(forest, [tap], cache=KeyValueCache(1 << 20))
    expected = plain(decoder, reader, forest, [tap])
    assert found.starts == expected.starts
    torch.testing.assert_close(found.rows[tap], expected.rows[tap], atol=1e-4, rtol=1e-4)
    assert max(kernel.tokens, default=0) <= tokens
    longest = max((s.position + len(s.token_ids) for s in forest.segments), default=0)
    assert max(kernel.keys, default=0) <= max(KEYS_PER_TOKEN * tokens, longest)


# ----------------------------------------------------------------------------------------------------------------------- plan

MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "token_ids": lambda ids: torch.cat([ids[:1] ^ 1, ids[1:]]),
    "position_ids": lambda positions: torch.cat([positions[:-1], positions[-1:] + 1]),
    "key_rows": lambda rows: torch.cat([rows[:-2], rows[[-3]], rows[-1:]]),
    "cu_seq_q": lambda ends: torch.cat([ends[:1], ends[1:2] - 1, ends[2:]]),
    "cu_seq_k": lambda ends: torch.cat([ends[:1], ends[1:2] - 1, ends[2:]]),
    "max_q": lambda longest: longest - 1,
    "max_k": lambda longest: longest - 1,
    "read_rows": lambda rows: rows.roll(1),
    "output_rows": lambda rows: rows.roll(1),
}


class Mutated(PackedBackbone):
    """Runs another plan than was made."""

    field = ""

    def _run(self, plan: PackedPlan, *others: Any, **options: Any) -> Any:
        return super()._run(replace(plan, **{self.field: MUTATIONS[self.field](getattr(plan, self.field))}), *others, **options)


@pytest.mark.parametrize("field", [field.name for field in fields(PackedPlan)])
def test_a_plan_with_one_field_changed_gives_something_else(field: str) -> None:
    decoder = packable_decoder("llama")
    reader = TapReader(decoder, [DEEPEST])
    backbone = Mutated(decoder, reader, varlen_reference.varlen_attn)
    backbone.field = field
    forest = a_forest()
    expected = plain(decoder, reader, forest, [DEEPEST])
    try:
        found = backbone.forward(forest, [DEEPEST])
    except AssertionError:  # the kernel's arguments do not fit each other
        return
    assert worst_error(found, expected) > 100 * BOUND


# ----------------------------------------------------------------------------------------------------------------- key values


def opened(decoder: Decoder, **options: Any) -> tuple[PackedBackbone, Kernel, TapReader]:
    reader, kernel = TapReader(decoder, [DEEPEST]), Kernel()
    return PackedBackbone(decoder, reader, kernel, **options), kernel, reader


def prompt_and_completion(prompt: np.ndarray, *completions: np.ndarray, scope: Scope = Scope.COMPLETION) -> Forest:
    options = ResolvedOptions(probes=(), scope=scope)
    return Forest.build([CheckedRollout(prompt, Continuation(completion), options) for completion in completions], {})


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "deepseek_v3"])
@pytest.mark.parametrize("tokens", [11, 1000])
def test_prompt_that_is_cached_is_not_computed_again(architecture: str, tokens: int) -> None:
    backbone, kernel, reader = opened(decoder := packable_decoder(architecture), max_pass_tokens=tokens)
    cache = KeyValueCache(1 << 22)
    prompt = some_ids(30, 0)
    backbone.forward(prompt_and_completion(prompt, some_ids(4, 1)), [DEEPEST], cache=cache)
    kernel.tokens.clear()

    forest = prompt_and_completion(prompt, some_ids(5, 2), some_ids(6, 3))
    found = backbone.forward(forest, [DEEPEST], cache=cache)

    assert [segment.cached for segment in forest.segments] == [30, 0, 0]
    assert sum(kernel.tokens) == 4 * (5 + 6)
    assert worst_error(found, plain(decoder, reader, forest, [DEEPEST])) < BOUND


def test_what_was_said_before_is_cached_as_far_as_it_is_the_same() -> None:
    backbone, kernel, reader = opened(decoder := packable_decoder("llama"))
    cache = KeyValueCache(1 << 22)
    first, answer = some_ids(20, 0), some_ids(9, 1)
    backbone.forward(prompt_and_completion(first, answer), [DEEPEST], cache=cache)
    kernel.tokens.clear()

    forest = prompt_and_completion(np.concatenate([first, answer[:6], some_ids(8, 2)]), some_ids(5, 3))
    found = backbone.forward(forest, [DEEPEST], cache=cache)

    assert forest.segments[0].cached == 26
    assert kernel.tokens == [8 + 5] * 4
    assert worst_error(found, plain(decoder, reader, forest, [DEEPEST])) < BOUND


def test_unread_chain_is_cached_segment_by_segment_and_nothing_that_is_read() -> None:
    backbone, _, reader = opened(decoder := packable_decoder("llama"))
    cache = KeyValueCache(1 << 22)
    for forest in (a_forest(), a_forest()):
        for index in (0, 1):  # only the follow-ups are read
            forest.segments[index].read = False
        found = backbone.forward(forest, [DEEPEST], cache=cache)
    assert [segment.cached for segment in forest.segments] == [20, 9, 0, 0, 0, 0, 0, 0]
    assert worst_error(found, plain(decoder, reader, forest, [DEEPEST])) < BOUND


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("packed_first", [True, False])
def test_both_paths_may_share_a_cache(architecture: str, packed_first: bool) -> None:
    packed, _, reader = opened(decoder := packable_decoder(architecture))
    universal = UniversalBackbone(decoder, reader)
    cache = KeyValueCache(1 << 22)
    paths = [packed, universal] if packed_first else [universal, packed]
    paths[0].forward(prompt_and_completion(some_ids(30, 0), some_ids(4, 1)), [DEEPEST], cache=cache)
    forest = prompt_and_completion(some_ids(30, 0), some_ids(5, 2))
    found = paths[1].forward(forest, [DEEPEST], cache=cache)
    assert forest.segments[0].cached == 30
    assert worst_error(found, plain(decoder, reader, forest, [DEEPEST])) < BOUND


class Recorded(PackedBackbone):
    """Knows of each pass how many tokens it had, and whether its keys and values were kept."""

    passes: list[tuple[int, bool]]

    def _run(self, plan: PackedPlan, *others: Any, keep: bool) -> Any:
        self.passes.append((len(plan.token_ids), keep))
        return super()._run(plan, *others, keep=keep)


@pytest.mark.parametrize(
    ("tokens", "passes"),
    [
        (100, [(18, False)]),
        (9, [(9, False), (9, False)]),  # a prompt with its completion in each
        (8, [(8, True), (8, True), (2, False)]),  # the ends of both completions left over
        (12, [(12, True), (6, False)]),  # a prompt cut in two
    ],
)
def test_keys_and_values_are_kept_where_a_later_pass_needs_them(tokens: int, passes: list[tuple[int, bool]]) -> None:
    options = ResolvedOptions(probes=())
    forest = Forest.build([CheckedRollout(some_ids(5, seed), Continuation(some_ids(4, seed + 2)), options) for seed in range(2)], {})
    decoder = packable_decoder("llama")
    backbone = Recorded(decoder, TapReader(decoder, [DEEPEST]), varlen_reference.varlen_attn, max_pass_tokens=tokens)
    backbone.passes = []
    backbone.forward(forest, [DEEPEST])
    assert backbone.passes == passes


def test_what_no_one_wants_is_not_run() -> None:
    backbone, kernel, reader = opened(decoder := packable_decoder("llama"))
    forest = a_forest()
    unwanted = {1, 6}  # a completion with its two follow-ups, and another completion
    found = backbone.forward(forest, [DEEPEST], skip=unwanted.__contains__)
    expected = plain(decoder, reader, forest, [DEEPEST])
    assert kernel.tokens == [20 + 3 + 14 + 1] * 4
    for index in (0, 4, 5, 7):
        own = slice(found.starts[index], found.starts[index] + len(forest.segments[index].token_ids))
        torch.testing.assert_close(found.rows[DEEPEST][own], expected.rows[DEEPEST][own], atol=1e-4, rtol=1e-4)


def test_forest_without_anything_to_run_is_empty() -> None:
    backbone, kernel, _ = opened(packable_decoder("llama"))
    assert backbone.forward(Forest(), [DEEPEST]).rows[DEEPEST].shape == (0, 64)
    assert kernel.tokens == []


# --------------------------------------------------------------------------------------------------------------------- kernel


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_kernel_without_unequal_heads_gets_them_repeated(architecture: str) -> None:
    def varlen_attn_of_torch_2_11(*tensors: Any, return_aux: Any = None, scale: float | None = None, window_size: Any = (-1, -1)) -> Any:
        return varlen_reference.varlen_attn(*tensors, return_aux=return_aux, scale=scale, window_size=window_size)

    decoder = packable_decoder(architecture)
    reader = TapReader(decoder, [DEEPEST])
    forest = a_forest()
    found = PackedBackbone(decoder, reader, varlen_attn_of_torch_2_11).forward(forest, [DEEPEST])
    assert worst_error(found, plain(decoder, reader, forest, [DEEPEST])) < BOUND


def test_sinks_are_refused_where_log_sum_exps_come_in_another_shape() -> None:
    def by_token(*tensors: Any, **options: Any) -> Any:
        output, log_sum_exp = varlen_reference.varlen_attn(*tensors, **options)
        return output, log_sum_exp.T

    decoder = packable_decoder("gpt_oss")
    with pytest.raises(UnknownAttention, match="log-sum-exp has shape"):
        PackedBackbone(decoder, TapReader(decoder, [DEEPEST]), by_token).forward(a_forest(), [DEEPEST])


def test_attention_is_the_decoders_own_again_even_after_an_error() -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel image")

    decoder = packable_decoder("llama")
    reader = TapReader(decoder, [DEEPEST])
    before = decoder.config._attn_implementation
    PackedBackbone(decoder, reader, varlen_reference.varlen_attn).forward(a_forest(), [DEEPEST])
    assert decoder.config._attn_implementation == before
    with pytest.raises(RuntimeError, match="no kernel image"):
        PackedBackbone(decoder, reader, broken).forward(a_forest(), [DEEPEST])
    assert decoder.config._attn_implementation == before


def test_blocks_that_attend_otherwise_are_an_error_and_never_a_score() -> None:
    decoder = packable_decoder("bloom")
    backbone = PackedBackbone(decoder, TapReader(decoder, [DEEPEST]), varlen_reference.varlen_attn)
    with pytest.raises(RuntimeError, match="0 of 4 blocks attended through the packed path"):
        backbone.forward(a_forest(), [DEEPEST])
