"""The families of the parity table: a tiny model of each, with the settings that set its family apart smaller than the rollouts.

Windows, chunks and the like must matter: a model that ignores them would score like the one that does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from parity_models import ARCHITECTURES, HIDDEN, LAYERS, VOCAB_SIZE, WINDOW, scale_weights, write_model, write_tokenizer, written_settings
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        name: for people.
        architecture: transformers' ``model_type``.
        settings: of its text decoder, beside those that all have.
        wrapper: settings of a model that has encoders of other things beside the decoder; ``None`` for one of text alone.
    """

    name: str
    architecture: str
    settings: dict[str, Any] = field(default_factory=dict)
    wrapper: dict[str, Any] | None = None


PLACEHOLDER = VOCAB_SIZE
"""The id that stands for a piece of a picture in every wrapper here; it and those after it come in no rollout."""

_ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
_EXPERTS = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DEEPSEEK_EXPERTS = {
    **_EXPERTS,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_HALF_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
_MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_expand": 2}
_GPT_2 = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 256}
_GRANITE = {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "attention_multiplier": 0.3}
_LLAMA_4 = {
    "intermediate_size_mlp": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "no_rope_layers": [1, 1, 1, 0],
    "attn_temperature_tuning": True,
    "floor_scale": WINDOW,
}
_GEMMA_4 = {**_ALTERNATING, "global_head_dim": 32, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
_PER_LAYER_INPUT = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3}

_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
_QWEN_TOWER = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": HIDDEN, "intermediate_size": 32}
_QWEN_IDS = {"image_token_id": PLACEHOLDER, "video_token_id": PLACEHOLDER + 1, "vision_start_token_id": PLACEHOLDER + 2}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def _text(name: str, architecture: str, **settings: Any) -> Family:
    return Family(name, architecture, settings)


def _wrapper(name: str, architecture: str, text: dict[str, Any], vision: dict[str, Any], **top: Any) -> Family:
    top = top or {"image_token_id": PLACEHOLDER}
    return Family(name, architecture, text, {"vision_config": vision} | top)


_NAMES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "gemma3_text": "Gemma 3",
    "gemma2": "Gemma 2",
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX",
    "olmo2": "OLMo 2",
    "phi3": "Phi-3",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3-MoE",
    "gpt_oss": "GPT-OSS",
    "bloom": "BLOOM",
    "qwen3_next": "Qwen3-Next",
    "deepseek_v3": "DeepSeek-V3",
}

