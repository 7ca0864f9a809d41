"""Linear probes with a standardisation beside them, as people save them from torch, and as vllm-lens' example does.

    score = weight · (x - mean) / std + bias

The numbers are taken as they are saved: no ddof is corrected and no eps is added.
"""

from __future__ import annotations

import numpy as np

from probescore.types import ScoreUnit
from probescore_probes.importing.directions import rows_of, unprefixed
from probescore_probes.importing.imported import Array, Imported, ImportOptions, linear, named
from probescore_probes.importing.source import ProbeSource, taken

_VLLM_LENS_SMALLEST_STD = 1e-8


def is_standardised(source: ProbeSource) -> bool:
    """Tells whether a file has a weight, a mean and a standard deviation."""
    return source.kind in ("torch", "safetensors", "npz") and {"weight", "mean", "std"} <= {*_names(source)}


def read_standardised(source: ProbeSource, asked: ImportOptions) -> Imported:
    """Reads a linear probe over standardised activations.

    Raises:
        ValueError: shapes that do not fit, or a standard deviation that is not above 0.
    """
    return _read(source, asked, smallest_std=0.0)


def read_vllm_lens(source: ProbeSource, asked: ImportOptions) -> Imported:
    """Reads a linear probe over the flattened outputs of several blocks, by a mean over the tokens of a pass.

    Raises:
        ValueError: as ``read_standardised``; or a tap is not the output of a block.
    """
    others = [str(tap) for tap in asked.taps if tap.hook != "resid_post"]
    if others:
        raise ValueError(
            f"tap: {', '.join(others)}; vllm-lens reads what leaves a block, counted from 0: give resid_post.N for its layer N"
        )
    found = _read(source, asked, smallest_std=_VLLM_LENS_SMALLEST_STD)
    return Imported(found.function, found.taps, "logistic regression of vllm-lens", found.labels, reduction="mean", notes=found.notes)


def check_std(std: Array, where: str) -> None:
    """Refuses a standard deviation by which nothing can be divided.

    Raises:
        ValueError: it is 0 or less somewhere; names the column.
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
