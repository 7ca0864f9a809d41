"""Tiny models of many architectures, from config, with random weights scaled so that attention matters.

With the usual initialisation (σ = 0.02) every query looks at every key alike, and a model that forgets its context scores nearly the same
as one that reads it. Here each matrix keeps the size of what passes through it, so that attention is peaked and each block says something.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 128
BOS = 1
WINDOW = 8
LAYERS = 4
HIDDEN = 64
LINEAR_ATTENTION_DECAY = 0.05  # in nats a token, about
ATTENTION_GAIN = 1.6  # queries and keys: logits of σ ≈ gain², so that a few keys carry most of the weight

_LOOKING = ("q_proj", "k_proj", "qkv", "query", "c_attn", "q_b_proj", "kv_b_proj")

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": BOS,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": _ALTERNATING, "query_pre_attn_scalar": 16},
    "gemma2": {"sliding_window": WINDOW, "layer_types": _ALTERNATING, "query_pre_attn_scalar": 16},
    "gpt2": {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 256},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "olmo2": {},
    "phi3": {"sliding_window": WINDOW},
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "gpt_oss": {**_EXPERTS, "sliding_window": WINDOW, "layer_types": _ALTERNATING},
    "bloom": {"n_layer": LAYERS, "n_head": 4},
    "qwen3_next": {
        **_EXPERTS,
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    },
    "deepseek_v3": {
        **_EXPERTS,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
}


def write_model(directory: Path, architecture: str, *, seed: int = 0, **changed: Any) -> Path:
    """Write a whole model (head included, as on the hub) and its tokenizer; return ``directory``."""
    settings = written_settings(architecture, ARCHITECTURES.get(architecture, {}) | changed)
    config = AutoConfig.for_model(architecture, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float()
    scale_weights(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def written_settings(architecture: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Those of an architecture, with the ones that all models here have."""
    settings = _COMMON | settings
    if architecture in ("deepseek_v2", "deepseek_v3", "falcon", "mamba2", "minicpm3"):
        settings = {name: value for name, value in settings.items() if name != "head_dim" or value != _COMMON["head_dim"]}
    return settings  # head_dim is qk_rope_head_dim, or computed, in those


def write_tokenizer(directory: Path) -> None:
    """Writes the tokenizer that all models here share."""
    _tokenizer().save_pretrained(directory)


@torch.no_grad()
def scale_weights(model: torch.nn.Module, random: torch.Generator) -> None:
    """Draws all weights anew, each of the size that keeps what passes through it."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    embedding_scale = next((float(buffer) for name, buffer in model.named_buffers() if name.endswith("embed_scale")), 1.0)
    # YaRN enlarges queries and keys, and with them the logits
    yarn = next((float(vars(m)["attention_scaling"]) for m in model.modules() if "attention_scaling" in vars(m)), 1.0)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=random)
        if id(weight) in embeddings:
            weight.copy_(noise / embedding_scale)
        elif name.endswith("A_log"):  # as initialised, most heads of a linear attention forget all but the current token
            weight.copy_(math.log(LINEAR_ATTENTION_DECAY) + 0.1 * noise)
        elif weight.ndim == 1:
            weight.add_(0.1 * noise)  # biases around 0, norms around what they start at
        else:
            looks = any(part in name for part in _LOOKING)
            width = weight.shape[-1] if "conv1d" in name else min(weight.shape[-2:])
            weight.copy_(noise * (ATTENTION_GAIN / yarn if looks else 1.0) / math.sqrt(width))


def _tokenizer() -> PreTrainedTokenizerFast:
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    pieces = ["a", "b", "ab"]  # so that the ids of "a", "b" do not survive being decoded and encoded again
    words = [*special.values(), *pieces, *(f"w{i}" for i in range(len(special) + len(pieces), VOCAB_SIZE))]
    bpe = models.BPE({word: i for i, word in enumerate(words)}, [("a", "b")], unk_token=special["unk_token"])
    tokenizer = Tokenizer(bpe)
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
