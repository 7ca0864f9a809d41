"""Models that the packed path would get wrong are refused, each for its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packed_models import PACKABLE, open_decoder, packable_decoder

from probescore_server.backbone.packed.support import packed_refusal

HYBRID = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
LONGROPE = {
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    "original_max_position_embeddings": 64,
}
CHUNKS = {"attention_chunk_size": 8, "intermediate_size_mlp": 64, "num_local_experts": 4}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "soft-capped logits": ("gemma2", {}, "its attention has softcap"),
    "positions by bias": ("bloom", {}, "it takes no positions"),
    "attention of its own": ("falcon", {}, "it cannot be run with another attention function: "),
    "recurrent layers": ("qwen3_next", {}, "it has layers of type linear_attention"),
    "recurrence beside attention": ("falcon_h1", HYBRID, "it has layers of type hybrid"),
    "convolutions": ("lfm2", CONVOLUTIONS, "it has layers of type conv"),
    "chunks": ("llama4_text", CHUNKS, "it has layers of type chunked_attention"),
    "rotary embedding that grows": ("llama", DYNAMIC, "its rotary embedding (dynamic) may depend on the length of the row"),
    "rotary embedding of two lengths": ("phi3", LONGROPE, "its rotary embedding (longrope) may depend on the length of the row"),
    "wide heads": ("llama", {"head_dim": 260}, "it has heads of width 264, and the kernel takes 256"),
}


@pytest.mark.parametrize("architecture", PACKABLE)
def test_models_that_pack_right_are_not_refused(architecture: str) -> None:
    assert packed_refusal(packable_decoder(architecture)) is None


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_what_the_model_is(case: str) -> None:
    architecture, changed, reason = REFUSED[case]
    refusal = packed_refusal(open_decoder(architecture, **changed))
    assert refusal is not None
    assert refusal.startswith(reason)


def test_refused_where_a_block_goes_without_attention_whatever_its_layer_is_called() -> None:
    decoder = open_decoder("lfm2", **CONVOLUTIONS)
    decoder.config.layer_types = ["full_attention"] * 4
    assert packed_refusal(decoder) == "4 blocks call transformers' attention interface 2 times"


class TokenShift(torch.nn.Module):
    """An MLP that sees the token before, too, as recurrent models have it."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.mlp(hidden_states + hidden_states.roll(1, dims=1))


def test_refused_where_tokens_see_each_other_otherwise_than_by_attention() -> None:
    decoder = open_decoder("llama")
    decoder.blocks[1].mlp = TokenShift(decoder.blocks[1].mlp)
    assert packed_refusal(decoder) == "its tokens depend on their neighbours also without attention"


def test_refused_where_layers_do_not_tell_the_kernel_of_the_window_that_their_mask_has() -> None:
    decoder = open_decoder("mistral")
    decoder.config.layer_types = ["full_attention", "sliding_attention"] * 2
    assert packed_refusal(decoder) == ("its layers ask for windows [8, 8, 8, 8] where its config says [None, 8, None, 8]")


def test_refused_where_attention_looks_ahead() -> None:
    decoder = open_decoder("llama")
    decoder.blocks[2].self_attn.is_causal = False
    assert packed_refusal(decoder) == "its attention is not plainly causal"


def test_refused_where_queries_depend_on_their_place_in_the_row() -> None:
    decoder = open_decoder("llama4_text", **CHUNKS, layer_types=["full_attention"] * 4)
    decoder.config.attn_temperature_tuning = True
    assert packed_refusal(decoder) == "it scales queries by their place in the row"


def test_refused_where_attention_is_computed_in_another_dtype_than_the_model() -> None:
    decoder = open_decoder("qwen3", dtype="bfloat16")
    decoder.blocks[0].self_attn.q_norm.to(torch.float32)
    assert packed_refusal(decoder) == "it attends in bfloat16, float32"
