"""Implements the classes of probes of the Obfuscation Atlas, each as a torch module and as a formula in numpy.

Both compute, from the activations of tokens, the attention logits ``q`` and the values ``v`` of each head.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import erf
from torch import Tensor, nn

from probescore_probes import arguments
from probescore_probes.importing.imported import Array, ImportOptions
from probescore_probes.importing.sequences import attended, attention, causal, seen
from probescore_probes.importing.source import flag_in, nothing_more, one_of, taken, whole_number

_CONFIG, WEIGHTS = "config.json", "model.pt"
_NORM_EPS = 1e-5
_COMMON = ("input_scale", "platt_A", "platt_B")
_PARTS = {
    "LinearProbe": r"linear\.(weight|bias)",
    "MultiHeadLinearProbe": r"linear\.(weight|bias)",
    "NonlinearProbe": r"mlp\.[03]\.(weight|bias)",
    "GDMProbe": r"(mlp\.\d+|q_proj|v_proj)\.(weight|bias)",
    "QuadraticProbe": r"M|linear\.(weight|bias)",
    "AttentionProbe": r"(qkv_proj|out_proj)\.(weight|bias)",
    "TransformerProbe": r"(transformer\.layers\.\d+\.(self_attn\.(in_proj_|out_proj\.)|(linear|norm)[12]\.)|transformer\.norm\.|out_proj\.)"
    r"(weight|bias)",
}
"""Dictionary keyed by the class of an Obfuscation Atlas probe: a regular expression for the names of the class's tensors."""

Weights = dict[str, Array]
Heads = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Kind:
    """A probe of one of the Obfuscation Atlas classes, with its weights.

    Attributes:
        scores: a torch module that computes attention logits and values ``(q, v)`` from normalised activations and, if ``attends`` is
            set, ``cu_seqlens``.
        of_one: the same function in numpy, for the activations of one sequence.
        attends: whether, and how far, the scores of a token depend on earlier tokens.
    """

    scores: nn.Module
    of_one: Callable[[Array], tuple[Array, Array]]
    attends: bool = False
    window: int | None = None


class _Layers(nn.Module):
    """Torch module of linear layers with ReLUs between them, followed by layers for the attention logits ``q`` and the values ``v``."""

    def __init__(self, layers: list[tuple[Array, Array]], query: tuple[Array, Array] | None, value: tuple[Array, Array] | None) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for index, layer in enumerate(layers):
            steps += [*([nn.ReLU()] if index else []), _linear(layer)]
        self.layers = nn.Sequential(*steps)
        self.query = None if query is None else _linear(query)
        self.value = None if value is None else _linear(value)

    def forward(self, x: Tensor) -> Heads:
        hidden = self.layers(x)
        value = hidden if self.value is None else self.value(hidden)
        return (value if self.query is None else self.query(hidden)), value


class _Quadratic(nn.Module):
    """Torch module that scores an activation ``x`` by the quadratic form xᵀMx + wᵀx + b."""

    matrix: Tensor

    def __init__(self, matrix: Array, layer: tuple[Array, Array]) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.from_numpy(matrix).float())
        self.linear = _linear(layer)

    def forward(self, x: Tensor) -> Heads:
        value = ((x @ self.matrix) * x).sum(-1, keepdim=True) + self.linear(x)
        return value, value


class _Attention(nn.Module):
    """Torch module that scores tokens by causal attention over all earlier tokens, or over the last ones in a window."""

    def __init__(self, qkv: tuple[Array, Array], out: tuple[Array, Array], heads: int, window: int | None) -> None:
        super().__init__()
        self.qkv, self.out, self.heads, self.window = _linear(qkv), _linear(out), heads, window

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Heads:
        query, key, value = _threefold(self.qkv(x), self.heads)
        score = self.out(attention(query, key, value, seen(x, cu_seqlens, self.window)))
        return score, score


