"""Reads directions and weight matrices, with or without a bias, in plain files: ``.npy``, ``.npz``, ``.safetensors``, ``.pt``.

    score = weight · x + bias

A file of the format ``hf-directions`` has a direction for every entry of Hugging Face's ``hidden_states``; one of them is imported.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from probescore.types import ScoreUnit
from probescore_probes.importing.imported import Array, Imported, ImportOptions, linear, named
from probescore_probes.importing.source import ProbeSource, nothing_more

_WEIGHTS = ("weight", "direction", "w", "coef", "coef_", "vector")
_BIASES = ("bias", "b", "intercept", "intercept_")
_FILES = ("npy", "npz", "safetensors", "torch")


def is_direction(source: ProbeSource) -> bool:
    """Returns whether a file holds a linear probe: a single tensor, or a weight with or without a bias."""
    if source.kind not in _FILES or (isinstance(source.content, Mapping) and any(isinstance(v, Mapping) for v in source.content.values())):
        return False
    names = set(unprefixed(source.tensors))
    return len(names) == 1 or (len(names & {*_WEIGHTS}) == 1 and len(names & {*_BIASES}) == 1 and len(names) == 2)


def read_direction(source: ProbeSource, asked: ImportOptions) -> Imported:
    """Reads a linear probe from a file: a direction ``(width,)``, or a matrix with one row of weights for each label.

    Raises:
        ValueError: shapes do not fit together, or the meaning of the rows is not known.
    """
    found = unprefixed(source.tensors)
    weight, bias = weight_and_bias(found, source.name)
    weight = rows_of(weight, asked, source.name)
    _check_rows(weight, asked, source.name)
    unit = asked.unit or (ScoreUnit.LOGIT if bias is not None else ScoreUnit.VALUE)
    offset = np.zeros(len(weight)) if bias is None else _bias_of(bias, weight, source.name)
    notes = () if bias is not None or asked.unit else ("A direction without bias: the score is a value on no scale of its own",)
    return Imported(
        linear(weight, offset, unit=unit), asked.taps_for(weight.shape[1]), "a direction", named(asked, len(weight)), notes=notes
    )


def is_hidden_states_direction(source: ProbeSource) -> bool:
    """Returns ``False`` for every file: a file with one direction for each layer cannot be told from one with a row of weights for each
    label, so that the user must name the format ``hf-directions``.
    """
    return False


def read_hidden_states_direction(source: ProbeSource, asked: ImportOptions) -> Imported:
    """Reads one direction of a file that holds a direction for every entry of Hugging Face's ``hidden_states``, entry 0 first.

    Raises:
        ValueError: the number of rows is not the number of entries, or no entry was asked for.
    """
    weight, bias = weight_and_bias(unprefixed(source.tensors), source.name)
    entries = asked.num_hidden_layers + 1
    if weight.shape != (entries, asked.hidden_size):
        raise ValueError(
            f"{source.name}: shape {weight.shape}; hf-directions is ({entries}, {asked.hidden_size}) for this model, a row for each "
            "entry of hidden_states, the embeddings first"
        )
    index, tap = asked.entry_of(range(entries), "directions")
    offset = np.zeros(1) if bias is None else np.broadcast_to(bias.ravel(), entries)[index : index + 1]
    unit = asked.unit or (ScoreUnit.LOGIT if bias is not None else ScoreUnit.VALUE)
    return Imported(
        linear(weight[index : index + 1], offset, unit=unit), (tap,), f"the direction for hidden_states[{index}]", named(asked, 1)
    )


def unprefixed(found: Mapping[str, Array]) -> dict[str, Array]:
    """Returns tensors without the common prefix of their names, such as ``linear.`` of a module that holds one layer."""
    prefixes = {name.rpartition(".")[0] for name in found}
    prefix = f"{prefixes.pop()}." if len(prefixes) == 1 else ""
    return {name.removeprefix(prefix): array for name, array in found.items()}


def weight_and_bias(found: Mapping[str, Array], where: str) -> tuple[Array, Array | None]:
    """Finds the weight, under any of its usual names, and the bias if there is one, among tensors by name.

    Raises:
        ValueError: there is no weight, or there are several.
    """
    weights = [name for name in found if name in _WEIGHTS] or ([*found] if len(found) == 1 else [])
    if len(weights) != 1:
        raise ValueError(f"{where}: has {', '.join(found) or 'no tensors'}; name one of them {_WEIGHTS[0]!r}, and a bias {_BIASES[0]!r}")
    nothing_more(found, (*weights, *_BIASES), where, "a direction with a bias")
    if len(biases := [name for name in found if name in _BIASES]) > 1:
        raise ValueError(f"{where}: has {' and '.join(biases)}; save one bias")
    bias = next((found[name] for name in biases), None)
    return found[weights[0]], bias


def rows_of(weight: Array, asked: ImportOptions, where: str) -> Array:
    """Returns the weights of a linear probe as a matrix ``(labels, width)``, whether they are saved as one direction, as a matrix or as a
    column.

    Raises:
        ValueError: the weights have more than two axes.
    """
    if weight.ndim not in (1, 2):
        raise ValueError(f"{where}: weights of shape {weight.shape}; save one direction (width,), or a matrix (labels, width)")
    matrix = np.atleast_2d(weight)
    column = matrix.shape[1] == 1 and asked.hidden_size != 1 and matrix.shape[0] % asked.hidden_size == 0
    return np.ascontiguousarray(matrix.T) if column else matrix


def _bias_of(bias: Array, weight: Array, where: str) -> Array:
    if bias.size not in (1, len(weight)):
        raise ValueError(f"{where}: bias of shape {bias.shape} for {len(weight)} rows of weights; save one number for each row")
    return np.broadcast_to(bias.ravel(), (len(weight),)).copy()


def _check_rows(weight: Array, asked: ImportOptions, where: str) -> None:
    rows, blocks = len(weight), asked.num_hidden_layers
    if rows in (blocks, blocks + 1) and rows > 1 and not asked.labels:
        raise ValueError(
            f"{where}: {rows} rows, and the model has {blocks} blocks: a row for each layer, or for each label? Give format "
            f"hf-directions if they are for hidden_states[0] to hidden_states[{blocks}], {rows} labels if they are labels, or save the "
            "one row to import"
        )
