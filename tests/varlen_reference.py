"""``varlen_attn`` as its documentation says, in plain torch, for machines without a GPU: its arguments, and no others.

Queries and keys of a sequence are aligned at their ends: the last query stands at the last key. The kernel's bounds on shapes are kept too.
"""

from __future__ import annotations

import torch
from torch.nn.attention.varlen import AuxRequest


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``(T, H, D)``, and if asked for the log-sum-exps ``(H, T)`` in float32."""
    heads, width = query.shape[1:]
    assert key.shape == value.shape
    assert key.shape[2] == width <= 256
    assert width % 8 == 0
    assert query.dtype == key.dtype == value.dtype
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert len(cu_seq_q) == len(cu_seq_k)
    assert (int(cu_seq_q[-1]), int(cu_seq_k[-1])) == (len(query), len(key))
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    assert heads == key.shape[1] or (enable_gqa and heads % key.shape[1] == 0)
    output, sums = torch.empty_like(query), torch.empty((heads, len(query)))
    for i in range(len(cu_seq_q) - 1):
        rows, columns = slice(*cu_seq_q[i : i + 2].tolist()), slice(*cu_seq_k[i : i + 2].tolist())
        queries = query[rows].float().transpose(0, 1)
        keys, values = (tensor[columns].float().transpose(0, 1).repeat_interleave(heads // key.shape[1], dim=0) for tensor in (key, value))
        logits = queries @ keys.transpose(1, 2) * (width**-0.5 if scale is None else scale)
        ages = torch.arange(queries.shape[1])[:, None] + keys.shape[1] - queries.shape[1] - torch.arange(keys.shape[1])
        left, right = window_size
        hidden = ((ages > left) & (left >= 0)) | ((-ages > right) & (right >= 0))
        logits = logits.masked_fill(hidden, -torch.inf)
        output[rows] = (logits.softmax(-1) @ values).transpose(0, 1).to(query.dtype)
        sums[:, rows] = logits.logsumexp(-1)
    return (output, sums) if return_aux is not None and return_aux.lse else output
