"""Tiny models that read pictures too, from config: a text decoder of a known family, behind a wrapper with a small eye."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from models import BOS, EOS, HIDDEN_SIZE, LAYERS, PAD, VOCAB_SIZE, _scale_weights, _session_directory, tiny_tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText

IMAGE = 90  # the id that stands for a picture

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "rms_norm_eps": 1e-6,
}
_EYE: dict[str, Any] = {
    "hidden_size": 16,
    "embed_dim": 16,
    "depth": 1,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "out_hidden_size": HIDDEN_SIZE,
    "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
    "mlp_ratio": 1,
}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}

# Each with what its text decoder is, where that is a setting, or with what it needs.
WRAPPERS: dict[str, dict[str, Any]] = {
    "qwen2_vl": _SECTIONS,
    "qwen2_5_vl": _SECTIONS,
    "qwen3_vl": {"rope_parameters": _SECTIONS["rope_parameters"] | {"mrope_interleaved": True}},
    "glm4v": {"rope_parameters": _SECTIONS["rope_parameters"] | {"partial_rotary_factor": 1.0}},
    "mistral3": {"model_type": "mistral"},
    "llava": {"model_type": "llama"},
    "llava_next": {"model_type": "llama"},
    "llava_onevision": {"model_type": "qwen2"},
    "idefics3": {"model_type": "llama"},
    "smolvlm": {"model_type": "llama"},
    "aya_vision": {"model_type": "cohere2"},
    "gemma3": {"model_type": "gemma3_text", "query_pre_attn_scalar": 8},
    "paligemma": {"model_type": "gemma"},
    "internvl": {"model_type": "qwen2"},
}


@functools.cache
def tiny_wrapper(architecture: str) -> Path:
    """A directory with config, safetensors and tokenizer of such a model, as on the hub."""
    eye = AutoConfig.for_model(architecture).vision_config
    config = AutoConfig.for_model(
        architecture,
        text_config=_TEXT | WRAPPERS[architecture],
        vision_config={key: value for key, value in _EYE.items() if hasattr(eye, key)} | {"model_type": eye.model_type},
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    _scale_weights(model, torch.Generator().manual_seed(0))
    directory = Path(_session_directory(), architecture)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
