"""Reads probes of the Obfuscation Atlas: ``layer_K/model.pt`` with ``config.json``, over ``hidden_states[K + 1]``.

``config.json`` is ``{class_name, module, init_args}``. Every class of probe gives values ``v`` (tokens, heads), and attention logits ``q``
if it has queries (else q = v). An aggregator, which the file does not name, makes one logit of them; the probability is
sigmoid(platt_A · logit + platt_B):

    mean, max, sum, last       of Σ over heads of v
    multimax                   Σ over heads of max over tokens of v
    attention                  Σ over heads of Σ over tokens of softmax(q) · v
    rolling_attention(w)       as attention within each window of w tokens; the largest window of each head counts
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from probescore.types import ScoreUnit
from probescore_probes import arguments
from probescore_probes.importing.atlas_kinds import WEIGHTS, Kind, Weights, kind_of
from probescore_probes.importing.imported import Array, Imported, ImportOptions, each_sequence, formula, named, side_by_side
from probescore_probes.importing.places import hidden_state
from probescore_probes.importing.sequences import members, seen, sequence_of, softmax
from probescore_probes.importing.source import ProbeSource, number_in, one_of, settings_in
from probescore_server.probes.format.manifest import Context

_CONFIG = "config.json"
_L2_EPS, _WINDOW_EPS = 1e-8, 1e-8
_PER_TOKEN = ("mean", "max", "sum", "last")
_POOLING = ("multimax", "attention", "rolling_attention")
_NORMALISATIONS = ("none", "l2", "unit_norm")
_AGGREGATORS = "mean, max, sum, last, multimax, attention or rolling_attention(10)"


class _Pooled(nn.Module):
    """Torch module of an Atlas probe and its aggregator.

    It normalises activations, scores tokens by head, pools the scores to one logit and applies Platt scaling.
    """

    def __init__(self, kind: Kind, normalise: tuple[str, float], aggregator: str, window: int, platt: tuple[float, float]) -> None:
        super().__init__()
        self.scores, self.attends = kind.scores, kind.attends
        self.normalise, self.scale = normalise
        self.aggregator, self.window = aggregator, window
        self.a, self.b = platt

    def forward(self, *given: Tensor) -> Tensor:
        """Computes the logits of an Obfuscation Atlas probe (a probe of another project) from activations: ``(N, 1)`` for N tokens, or
        ``(S, 1)`` for S sequences if the probe's aggregator pools the token scores of each head by itself.
        """
        x = given[0]
        if self.normalise == "l2":
            x = _over(x, (x * x).sum(-1, keepdim=True).sqrt(), _L2_EPS)
        elif self.normalise == "unit_norm":
            x = x / self.scale
        query: Tensor
        value: Tensor
        query, value = self.scores(x, given[1]) if self.attends else self.scores(x)
        if self.aggregator in _PER_TOKEN:
            return self.a * value.sum(-1, keepdim=True) + self.b
        return self.a * self._pool(query, value, given[1]).sum(-1, keepdim=True) + self.b

    def _pool(self, query: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
        inside = members(value, cu_seqlens)
        if self.aggregator == "multimax":
            return _largest(value, inside)
        share = query.T[None].masked_fill(~inside[:, None], float("-inf")).softmax(-1)
        if self.aggregator == "attention":
            return torch.einsum("shn,nh->sh", share, value)
        share = share.masked_fill(~inside[:, None], 0.0).sum(0).T
        band = seen(value, cu_seqlens, self.window).float()
        averages = _over(band @ (share * value), band @ share, _WINDOW_EPS)
        row = torch.arange(value.shape[0])
        sequence = sequence_of(row, cu_seqlens)
        start, end = cu_seqlens[:-1][sequence], cu_seqlens[1:][sequence]
        whole = row - start + 1 >= torch.minimum(end - start, torch.full_like(end, self.window))
        return _largest(averages, inside & whole)


def is_obfuscation_atlas(source: ProbeSource) -> bool:
    """Returns whether a folder holds a configuration that names an Obfuscation Atlas class, and weights beside the configuration."""
    return source.holds(_CONFIG, WEIGHTS) and {"class_name", "init_args"} <= set(source.config(_CONFIG))


def read_obfuscation_atlas(source: ProbeSource, asked: ImportOptions) -> Imported:
    """Reads an Obfuscation Atlas probe together with its aggregator; the probe's score is one logit for each rollout.

    Raises:
        ValueError: the importer did not give the aggregator or the number of attention heads, the class is not known, or weights have other
            shapes.
    """
    config = source.config(_CONFIG)
    init = settings_in(config, "init_args", _CONFIG)
    aggregator, window = _aggregator(asked)
    weights = source.member(WEIGHTS)
    every = weights.tensors
    wrapped = {name.removeprefix("probe."): array for name, array in every.items() if name.startswith("probe.")}
    found = wrapped or every
    kind = kind_of(str(config.get("class_name")), found, _mask(weights), init, asked)
    a, b = _platt(every, aggregator)
    normalise = _normalisation(init, found)
    pools = aggregator in _POOLING
    module = _Pooled(kind, normalise, aggregator, window, (a, b))

    def of_one(x: Array) -> Array:
        query, value = kind.of_one(_normalised(x, normalise))
        return a * (_aggregated(query, value, aggregator, window) if pools else value.sum(-1, keepdims=True)) + b

    in_sequences = each_sequence(of_one)
    sees = (f"Its file does not say whether it reads the prompt: it {'does' if asked.sees_prompt else 'does not'} here",)
    return Imported(
        formula(
            in_sequences if pools or kind.attends else lambda inputs: of_one(side_by_side(inputs)),
            module,
            unit=ScoreUnit.LOGIT,
            width=asked.hidden_size,
            columns=1,
        ),
        _taps(source, asked),
        f"{config['class_name']} of the Obfuscation Atlas, aggregated by {aggregator}{f'({window})' if window else ''}",
        named(asked, 1),
        context=_context(kind, pools, asked),
        reduction=None if pools else aggregator,
        notes=(
            "Its aggregator is not in its file: it was given to the import",
            *(sees if kind.attends or pools else ()),
            f"Platt's line of its author is in the logit: {a:.6g} · logit + {b:.6g}",
        ),
    )


def _mask(weights: ProbeSource) -> NDArray[np.bool_] | None:
    """Returns the last row of the attention mask that is saved with the weights; ``None`` if no mask is saved.

    A mask of booleans is large and is not among the tensors that are read as numbers.
    """
    masks = [value for name, value in weights.content.items() if str(name).removeprefix("probe.") == "base_mask" and value is not None]
    if not masks:
        return None
    if not isinstance(masks[0], torch.Tensor) or masks[0].ndim != 2 or not masks[0].numel():
        raise ValueError(f"{WEIGHTS}: base_mask: {arguments.kind_of(masks[0])}; expected booleans (max_length, max_length)")
    return np.asarray(masks[0][-1].bool())


def _context(kind: Kind, pools: bool, asked: ImportOptions) -> Context:
    if pools:
        return Context(kind="rollout", sees_prompt=asked.sees_prompt)
    return Context(kind="causal", window=kind.window, sees_prompt=asked.sees_prompt) if kind.attends else Context()


def _normalisation(init: Mapping[str, Any], found: Weights) -> tuple[str, float]:
    """Returns how an Atlas probe normalises activations, and the number by which ``unit_norm`` divides them."""
    normalise = one_of(init, "normalize_input", f"{_CONFIG}: init_args", _NORMALISATIONS, "none")
    scale = number_in(found, "input_scale", WEIGHTS, 1.0)
    if normalise == "unit_norm" and scale <= 0:
        raise ValueError(f"{WEIGHTS}: input_scale: {scale:g}; activations are divided by it: it should be above 0")
    return normalise, scale


def _normalised(x: Array, normalise: tuple[str, float]) -> Array:
    if normalise[0] == "l2":
        return np.asarray(x / (np.linalg.norm(x, axis=-1, keepdims=True) + _L2_EPS))
    return x / normalise[1] if normalise[0] == "unit_norm" else x


def _taps(source: ProbeSource, asked: ImportOptions) -> tuple[Any, ...]:
    if not (layer := re.fullmatch(r"layer_(\d+)", source.folder.resolve().name)):
        return asked.taps_for(asked.hidden_size, "its folder is not called layer_K, which would say so: give hidden_states[K + 1]")
    stated = hidden_state(int(layer[1]) + 1, f"{layer[0]}", asked.num_hidden_layers)
    return asked.tap_or((stated,), f"the folder's name {layer[0]}, which is hidden_states[{int(layer[1]) + 1}],")


def _aggregator(asked: ImportOptions) -> tuple[str, int]:
    written = asked.reduction or ""
    name, _, rest = written.partition("(")
    window = rest.removesuffix(")")
    if name == "rolling_attention" and (not rest or (window.isdecimal() and int(window) > 0)):
        return name, int(window or 10)
    if name in (*_PER_TOKEN, *_POOLING) and not rest:
        return name, 0
    raise ValueError(
        f"reduction: {arguments.shown(written) if written else 'not given'}; the file does not say how its author "
        f"aggregates: give {_AGGREGATORS}"
    )


def _platt(found: Weights, aggregator: str) -> tuple[float, float]:
    """Returns the numbers ``a`` and ``b`` of an Atlas probe's Platt scaling ``a · logit + b``, after a check that scaling token scores
    gives the same as scaling the aggregated score.
    """
    a, b = number_in(found, "platt_A", WEIGHTS, 1.0), number_in(found, "platt_B", WEIGHTS, 0.0)
    if aggregator == "sum" and b:
        raise ValueError(f"platt_B: {b:g} is added once to a sum over tokens; a sum can be imported only where it is 0")
    if aggregator == "max" and a <= 0:
        raise ValueError(f"platt_A: {a:g} turns the largest logit into the smallest; give a probe whose scores rise with what it looks for")
    return a, b


def _aggregated(query: Array, value: Array, aggregator: str, window: int) -> Array:
    """Pools the scores that each head of an Obfuscation Atlas probe (a probe of another project) gives the tokens of one sequence, with the
    probe's aggregator, and returns one logit ``(1, 1)``.
    """
    if aggregator == "multimax":
        return np.asarray(value.max(0).sum(keepdims=True)[None])
    share = softmax(query, 0)
    if aggregator == "attention" or len(value) < window:
        return np.asarray((share * value).sum(keepdims=True))
    shares, values = (np.lib.stride_tricks.sliding_window_view(array, window, axis=0) for array in (share, value))
    averages = (shares / (shares.sum(-1, keepdims=True) + _WINDOW_EPS) * values).sum(-1)
    return np.asarray(averages.max(0).sum(keepdims=True)[None])


def _over(x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Computes ``x / (y + eps)``, written so that ONNX exporters, which drop an addition that they take for ``+ 0``, keep ``eps``."""
    return (x / eps) / (y / eps + 1)


def _largest(value: Tensor, inside: Tensor) -> Tensor:
    return value.T[None].masked_fill(~inside[:, None], float("-inf")).amax(-1)