_ALL = [
    *(Family(_NAMES[architecture], architecture, settings) for architecture, settings in ARCHITECTURES.items()),
    _text("Apertus", "apertus"),
    _text("Arcee", "arcee"),
    _text("Bamba", "bamba", **_MAMBA_2, attn_layer_indices=[1, 3]),
    _text("BitNet", "bitnet"),
    _text("CodeGen", "codegen", **_GPT_2, rotary_dim=8),
    _text("Cohere", "cohere"),
    _text("Cohere2", "cohere2", **_ALTERNATING),
    _text("DeepSeek-V2", "deepseek_v2", **_DEEPSEEK_EXPERTS, **_LATENT),
    _text("dots.llm1", "dots1", **_DEEPSEEK_EXPERTS),
    _text("ERNIE 4.5", "ernie4_5"),
    _text(
        "ERNIE 4.5 MoE",
        "ernie4_5_moe",
        moe_num_experts=8,
        moe_k=2,
        moe_intermediate_size=32,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
    ),
    _text("EXAONE 4", "exaone4", **_ALTERNATING),
    _text("Falcon", "falcon"),
    _text("Falcon-H1", "falcon_h1", **{**_MAMBA_2, "mamba_n_heads": 4, "mamba_d_ssm": 64}),
    _text("Gemma", "gemma"),
    _text("Gemma 4", "gemma4_text", **_GEMMA_4),
    _text("Gemma 4 E (inputs to each layer)", "gemma4_text", **(_GEMMA_4 | _PER_LAYER_INPUT)),
    _text("GLM-4", "glm4", **_HALF_ROTARY),
    _text("GLM-4-MoE", "glm4_moe", **_DEEPSEEK_EXPERTS, **_HALF_ROTARY),
    _text("GPT-J", "gptj", **_GPT_2, rotary_dim=8),
    _text("GPT-Neo", "gpt_neo", num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]], window_size=WINDOW),
    _text("Granite", "granite", **_GRANITE),
    _text("Granite-MoE", "granitemoe", **_EXPERTS, **_GRANITE),
    _text(
        "Granite 4 (hybrid)",
        "granitemoehybrid",
        **_MAMBA_2,
        **_EXPERTS,
        **_GRANITE,
        layer_types=["mamba", "attention"] * 2,
        shared_intermediate_size=32,
    ),
    _text("Helium", "helium"),
    _text("Hunyuan", "hunyuan_v1_dense"),
    _text("Hunyuan-MoE", "hunyuan_v1_moe", num_experts=8, moe_topk=2),
    _text("Jamba", "jamba", attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False, **_EXPERTS),
    _text("LFM2", "lfm2", **_CONVOLUTIONS),
    _text("LFM2-MoE", "lfm2_moe", **_CONVOLUTIONS, **_EXPERTS, num_dense_layers=1),
    _text("Llama 4", "llama4_text", **_LLAMA_4, attention_chunk_size=WINDOW),
    _text("Llama 4 (chunks of 8,192)", "llama4_text", **_LLAMA_4, attention_chunk_size=8192, max_position_embeddings=16384),
    _text("Mamba", "mamba", state_size=8),
    _text("Mamba-2", "mamba2", num_heads=4, head_dim=32, n_groups=1, state_size=8, chunk_size=8),
    _text("MiniCPM3", "minicpm3", **_LATENT),
    _text("MiniMax", "minimax", **_EXPERTS, layer_types=["linear_attention", "full_attention"] * 2),
    _text("MiniMax-M2", "minimax_m2", **_EXPERTS),
    _text("MPT", "mpt", d_model=HIDDEN, n_heads=4, n_layers=4, max_seq_len=256),
    _text("Nemotron", "nemotron"),
    _text(
        "Nemotron-H",
        "nemotron_h",
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        ssm_state_size=8,
        chunk_size=8,
        layers_block_type=["mamba", "mlp", "attention", "mlp"],
    ),
    _text("OLMo", "olmo"),
    _text("OLMo 3", "olmo3", **_ALTERNATING),
    _text("OLMoE", "olmoe", **_EXPERTS),
    _text("OPT", "opt", ffn_dim=96, word_embed_proj_dim=HIDDEN),
    _text("OPT-350M (narrow, norms after)", "opt", ffn_dim=96, word_embed_proj_dim=32, do_layer_norm_before=False),
    _text("Phi", "phi"),
    _text("Phi-3.5-MoE", "phimoe", **_EXPERTS),
    _text("Qwen2-MoE", "qwen2_moe", **_EXPERTS, shared_expert_intermediate_size=32),
    _text("Qwen3.5", "qwen3_5_text", **_DELTA_NET),
    _text("Qwen3.5-MoE", "qwen3_5_moe_text", **_DELTA_NET, **_EXPERTS, shared_expert_intermediate_size=32),
    _text("RecurrentGemma", "recurrent_gemma"),
    _text("RWKV", "rwkv"),
    _text("Seed-OSS", "seed_oss"),
    _text("SmolLM3", "smollm3", no_rope_layers=[1, 1, 1, 0]),
    _text("StableLM", "stablelm"),
    _text("StarCoder2", "starcoder2", sliding_window=WINDOW),
    _text("VaultGemma", "vaultgemma", **_ALTERNATING, query_pre_attn_scalar=16),
    _wrapper(
        "Aya Vision",
        "aya_vision",
        {"model_type": "cohere2", **_ALTERNATING},
        {**_TOWER, "model_type": "siglip_vision_model"},
        image_token_index=PLACEHOLDER,
    ),
    _wrapper(
        "Gemma 3 (vision)",
        "gemma3",
        {**_ALTERNATING, "query_pre_attn_scalar": 16},
        _TOWER,
        image_token_index=PLACEHOLDER,
        boi_token_index=PLACEHOLDER + 1,
        eoi_token_index=PLACEHOLDER + 2,
        mm_tokens_per_image=4,
    ),
    _wrapper(
        "Gemma 4 (vision)",
        "gemma4",
        _GEMMA_4,
        {**_TOWER, "head_dim": 16, "num_key_value_heads": 2},
        image_token_id=PLACEHOLDER,
        boi_token_id=PLACEHOLDER + 1,
        eoi_token_id=PLACEHOLDER + 2,
        audio_config=None,
    ),
    _wrapper("GLM-4V", "glm4v", {"rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}}, {**_QWEN_TOWER, "image_size": 28}),
    _wrapper("Idefics3", "idefics3", {"model_type": "llama"}, _TOWER),
    _wrapper("InternVL", "internvl", {"model_type": "qwen2"}, {**_TOWER, "image_size": [28, 28], "patch_size": [14, 14]}),
    _wrapper("LFM2-VL", "lfm2_vl", {"model_type": "lfm2", **_CONVOLUTIONS}, {**_TOWER, "model_type": "siglip2_vision_model"}),
    _wrapper(
        "Llama 4 (vision)",
        "llama4",
        {**_LLAMA_4, "attention_chunk_size": WINDOW},
        {**_TOWER, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        image_token_index=PLACEHOLDER,
        boi_token_index=PLACEHOLDER + 1,
        eoi_token_index=PLACEHOLDER + 2,
    ),
    _wrapper(
        "Llama 3.2 Vision",
        "mllama",
        {"cross_attention_layers": [1, 3]},
        {
            **_TOWER,
            "num_global_layers": 1,
            "supported_aspect_ratios": [[1, 1]],
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        },
        image_token_index=PLACEHOLDER,
    ),
    _wrapper("LLaVA", "llava", {"model_type": "llama"}, {**_TOWER, "model_type": "clip_vision_model"}, image_token_index=PLACEHOLDER),
    _wrapper(
        "LLaVA-OneVision",
        "llava_onevision",
        {"model_type": "qwen2"},
        {**_TOWER, "model_type": "siglip_vision_model"},
        image_token_index=PLACEHOLDER,
        video_token_index=PLACEHOLDER + 1,
    ),
    _wrapper("Mistral 3", "mistral3", {"model_type": "mistral"}, {**_TOWER, "model_type": "pixtral"}, image_token_index=PLACEHOLDER),
    _wrapper(
        "PaliGemma", "paligemma", {"model_type": "gemma"}, {**_TOWER, "model_type": "siglip_vision_model"}, image_token_index=PLACEHOLDER
    ),
    _wrapper("Qwen2.5-VL", "qwen2_5_vl", {"rope_parameters": _MROPE}, _QWEN_TOWER, **_QWEN_IDS),
    _wrapper(
        "Qwen3-VL",
        "qwen3_vl",
        {"rope_parameters": _MROPE},
        {**_QWEN_TOWER, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        **_QWEN_IDS,
    ),
    _wrapper(
        "Qwen3.5 (vision)",
        "qwen3_5",
        {**_DELTA_NET, "rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}},
        {**_QWEN_TOWER, "num_position_embeddings": 16},
        **_QWEN_IDS,
    ),
    _wrapper("SmolVLM", "smolvlm", {"model_type": "llama"}, _TOWER),
]
FAMILIES = {family.name: family for family in sorted(_ALL, key=lambda family: family.name.lower())}


def write_family(directory: Path, family: Family) -> Path:
    """Writes a whole model of the family, with a tokenizer; returns ``directory``."""
    if family.wrapper is None:
        return write_model(directory, family.architecture, **family.settings)
    text = written_settings(family.architecture, family.settings) | {"vocab_size": VOCAB_SIZE + 8}
    config = CONFIG_MAPPING[family.architecture](text_config=text, **family.wrapper)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).float()
    scale_weights(model, torch.Generator().manual_seed(0))
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory
