"""Reads probes of obalcells/hallucination_probes, another project: ``probe_config.json`` and ``probe_head.bin`` in a folder.

score of a token = sigmoid(weight · x + bias), x = the output of block ``layer_idx``, counted from 0

If a LoRA adapter lies beside the two files, x is that of the model with the adapter.
"""

from __future__ import annotations

from probescore.types import ScoreUnit, Tap
from probescore_probes import arguments
from probescore_probes.importing.imported import Imported, ImportOptions, linear, named
from probescore_probes.importing.source import ProbeSource, nothing_more, taken, whole_number

_CONFIG, _HEAD = "probe_config.json", "probe_head.bin"


def is_hallucination_probe(source: ProbeSource) -> bool:
    """Returns whether a folder holds ``probe_config.json`` and ``probe_head.bin``, the files of a probe of the project
    obalcells/hallucination_probes.
    """
    return source.holds(_CONFIG, _HEAD)


def read_hallucination_probe(source: ProbeSource, asked: ImportOptions) -> Imported:
    """Reads a probe of the project obalcells/hallucination_probes, a linear head over the output of a block; each token's score is a
    probability.

    Raises:
        ValueError: the model lacks the layer, or the weights have another shape.
    """
    config = source.config(_CONFIG)
    layer, width = whole_number(config, "layer_idx", _CONFIG), whole_number(config, "hidden_size", _CONFIG)
    if width != asked.hidden_size:
        raise ValueError(
            f"{_CONFIG}: hidden_size: {width}; the model's is {asked.hidden_size}: give the model that the probe was fitted on"
        )
    stated = arguments.tap(Tap("resid_post", layer), f"{_CONFIG}: layer_idx", asked.num_hidden_layers)
    head = source.member(_HEAD).tensors
    nothing_more(head, ("weight", "bias"), _HEAD, "a linear head")
    weight, bias = taken(head, "weight", _HEAD, 1, width), taken(head, "bias", _HEAD, 1)
    return Imported(
        linear(weight, bias, unit=ScoreUnit.LOGIT),
        asked.tap_or((stated,), _CONFIG),
        "a hallucination probe of single tokens",
        named(asked, 1),
        reduce_on=ScoreUnit.PROBABILITY,
        notes=("Its author flags tokens at 0.5, which is no calibration",),
    )
