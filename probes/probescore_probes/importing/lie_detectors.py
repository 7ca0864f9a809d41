"""Reads probes of AISI's lie_detectors: one ``.pt`` file with ``state_dict`` and ``hyperparams``.

    dim   score = direction · x
    lr    score = weight · (x - dataset_mean) / dataset_std + bias
    mlp   score = net.2 · relu(net.0 · (x - dataset_mean) / dataset_std + …) + …

The file's pickle refers to an enum of a private package. A placeholder replaces the enum, and the kind is recognised by the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from probescore.types import ScoreUnit, Tap
from probescore_probes import arguments
from probescore_probes.importing.imported import NONLINEAR, Array, Imported, ImportOptions, formula, linear, named, side_by_side
from probescore_probes.importing.source import ProbeSource, nothing_more, number_in, taken, tensors
from probescore_probes.importing.standardised import check_std

_SCALED = ("dataset_mean", "dataset_std", "threshold")
_PARTS = {
    "direction": ("direction", "threshold"),
    "linear": ("linear.weight", "linear.bias", *_SCALED),
    "net": ("net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias", *_SCALED),
}
_WHAT = "a direction, a logistic regression or a perceptron with one hidden layer"


def is_lie_detector(source: ProbeSource) -> bool:
    """Returns whether a torch file holds ``state_dict`` and ``hyperparams``, as probes of lie_detectors do."""
    if source.kind != "torch" or not isinstance(source.content, Mapping):
        return False
    return isinstance(source.content.get("state_dict"), Mapping) and isinstance(source.content.get("hyperparams"), Mapping)


def read_lie_detector(source: ProbeSource, asked: ImportOptions) -> Imported:
    """Reads a probe of lie_detectors: a difference of means, a logistic regression, or a perceptron with one hidden layer.

    Raises:
        ValueError: no tap (place in the model) was given, since the file does not say how layers are counted; or the weights have another
            shape.
    """
    content: Mapping[str, Any] = source.content
    if not isinstance(content, Mapping) or not isinstance(content.get("state_dict"), Mapping):
        raise ValueError(f"{source.name}: no state_dict in it; is it of another format?")
    found = tensors(content["state_dict"], source.name)
    hyperparams = content.get("hyperparams")
    layer = hyperparams.get("layer") if isinstance(hyperparams, Mapping) else None
    notes = []
    if "threshold" in found:
        notes.append(f"Its author's threshold of {number_in(found, 'threshold', source.name, 0):.6g} is not taken over: calibrate it here")
    if source.stand_ins:
        notes.append(f"Read with stand-ins for {', '.join(source.stand_ins)}, which hold no weights")
    width = _width(found, source.name)
    taps = asked.taps_for(width, _which_layer(layer, asked))
    if isinstance(layer, int):
        notes.append(f"Its author's layer is {layer}, read here at {', '.join(map(str, taps))}")
    kind = "direction" if "direction" in found else "linear" if "linear.weight" in found else "net"
    nothing_more(found, _PARTS[kind], source.name, _WHAT)
    if "direction" in found:
        function, method = linear(found["direction"][None], np.zeros(1), unit=ScoreUnit.VALUE), "difference of means"
    else:
        mean, std = (taken(found, name, source.name, width) for name in ("dataset_mean", "dataset_std"))
        check_std(std, f"{source.name}: dataset_std")
        if "linear.weight" in found:
            weight, bias = found["linear.weight"], taken(found, "linear.bias", source.name, 1)
            function, method = linear(weight, bias, unit=ScoreUnit.LOGIT, mean=mean, std=std), "logistic regression"
        else:
            function, method = _perceptron(found, mean, std, source.name), "multilayer perceptron"
            notes.append(NONLINEAR)
    return Imported(function, taps, f"{method} of lie_detectors", named(asked, 1), notes=tuple(notes))


def _width(found: Mapping[str, Array], where: str) -> int:
    if "direction" in found:
        return len(taken(found, "direction", where, None))
    if "linear.weight" in found:
        return int(taken(found, "linear.weight", where, 1, None).shape[1])
    return int(taken(found, "net.0.weight", where, None, None).shape[1])


def _which_layer(layer: object, asked: ImportOptions) -> str:
    if not isinstance(layer, int) or isinstance(layer, bool):
        return "its author's layer is not in the file either"
    blocks = asked.num_hidden_layers
    if not 0 <= layer <= blocks:
        return f"its author's layer is {arguments.shown(layer)}, and the model has {blocks} blocks: is it for another model?"
    as_block = [f"resid_post.{layer} if that is a block counted from 0"] if layer < blocks else []
    before = Tap("final_norm") if layer == blocks else Tap("resid_post", layer - 1) if layer else Tap("resid_pre", 0)
    choices = " or ".join([*as_block, f"{before} if it is hidden_states[{layer}]"])
    return f"its author's layer is {layer}: give {choices}; scores from the author's side tell the two apart"


def _perceptron(found: Mapping[str, Array], mean: Array, std: Array, where: str) -> Any:  # noqa: ANN401
    width = len(mean)
    first = taken(found, "net.0.weight", where, None, width)
    hidden = len(first)
    first_bias, second = taken(found, "net.0.bias", where, hidden), taken(found, "net.2.weight", where, 1, hidden)
    second_bias = taken(found, "net.2.bias", where, 1)
    module = torch.nn.Sequential(torch.nn.Linear(width, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 1))
    folded = {
        "0.weight": first / std,
        "0.bias": first_bias - (first / std) @ mean,
        "2.weight": second,
        "2.bias": second_bias,
    }
    module.load_state_dict({name: torch.from_numpy(array) for name, array in folded.items()})
    return formula(
        lambda inputs: np.maximum((side_by_side(inputs) - mean) / std @ first.T + first_bias, 0) @ second.T + second_bias,
        module,
        unit=ScoreUnit.LOGIT,
        width=width,
        columns=1,
    )
