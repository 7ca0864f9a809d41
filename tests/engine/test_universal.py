"""The universal path: chunks, forks, prepacked weights and cached keys and values change how activations are computed, not their values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from models import VOCAB_SIZE, tiny_model
from transformers.activations import ACT2FN

from probescore.types import Scope, Tap
from probescore_server.backbone.base import Activations
from probescore_server.backbone.forest import Forest
from probescore_server.backbone.kv_cache import KeyValueCache
from probescore_server.backbone.model_loading import Decoder, load_decoder
from probescore_server.backbone.selection import universal_backbone
from probescore_server.backbone.self_test import SelfTest
from probescore_server.backbone.taps import TapReader
from probescore_server.backbone.universal import backbone
from probescore_server.backbone.universal.attention import CAUSAL_ATTENTION
from probescore_server.backbone.universal.backbone import UniversalBackbone
from probescore_server.backbone.universal.gated_mlp import multiply_in_place
from probescore_server.backbone.universal.prepacking import can_prepack, prepack
from probescore_server.errors import ModelRefused
from probescore_server.rollouts import CheckedRollout, Continuation, ResolvedOptions

TAP = Tap("resid_post", 2)
ARCHITECTURES = [("llama", None), ("mistral", 8), ("gemma2", 8), ("gpt_neox", None), ("gpt2", None)]


def opened(architecture: str = "llama", window: int | None = None) -> tuple[Decoder, TapReader]:
    decoder = load_decoder(tiny_model(architecture, sliding_window=window), num_layers=3)
    return decoder, TapReader(decoder, [TAP])


def some_ids(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, VOCAB_SIZE, count, np.int32)


def group(prompt: np.ndarray, *completions: np.ndarray, scope: Scope = Scope.COMPLETION) -> Forest:
    options = ResolvedOptions(probes=(), scope=scope)
    return Forest.build([CheckedRollout(prompt, Continuation(completion), options) for completion in completions], {})


def rows(activations: Activations, segment: int, forest: Forest) -> torch.Tensor:
    start = activations.starts[segment]
    return activations.rows[TAP][start : start + len(forest.segments[segment].token_ids)]


@contextmanager
def chunks_of(tokens: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(backbone, "CHUNK_TOKENS", tokens)
        yield


@pytest.mark.parametrize(("architecture", "window"), ARCHITECTURES)
def test_chunks_give_what_the_whole_gives(architecture: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = universal_backbone(*opened(architecture, window))
    forest = group(some_ids(21, 0), some_ids(33, 1), scope=Scope.ALL)
    whole = backbone.forward(forest, [TAP]).rows[TAP]
    with chunks_of(5, monkeypatch):
        torch.testing.assert_close(backbone.forward(forest, [TAP]).rows[TAP], whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("architecture", "window"), ARCHITECTURES)
def test_second_epoch_computes_completions_only_and_gives_the_same(architecture: str, window: int | None) -> None:
    backbone = universal_backbone(*opened(architecture, window))
    cache = KeyValueCache(1 << 24)
    prompt = some_ids(30, 0)
    backbone.forward(group(prompt, some_ids(9, 1)), [TAP], cache=cache)
    # when the prompt comes again with another completion
    again = group(prompt, some_ids(12, 2))
    found = backbone.forward(again, [TAP], cache=cache)
    assert [segment.cached for segment in again.segments] == [30, 0]
    assert again.usage(0).tokens_computed == 12
    # then its scores are what they are without a cache
    fresh = group(prompt, some_ids(12, 2))
    torch.testing.assert_close(found.rows[TAP], backbone.forward(fresh, [TAP]).rows[TAP], atol=1e-4, rtol=1e-4)


def test_next_turn_computes_only_what_is_new() -> None:
    backbone = universal_backbone(*opened())
    cache = KeyValueCache(1 << 24)
    prompt, answer, question = some_ids(20, 0), some_ids(8, 1), some_ids(5, 2)
    backbone.forward(group(prompt, answer), [TAP], cache=cache)
    turn = group(np.concatenate([prompt, answer, question]), some_ids(6, 3))
    backbone.forward(turn, [TAP], cache=cache)
    assert turn.usage(0).tokens_computed == 5 + 6


def test_turns_of_one_batch_share_what_they_begin_with() -> None:
    backbone = universal_backbone(*opened())
    prompt, answer = some_ids(20, 0), some_ids(8, 1)
    options = ResolvedOptions(probes=())
    turns = [
        CheckedRollout(prompt, Continuation(answer), options),
        CheckedRollout(np.concatenate([prompt, answer]), Continuation(some_ids(4, 2)), options),
    ]
    forest = Forest.build(turns, {})
    backbone.forward(forest, [TAP], cache=KeyValueCache(1 << 24))
    assert [forest.usage(index).tokens_computed for index in range(2)] == [28, 4]


def test_what_is_read_is_computed_though_its_keys_and_values_are_known() -> None:
    backbone = universal_backbone(*opened())
    cache = KeyValueCache(1 << 24)
    backbone.forward(group(some_ids(20, 0), some_ids(8, 1)), [TAP], cache=cache)
    forest = group(some_ids(20, 0), some_ids(8, 1), scope=Scope.ALL)
    backbone.forward(forest, [TAP], cache=cache)
    assert forest.usage(0).tokens_computed == 28


def test_recurrent_model_bypasses_the_cache() -> None:
    decoder, reader = opened()
    backbone = UniversalBackbone(decoder, reader)
    backbone.keeps_key_values = False
    cache = KeyValueCache(1 << 24)
    backbone.forward(group(some_ids(20, 0), some_ids(8, 1)), [TAP], cache=cache)
    assert cache.bytes == 0


def test_nobody_changes_what_the_cache_holds() -> None:
    backbone = universal_backbone(*opened("mistral", 8))
    cache = KeyValueCache(1 << 24)
    prompt = some_ids(30, 0)
    backbone.forward(group(prompt, some_ids(9, 1)), [TAP], cache=cache)
    before = [(keys.clone(), values.clone()) for keys, values in cache.longest_prefix(prompt)]
    backbone.forward(group(prompt, some_ids(12, 2), some_ids(3, 3)), [TAP], cache=cache)
    torch.testing.assert_close(cache.longest_prefix(prompt), before, atol=0, rtol=0)


# ----------------------------------------------------------------------------------------------------------- what nobody reads


@pytest.mark.parametrize(("scope", "computed"), [(Scope.COMPLETION, [9]), (Scope.ALL, [30, 9])])
def test_of_a_prompt_that_nobody_reads_the_last_block_computes_keys_and_values_only(scope: Scope, computed: list[int]) -> None:
    decoder, reader = opened()
    backbone = universal_backbone(decoder, reader)
    seen: list[int] = []
    decoder.blocks[-1].mlp.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[1]))
    backbone.forward(group(some_ids(30, 0), some_ids(9, 1), scope=scope), [TAP])
    assert seen == computed


@pytest.mark.parametrize(("architecture", "window"), ARCHITECTURES)
def test_what_is_read_after_a_prompt_that_nobody_reads_is_what_it_is_after_one_that_is_read(architecture: str, window: int | None) -> None:
    decoder, reader = opened(architecture, window)
    backbone = UniversalBackbone(decoder, reader)
    whole, part = (group(some_ids(30, 0), some_ids(9, 1), scope=scope) for scope in (Scope.ALL, Scope.COMPLETION))
    expected = rows(backbone.forward(whole, [TAP]), 1, whole)
    torch.testing.assert_close(rows(backbone.forward(part, [TAP]), 1, part), expected, atol=1e-5, rtol=1e-5)


def test_self_test_notices_a_state_that_ends_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, reader = opened()
    read_tokens = UniversalBackbone.read_tokens

    def forgetful(backbone: UniversalBackbone, token_ids: np.ndarray, position: int, state: Any, into: Any) -> None:
        read_tokens(backbone, token_ids, position, state, into)
        if not into:
            state.layers[-1].keys = torch.zeros_like(state.layers[-1].keys)

    monkeypatch.setattr(UniversalBackbone, "read_tokens", forgetful)
    with pytest.raises(ModelRefused, match="self-test: with shared prompts"):
        universal_backbone(decoder, reader)


# ------------------------------------------------------------------------------------------------------------ products in place


class Gated(torch.nn.Module):
    def __init__(self, act_fn: torch.nn.Module, added: float = 0.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = torch.nn.Linear(8, 12), torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)
        self.act_fn = act_fn
        self.added = added

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(rows)) * (self.up_proj(rows) + self.added))


@pytest.mark.parametrize("act_fn", [torch.nn.SiLU(), ACT2FN["silu"], ACT2FN["gelu_pytorch_tanh"], torch.nn.Identity()])
def test_gated_mlp_gives_the_same_in_place_and_leaves_its_input_alone(act_fn: torch.nn.Module) -> None:
    module = Gated(act_fn)
    inputs = torch.randn(1, 5, 8)
    kept, expected = inputs.clone(), module(inputs)
    undo = multiply_in_place(torch.nn.ModuleList([module]))
    assert "forward" in vars(module)
    torch.testing.assert_close(module(inputs), expected)
    assert torch.equal(inputs, kept)
    undo()
    assert "forward" not in vars(module)


def test_mlp_with_the_same_parts_that_computes_something_else_is_left_alone() -> None:
    module = Gated(torch.nn.SiLU(), added=1.0)
    multiply_in_place(torch.nn.ModuleList([module]))
    assert "forward" not in vars(module)


def test_mlp_that_gives_no_numbers_is_left_alone() -> None:
    module = Gated(torch.nn.SiLU(), added=float("nan"))
    multiply_in_place(torch.nn.ModuleList([module]))
    assert "forward" not in vars(module)


# ------------------------------------------------------------------------------------------------------------- prepacked weights


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [1, 24, 128, 129, 300, 576])
@pytest.mark.parametrize("rows", [1, 7, 700])
def test_prepacked_layers_give_the_same_products(rows: int, width: int, bias: bool) -> None:
    layer = torch.nn.Linear(width, 40, bias=bias).requires_grad_(False)
    inputs = torch.randn(1, rows, width)
    before = layer(inputs)
    prepack(torch.nn.ModuleList([layer]))
    torch.testing.assert_close(layer(inputs), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 700), (2, 350), (700,)])
@pytest.mark.parametrize("at_once", [1, 64, 699, 700])
def test_products_that_are_added_up_for_some_rows_at_a_time_are_the_same(
    shape: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = torch.nn.Linear(300, 40).requires_grad_(False)
    inputs = torch.randn(*shape, 300)
    before = layer(inputs)
    prepack(torch.nn.ModuleList([layer]))
    monkeypatch.setattr("probescore_server.backbone.universal.prepacking.ADDED_BYTES", at_once * 40 * 4)
    torch.testing.assert_close(layer(inputs), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [24, 300])
def test_prepacking_is_undone_to_the_last_bit(width: int) -> None:
    layer = torch.nn.Linear(width, 40, bias=False)
    before = layer.weight.detach().clone()
    prepack(torch.nn.ModuleList([layer]))()
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer(torch.eye(width)), before.T)


def test_weight_that_stands_in_two_places_is_left_alone() -> None:
    first, second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    second.weight = first.weight
    prepack(torch.nn.ModuleList([first, second]))
    assert second.weight is first.weight


def test_only_float32_on_a_cpu_is_prepacked() -> None:
    assert can_prepack(torch.device("cpu"), torch.float32)
    assert not can_prepack(torch.device("cpu"), torch.bfloat16)
    assert not can_prepack(torch.device("meta"), torch.float32)


def test_faster_ways_that_do_not_fit_are_undone() -> None:
    # given a model whose own code multiplies by a weight itself, and caps its attention
    decoder, reader = opened("gemma2", 8)
    projection = decoder.blocks[0].mlp.down_proj
    decoder.blocks[0].mlp.forward = lambda rows: rows[..., :1] * projection.weight.sum()
    expected = SelfTest(decoder, reader)
    backbone = universal_backbone(decoder, reader)
    assert expected.check(backbone) < 1e-5


def test_window_that_layers_do_not_pass_on_keeps_their_own_attention() -> None:
    # given layers that mask by the config's window, longer than any test, and do not tell the attention function
    decoder, reader = opened("gemma3_text", 600)
    assert universal_backbone(decoder, reader)._attention == CAUSAL_ATTENTION
    decoder, reader = opened("gemma3_text", 600)
    for block in decoder.blocks:
        block.self_attn.sliding_window = None
    assert universal_backbone(decoder, reader)._attention is None