class _Transformer(nn.Module):
    """Torch module that scores tokens by the layers of a causal transformer encoder, as torch implements them."""

    def __init__(self, found: Weights, layers: int, heads: int, activation: str, norm_first: bool) -> None:
        super().__init__()
        self.heads, self.norm_first = heads, norm_first
        self.activation = nn.functional.relu if activation == "relu" else nn.functional.gelu
        self.blocks = nn.ModuleList()
        for index in range(layers):
            at = f"transformer.layers.{index}."
            block = nn.ModuleDict({name: _linear(_pair(found, at + where)) for name, where in _BLOCK.items()})
            block["qkv"] = _linear((found[at + "self_attn.in_proj_weight"], found[at + "self_attn.in_proj_bias"]))
            for name in ("norm1", "norm2"):
                block[name] = _norm(_pair(found, at + name))
            self.blocks.append(block)
        self.norm = _norm(_pair(found, "transformer.norm")) if norm_first else None
        self.out = _linear(_pair(found, "out_proj"))

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Heads:
        mask = seen(x, cu_seqlens, None)
        block: Any
        for block in self.blocks:
            if self.norm_first:
                x = x + self._attended(block, block["norm1"](x), mask)
                x = x + self._fed_forward(block, block["norm2"](x))
            else:
                x = block["norm1"](x + self._attended(block, x, mask))
                x = block["norm2"](x + self._fed_forward(block, x))
        score = self.out(x if self.norm is None else self.norm(x))
        return score, score

    def _attended(self, block: Any, x: Tensor, mask: Tensor) -> Tensor:  # noqa: ANN401
        query, key, value = _threefold(block["qkv"](x), self.heads)
        mixed: Tensor = block["out"](attention(query, key, value, mask))
        return mixed

    def _fed_forward(self, block: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        fed: Tensor = block["second"](self.activation(block["first"](x)))
        return fed


_BLOCK = {"out": "self_attn.out_proj", "first": "linear1", "second": "linear2"}


def kind_of(name: str, found: Weights, mask: NDArray[np.bool_] | None, init: dict[str, Any], asked: ImportOptions) -> Kind:
    """Builds an Obfuscation Atlas probe of the given class from its weights.

    Args:
        name: name of the class.
        found: weights by name.
        mask: the last row of the attention mask that is saved with the weights, ``(max_length,)``; ``None`` = no mask is saved.
        init: arguments that the author constructed the class with.
        asked: options of the import.

    Raises:
        ValueError: the class is not known, the weights have other shapes, or the class attends and the number of heads was not given.
    """
    width = asked.hidden_size
    if name in _PARTS:
        nothing_more(found, [part for part in found if re.fullmatch(_PARTS[name], part) or part in _COMMON], WEIGHTS, f"a {name}")
    match name:
        case "LinearProbe" | "MultiHeadLinearProbe":
            return _layered([_layer(found, "linear", width)])
        case "NonlinearProbe":
            first = _layer(found, "mlp.0", width)
            return _layered([first, _layer(found, "mlp.3", len(first[0]))])
        case "GDMProbe":
            return _gdm(found, width)
        case "QuadraticProbe":
            matrix, layer = taken(found, "M", WEIGHTS, width, width), _layer(found, "linear", width)

            def quadratic(x: Array) -> tuple[Array, Array]:
                value = np.einsum("ti,ij,tj->t", x, matrix, x, optimize=True)[:, None] + x @ layer[0].T + layer[1]
                return value, value

            return Kind(_Quadratic(matrix, layer), quadratic)
        case "AttentionProbe":
            return _attention_kind(found, mask, init, asked, width)
        case "TransformerProbe":
            return _transformer_kind(found, init, asked, width)
    raise ValueError(
        f"{_CONFIG}: class_name: {arguments.shown(name)}; known are LinearProbe, QuadraticProbe, NonlinearProbe, AttentionProbe, "
        "TransformerProbe and GDMProbe"
    )


def _layered(layers: list[tuple[Array, Array]], query: Any = None, value: Any = None) -> Kind:  # noqa: ANN401
    def of_one(x: Array) -> tuple[Array, Array]:
        for index, (weight, bias) in enumerate(layers):
            x = (np.maximum(x, 0) if index else x) @ weight.T + bias
        values = x if value is None else x @ value[0].T + value[1]
        return (values if query is None else x @ query[0].T + query[1]), values

    return Kind(_Layers(layers, query, value), of_one)


def _gdm(found: Weights, width: int) -> Kind:
    indices = sorted(int(key.split(".")[1]) for key in found if re.fullmatch(r"mlp\.\d+\.weight", key))
    layers: list[tuple[Array, Array]] = []
    for index in indices:
        layers.append(_layer(found, f"mlp.{index}", len(layers[-1][0]) if layers else width))
    if not layers:
        taken(found, "mlp.0.weight", WEIGHTS)
    inner = len(layers[-1][0])
    query, value = _layer(found, "q_proj", inner), _layer(found, "v_proj", inner)
    if len(query[0]) != len(value[0]):
        raise ValueError(f"{WEIGHTS}: q_proj has {len(query[0])} heads and v_proj {len(value[0])}; they should have as many")
    return _layered(layers, query, value)


def _attention_kind(found: Weights, mask: NDArray[np.bool_] | None, init: dict[str, Any], asked: ImportOptions, width: int) -> Kind:
    heads = _heads(asked)
    qkv = _layer(found, "qkv_proj", width)
    rows = len(qkv[0]) // 3
    out = _layer(found, "out_proj", rows)
    if len(qkv[0]) != 3 * rows or rows % heads:
        raise ValueError(
            f"heads: {heads}; {WEIGHTS} has {len(qkv[0])} rows in qkv_proj, three times the heads times their size: give one that divides"
        )
    window = None if init.get("sliding_window") is None else whole_number(init, "sliding_window", f"{_CONFIG}: init_args")
    if window is not None and window < 1:
        raise ValueError(f"{_CONFIG}: init_args: sliding_window: {window}; it should be above 0")
    if mask is not None and (window is None or int(mask.sum()) != min(window, len(mask))):
        raise ValueError(
            f"{_CONFIG}: init_args: sliding_window: {window}, and base_mask in {WEIGHTS} lets a token see {int(mask.sum())}: one of "
            "the two is of another probe"
        )

    def of_one(x: Array) -> tuple[Array, Array]:
        query, key, value = (x @ qkv[0].T + qkv[1]).reshape(len(x), 3, heads, -1).transpose(1, 0, 2, 3)
        score = attended(query, key, value, causal(len(x), window)) @ out[0].T + out[1]
        return score, score

    return Kind(_Attention(qkv, out, heads, window), of_one, attends=True, window=window)


def _transformer_kind(found: Weights, init: dict[str, Any], asked: ImportOptions, width: int) -> Kind:
    heads = _heads(asked)
    if width % heads:
        raise ValueError(f"heads: {heads}; the model's hidden size {width} is not divided by them: give one that divides")
    where = f"{_CONFIG}: init_args"
    activation, norm_first = one_of(init, "activation", where, ("relu", "gelu"), "relu"), flag_in(init, "norm_first", where, True)
    layers = len({key.split(".")[2] for key in found if key.startswith("transformer.layers.")})
    for index in range(max(layers, 1)):
        at = f"transformer.layers.{index}."
        taken(found, at + "self_attn.in_proj_weight", WEIGHTS, 3 * width, width)
        taken(found, at + "self_attn.in_proj_bias", WEIGHTS, 3 * width)
        _layer(found, at + "self_attn.out_proj", width)
        _layer(found, at + "linear2", len(_layer(found, at + "linear1", width)[0]))
        for norm in ("norm1", "norm2"):
            _check_norm(found, at + norm, width)
    if norm_first:
        _check_norm(found, "transformer.norm", width)
    elif "transformer.norm.weight" in found:
        raise ValueError(f"{where}: norm_first: false, and {WEIGHTS} has transformer.norm, which only a probe with norm_first has")
    _layer(found, "out_proj", width)

    def attend(x: Array, at: str) -> Array:
        rows = x @ found[at + "self_attn.in_proj_weight"].T + found[at + "self_attn.in_proj_bias"]
        query, key, value = rows.reshape(len(x), 3, heads, -1).transpose(1, 0, 2, 3)
        weight, bias = _pair(found, at + "self_attn.out_proj")
        return attended(query, key, value, causal(len(x), None)) @ weight.T + bias

    def feed(x: Array, at: str) -> Array:
        (first, first_bias), (second, second_bias) = _pair(found, at + "linear1"), _pair(found, at + "linear2")
        hidden = x @ first.T + first_bias
        active = np.maximum(hidden, 0) if activation == "relu" else _gelu(hidden)
        return active @ second.T + second_bias

    def of_one(x: Array) -> tuple[Array, Array]:
        for index in range(layers):
            at = f"transformer.layers.{index}."
            first, second = _pair(found, at + "norm1"), _pair(found, at + "norm2")
            if norm_first:
                x = x + attend(_layer_norm(x, first), at)
                x = x + feed(_layer_norm(x, second), at)
            else:
                x = _layer_norm(x + attend(x, at), first)
                x = _layer_norm(x + feed(x, at), second)
        last = _layer_norm(x, _pair(found, "transformer.norm")) if norm_first else x
        weight, bias = _pair(found, "out_proj")
        score = last @ weight.T + bias
        return score, score

    return Kind(_Transformer(found, layers, heads, activation, norm_first), of_one, attends=True)


def _heads(asked: ImportOptions) -> int:
    if asked.heads is None or asked.heads < 1:
        raise ValueError(
            f"heads: {'not given' if asked.heads is None else asked.heads}; the number in the file is not to be relied on, and another one "
            "loads and gives other scores: give the number that the probe was trained with"
        )
    return asked.heads


def _threefold(rows: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Splits the output of one projection of an attention probe into queries, keys and values, ``(N, heads, size)`` each."""
    return rows.reshape(-1, 3, heads, rows.shape[1] // (3 * heads)).unbind(1)


def _layer(found: Weights, name: str, width: int) -> tuple[Array, Array]:
    weight = taken(found, f"{name}.weight", WEIGHTS, None, width)
    return weight, taken(found, f"{name}.bias", WEIGHTS, len(weight))


def _check_norm(found: Weights, name: str, width: int) -> None:
    for part in ("weight", "bias"):
        taken(found, f"{name}.{part}", WEIGHTS, width)


def _pair(found: Weights, name: str) -> tuple[Array, Array]:
    return found[f"{name}.weight"], found[f"{name}.bias"]


def _linear(layer: tuple[Array, Array]) -> nn.Linear:
    made = nn.Linear(layer[0].shape[1], layer[0].shape[0])
    made.load_state_dict({"weight": torch.from_numpy(layer[0]), "bias": torch.from_numpy(layer[1])})
    return made


def _norm(layer: tuple[Array, Array]) -> nn.LayerNorm:
    made = nn.LayerNorm(len(layer[0]), eps=_NORM_EPS)
    made.load_state_dict({"weight": torch.from_numpy(layer[0]), "bias": torch.from_numpy(layer[1])})
    return made


def _layer_norm(x: Array, layer: tuple[Array, Array]) -> Array:
    normalised: Array = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + _NORM_EPS)
    return normalised * layer[0] + layer[1]


def _gelu(x: Array) -> Array:
    return np.asarray(x * (1 + erf(x / np.sqrt(2))) / 2)
