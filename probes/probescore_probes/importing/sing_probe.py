"""Reads probes of the project SingProbe, as the inference servers SGLang and vLLM serve them: ``config.json`` and ``*.safetensors`` in a
folder.

x = the activations of all ``base_model_layer_ids`` side by side, each normalised: r / sqrt(mean(r²) + 1e-6)
r of layer L is the input of block L, counted from 0

mlp    sigmoid(fc2 · act(fc1 · x))
attn   sigmoid(classifier · norm(o_proj · causal attention(q, k, v) + q)), one key and value for all heads
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.special import erf
from torch import Tensor, nn

from probescore.types import ScoreUnit, Tap
from probescore_probes import arguments
from probescore_probes.importing.imported import Array, Imported, ImportOptions, each_sequence, formula, named
from probescore_probes.importing.sequences import attended, attention, causal, seen
from probescore_probes.importing.source import ProbeSource, nothing_more, one_of, taken, whole_number
from probescore_server.probes.format.graph import CU_SEQLENS, GraphInputs
from probescore_server.probes.format.manifest import Context

_CONFIG = "config.json"
_EPS = 1e-6
_KINDS = ("sing_probe_mlp", "sing_probe_attn")
_MLP = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
_ATTENTION = (
    *("proj_q.weight", "proj_k.weight", "proj_v.weight", "o_proj.weight"),
    *("norm.weight", "classifier.weight", "classifier.bias"),
)
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": nn.functional.gelu, "relu": nn.functional.relu}


class SingMlp(nn.Module):
    """Torch module of a probe of kind ``mlp`` of the project SingProbe: two linear layers over normalised activations."""

    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor

    def __init__(self, weights: dict[str, Array], activation: str) -> None:
        super().__init__()
        _register(self, weights)
        self.activation = _ACTIVATIONS[activation]

    def forward(self, *taps: Tensor) -> Tensor:
        """Computes the logits ``(N, labels)`` of a probe of the project SingProbe from the activations of ``N`` tokens."""
        hidden: Tensor = self.activation(_normalised(taps) @ self.fc1_weight.T + self.fc1_bias)
        return hidden @ self.fc2_weight.T + self.fc2_bias


class SingAttention(nn.Module):
    """Torch module of a probe of kind ``attn`` of the project SingProbe: causal attention, with one key and one value head, over normalised
    activations.
    """

    proj_q_weight: Tensor
    proj_k_weight: Tensor
    proj_v_weight: Tensor
    o_proj_weight: Tensor
    norm_weight: Tensor
    classifier_weight: Tensor
    classifier_bias: Tensor

    def __init__(self, weights: dict[str, Array], heads: int, window: int | None) -> None:
        super().__init__()
        _register(self, weights)
        self.heads, self.window = heads, window

    def forward(self, *given: Tensor) -> Tensor:
        """Computes the logits ``(N, labels)`` of a probe of the project SingProbe from the activations of ``N`` tokens."""
        *taps, cu_seqlens = given
        x = _normalised(taps)
        query = x @ self.proj_q_weight.T
        key, value = ((x @ weight.T)[:, None].expand(-1, self.heads, -1) for weight in (self.proj_k_weight, self.proj_v_weight))
        mixed = attention(query.reshape(-1, self.heads, query.shape[1] // self.heads), key, value, seen(x, cu_seqlens, self.window))
        hidden = mixed @ self.o_proj_weight.T + query
        hidden = hidden * torch.rsqrt((hidden * hidden).mean(-1, keepdim=True) + _EPS) * self.norm_weight
        return hidden @ self.classifier_weight.T + self.classifier_bias


def is_sing_probe(source: ProbeSource) -> bool:
    """Returns whether the configuration in a folder is that of a probe of the project SingProbe."""
    return source.kind == "folder" and source.holds(_CONFIG) and str(source.config(_CONFIG).get("model_type")).startswith("sing_probe")


def read_sing_probe(source: ProbeSource, asked: ImportOptions) -> Imported:
    """Reads a probe of kind ``mlp`` or ``attn`` of the project SingProbe; the probe's scores are probabilities.

    Raises:
        ValueError: the probe is of another kind, its configuration has no labels, the model lacks one of its layers, or its weights have
            other shapes.
    """
    config = source.config(_CONFIG)
    kind = str(config.get("model_type")).lower()
    if kind not in _KINDS:
        why = "holds no weights: it only names the layers of another" if kind == "sing_probe_identity" else "is not known"
        raise ValueError(f"{_CONFIG}: model_type: {arguments.shown(kind)} {why}; give {' or '.join(_KINDS)}")
    taps = _taps(config, asked)
    count, stated = _labels(config)
    found: dict[str, Array] = {}
    for file in sorted(source.folder.glob("*.safetensors")):
        found |= ProbeSource(file).tensors
    if "proj_qkv.weight" in found:
        found |= _apart(taken(found, "proj_qkv.weight", "weights", None, None), config)
        del found["proj_qkv.weight"]
    width = asked.hidden_size * len(taps)
    read, names = (_read_mlp, _MLP) if kind == "sing_probe_mlp" else (_read_attention, _ATTENTION)
    nothing_more(found, names, "weights", kind)
    function, context = read(config, found, width, count)
    labels = stated or [f"label_{index}" for index in range(count)]
    return Imported(
        function,
        asked.tap_or(taps, _CONFIG),
        f"{kind} of SingProbe over normalised rows",
        named(asked, len(labels), labels),
        context=context,
        reduce_on=ScoreUnit.PROBABILITY,
        notes=("SGLang and vLLM read what enters a layer, divided by its root mean square: that is in the graph",),
    )


def _taps(config: dict[str, Any], asked: ImportOptions) -> list[Tap]:
    layers = config.get("base_model_layer_ids")
    if not isinstance(layers, list) or not layers:
        raise ValueError(f"{_CONFIG}: base_model_layer_ids: {arguments.shown(layers)}; it should list the layers that are read")
    width = whole_number(config, "hidden_size", _CONFIG)
    if width != asked.hidden_size:
        raise ValueError(f"{_CONFIG}: hidden_size: {width}; the model's is {asked.hidden_size}: give the model that it was trained on")
    each = [whole_number({f"{index}": layer}, f"{index}", f"{_CONFIG}: base_model_layer_ids") for index, layer in enumerate(layers)]
    return [arguments.tap(Tap("resid_pre", layer), f"{_CONFIG}: base_model_layer_ids", asked.num_hidden_layers) for layer in each]


def _labels(config: dict[str, Any]) -> tuple[int, list[str]]:
    """Returns the number of labels (score columns) that the configuration of a probe of the project SingProbe states, and their names; the
    list of names is empty if the configuration states none.
    """
    if isinstance(labels := config.get("labels"), list) and labels:
        return len(labels), [str(label) for label in labels]
    if config.get("num_labels") is None:
        raise ValueError(f"{_CONFIG}: neither labels nor num_labels; one says how many scores it gives")
    return whole_number(config, "num_labels", _CONFIG), []


def _read_mlp(config: dict[str, Any], found: dict[str, Array], width: int, labels: int) -> tuple[Any, Context]:
    activation = one_of(config, "hidden_act", _CONFIG, tuple(_ACTIVATIONS), "gelu")
    first = taken(found, "fc1.weight", "weights", None, width)
    weights = {
        "fc1.weight": first,
        "fc1.bias": taken(found, "fc1.bias", "weights", len(first)),
        "fc2.weight": taken(found, "fc2.weight", "weights", labels, len(first)),
        "fc2.bias": taken(found, "fc2.bias", "weights", labels),
    }

    def score(inputs: GraphInputs) -> Array:
        hidden = _normalised_rows(inputs) @ first.T + weights["fc1.bias"]
        active = np.maximum(hidden, 0) if activation == "relu" else hidden * (1 + erf(hidden / np.sqrt(2))) / 2
        logits: Array = active @ weights["fc2.weight"].T + weights["fc2.bias"]
        return logits

    return formula(score, SingMlp(weights, activation), unit=ScoreUnit.LOGIT, width=width, columns=labels), Context()


def _apart(projection: Array, config: dict[str, Any]) -> dict[str, Array]:
    """Splits the one weight in which vLLM keeps three projections of an attention probe into the weights that compute queries, keys and
    values.
    """
    size = whole_number({"head_dim": 64} | config, "head_dim", _CONFIG)
    if not 0 < 2 * size < len(projection):
        raise ValueError(f"{_CONFIG}: head_dim: {size}; proj_qkv has {len(projection)} rows, two heads and more: they do not fit")
    query, key, value = np.split(projection, [-2 * size, -size])
    return {"proj_q.weight": query, "proj_k.weight": key, "proj_v.weight": value}


def _read_attention(config: dict[str, Any], found: dict[str, Array], width: int, labels: int) -> tuple[Any, Context]:
    key = taken(found, "proj_k.weight", "weights", None, width)
    query = taken(found, "proj_q.weight", "weights", None, width)
    heads = whole_number({"num_attention_heads": 4} | config, "num_attention_heads", _CONFIG)
    inner = heads * len(key)
    if len(query) != inner:
        raise ValueError(
            f"{_CONFIG}: num_attention_heads: {heads}, and proj_q has {len(query)} rows for heads of {len(key)}: they do not fit"
        )
    window = config.get("sliding_window")
    if window is not None and whole_number(config, "sliding_window", _CONFIG) <= 0:
        raise ValueError(f"{_CONFIG}: sliding_window: {window}; it should be above 0")
    weights = {
        "proj_q.weight": query,
        "proj_k.weight": key,
        "proj_v.weight": taken(found, "proj_v.weight", "weights", len(key), width),
        "o_proj.weight": taken(found, "o_proj.weight", "weights", inner, inner),
        "norm.weight": taken(found, "norm.weight", "weights", inner),
        "classifier.weight": taken(found, "classifier.weight", "weights", labels, inner),
        "classifier.bias": taken(found, "classifier.bias", "weights", labels),
    }

    def of_one(x: Array) -> Array:
        queried = x @ query.T
        keys, values = (np.repeat((x @ weights[name].T)[:, None], heads, 1) for name in ("proj_k.weight", "proj_v.weight"))
        mixed = attended(queried.reshape(len(x), heads, -1), keys, values, causal(len(x), window))
        hidden = mixed @ weights["o_proj.weight"].T + queried
        hidden = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + _EPS) * weights["norm.weight"]
        logits: Array = hidden @ weights["classifier.weight"].T + weights["classifier.bias"]
        return logits

    function = formula(
        each_sequence(of_one, _normalised_rows), SingAttention(weights, heads, window), unit=ScoreUnit.LOGIT, width=width, columns=labels
    )
    return function, Context(kind="causal", window=window, sees_prompt=True)


def _register(module: nn.Module, weights: dict[str, Array]) -> None:
    for name, array in weights.items():
        module.register_buffer(name.replace(".", "_"), torch.from_numpy(array).float())


def _normalised(taps: Any) -> Tensor:  # noqa: ANN401  several tensors
    return torch.cat([x * torch.rsqrt((x * x).mean(-1, keepdim=True) + _EPS) for x in taps], dim=1)


def _normalised_rows(inputs: GraphInputs) -> Array:
    rows = [array.astype(np.float64) for name, array in inputs.items() if name != CU_SEQLENS]
    return np.concatenate([x / np.sqrt((x**2).mean(-1, keepdims=True) + _EPS) for x in rows], axis=1)
