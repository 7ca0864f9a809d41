"""The stand-in for the kernel is right itself: it gives what torch's attention gives for each sequence with the mask written out."""

from __future__ import annotations

import inspect

import pytest
import torch
import varlen_reference
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from torch.nn.functional import scaled_dot_product_attention

LENGTHS = [(3, 10), (1, 1), (9, 9), (4, 4)]  # queries, keys


def masked(queries: int, keys: int, left: int | None) -> torch.Tensor:
    """Query i stands at key ``keys - queries + i`` and sees it and what is before, ``left`` keys at most."""
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    for row in range(queries):
        own = keys - queries + row
        mask[row, 0 if left is None else max(0, own - left) : own + 1] = True
    return mask


@pytest.mark.parametrize("left", [None, 0, 4])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_each_sequence_is_attended_to_by_itself_from_its_end(left: int | None, key_heads: int) -> None:
    torch.manual_seed(0)
    ends = [torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32) for lengths in zip(*LENGTHS, strict=True)]
    query = torch.randn(int(ends[0][-1]), 4, 8)
    key, value = torch.randn(2, int(ends[1][-1]), key_heads, 8).unbind(0)
    window = (-1 if left is None else left, 0)
    output, sums = varlen_reference.varlen_attn(
        query, key, value, *ends, 9, 10, return_aux=AuxRequest(lse=True), scale=0.5, window_size=window, enable_gqa=key_heads != 4
    )
    for i, (queries, keys) in enumerate(LENGTHS):
        own, seen = slice(*ends[0][i : i + 2].tolist()), slice(*ends[1][i : i + 2].tolist())
        q, k, v = (tensor.transpose(0, 1) for tensor in (query[own], key[seen], value[seen]))
        mask = masked(queries, keys, left)
        expected = scaled_dot_product_attention(q[None], k[None], v[None], mask, scale=0.5, enable_gqa=True)[0].transpose(0, 1)
        torch.testing.assert_close(output[own], expected)
        logits = (0.5 * q @ k.repeat_interleave(4 // key_heads, dim=0).transpose(1, 2)).masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(sums[:, own], logits.logsumexp(-1))


def test_it_takes_nothing_that_the_kernel_does_not_take() -> None:
    kernel = inspect.signature(varlen_attn).parameters
    for name, parameter in inspect.signature(varlen_reference.varlen_attn).parameters.items():
        assert (kernel[name].kind, kernel[name].default) == (parameter.kind, parameter.default)
    assert list(kernel)[:7] == list(inspect.signature(varlen_reference.varlen_attn).parameters)[:7]
