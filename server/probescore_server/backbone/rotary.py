"""Finds rotary embeddings that change with the length of the sequence, so that a prefix is computed otherwise than on its own."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

_FIXED = frozenset({"default", "linear", "yarn", "llama3", "proportional"})


def changing_rope_types(config: PreTrainedConfig) -> list[str]:
    """Returns the types of a text model's rotary embeddings that are not known to be the same at every length, sorted."""
    return sorted({str(parameters["rope_type"]) for parameters in _embeddings(config)} - _FIXED)


def max_unchanged_positions(config: PreTrainedConfig) -> int | None:
    """Returns the length in tokens up to which a model's rotary embeddings do not change; ``None`` = they never change.

    Beyond it transformers rotates every position of a forward by other angles (``longrope``, ``dynamic``), so that keys computed before, of
    a shared prompt or an earlier chunk, are no longer those of the whole sequence.
    """
    limits = [
        parameters.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for parameters in _embeddings(config)
        if parameters["rope_type"] not in _FIXED
    ]
    known = [int(limit) if limit else int(config.max_position_embeddings) for limit in limits]
    return min(known, default=None)


def _embeddings(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Returns the parameters of each rotary embedding: one for all layers, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return []
    several = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return [each for each in several if "rope_type" in each]
