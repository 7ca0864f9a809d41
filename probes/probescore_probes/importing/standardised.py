"""Reads linear probes that are saved with the mean and the standard deviation of the activations that they were fitted on.

    score = weight · (x - mean) / std + bias

People save such probes from torch, and the example of vllm-lens, another project, does. The numbers are used as they are saved: no ddof is
corrected and no eps is added.
"""

from __future__ import annotations

import numpy as np

from probescore.types import ScoreUnit
from probescore_probes.importing.directions import rows_of, unprefixed
from probescore_probes.importing.imported import Array, Imported, ImportOptions, linear, named
from probescore_probes.importing.source import ProbeSource, nothing_more, taken

_VLLM_LENS_SMALLEST_STD = 1e-8


def is_standardised(source: ProbeSource) -> bool:
    """Returns whether a file holds a weight, a mean and a standard deviation, as a linear probe over standardised activations does."""
    return source.kind in ("torch", "safetensors", "npz") and {"weight", "mean", "std"} <= {*_names(source)}


def read_standardised(source: ProbeSource, asked: ImportOptions) -> Imported:
    """Reads a linear probe over standardised activations.

    Raises:
        ValueError: shapes do not fit together, or a standard deviation is not above 0.
    """
    return _read(source, asked, smallest_std=0.0)


def read_vllm_lens(source: ProbeSource, asked: ImportOptions) -> Imported:
    """Reads a probe of vllm-lens, another project, which is linear over the outputs of several blocks side by side, averaged over the
    tokens of a forward pass.

    Raises:
        ValueError: shapes do not fit together, a standard deviation is not above 0, or a tap (place in the model) is not the output of a
            block.
    """
    others = [str(tap) for tap in asked.taps if tap.hook != "resid_post"]
    if others:
        raise ValueError(
            f"tap: {', '.join(others)}; vllm-lens reads what leaves a block, counted from 0: give resid_post.N for its layer N"
        )
    found = _read(source, asked, smallest_std=_VLLM_LENS_SMALLEST_STD)
    return Imported(found.function, found.taps, "logistic regression of vllm-lens", found.labels, reduction="mean", notes=found.notes)


def check_std(std: Array, where: str) -> None:
    """Checks that every standard deviation is above 0, since activations are divided by it.

    Raises:
        ValueError: a standard deviation is 0 or less; the message names its column.
    """
    if (std <= 0).any():
        column = int(np.argmax(std <= 0))
        raise ValueError(
            f"{where}: {std[column]:g} at column {column}; its author added an eps that is not in the file, or left constant columns out: "
            "save std as it divides, with the eps in it"
        )


def _names(source: ProbeSource) -> list[str]:
    return list(unprefixed(source.tensors))


def _read(source: ProbeSource, asked: ImportOptions, smallest_std: float) -> Imported:
    found = unprefixed(source.tensors)
    if "weight" not in found:
        taken(found, "weight", source.name)
    nothing_more(found, ("weight", "bias", "mean", "std"), source.name, "weight · (x - mean) / std + bias")
    weight = rows_of(found["weight"], asked, source.name)
    width = weight.shape[1]
    mean, std = (taken({name: array.ravel() for name, array in found.items()}, name, source.name, width) for name in ("mean", "std"))
    std = np.maximum(std, smallest_std)
    check_std(std, f"{source.name}: std")
    bias = found.get("bias", np.zeros(len(weight))).ravel()
    if bias.size not in (1, len(weight)):
        raise ValueError(f"{source.name}: bias of {bias.size} numbers for {len(weight)} rows of weights; save one for each")
    bias = np.broadcast_to(bias, (len(weight),)).copy()
    remedy = "the layers are not in the file: give each as a tap, in the order in which they were flattened"
    return Imported(
        linear(weight, bias, unit=asked.unit or ScoreUnit.LOGIT, mean=mean, std=std),
        asked.taps_for(width, remedy),
        "a linear probe over standardised activations",
        named(asked, len(weight)),
    )
