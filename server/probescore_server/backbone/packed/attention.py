"""Computes attention over a packed row: the tokens of several sequences, one after the other, with no padding.

Keys and values are gathered by sequence, then a variable-length kernel is called once per layer. The attention function receives the row's
layout as a keyword argument of the model's forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional
from torch.nn.attention.varlen import AuxRequest
from transformers import AttentionInterface

from probescore_server.backbone.kv_cache import KeyValues
from probescore_server.backbone.universal.attention import UnknownAttention, check_plain

PACKED_ATTENTION = "probescore_packed"
"""Names this attention function in transformers. It is registered without a mask function, so that no mask is made for it."""

MAX_HEAD_DIM = 256
"""Gives the widest attention head that FlashAttention's kernels take."""

Kernel = Callable[..., Any]
"""Stands for ``torch.nn.attention.varlen.varlen_attn``, or any function that takes the same arguments."""

_HEAD_DIM_MULTIPLE = 8


@dataclass(frozen=True, slots=True, eq=False)
class PackedPlan:
    """Describes one packed row of T tokens, and which keys each of its S sequences attends to.

    Attributes:
        token_ids: ``(T,)`` int64, the ids of the sequences, one sequence after the other.
        position_ids: ``(T,)`` int64, each token's position in its sequence, its ancestors included.
        key_rows: ``(K,)`` int64, the keys of each sequence in order of position, as indices into all earlier keys followed by the row's
            own.
        cu_seq_q: ``(S + 1,)`` int32, where each sequence begins in the row, and the row's end.
        cu_seq_k: ``(S + 1,)`` int32, where each sequence's keys begin in ``key_rows``, and the end.
        max_q: number of tokens of the longest sequence in the row.
        max_k: largest number of keys of one sequence.
        read_rows: ``(R,)`` int64, indices of the row's tokens whose activations are read.
        output_rows: ``(R,)`` int64, the rows of the activations that they are copied to.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    key_rows: torch.Tensor
    cu_seq_q: torch.Tensor
    cu_seq_k: torch.Tensor
    max_q: int
    max_k: int
    read_rows: torch.Tensor
    output_rows: torch.Tensor


class LayerAttention(Protocol):
    """Describes a function that computes the attention of a model's layers, one layer after the other."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Computes the attention of the next layer.

        Args:
            query: ``(1, num_attention_heads, T, D)``.
            key: ``(1, num_key_value_heads, T, D)``.
            value: ``(1, num_key_value_heads, T, D_v)``.
            scale: factor of the logits.
            window: most keys that a query attends to, its own included; ``None`` = all keys up to its own.
            sinks: ``(num_attention_heads,)``, for each head the logit of one more key that has no value; ``None`` = there is no such key.

        Returns:
            The attended values ``(1, T, num_attention_heads, D_v)``.
        """


class PackedAttention:
    """Computes the attention of one forward of a packed row, the tokens of several sequences one after the other.

    Args:
        plan: layout of the row.
        earlier: keys and values of tokens before the row, in the order in which ``plan.key_rows`` counts them.
        kernel: variable-length attention kernel.
        keep: whether the row's own keys and values are wanted afterwards.

    Attributes:
        layers: number of layers whose attention has been computed.
        computed: the row's own keys and values by layer, if they are kept.
    """

    def __init__(self, plan: PackedPlan, earlier: Sequence[KeyValues], kernel: Kernel, *, keep: bool) -> None:
        self.layers = 0
        self.computed: KeyValues = []
        self._plan = plan
        self._earlier = earlier
        self._kernel = kernel
        self._kernel_repeats_heads = "enable_gqa" in inspect.signature(kernel).parameters  # torch 2.11 does not have this argument
        self._keep = keep

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Computes the attention of the next layer, with the arguments and the result of ``LayerAttention``."""
        if self._keep:
            self.computed.append((key, value))
        before = [key_values[self.layers] for key_values in self._earlier]
        self.layers += 1
        keys = self._gather([keys for keys, _ in before], key)
        values = self._gather([values for _, values in before], value)
        return self._attend(_by_token(query), keys, values, scale, window, sinks)[..., : value.shape[-1]].unsqueeze(0)

    def _gather(self, before: list[torch.Tensor], own: torch.Tensor) -> torch.Tensor:
        """Returns the keys, or values, that a packed row's sequences attend to, ``(K, num_key_value_heads, D)``."""
        rows = torch.cat([_by_token(tensor) for tensor in (*before, own)]) if before else _by_token(own)
        return rows.index_select(0, self._plan.key_rows)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the attended values ``(T, num_attention_heads, D')``, where D' is D rounded up to a width that the kernel takes."""
        plan = self._plan
        options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
        if query.shape[1] != key.shape[1]:
            if self._kernel_repeats_heads:
                options["enable_gqa"] = True
            else:
                key, value = (_repeat_heads(tensor, query.shape[1]) for tensor in (key, value))
        if sinks is not None:
            options["return_aux"] = AuxRequest(lse=True)
        width = kernel_head_dim(query, value)
        query, key, value = (_widened(tensor, width) for tensor in (query, key, value))
        attended = self._kernel(query, key, value, plan.cu_seq_q, plan.cu_seq_k, plan.max_q, plan.max_k, **options)
        if sinks is None:
            return attended  # type: ignore[no-any-return]
        output, log_sum_exp = attended
        return _with_sinks(output, log_sum_exp, sinks)


def kernel_head_dim(query: torch.Tensor, value: torch.Tensor) -> int:
    """Returns the width to which heads are padded with zeros for the kernel: one width for queries, keys and values, and a multiple of 8.

    The padding changes neither the logits nor the sums of values.
    """
    widest = max(query.shape[-1], value.shape[-1])
    return -(-widest // _HEAD_DIM_MULTIPLE) * _HEAD_DIM_MULTIPLE


def _by_token(tensor: torch.Tensor) -> torch.Tensor:
    """Returns queries, keys or values ``(1, heads, T, D)`` ordered by token: ``(T, heads, D)``."""
    return tensor[0].transpose(0, 1)


def _widened(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Returns a tensor with each head padded with zeros to a width, or the tensor itself if it is as wide: padding by
    nothing would copy.
    """
    return tensor if tensor.shape[-1] == width else functional.pad(tensor, (0, width - tensor.shape[-1]))


def _repeat_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns ``(K, num_key_value_heads, D)`` as ``(K, heads, D)``, each head repeated for every query head that shares it."""
    return tensor.unsqueeze(2).expand(-1, -1, heads // tensor.shape[1], -1).flatten(1, 2)


def _with_sinks(output: torch.Tensor, log_sum_exp: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Returns attention as if each head's softmax had one logit more, the sink, whose share is ``1 - sigmoid(log_sum_exp - sink)``.

    Raises:
        UnknownAttention: the kernel's ``log_sum_exp`` has another shape than ``(heads, T)``.
    """
    if log_sum_exp.shape != (output.shape[1], output.shape[0]):
        raise UnknownAttention(f"the kernel's log-sum-exp has shape {tuple(log_sum_exp.shape)}")
    share = torch.sigmoid(log_sum_exp.transpose(0, 1) - sinks.float())
    return (output * share.unsqueeze(-1)).to(output.dtype)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed_attention: LayerAttention,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Computes one layer's attention over a packed row; transformers calls this function in each layer."""
    check_plain(module, attention_mask, is_causal, others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packed_attention(query, key, value, scale=scale, window=sliding_window, sinks=s_aux), None


AttentionInterface.register(PACKED_ATTENTION, _attend)
