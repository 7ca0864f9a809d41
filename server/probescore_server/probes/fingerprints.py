"""Model fingerprints: whether the model that runs is the one that a probe was made for.

A fingerprint covers the tensors as they are stored (name, dtype, shape, sampled bytes) and the part of the config that changes what the
decoder blocks compute. It is read from safetensors files and ``config.json``; the model is not loaded.

The same model in another form keeps its fingerprint: other shards, with or without a head, saved as the bare decoder or inside a wrapper,
its config written by an older transformers. Other weights, another dtype or another rope base change it. Bytes are sampled, evenly over
each tensor, so a training step shows and one altered number in a large tensor may not; the golden vectors are the check that remains.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from transformers import CONFIG_MAPPING

from probescore_server.errors import ModelRefused
from probescore_server.files import UnfitFile, read_regular_file

_CHUNKS = 64
_CHUNK_BYTES = 64
_MAX_JSON_BYTES = 1 << 28
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit

# Names that wrap a decoder: Qwen3ForCausalLM stores `model.layers.0…`, Qwen3Model the same tensor as `layers.0…`.
_WRAPPERS = {"model", "base_model", "language_model", "text_model", "transformer", "decoder", "gpt_neox", "backbone"}
_HEADS = {"lm_head", "embed_out"}
# Constants that old versions of transformers stored and new ones compute.
_DERIVED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention|self_attention)\.(bias|masked_bias))$")

# What changes the activations of a decoder block, by transformers' names. A list rather than all keys, since every release of transformers
# adds keys with defaults, and trainers change those that do not matter here (use_cache, dtype, token ids, dropout).
# fmt: off
_CONFIG_KEYS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "hidden_act", "hidden_activation", "activation_function", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon",
    "norm_epsilon",
    "max_position_embeddings", "rope_parameters", "rope_interleave", "no_rope_layers", "alibi",
    "layer_types", "sliding_window", "attention_chunk_size", "use_bidirectional_attention",
    "attn_logit_softcapping", "query_pre_attn_scalar", "attention_multiplier", "residual_multiplier", "embedding_multiplier", "clip_qkv",
    "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "attn_temperature_tuning", "attn_scale", "floor_scale", "use_qk_norm",
    "attention_bias", "mlp_bias", "use_parallel_residual", "parallel_attn", "multi_query", "new_decoder_architecture",
    "do_layer_norm_before",
    "apply_residual_connection_post_layernorm",
    "num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
    "shared_expert_intermediate_size", "norm_topk_prob", "routed_scaling_factor", "scoring_func", "topk_method", "n_group", "topk_group",
    "first_k_dense_replace",
    "decoder_sparse_step", "mlp_only_layers", "moe_layers", "swiglu_limit",
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads",
)
# fmt: on


def model_fingerprint(directory: Path) -> str:
    """Computes ``sha256:…`` over a model's tensors and the meaningful part of its config.

    Args:
        directory: holds ``config.json`` and ``model.safetensors``, or ``model.safetensors.index.json`` and its shards.

    Raises:
        ModelRefused: a file is missing or damaged, or the weights are in another format than safetensors.
    """
    tensors = sorted(entry for file in _weight_files(directory) for entry in _tensors(file))
    if not tensors:
        raise ModelRefused(f"{directory}: no tensors in its safetensors files")
    content = {"config": _meaningful_config(directory), "tensors": tensors}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def _weight_files(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        found = f"found {', '.join(others[:3])}, which are pickles and never opened" if others else "found no weights"
        raise ModelRefused(f"{directory}: {found}; expected model.safetensors, or model.safetensors.index.json with its shards")
    try:
        names = sorted(set(_read_json(index)["weight_map"].values()))
        shards = [directory / Path(name).name for name in names]
    except (KeyError, TypeError, AttributeError):
        raise ModelRefused(f"{index}: found no weight_map from tensor names to file names") from None
    for shard in shards:
        if not shard.is_file():
            raise ModelRefused(f"{directory}: the shard {shard.name} named by {index.name} is missing")
    return shards


def _tensors(file: Path) -> Iterator[tuple[str, str, list[int], str]]:
    """Name, dtype, shape and digest of sampled bytes of each tensor in a safetensors file.

    The format: https://huggingface.co/docs/safetensors/index#format
    """
    with file.open("rb") as stream:
        size = file.stat().st_size
        header_bytes = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise ModelRefused(f"{file}: truncated, or not a safetensors file")
        start = 8 + header_bytes
        try:
            header: dict[str, dict[str, Any]] = json.loads(stream.read(header_bytes))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = map(int, entry["data_offsets"])
                if not 0 <= begin <= end <= size - start:
                    raise ModelRefused(f"{file}: truncated: tensor {name!r} ends at byte {start + end} of {size}")
                bare = _without_wrappers(name)
                if bare.split(".")[0] not in _HEADS and not _DERIVED.search(bare):
                    yield bare, str(entry["dtype"]), list(entry["shape"]), _sampled_digest(stream, start + begin, end - begin)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ModelRefused(f"{file}: its header is not one of a safetensors file") from None


def _without_wrappers(name: str) -> str:
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        del parts[0]
    return ".".join(parts)


def _sampled_digest(stream: BinaryIO, start: int, size: int) -> str:
    """Over the whole tensor if it is small, else over evenly spaced chunks, the first and the last bytes among them."""
    digest = hashlib.sha256()
    if size <= _CHUNKS * _CHUNK_BYTES:
        stream.seek(start)
        digest.update(stream.read(size))
    else:
        for chunk in range(_CHUNKS):
            stream.seek(start + (size - _CHUNK_BYTES) * chunk // (_CHUNKS - 1))
            digest.update(stream.read(_CHUNK_BYTES))
    return digest.hexdigest()


def _meaningful_config(directory: Path) -> dict[str, object]:
    """The keys that matter, as the running transformers understands ``config.json``: it brings old spellings and defaults to one form.

    A model that brings its own config class is read as written, so that the fingerprint needs no code of the model's.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ModelRefused(f"{directory}: no config.json")
    written = _read_json(path)
    model_type = written.get("model_type")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        config = CONFIG_MAPPING[model_type].from_dict(written).get_text_config(decoder=True)
        values = {key: getattr(config, key, None) for key in _CONFIG_KEYS}
    else:
        text = written.get("text_config", written)
        values = {key: text.get(key) for key in _CONFIG_KEYS}
    return {key: _canonical(value) for key, value in values.items() if value is not None}


def _canonical(value: object) -> object:
    """One spelling for what means the same: 10000 and 10000.0, an absent entry and null, rope's old ``type`` beside ``rope_type``."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(entry) for key, entry in value.items() if entry is not None and key != "type"}
    if isinstance(value, (list, tuple)):
        return [_canonical(entry) for entry in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular_file(path, _MAX_JSON_BYTES))
    except UnfitFile as error:
        raise ModelRefused(f"{path}: {error}") from None
    except ValueError:
        raise ModelRefused(f"{path}: not JSON") from None
    if not isinstance(content, dict):
        raise ModelRefused(f"{path}: not a JSON object")
    return content
