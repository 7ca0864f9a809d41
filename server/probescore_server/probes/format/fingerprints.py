"""Computes model fingerprints, digests which tell whether the running model is the one that a probe was made for.

A fingerprint covers the tensors as they are stored (name, dtype, shape, sampled bytes) and the settings of the config that change the
results of the decoder blocks. The fingerprint is read from safetensors files and ``config.json``; the model is not loaded.

The same model stored in another form keeps its fingerprint: with other shards, with or without a head of any kind, saved as the bare
decoder or inside a wrapper that also has image encoders, with its tied embedding stored under the head's name, or with a config written by
an older transformers. Other weights, another dtype or another rope base change the fingerprint.

Bytes are sampled evenly over each tensor. A training step therefore changes the fingerprint, but a single altered number in a large tensor
may not. Such a number is left for the golden vectors to find, which are stored scores that a server recomputes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from transformers import CONFIG_MAPPING, PreTrainedConfig

from probescore_server.backbone.checkpoint import HEAD_NAMES, check_is_whole, tied_embedding
from probescore_server.errors import ModelRefused
from probescore_server.files import UnreadableFile, read_regular_file

_CHUNKS = 64
_CHUNK_BYTES = 64
_MAX_JSON_BYTES = 1 << 28
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit

# Names that wrap a decoder: Qwen3ForCausalLM stores `model.layers.0…`, Qwen3Model the same tensor as `layers.0…`.
WRAPPERS = {"model", "base_model", "language_model", "text_model", "transformer", "decoder", "gpt_neox", "backbone"}
# Tensors beside the decoder, by the first part of their name: text never passes through them on its way to any tap. Heads are what language
# models, reward models, classifiers and trainers' value functions add; encoders are of other things than text; `mtp` drafts later tokens.
# A tensor of an unknown name is counted: then the same model may get two fingerprints, but two models never get the same one.
_BESIDE = re.compile(
    r"((\w+_)?heads?|embed_out|score|classifier|regression_layer|qa_outputs|mtp"
    r"|(high_res_)?(vision|visual|image|audio|video|speech)(_\w+)?|embed_vision|embed_audio"
    r"|(multi_modal_|mm_)?projector|connector|aligner|resampler(_model)?|qformer|query_tokens|language_projection)"
)
# Constants that old versions of transformers stored and new ones compute.
_DERIVED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention|self_attention)\.(bias|masked_bias))$")

_Tensor = tuple[str, str, list[int], str]
"""Describes a stored tensor: its name without wrappers, its dtype, its shape, and a digest of bytes sampled from it."""

# Settings that change the activations of a decoder block, by transformers' names. This is a list rather than all keys, since every release
# of transformers adds keys with defaults, and trainers change those that do not matter here (use_cache, dtype, token ids, dropout).
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
# These settings change activations too, in some architectures. They count where they differ from the architecture's default, so that a
# model which leaves them alone keeps the fingerprint that it had before they were listed.
_CONFIG_KEYS_IF_CHANGED = (
    "swiglu_alpha", "moe_norm_min", "norm_eps", "mixer_rms_eps", "scale_emb", "scale_depth", "rotary_dim", "window_size",
    "attention_layers", "attn_config", "activation", "output_attentions", "router_jitter_noise", "scale_embedding", "rescale_every",
    "full_attn_alpha_factor", "full_attn_beta_factor", "linear_attn_alpha_factor", "linear_attn_beta_factor",
    "mlp_alpha_factor", "mlp_beta_factor",
    "altup_active_idx", "altup_correct_scale", "activation_sparsity_pattern",
    "key_multiplier", "attention_in_multiplier", "attention_out_multiplier", "mlp_multipliers",
    "ssm_in_multiplier", "ssm_out_multiplier", "ssm_multipliers", "time_step_limit", "time_step_min", "time_step_max",
    "mlp_hidden_act", "mamba_hidden_act", "use_mem_rope", "hybrid_layer_ids",
)
# fmt: on
# Settings that change no activation, of a model that brings its own code; any other setting of such a model may change some.
_WITHOUT_EFFECT = re.compile(
    r"_.*|.*(dropout|pdrop|token_ids?|initializer_\w+|id2label|label2id)"
    r"|architectures|auto_map|dtype|num_labels|problem_type|torch_dtype|transformers_version|use_cache"
)
# The floats that JSON has no number for, as transformers writes them.
_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def model_fingerprint(directory: Path) -> str:
    """Computes a model's fingerprint, ``sha256:…`` over its tensors and over the settings of its config that change its activations.

    Args:
        directory: directory with ``config.json`` and ``model.safetensors``, or ``model.safetensors.index.json`` and its shards.

    Raises:
        ModelRefused: a file is missing or damaged, or the weights are in another format than safetensors.
    """
    check_is_whole(directory)
    files = _weight_files(directory)
    written = _read_config(directory)
    tensors = [entry for file in files for entry in _tensors(file)]
    if not tensors:
        raise ModelRefused(f"{directory}: no tensors in its safetensors files")
    config = _known_config(written, directory.name)
    tied = None if config is None else tied_embedding(config)
    if tied is not None:
        tensors = _with_embedding(tensors, without_wrappers(tied[1]))
    content: dict[str, object] = {
        "config": _meaningful_settings(written, config),
        "tensors": sorted(entry for entry in tensors if not stands_beside(entry[0])),
    }
    if config is None:
        content["code"] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.glob("*.py"))]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def decoder_settings(config_file: bytes, name: str) -> dict[str, object]:
    """Returns the settings of a model's config that change the activations of its decoder blocks, in one spelling.

    Args:
        config_file: content of ``config.json``.
        name: name of the model, for messages.

    Raises:
        ModelRefused: the content is no config of a model.
    """
    try:
        written = json.loads(config_file)
    except ValueError:
        raise ModelRefused(f"{name}: config.json is not JSON") from None
    if not isinstance(written, dict):
        raise ModelRefused(f"{name}: config.json is not a JSON object")
    written = _decoded(written)
    return _meaningful_settings(written, _known_config(written, name))


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


def _tensors(file: Path) -> Iterator[_Tensor]:
    """Yields each tensor of a safetensors file that belongs to the decoder or may be the decoder's embedding.

    The format of the file is described at https://huggingface.co/docs/safetensors/index#format
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
                bare = without_wrappers(name)
                if (re.match(HEAD_NAMES, bare) or not stands_beside(bare)) and not _DERIVED.search(bare):
                    yield bare, str(entry["dtype"]), list(entry["shape"]), _sampled_digest(stream, start + begin, end - begin)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ModelRefused(f"{file}: its header is not one of a safetensors file") from None


