"""Tiny models that the packed path runs, with what is unusual about their attention."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from parity_models import write_model

from probescore_server.backbone.model_loading import Decoder, load_decoder

PACKABLE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"head_dim": 20},  # not a multiple of 8
    "mistral": {},  # a window
    "gemma3_text": {},  # a window in every other layer
    "cohere2": {"sliding_window": 8},
    "gpt2": {},  # positions are embedded
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi3": {},
    "olmo2": {},
    "granite": {},
    "mixtral": {},
    "qwen3_moe": {},
    "deepseek_v3": {},  # values narrower than keys
    "gpt_oss": {},  # sinks
}


def open_decoder(architecture: str, *, dtype: str = "float32", device: str = "cpu", **changed: Any) -> Decoder:
    """All four blocks of a tiny model with random weights, newly loaded."""
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory), architecture, **PACKABLE.get(architecture, {}) | changed)
        return load_decoder(Path(directory), num_layers=4, dtype=dtype, device=device)


@functools.cache
def packable_decoder(architecture: str) -> Decoder:
    """The same one for all tests, which leave it as it is."""
    return open_decoder(architecture)
