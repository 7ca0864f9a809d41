"""Reads attention probes of EleutherAI/attention-probes: a state dict with ``q.weight``, ``v.*``, ``position_weight`` and perhaps ``o.*``.

a = softmax over the tokens of (q · x + position · position_weight), for each head
score = Σ over heads and tokens of a · (v · x)        with an MLP: o · relu(that sum)
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from probescore.types import ScoreUnit
from probescore_probes.importing.imported import Array, Imported, ImportOptions, formula, named, side_by_side
from probescore_probes.importing.sequences import members, sequence_of, softmax
from probescore_probes.importing.source import ProbeSource, nothing_more, taken
from probescore_server.probes.format.graph import CU_SEQLENS, POSITIONS, GraphInputs
from probescore_server.probes.format.manifest import Context

_NAMES = {"q.weight", "v.weight", "v.bias", "position_weight"}


class EleutherAttentionPool(nn.Module):
    """Torch module that pools a rollout by the softmax attention of several heads, each with a weight on token positions.

    Adding one number to all positions does not change a softmax, so positions are counted from the first token that the probe reads.
    Products with the positions of a long rollout would be too large for float32.
    """

    q_weight: Tensor
    v_weight: Tensor
    v_bias: Tensor
    position_weight: Tensor
    o_weight: Tensor
    o_bias: Tensor

    def __init__(self, weights: Mapping[str, Array], heads: int) -> None:
        super().__init__()
        for name, array in weights.items():
            self.register_buffer(name.replace(".", "_"), torch.from_numpy(array).float())
        self.heads, self.mlp = heads, "o.weight" in weights

    def forward(self, *given: Tensor) -> Tensor:
        """Computes scores ``(S, labels)`` from activations ``(N, width)``, sequence offsets ``(S + 1,)`` and token positions ``(N,)``."""
        *taps, cu_seqlens, positions = given
        x = torch.cat(taps, dim=1)
        start = positions[cu_seqlens[:-1]][sequence_of(torch.arange(x.shape[0]), cu_seqlens)]
        logits = x @ self.q_weight.T + (positions - start)[:, None] * self.position_weight
        inside = members(x, cu_seqlens)
        share = logits.T[None].masked_fill(~inside[:, None], float("-inf")).softmax(-1)
        values = (x @ self.v_weight.T + self.v_bias).reshape(-1, self.heads, self.v_weight.shape[0] // self.heads)
        pooled = torch.einsum("shn,nho->so", share, values)
        return pooled.relu() @ self.o_weight.T + self.o_bias if self.mlp else pooled


def is_attention_probe(source: ProbeSource) -> bool:
    """Returns whether a file has the tensors of an EleutherAI attention probe and no other tensors."""
    if source.kind not in ("torch", "safetensors") or not isinstance(source.content, Mapping):
        return False
    return set(map(str, source.content)) in (_NAMES, _NAMES | {"o.weight", "o.bias"})


def read_attention_probe(source: ProbeSource, asked: ImportOptions) -> Imported:
    """Reads an EleutherAI attention probe, which pools a rollout into one score for each class.

    Raises:
        ValueError: the weights have shapes that do not fit together.
    """
    found, where = source.tensors, source.name
    if asked.reduction is not None:
        raise ValueError(f"reduction: {asked.reduction}; an attention probe pools by itself: leave it out")
    nothing_more(found, {*_NAMES, "o.weight", "o.bias"}, where, "attention pooling")
    query = taken(found, "q.weight", where, None, None)
    heads, width = query.shape
    value = taken(found, "v.weight", where, None, width)
    if len(value) % heads:
        raise ValueError(f"{where}: v.weight: {len(value)} rows for {heads} heads of q.weight; they should divide evenly")
    weights = {
        "q.weight": query,
        "v.weight": value,
        "v.bias": taken(found, "v.bias", where, len(value)),
        "position_weight": taken(found, "position_weight", where, heads),
    }
    columns = len(value) // heads
    if "o.weight" in found:
        weights["o.weight"] = taken(found, "o.weight", where, None, columns)
        columns = len(weights["o.weight"])
        weights["o.bias"] = taken(found, "o.bias", where, columns)
    unit = asked.unit or ScoreUnit.LOGIT
    return Imported(
        formula(
            lambda inputs: _scores(inputs, weights, heads), EleutherAttentionPool(weights, heads), unit=unit, width=width, columns=columns
        ),
        asked.taps_for(width),
        f"attention pooling of {heads} heads",
        named(asked, columns),
        context=Context(kind="rollout", sees_prompt=asked.sees_prompt),
        positions=True,
        notes=(
            "Its file does not say whether attention is a softmax or use_tanh: read as a softmax, the default",
            "Its file does not say how positions were counted: read as rising by one from token to token",
            f"Its file does not say whether it pools the prompt too: it {'does' if asked.sees_prompt else 'does not'} here",
        ),
    )


def _scores(inputs: GraphInputs, weights: Mapping[str, Array], heads: int) -> Array:
    every, positions = side_by_side(inputs), inputs[POSITIONS].astype(np.float64)
    pooled = []
    for start, end in pairwise(inputs[CU_SEQLENS].tolist()):
        x = every[start:end]
        logits = x @ weights["q.weight"].T + (positions[start:end] - positions[start])[:, None] * weights["position_weight"]
        values = (x @ weights["v.weight"].T + weights["v.bias"]).reshape(len(x), heads, -1)
        pooled.append((softmax(logits, 0)[..., None] * values).sum((0, 1)))
    scores = np.array(pooled)
    return np.maximum(scores, 0) @ weights["o.weight"].T + weights["o.bias"] if "o.weight" in weights else scores
