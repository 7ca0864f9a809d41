"""Computes attention of new tokens to themselves and to the tokens before them, without a mask, faster on a CPU than transformers does.

transformers gives a query that continues a cache a dense mask. Here the keys before the query's first token and those from there on are
attended to separately, the latter causally, and merged by their log-sum-exps (FlashAttention's way of combining blocks,
https://arxiv.org/abs/2205.14135). Where the sequence is longer than a sliding window, a mask covers the keys that some block of queries can
still see.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import DynamicSlidingWindowLayer

from probescore_server.backbone.model_loading import Decoder

CAUSAL_ATTENTION = "probescore_causal"
"""Names ``causal_attention`` in transformers. It is registered without a mask function, so that no mask is made for it."""

_RECORDING = "probescore_recording"

QUERY_BLOCK = 64
"""Gives the number of query tokens whose attention is computed at once. Only for keys within such a block is a causal kernel needed, which
is slower than one that sees every key.
"""

WINDOW_BLOCK = 256
"""Gives the number of query tokens that share one attention mask where a sliding window hides keys."""

_WITHOUT_EFFECT = frozenset({"dropout", "output_attentions", "output_hidden_states", "position_embeddings", "position_ids", "use_cache"})


class UnknownAttention(Exception):
    """Raised when a layer requires something that this project's attention functions do not compute."""


@contextmanager
def attending(decoder: Decoder, implementation: str | None) -> Iterator[None]:
    """Makes a decoder's layers call the attention function of a given name while its context is open.

    The name is one that is registered in transformers; ``None`` stands for the function that transformers chose.
    """
    config, own = decoder.config, decoder.config._attn_implementation
    config._attn_implementation = implementation or own
    try:
        yield
    finally:
        config._attn_implementation = own


def check_plain(module: torch.nn.Module, attention_mask: torch.Tensor | None, is_causal: bool | None, others: Mapping[str, object]) -> None:
    """Checks that a layer asks for causal attention and nothing else.

    Args:
        module: the layer.
        attention_mask: the mask that transformers gives.
        is_causal: the value that the layer passes; ``None`` = the layer's attribute decides.
        others: further arguments of the layer, such as soft-capping, position biases or chosen keys. Only those that are known to have no
            effect are accepted.

    Raises:
        UnknownAttention: the layer asks for more or for something else; the error names it.
    """
    if attention_mask is not None or False in (is_causal, getattr(module, "is_causal", True)):
        raise UnknownAttention("its attention is not plainly causal")
    asked = sorted(name for name, value in others.items() if value is not None and name not in _WITHOUT_EFFECT)
    if asked:
        raise UnknownAttention(f"its attention has {', '.join(asked)}")


def has_causal_attention() -> bool:
    """Returns whether the installed torch has the attention kernel for CPUs, which is not among its public functions."""
    return hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


def causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Computes causal attention for transformers' ``AttentionInterface``.

    Args:
        module: the layer.
        query: ``(1, num_attention_heads, T, head_dim)``, queries of the last T of S tokens.
        key: ``(1, num_key_value_heads, S, head_dim)``.
        value: values, shaped as ``key``.
        attention_mask: must be ``None``.
        scaling: factor of the products; ``None`` = 1 / √head_dim.
        sliding_window: number of latest tokens that a token sees, itself included; ``None`` = all.
        is_causal: must not be false.
        others: further arguments that the layer passes.

    Returns:
        The attended values ``(1, T, num_attention_heads, head_dim)``, and ``None`` in place of attention weights.

    Raises:
        UnknownAttention: the layer asks for more than causal attention, or its values are not as wide as its keys.
    """
    check_plain(module, attention_mask, is_causal, others)
    if key.shape != value.shape:
        raise UnknownAttention(f"its keys are {key.shape[-1]} wide and its values {value.shape[-1]}")
    if sliding_window is not None and key.shape[2] > sliding_window:
        attended = _windowed(query, key, value, scaling, sliding_window)
    else:
        attended = _causal(query, key, value, scaling)
    return attended.transpose(1, 2).contiguous(), None


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    before = key.shape[2] - query.shape[2]
    blocks = []
    for start in range(0, query.shape[2], QUERY_BLOCK):
        block, first = query[:, :, start : start + QUERY_BLOCK], before + start
        last = first + block.shape[2]
        blocks.append(_merged(block, key[:, :, :last], value[:, :, :last], first, scaling))
    return torch.cat(blocks, dim=2)


def _merged(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, before: int, scaling: float | None) -> torch.Tensor:
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    own, own_sums = attend(query, key[:, :, before:], value[:, :, before:], 0.0, True, scale=scaling)
    if before == 0:
        return own  # type: ignore[no-any-return]
    earlier, earlier_sums = attend(query, key[:, :, :before], value[:, :, :before], 0.0, False, scale=scaling)
    share = torch.sigmoid_(own_sums.sub_(earlier_sums)).unsqueeze(-1)
    return torch.lerp(earlier.float(), own.float(), share).to(query.dtype)


def _windowed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int) -> torch.Tensor:
    before = key.shape[2] - query.shape[2]
    blocks = []
    for start in range(0, query.shape[2], WINDOW_BLOCK):
        block = query[:, :, start : start + WINDOW_BLOCK]
        first, last = before + start, before + start + block.shape[2]
        oldest = max(0, first - window + 1)
        ages = torch.arange(first, last, device=query.device)[:, None] - torch.arange(oldest, last, device=query.device)
        blocks.append(
            torch.nn.functional.scaled_dot_product_attention(
                block, key[:, :, oldest:last], value[:, :, oldest:last], (ages >= 0) & (ages < window), scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(blocks, dim=2)


AttentionInterface.register(CAUSAL_ATTENTION, causal_attention)


@torch.inference_mode()
def passes_windows(decoder: Decoder) -> bool:
    """Returns whether each layer with a sliding window passes the window's size to its attention function.

    A short test does not exceed a long window, and without a mask only this argument tells of the window.
    """
    passed: list[int | None] = []

    def record(*inputs: Any, **keywords: Any) -> tuple[torch.Tensor, None]:  # noqa: ANN401
        passed.append(keywords.get("sliding_window"))
        return causal_attention(*inputs, **keywords)

    AttentionInterface.register(_RECORDING, record)
    with attending(decoder, _RECORDING):
        decoder.model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=decoder.device), use_cache=False)
    # The cache treats chunks as a window and attention does not: layers with chunks fail this check.
    windows = [layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None for layer in decoder.cache_layers]
    return passed == windows
