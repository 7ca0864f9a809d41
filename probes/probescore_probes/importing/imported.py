"""Defines what readers of other libraries' formats receive and return: the options of an import, and the probe that was read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from probescore.types import ScoreUnit, Tap
from probescore_probes.exporting import ProbeFunction, linear_probe, torch_probe
from probescore_probes.importing.places import hidden_state, hidden_state_of
from probescore_server.probes.format.graph import CU_SEQLENS, POSITIONS, GraphInputs
from probescore_server.probes.format.manifest import Context

Array = NDArray[np.float64]

POINTWISE = Context()

NONLINEAR = (
    "It is not linear, and its file does not say what it was fitted on: the score of a rollout's mean activation, if its author computes "
    "that, is another number than the mean of the scores of its tokens, which is served"
)
"""Note for the manifest of a probe that is not of the form ``weight · x + bias``."""


@dataclass(frozen=True)
class ImportOptions:
    """Options of an import of another library's probe: facts about the probe that its file may leave out, given by the user.

    Attributes:
        hidden_size: width of the model's activations.
        num_hidden_layers: number of blocks of the model.
        layer_norms: whether the model's norms subtract the mean of each activation; root mean square norms do not.
        taps: taps (places in the model) that the probe reads, in order; empty = not given.
        reduction: how token scores become one score of a rollout, or how the author's probe pools; ``None`` = not given.
        unit: unit of the scores; ``None`` = not given.
        labels: names of the score columns; empty = not given.
        heads: number of heads of an attention probe.
        features: indices of features of a sparse autoencoder.
        sees_prompt: whether a probe that reads several tokens together also reads the prompt's tokens.
        trust_pickle: whether files may run code in this process while they are opened.
    """

    hidden_size: int
    num_hidden_layers: int
    layer_norms: bool = False
    taps: tuple[Tap, ...] = ()
    reduction: str | None = None
    unit: ScoreUnit | None = None
    labels: tuple[str, ...] = ()
    heads: int | None = None
    features: tuple[int, ...] = ()
    sees_prompt: bool = False
    trust_pickle: bool = False

    def taps_for(self, width: int, remedy: str = "") -> tuple[Tap, ...]:
        """Returns the taps (places in the model where the probe reads activations) that the user named, after a check that they are as many
        as the width of the probe's weights needs.

        Raises:
            ValueError: no taps were given, or not as many as the weights need.
        """
        needed, rest = divmod(width, self.hidden_size)
        if rest or not needed:
            raise ValueError(
                f"weights: for rows of {width} numbers, and the model's hidden size is {self.hidden_size}; give the model that the probe "
                "was fitted on"
            )
        if not self.taps:
            what = "which tap it reads" if needed == 1 else f"which {needed} taps it reads, in order"
            raise ValueError(
                f"tap: the file does not say {what}; {remedy or 'give it as resid_post.6, or hidden_states[7] of Hugging Face'}"
            )
        if len(self.taps) != needed:
            raise ValueError(
                f"tap: {len(self.taps)} given ({', '.join(map(str, self.taps))}), and the weights are for {needed} × {self.hidden_size} "
                f"numbers; give {needed}"
            )
        return self.taps

    def tap_or(self, stated: Sequence[Tap], where: str) -> tuple[Tap, ...]:
        """Returns the taps (places in the model where the probe reads activations) that a probe's file states, after a check that the user
        named no others.

        Raises:
            ValueError: the importer gave other taps.
        """
        if self.taps and self.taps != tuple(stated):
            raise ValueError(
                f"tap: {', '.join(map(str, self.taps))}; {where} says {', '.join(map(str, stated))}: leave it out, or correct the file "
                "if it is wrong"
            )
        return tuple(stated)

    def entry_of(self, layers: Sequence[int], what: str) -> tuple[int, Tap]:
        """Chooses one probe of a file that holds a probe for each of several entries of Hugging Face's ``hidden_states``. Returns the
        probe's index in ``layers``, and the tap (place in the model) that it reads.

        Raises:
            ValueError: no entry was asked for although the file has several probes, or the file has no probe for the entry.
        """
        if len(layers) == 1 and not self.taps:
            return 0, hidden_state(layers[0], "layers[0]", self.num_hidden_layers)
        known = ", ".join(f"hidden_states[{layer}]" for layer in layers)
        if len(self.taps) != 1:
            raise ValueError(f"tap: {len(self.taps) or 'none'} given; the file has {what} for {known}: give one of these")
        entry = hidden_state_of(self.taps[0], self.num_hidden_layers)
        if entry is None or entry not in layers:
            as_entry = "" if entry is None else f", which is hidden_states[{entry}]"
            raise ValueError(f"tap: {self.taps[0]}{as_entry}; the file has {what} for {known}: give one of these")
        return list(layers).index(entry), self.taps[0]


@dataclass(frozen=True, eq=False)
class Imported:
    """A probe of another library after reading, before it is written as a probe file.

    Attributes:
        function: the probe's formula in numpy and its ONNX graph.
        taps: taps (places in the model) that the probe reads, in order.
        method: description of the kind of probe, for people.
        labels: names of the score columns.
        context: which tokens a score depends on.
        positions: whether the probe receives each token's position.
        reduce_on: unit in which token scores are reduced; ``None`` = the unit of ``function``.
        reduction: default reduction; ``None`` = mean, or none for a probe that pools.
        expects_bos: whether prompts start with BOS; ``None`` = not known.
        notes: what the file does not say, and what was not converted; whole sentences without a full stop.
    """

    function: ProbeFunction
    taps: tuple[Tap, ...]
    method: str
    labels: tuple[str, ...] = ("score",)
    context: Context = POINTWISE
    positions: bool = False
    reduce_on: ScoreUnit | None = None
    reduction: str | None = None
    expects_bos: bool | None = None
    notes: tuple[str, ...] = ()


def named(asked: ImportOptions, columns: int, stated: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns the names of a probe's score columns: those asked for, else those in the file, else numbers.

    Raises:
        ValueError: the number of names asked for is not the number of columns.
    """
    if asked.labels and len(asked.labels) != columns:
        raise ValueError(
            f"label: {len(asked.labels)} given ({', '.join(asked.labels)}), and the probe gives {columns} scores; give {columns}"
        )
    if asked.labels or stated:
        return asked.labels or tuple(stated)
    return ("score",) if columns == 1 else tuple(f"score_{column}" for column in range(columns))


