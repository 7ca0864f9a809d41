"""Loads a whole language model with plain transformers, with every weight from its files, or refuses the model with a message.

Two problems that transformers only reports are refused here: weights that are missing from the files, which transformers would initialise
at random, and adapters, which transformers would ignore. No code here is shared with the server's engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from probescore_server.errors import ModelRefused

_FLOATS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NEVER_READ = ["*.bin", "*.pt", "*.gguf", "*.onnx"]
_SHOWN = 5


def find_model(model: str | Path, revision: str) -> tuple[Path, str]:
    """Returns the directory of a model, and its commit on the Hugging Face hub, which is empty for a local directory.

    Raises:
        TypeError: ``model`` or ``revision`` is not text or a path.
        ModelRefused: there is no directory or model of that name.
    """
    if not isinstance(model, (str, Path)):
        raise TypeError(f"model: {type(model).__name__} {model!r:.100}; give a directory or the id of a model on the hub, as text or Path")
    if not isinstance(revision, str):
        raise TypeError(f"revision: {type(revision).__name__} {revision!r:.100}; give a branch, tag or commit as text")
    written = str(model)
    directory = Path(model).expanduser()
    if directory.is_dir() and written:
        return directory, ""
    if not written or directory.exists() or written.startswith((".", "/", "~")) or written.count("/") > 1:
        raise ModelRefused(f"model: {written!r} is not a directory with a model; give one that holds config.json and *.safetensors")
    try:
        snapshot = Path(snapshot_download(written, revision=revision or None, ignore_patterns=_NEVER_READ))
    except LocalEntryNotFoundError:
        raise ModelRefused(
            f"model: {written!r} is neither a directory nor in the local cache, and the hub cannot be reached; download it first"
        ) from None
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise ModelRefused(
            f"model: {written!r} is not a directory, and the hub does not give it ({type(error).__name__}); check its id, the revision "
            f"{revision or 'main'!r}, and that you may read it"
        ) from None
    return snapshot, snapshot.name


def load_whole_model(
    directory: Path, *, dtype: torch.dtype | str, device: str | torch.device, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads every decoder block of a model, its head if it has one, and its tokenizer.

    A model that also reads pictures is loaded whole, and only text is run through it.

    Raises:
        TypeError: ``dtype`` is not a torch dtype, or ``device`` is not a torch device.
        ModelRefused: the model is not a decoder, its files lack weights or hold an adapter, or a file cannot be read.
    """
    precision = _dtype(dtype)
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device: {device!r:.100}; give one as torch names it, such as 'cpu' or 'cuda:0'")
    name = directory.resolve().name
    if (directory / "adapter_config.json").is_file():
        raise ModelRefused(
            f"model: {name} holds an adapter (adapter_config.json), which would be left out; merge it first: "
            "peft's merge_and_unload(), then save_pretrained() to a directory of its own"
        )
    config = _config(directory, name, trust_remote_code)
    _check_safetensors(directory, name)
    tokenizer = _tokenizer(directory, name, trust_remote_code)
    loader = _loader(config, name)
    try:
        with _quietly():
            model, report = loader.from_pretrained(
                directory,
                config=config,
                dtype=precision,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # a damaged file or a size that differs, for which transformers and safetensors raise various exceptions
        raise ModelRefused(f"model: {_what_is_wrong(name, error)}") from error
    _check_report(model, report, name)
    try:
        torch.nn.Module.to(model, device)
    except (RuntimeError, AssertionError, TypeError):  # torch asserts that it was built for the device
        raise ModelRefused(f"device: {str(device)!r} is not there for this torch; 'cpu' always is") from None
    return model, tokenizer


def is_wrapper(config: PreTrainedConfig) -> bool:
    """Returns whether a config describes a model that contains a text model as one part and also reads pictures or sound."""
    return config.get_text_config(decoder=True) is not config


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = _FLOATS.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in _FLOATS.values():
        raise TypeError(f"dtype: {dtype!r:.100}; give one of {', '.join(f'torch.{name}' for name in _FLOATS)}")
    return found


def _config(directory: Path, name: str, trust_remote_code: bool) -> PreTrainedConfig:
    if not (directory / "config.json").is_file():
        raise ModelRefused(f"model: {name} has no config.json; give the directory that save_pretrained() wrote")
    try:
        with _quietly():
            config: PreTrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # raised for the file, for its content, or by the model's own code
        written = PreTrainedConfig.get_config_dict(directory)[0] if _is_json(directory / "config.json") else {}
        if written.get("auto_map") and not trust_remote_code:
            raise ModelRefused(f"model: {name} brings its own Python code; if you trust it, pass trust_remote_code=True") from None
        if written.get("model_type") not in CONFIG_MAPPING:
            kind = repr(written["model_type"]) if "model_type" in written else "none"
            raise ModelRefused(
                f"model: {name} has a config.json whose model_type is {kind}, which this transformers does not know; install a newer one"
            ) from error
        raise ModelRefused(f"model: {name} has a config.json that cannot be read ({type(error).__name__}); save it again") from error
    if config.is_encoder_decoder:
        raise ModelRefused(f"model: {name}, a {config.model_type} model, is an encoder with a decoder; only decoders can be probed")
    text = config.get_text_config(decoder=True)
    for key in ("hidden_size", "num_hidden_layers"):
        if not isinstance(getattr(text, key, None), int):
            raise ModelRefused(f"model: {name}, a {config.model_type} model, has no {key}; only decoders of language can be read")
    return config


def _is_json(path: Path) -> bool:
    try:
        PreTrainedConfig._dict_from_json_file(path)
    except (ValueError, OSError):
        return False
    return True


def _tokenizer(directory: Path, name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        with _quietly():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a tokenizer's own reader raises
        raise ModelRefused(
            f"model: {name} has no tokenizer that can be read ({type(error).__name__}), and a probe file says whose ids it reads; "
            "save one there: tokenizer.save_pretrained(directory)"
        ) from error
    return tokenizer


def _loader(config: PreTrainedConfig, name: str) -> Any:  # noqa: ANN401  transformers' loaders have no type in common
    """Returns the transformers class that loads a model with the given config.

    A model that also reads pictures or sound is loaded whole if transformers has a class for it, since the text model alone would expect
    other weight names.
    """
    causal, pictures = AutoModelForCausalLM, AutoModelForImageTextToText
    for loader in (pictures, causal, AutoModel) if is_wrapper(config) else (causal, AutoModel):
        if type(config) in loader._model_mapping or loader.__name__ in (getattr(config, "auto_map", None) or {}):
            return loader
    raise ModelRefused(f"model: {name} is a {config.model_type} model, which this transformers cannot run; install a newer one")


def _check_safetensors(directory: Path, name: str) -> None:
    if any(directory.glob("*.safetensors")):
        return
    found = ", ".join(sorted(path.name for pattern in _NEVER_READ for path in directory.glob(pattern)))
    pickles = f"; {found} may be pickles, which can run code and are never opened" if found else ""
    raise ModelRefused(f"model: {name} has no *.safetensors weights{pickles}; save it with save_pretrained()")


def _what_is_wrong(name: str, error: Exception) -> str:
    if "size mismatch" in str(error) or "mismatched" in str(error):
        return f"{name} has weights of other shapes than its config.json says: the two are not of one model; save them together"
    return f"{name} cannot be loaded ({type(error).__name__}): a file of weights is damaged or missing; copy or download it again"


def _check_report(model: PreTrainedModel, report: dict[str, Any], name: str) -> None:
    """Refuses a model if transformers initialised a weight that the files lack; a missing head does not matter, since no probe reads it."""
    inside = {parameter for parameter, _ in model.base_model.named_parameters()} | {
        buffer for buffer, _ in model.base_model.named_buffers()
    }
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    missing = sorted(key for key in report["missing_keys"] if key.removeprefix(prefix) in inside and key.startswith(prefix))
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"])
    adapted = sorted(key for key in report["unexpected_keys"] if "lora_" in key)
    if adapted:
        raise ModelRefused(f"model: {name} holds an adapter beside its weights ({adapted[0]}, …), which would be left out; merge it first")
    for keys, what in ((missing, "are missing from its files"), (mismatched, "have other shapes in its files than in its config.json")):
        if keys:
            listed = ", ".join(keys[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
            raise ModelRefused(
                f"model: {len(keys)} weights of {name} {what}, so that random ones would be made up: {listed}; download or save it again"
            )


@contextmanager
def _quietly() -> Iterator[None]:
    """Silences transformers' messages about loading within the context; problems among them are raised as errors."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
