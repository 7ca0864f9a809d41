"""Reads probes of the project rl-rewardhacking, whose files hold one probe for every entry of Hugging Face's ``hidden_states`` (0 = the
embeddings).

    .mmpprobe   a torch file, ``{"direction": (layers, width), "layers": [...]}``
    .lgprobe    a pickle, ``{layer: LogisticRegression or None}``

Both kinds read the mean of a response's activations. A linear probe's score of that mean equals the mean of its token scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from probescore.types import ScoreUnit
from probescore_probes import arguments
from probescore_probes.importing.estimators import estimator_probe
from probescore_probes.importing.imported import Imported, ImportOptions, linear, named
from probescore_probes.importing.pickles import unpickled
from probescore_probes.importing.source import ProbeSource, tensors

_STATISTICS = "probe_rh_summary_stats.json"
_INSTEAD = "save coef_ and intercept_ of the layer that you use as weight and bias, and import those"


def is_rl_rewardhacking(source: ProbeSource) -> bool:
    """Returns whether a file is a probe of the project rl-rewardhacking: a pickle ``*.lgprobe``, or a torch file with a ``direction`` and
    ``layers``.
    """
    if source.path.suffix == ".lgprobe" and source.kind == "pickle":
        return True
    return source.kind == "torch" and isinstance(source.content, Mapping) and {"direction", "layers"} <= set(source.content)


def read_rl_rewardhacking(source: ProbeSource, asked: ImportOptions) -> Imported:
    """Reads the probe of one layer from a file of the project rl-rewardhacking, which holds a probe for each layer.

    Raises:
        ValueError: the user named no layer, the file has no probe for the layer, or the file is a pickle that is not trusted.
    """
    return _logistic(source, asked) if source.kind == "pickle" else _mass_mean(source, asked)


def _mass_mean(source: ProbeSource, asked: ImportOptions) -> Imported:
    content = source.content
    directions = tensors({"direction": content.get("direction")}, source.name)["direction"]
    layers = _layers(content.get("layers"), source.name)
    if directions.shape != (len(layers), asked.hidden_size):
        raise ValueError(
            f"{source.name}: direction: shape {directions.shape} for {len(layers)} layers and the model's hidden size "
            f"{asked.hidden_size}; give the model that it was fitted on"
        )
    row, tap = asked.entry_of(layers, "directions")
    return Imported(
        linear(directions[row : row + 1], np.zeros(1), unit=ScoreUnit.VALUE),
        (tap,),
        f"the mass-mean direction for hidden_states[{layers[row]}]",
        named(asked, 1),
        reduction="mean",
        notes=_thresholds(source),
    )


def _layers(content: object, where: str) -> list[int]:
    layers = content.tolist() if isinstance(content, torch.Tensor | np.ndarray) else content
    if not isinstance(layers, list | tuple | range) or not all(isinstance(layer, int) and layer >= 0 for layer in layers):
        raise ValueError(f"{where}: layers: {arguments.shown(layers)}; it should list entries of hidden_states")
    return list(layers)


def _logistic(source: ProbeSource, asked: ImportOptions) -> Imported:
    content, warned = unpickled(source, asked.trust_pickle, _INSTEAD)
    if not isinstance(content, Mapping):
        raise ValueError(f"{source.name}: {arguments.kind_of(content)}; an .lgprobe holds a classifier for each layer")
    fitted = {int(layer): estimator for layer, estimator in content.items() if estimator is not None}
    if not fitted:
        raise ValueError(f"{source.name}: no layer in it was fitted; fit it again")
    layers = sorted(fitted)
    row, tap = asked.entry_of(layers, "classifiers")
    one = replace(asked, taps=(tap,))
    found = estimator_probe(fitted[layers[row]], one, source, warned)
    method = f"logistic regression for hidden_states[{layers[row]}]"
    return Imported(found.function, found.taps, method, found.labels, reduction="mean", notes=(*found.notes, *_thresholds(source)))


def _thresholds(source: ProbeSource) -> tuple[str, ...]:
    """Returns a note for a probe's manifest (description in its file) that the author's thresholds are not imported, if a file with
    thresholds lies beside the probe; else no note.
    """
    path = source.folder / _STATISTICS
    try:
        statistics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ()
    named_thresholds = [name for name in _keys(statistics) if name.endswith("threshold")]
    return (f"Its author's thresholds ({_STATISTICS}: {', '.join(named_thresholds[:4])}) are not taken over: calibrate it here",) * bool(
        named_thresholds
    )


def _keys(content: object) -> list[str]:
    if isinstance(content, Mapping):
        return list(dict.fromkeys(key for name, value in content.items() for key in (str(name), *_keys(value))))
    return list(dict.fromkeys(key for value in content for key in _keys(value))) if isinstance(content, list) else []
