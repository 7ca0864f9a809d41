"""The backbone: the same activations whichever way, on unlike architectures; refused where that cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import HIDDEN_SIZE, tiny_model
from parity_families import FAMILIES, write_family
from transformers import AutoConfig, AutoModelForCausalLM

from probescore.types import Scope, Tap
from probescore_server.backbone import self_test as self_test_module
from probescore_server.backbone.forest import Forest
from probescore_server.backbone.model_loading import _find_blocks, load_config, load_decoder
from probescore_server.backbone.self_test import SelfTest
from probescore_server.backbone.taps import TapReader
from probescore_server.backbone.universal.backbone import UniversalBackbone
from probescore_server.errors import ModelRefused
from probescore_server.rollouts import CheckedRollout, Continuation, ResolvedOptions

HOOKS = [Tap("resid_pre", 0), Tap("resid_pre", 1), Tap("resid_post", 1), Tap("attn_out", 1), Tap("mlp_out", 1)]


def write_model(directory: Path, architecture: str, **settings: Any) -> Path:
    """A model that ``tiny_model`` does not make; its weights are as transformers makes them, but larger."""
    common = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **(common | settings)), dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.2)
    model.save_pretrained(directory)
    return directory


def opened(model: Path, layers: int, taps: Sequence[Tap]) -> UniversalBackbone:
    decoder = load_decoder(model, num_layers=layers)
    reader = TapReader(decoder, taps)
    return UniversalBackbone(decoder, reader)


def forest() -> Forest:
    def ids(*tokens: int) -> np.ndarray:
        return np.array(tokens, np.int32)

    options = ResolvedOptions(probes=(), scope=Scope.ALL)
    prompt = ids(*range(10, 30))
    forked = Continuation(ids(3, 4, 5), follow_ups=(Continuation(ids(6, 7)), Continuation(ids(8))))
    return Forest.build([CheckedRollout(prompt, forked, options), CheckedRollout(prompt, Continuation(ids(9, 10, 11, 12)), options)], {})


@pytest.mark.parametrize(
    "model", [("llama", None), ("mistral", 8), ("gemma2", 8), ("gpt_neox", None)], ids=lambda model: f"{model[0]}-{model[1]}"
)
def test_residual_stream_adds_up_at_every_row_of_a_forest(model: tuple[str, int | None]) -> None:
    architecture, window = model
    read = opened(tiny_model(architecture, sliding_window=window), 2, HOOKS).forward(forest(), HOOKS).rows
    assert {rows.shape for rows in read.values()} == {(20 + 3 + 2 + 1 + 4, HIDDEN_SIZE)}
    entered, left = read[Tap("resid_pre", 1)], read[Tap("resid_post", 1)]
    torch.testing.assert_close(entered + read[Tap("attn_out", 1)] + read[Tap("mlp_out", 1)], left, atol=1e-4, rtol=1e-4)


def test_bloom_adds_inside_its_modules_and_is_read_before_that(tmp_path: Path) -> None:
    model = write_model(tmp_path, "bloom", n_layer=2, n_head=4)
    read = opened(model, 2, HOOKS).forward(forest(), HOOKS).rows
    total = read[Tap("resid_pre", 1)] + read[Tap("attn_out", 1)] + read[Tap("mlp_out", 1)]
    torch.testing.assert_close(total, read[Tap("resid_post", 1)], atol=1e-5, rtol=1e-4)


def test_granite_scales_what_it_adds(tmp_path: Path) -> None:
    model = write_model(tmp_path, "granite", residual_multiplier=0.25)
    read = opened(model, 2, HOOKS).forward(forest(), HOOKS).rows
    total = read[Tap("resid_pre", 1)] + read[Tap("attn_out", 1)] + read[Tap("mlp_out", 1)]
    torch.testing.assert_close(total, read[Tap("resid_post", 1)], atol=1e-5, rtol=1e-4)


def test_terms_that_do_not_add_up_are_refused_and_the_rest_is_served(tmp_path: Path) -> None:
    # FalconH1's blocks add an attention and a state-space term in one step
    model = write_model(
        tmp_path, "falcon_h1", num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8
    )
    opened(model, 2, [Tap("resid_post", 1)])
    with pytest.raises(ModelRefused, match=r"attn_out\.1, mlp_out\.1: no outputs of attention and MLP in this falcon_h1 model's block"):
        opened(model, 2, [Tap("mlp_out", 1)])


@pytest.mark.parametrize(
    ("family", "tap", "reason"),
    [
        ("LFM2", Tap("attn_out", 2), r"block 2 of this lfm2 model has no attention of its own \(its parts: conv, .*"),
        ("Mamba", Tap("mlp_out", 1), r"block 1 of this mamba model has no MLP of its own \(its parts: norm, mixer\)"),
        ("Gemma 4 E (inputs to each layer)", Tap("attn_out", 0), "no outputs of attention and MLP in this gemma4_text model's block"),
        ("OPT-350M (narrow, norms after)", Tap("mlp_out", 3), "no outputs of attention and MLP in this opt model's block"),
    ],
)
def test_a_block_without_separate_terms_is_refused_with_what_to_read_instead(family: str, tap: Tap, reason: str, tmp_path: Path) -> None:
    decoder = load_decoder(write_family(tmp_path, FAMILIES[family]), num_layers=4)
    TapReader(decoder, [Tap("resid_pre", tap.layer), Tap("resid_post", tap.layer)])
    with pytest.raises(ModelRefused, match=rf"{reason}.*; read resid_pre\.{tap.layer} or resid_post\.{tap.layer} instead$"):
        TapReader(decoder, [tap])


def test_a_final_norm_of_another_width_is_refused_with_what_to_read_instead(tmp_path: Path) -> None:
    decoder = load_decoder(write_family(tmp_path, FAMILIES["OPT-350M (narrow, norms after)"]), num_layers=4)
    with pytest.raises(ModelRefused, match=r"final_norm: .* opt model gives rows of width 32 .* 64 wide; read resid_post\.3 instead"):
        TapReader(decoder, [Tap("final_norm")])


def test_blocks_that_text_does_not_run_are_refused(tmp_path: Path) -> None:
    decoder = load_decoder(write_family(tmp_path, FAMILIES["Llama 3.2 Vision"]), num_layers=4)
    with pytest.raises(ModelRefused, match="does not run its blocks 1, 3 on text alone"):
        TapReader(decoder, [])


def test_model_whose_cache_forgets_is_refused(tmp_path: Path) -> None:
    # transformers' Mamba starts a second piece of a sequence with an empty state
    decoder = load_decoder(write_model(tmp_path, "mamba", state_size=8), num_layers=2)
    reader = TapReader(decoder, [Tap("resid_post", 1)])
    with pytest.raises(ModelRefused, match="self-test: with shared prompts this mamba model gives other activations than alone"):
        SelfTest(decoder, reader).check(UniversalBackbone(decoder, reader))


def test_model_that_its_own_code_cannot_run_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path, "falcon_h1", num_key_value_heads=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8)
    with pytest.raises(ModelRefused, match="a falcon_h1 model cannot be run: RuntimeError"):
        opened(model, 2, [])


def test_blocks_that_cannot_be_told_are_refused(tmp_path: Path) -> None:
    # given a list of experts as long as the list of blocks, and as far out
    decoder = load_decoder(tiny_model(), num_layers=2)
    decoder.model.experts = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    with pytest.raises(ModelRefused, match="cannot tell its 2 decoder blocks; lists of that length: layers, experts"):
        _find_blocks(decoder.model, 2, "tiny")


def test_model_that_has_a_cache_of_its_own_is_refused(tmp_path: Path) -> None:
    decoder = load_decoder(write_model(tmp_path, "minimax", num_local_experts=2, num_key_value_heads=2, head_dim=8), num_layers=2)
    reader = TapReader(decoder, [Tap("resid_post", 1)])
    with pytest.raises(ModelRefused, match="a minimax model cannot be run with a cache"):
        SelfTest(decoder, reader).check(UniversalBackbone(decoder, reader))


def test_recurrent_model_is_loaded_up_to_its_first_attention_layer(tmp_path: Path) -> None:
    kinds = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    model = write_model(
        tmp_path, "qwen3_next", num_hidden_layers=4, num_key_value_heads=2, head_dim=16, layer_types=kinds, **linear, **experts
    )
    decoder = load_decoder(model, num_layers=1)
    assert (len(decoder.blocks), decoder.num_hidden_layers) == (3, 4)
    reader = TapReader(decoder, [Tap("resid_post", 0)])
    assert SelfTest(decoder, reader).check(UniversalBackbone(decoder, reader)) < 1e-3


def test_model_whose_weights_depend_on_the_number_of_blocks_is_cut_after_loading(tmp_path: Path) -> None:
    settings = {"num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16, "num_hidden_layers": 4, "hidden_size_per_layer_input": 8}
    model = write_model(tmp_path, "gemma4_text", vocab_size_per_layer_input=64, **settings)
    decoder = load_decoder(model, num_layers=2)
    assert len(decoder.blocks) == 2
    reader = TapReader(decoder, [Tap("resid_post", 1)])
    assert SelfTest(decoder, reader).check(UniversalBackbone(decoder, reader)) < 1e-3


def test_text_part_of_a_multimodal_model_is_served(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text | {"num_key_value_heads": 2}, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path, num_layers=2)
    assert (len(decoder.blocks), decoder.num_hidden_layers, decoder.config.model_type) == (2, 3, "gemma3_text")
    assert not any("vision" in name for name, _ in decoder.model.named_modules())


def test_model_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelRefused, match="a vit model has no vocab_size; only decoders can be served"):
        load_config(tmp_path)


# ------------------------------------------------------------------------------------------------------------------- self-test


def test_self_test_is_longer_than_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load_decoder(tiny_model("mistral", sliding_window=40), num_layers=2)
    prompt, crossing, *_ = self_test_module.small_forest(decoder).segments
    assert len(prompt.token_ids) < 40 < crossing.position + len(crossing.token_ids)


def test_self_test_stays_within_the_models_positions_and_its_own_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load_decoder(tiny_model("mistral", sliding_window=5000), num_layers=2)
    longest = max(segment.position + len(segment.token_ids) for segment in self_test_module.small_forest(decoder).segments)
    assert longest <= decoder.config.max_position_embeddings
    monkeypatch.setattr(self_test_module, "MAX_TEST_TOKENS", 100)
    assert max(s.position + len(s.token_ids) for s in self_test_module.small_forest(decoder).segments) <= 100


@pytest.mark.parametrize("fault", ["position", "cache"])
def test_self_test_catches_a_shifted_position_and_a_shared_cache(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load_decoder(tiny_model(), num_layers=2)
    reader = TapReader(decoder, [Tap("resid_post", 1)])
    backbone = UniversalBackbone(decoder, reader)
    assert SelfTest(decoder, reader).check(backbone) < 1e-5
    if fault == "position":
        run = backbone.read_tokens
        monkeypatch.setattr(backbone, "read_tokens", lambda ids, position, *rest: run(ids, position + (position > 0), *rest))
    else:
        monkeypatch.setattr("probescore_server.backbone.universal.backbone._fork", lambda cache: cache)
    with pytest.raises(ModelRefused, match="self-test"):
        SelfTest(decoder, reader).check(backbone)


def test_blocks_in_another_order_are_no_residual_stream() -> None:
    decoder = load_decoder(tiny_model(), num_layers=3)
    shuffled = replace(decoder, blocks=torch.nn.ModuleList([decoder.blocks[1], decoder.blocks[0], decoder.blocks[2]]))
    with pytest.raises(ModelRefused, match="does not pass one residual stream"):
        TapReader(shuffled, [])