def without_wrappers(name: str) -> str:
    """Returns a tensor's or module's name as it is in the bare decoder, such as ``layers.0.mlp`` for ``model.layers.0.mlp``."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in WRAPPERS:
        del parts[0]
    return ".".join(parts)


def stands_beside(name: str) -> bool:
    """Returns whether a tensor or module, by its name without wrappers, lies beside the decoder: text passes through it on its way to no
    tap.
    """
    return _BESIDE.fullmatch(name.split(".")[0]) is not None


def _with_embedding(tensors: list[_Tensor], embedding: str) -> list[_Tensor]:
    """Adds the weight of a language model's head to a list of tensors under the embedding's name, if the checkpoint stores a tied embedding
    under the head's name only.
    """
    if any(name == embedding for name, *_ in tensors):
        return tensors
    return tensors + [(embedding, dtype, shape, digest) for name, dtype, shape, digest in tensors if re.match(HEAD_NAMES, name)]


def _sampled_digest(stream: BinaryIO, start: int, size: int) -> str:
    """Returns a digest of a tensor's bytes.

    The digest covers all bytes of a small tensor. Of a large tensor, it covers evenly spaced chunks that include the first and the last
    bytes.
    """
    digest = hashlib.sha256()
    if size <= _CHUNKS * _CHUNK_BYTES:
        stream.seek(start)
        digest.update(stream.read(size))
    else:
        for chunk in range(_CHUNKS):
            stream.seek(start + (size - _CHUNK_BYTES) * chunk // (_CHUNKS - 1))
            digest.update(stream.read(_CHUNK_BYTES))
    return digest.hexdigest()


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise ModelRefused(f"{directory}: no config.json")
    written: dict[str, Any] = _decoded(_read_json(path))
    return written


def _decoded(value: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    """Returns JSON content with objects such as ``{"__float__": "Infinity"}``, as transformers writes them, replaced by their numbers."""
    if isinstance(value, dict):
        if set(value) == {"__float__"} and value["__float__"] in _FLOATS:
            return _FLOATS[value["__float__"]]
        return {key: _decoded(entry) for key, entry in value.items()}
    return [_decoded(entry) for entry in value] if isinstance(value, list) else value


def _known_config(written: dict[str, Any], name: str) -> PreTrainedConfig | None:
    """Reads a language model's config with the installed transformers, which brings old spellings and defaults to one form.

    Returns ``None`` for a model that brings its own config class. The config of such a model is used as it is written, so that a
    fingerprint never needs the model's own code.
    """
    model_type = written.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(written)
    except Exception as error:  # each architecture checks its own settings, and may raise any exception
        raise ModelRefused(f"{name}: its config cannot be read: {error}") from None
    return config


def _meaningful_settings(written: dict[str, Any], config: PreTrainedConfig | None) -> dict[str, object]:
    """Returns the settings of a model's config that change the activations of its decoder blocks."""
    if config is None:
        values = {key: value for key, value in written.items() if not _WITHOUT_EFFECT.fullmatch(key)}
    else:
        text = config.get_text_config(decoder=True)
        default = type(text)()
        values = {key: _setting(text, key) for key in _CONFIG_KEYS}
        for key in _CONFIG_KEYS_IF_CHANGED:
            value = _setting(text, key)
            if _canonical(value) != _canonical(_setting(default, key)):
                values[key] = value
        values["quantization_config"] = written.get("quantization_config")
    return {key: _canonical(value) for key, value in values.items() if value is not None}


def _setting(config: PreTrainedConfig, key: str) -> object:
    """Returns one setting of a model's config: a value, a list of one value per layer if layers differ, or ``None`` if there is no such
    setting.
    """
    try:
        return getattr(config, key, None)
    except RuntimeError:  # transformers raises it where layers differ
        return [getattr(layer, key, None) for layer in config.per_layer_config]


def _canonical(value: object) -> object:
    """Returns a setting of a model's config in one spelling, if several spellings mean the same.

    10000 and 10000.0 become equal, an entry that is null is left out like an absent one, and so is rope's old ``type`` beside
    ``rope_type``.
    """
    if isinstance(value, PreTrainedConfig):
        value = {key: entry for key, entry in value.to_dict().items() if not _WITHOUT_EFFECT.fullmatch(key)}
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
    except UnreadableFile as error:
        raise ModelRefused(f"{path}: {error}") from None
    except ValueError:
        raise ModelRefused(f"{path}: not JSON") from None
    if not isinstance(content, dict):
        raise ModelRefused(f"{path}: not a JSON object")
    return content