def linear(weight: Array, bias: Array, *, unit: ScoreUnit, mean: Array | None = None, std: Array | None = None) -> ProbeFunction:
    """Makes a probe that computes ``weight · (x - mean) / std + bias``; its ONNX graph has mean and std folded into weights and bias.

    Args:
        weight: weights, ``(labels, width)``.
        bias: biases, ``(labels,)``.
        unit: unit of the scores.
        mean: means of the features, ``(width,)``; ``None`` = 0.
        std: standard deviations of the features, ``(width,)``; ``None`` = 1.
    """
    centre = np.zeros(weight.shape[1]) if mean is None else mean
    scale = np.ones(weight.shape[1]) if std is None else std
    folded = linear_probe(weight / scale, bias - (weight / scale) @ centre, unit=unit)
    return replace(folded, score=lambda inputs: ((side_by_side(inputs) - centre) / scale) @ weight.T + bias)


def is_affine(function: ProbeFunction, width: int) -> bool:
    """Returns whether a probe computes ``weight · x + bias`` of each token, so that the mean of scores is the score of the mean."""
    x, y = np.random.default_rng(0).standard_normal((2, 8, width))

    def scores(rows: Array) -> Array:
        return np.asarray(function.score({"rows": rows.astype(np.float32).astype(np.float64)}), np.float64).reshape(len(rows), -1)

    apart, together = (scores(x) + scores(y)) / 2, scores((x + y) / 2)
    return bool(np.abs(apart - together).max() <= 1e-4 * max(float(apart.std()), 1e-12))


def formula(score: Callable[[GraphInputs], Array], module: torch.nn.Module, *, unit: ScoreUnit, width: int, columns: int) -> ProbeFunction:
    """Makes a probe from a formula in numpy, as reference, and a torch module that is exported to ONNX and must agree with the formula."""
    return replace(torch_probe(module, unit=unit), score=score, width=width, columns=columns)


def side_by_side(inputs: GraphInputs) -> Array:
    """Returns the activations at all taps (places in the model) side by side, ``(N, taps × hidden_size)`` float64."""
    taps = [array for name, array in inputs.items() if name not in (CU_SEQLENS, POSITIONS)]
    return np.concatenate(taps, axis=1).astype(np.float64)


def each_sequence(of_one: Callable[[Array], Array], rows: Callable[[GraphInputs], Array] = side_by_side) -> Callable[[GraphInputs], Array]:
    """Turns a formula for one sequence into a formula for several sequences one after another.

    The formula for one sequence maps ``(T, width)`` to ``(T, labels)`` or, if it pools, to ``(1, labels)``.
    """

    def score(inputs: GraphInputs) -> Array:
        every = rows(inputs)
        return np.concatenate([of_one(every[start:end]) for start, end in pairwise(inputs[CU_SEQLENS].tolist())])

    return score
