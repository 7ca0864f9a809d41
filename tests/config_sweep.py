"""Each setting of a model's config changed: does what the blocks compute change without the fingerprint?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from probescore_server.probes.format.fingerprints import model_fingerprint

# `tie_word_embeddings` says which of two names an embedding is read from, and the models here store both.
_NOT_A_SETTING = ("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "tie_word_embeddings")
_ROUNDING = 1e-3  # of a change that is only in the order of summation
_CHOICES = ("gelu", "relu", "silu", "sigmoid", "softmax", "default")


def unnoticed_settings(model: Path) -> dict[str, Any]:
    """The settings, with a value each, that change an activation and leave the model's fingerprint as it is. The model keeps its config."""
    path = model / "config.json"
    original = path.read_text()
    written = json.loads(original)
    weights = AutoModel.from_pretrained(model).state_dict()
    before, activations = model_fingerprint(model), _activations(model, weights)
    assert activations is not None
    unnoticed = {}
    try:
        for name, value in _all_settings(written, AutoConfig.from_pretrained(model).to_dict()):
            for other in _others(value):
                path.write_text(json.dumps(_with(written, name, other)))
                found = _activations(model, weights)
                if found is not None and _differs(found, activations) and model_fingerprint(model) == before:
                    unnoticed[".".join(name)] = other
                    break
    finally:
        path.write_text(original)
    return unnoticed


def _all_settings(written: dict[str, Any], known: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What the config says and what the architecture has beside it, of the text decoder."""
    prefix = ("text_config",) if "text_config" in written else ()
    for part in prefix:
        written, known = written[part], known[part]
    for key, value in (known | written).items():
        if key not in _NOT_A_SETTING and not key.startswith("_"):
            yield (*prefix, key), value


def _others(value: Any) -> list[Any]:
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, value * 2, max(value // 2, 1)]
        case float():
            return [value * 1.5 + 0.1, value * 0.5]
        case None:
            return [1, 2.0, True, 4, 0.5]
        case str():
            return [choice for choice in _CHOICES if choice != value]
        case list() if all(isinstance(entry, str) for entry in value):
            return [value[::-1], *([kind] * len(value) for kind in sorted({"full_attention", "sliding_attention", *value}))]
        case list() if all(isinstance(entry, (int, float)) for entry in value):
            return [value[::-1], [entry + 1 for entry in value]]
        case dict():
            return [value | {key: other} for key, entry in value.items() for other in _others(entry)]
    return []


def _with(written: dict[str, Any], name: tuple[str, ...], value: Any) -> dict[str, Any]:
    first, *rest = name
    return written | {first: _with(written[first], tuple(rest), value) if rest else value}


@torch.inference_mode()
def _activations(model: Path, weights: dict[str, torch.Tensor]) -> list[torch.Tensor] | None:
    """At every residual stream and after the final norm; ``None`` if such a model cannot be, or cannot have these weights."""
    ids = torch.randint(4, 99, (1, 40), generator=torch.Generator().manual_seed(1))
    try:
        loaded = AutoModel.from_config(AutoConfig.from_pretrained(model)).eval()
        loaded.load_state_dict(weights)
        output = loaded(ids, use_cache=False, output_hidden_states=True)
        last = getattr(output, "last_hidden_state", None)  # Llama 4's wrapper gives logits
        return [*output.hidden_states, *([] if last is None else [last])]
    except Exception:  # whatever an architecture says of a setting that it cannot have
        return None


def _differs(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) != len(expected) or any(
        one.shape != other.shape or float((one - other).abs().max()) > _ROUNDING for one, other in zip(found, expected, strict=True)
    )
