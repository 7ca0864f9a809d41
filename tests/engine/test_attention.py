"""Attention without masks: the same as softmax over exactly the keys that each token may see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model
from parity_families import FAMILIES, write_family

from probescore_server.backbone.model_loading import load_decoder
from probescore_server.backbone.universal.attention import UnknownAttention, attending, causal_attention, passes_windows

LAYER = torch.nn.Module()


def expected(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None) -> torch.Tensor:
    """In float64, by definition; ``(1, T, heads, head_dim)``."""
    repeats = query.shape[1] // key.shape[1]
    keys, values = (tensor.double().repeat_interleave(repeats, dim=1) for tensor in (key, value))
    ages = torch.arange(key.shape[2])[-query.shape[2] :, None] - torch.arange(key.shape[2])
    seen = (ages >= 0) & (ages < (window or key.shape[2]))
    products = (query.double() @ keys.transpose(2, 3) * scaling).masked_fill(~seen, float("-inf"))
    return (products.softmax(dim=-1) @ values).transpose(1, 2).float()


@given(
    st.integers(0, 600),
    st.integers(1, 300),
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.none() | st.integers(1, 700),
    st.floats(0.1, 2.0),
)
def test_any_tokens_after_any_others(before: int, own: int, heads: tuple[int, int], window: int | None, scaling: float) -> None:
    random = torch.Generator().manual_seed(before + own)
    query = torch.randn(1, heads[0], own, 8, generator=random)
    key, value = (torch.randn(1, heads[1], before + own, 8, generator=random) for _ in range(2))
    found, weights = causal_attention(LAYER, query, key, value, None, scaling=scaling, sliding_window=window)
    torch.testing.assert_close(found, expected(query, key, value, scaling, window), atol=2e-5, rtol=1e-4)
    assert weights is None


def test_half_precision_stays_half() -> None:
    query, key = torch.randn(1, 2, 3, 8).bfloat16(), torch.randn(1, 2, 9, 8).bfloat16()
    found, _ = causal_attention(LAYER, query, key, key, None)
    torch.testing.assert_close(found.float(), expected(query, key, key, 8**-0.5, None), atol=5e-2, rtol=5e-2)
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "arguments", [{"softcap": 30.0}, {"s_aux": torch.zeros(2)}, {"attention_mask": torch.ones(1, 1, 3, 3)}, {"is_causal": False}], ids=str
)
def test_what_is_not_computed_is_refused(arguments: dict[str, object]) -> None:
    query = torch.randn(1, 2, 3, 8)
    with pytest.raises(UnknownAttention):
        causal_attention(LAYER, query, query, query, **({"attention_mask": None} | arguments))  # type: ignore[arg-type]


def test_values_of_another_width_are_refused() -> None:
    query = torch.randn(1, 2, 3, 8)
    with pytest.raises(UnknownAttention):
        causal_attention(LAYER, query, query, query[..., :4], None)


def test_implementation_is_put_back_whatever_happens() -> None:
    decoder = load_decoder(tiny_model(), num_layers=1)
    config, before = decoder.config, decoder.config._attn_implementation

    def fail() -> None:
        with attending(decoder, "probescore_causal"):
            assert config._attn_implementation == "probescore_causal"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert config._attn_implementation == before


@pytest.mark.parametrize(("architecture", "window"), [("llama", None), ("mistral", 400), ("gemma3_text", 400)])
def test_windows_reach_the_attention_function(architecture: str, window: int | None) -> None:
    assert passes_windows(load_decoder(tiny_model(architecture, sliding_window=window), num_layers=2))


def test_window_that_is_not_passed_on_is_noticed() -> None:
    # given layers that have forgotten their window, longer than any test
    decoder = load_decoder(tiny_model("gemma3_text", sliding_window=400), num_layers=2)
    for block in decoder.blocks:
        block.self_attn.sliding_window = None
    assert not passes_windows(decoder)


def test_chunks_are_no_window_and_need_their_mask(tmp_path: Path) -> None:
    # longer than any test of a load: nothing but what the layers pass tells that they have chunks
    decoder = load_decoder(write_family(tmp_path, FAMILIES["Llama 4 (chunks of 8,192)"]), num_layers=2)
    assert not passes_windows(decoder)
