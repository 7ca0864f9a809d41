"""Loads the part of a language model that probes need, from a directory or a model id on the Hugging Face hub.

The head and all blocks after the deepest block that a probe reads are left out.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import AutoConfig, AutoModel, AutoTokenizer, DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from probescore_server.backbone.checkpoint import HEAD_NAMES, check_is_whole, tied_embedding
from probescore_server.backbone.cutting import changed_when_built, computes_as_whole
from probescore_server.errors import ModelRefused

logger = structlog.get_logger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_WANTED_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True, eq=False)
class Decoder:
    """Value object with a language model's decoder, of which some of the last blocks may have been removed.

    Attributes:
        model: the decoder. Called with token ids, the decoder returns ``last_hidden_state``, the output of the final norm. Its config is
            that of the whole model.
        blocks: the decoder blocks that are loaded, in order.
        num_hidden_layers: number of blocks of the whole model; the final norm's output is meaningful only if all of them are loaded.
    """

    model: PreTrainedModel
    blocks: torch.nn.ModuleList
    num_hidden_layers: int

    @property
    def config(self) -> PreTrainedConfig:
        """Returns the config of the text decoder, without the parts for images and other content."""
        return self.model.config

    @property
    def cache_layers(self) -> list[Any]:
        """Returns new, empty layers of a key-value cache, of the classes that transformers chooses for the loaded blocks."""
        return DynamicCache(config=self.config).layers[: len(self.blocks)]

    @property
    def device(self) -> torch.device:
        """Returns the device that the model runs on. For a model on several devices, this is the device that receives the token ids."""
        return self.model.device

    @property
    def is_spread(self) -> bool:
        """Returns whether the model's parameters are on several devices."""
        return len({parameter.device for parameter in self.model.parameters()}) > 1

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of the model's weights and activations."""
        return self.model.dtype


def resolve_model(model: str, *, revision: str = "", trust_remote_code: bool = False) -> Path:
    """Returns the directory of a model. For an id on the Hugging Face hub, a snapshot is downloaded first.

    Raises:
        ModelRefused: the directory or model does not exist, the hub cannot be reached, a revision is given for a directory, an adapter lies
            beside the weights, or the config or the safetensors weights are missing.
    """
    directory = Path(model).expanduser()
    if not directory.is_dir():
        if directory.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise ModelRefused(f"{model}: not a directory with a model")
        directory = _download(model, revision, [*_WANTED_FILES, *(["*.py"] if trust_remote_code else [])])
    elif revision:
        raise ModelRefused(f"{model}: a revision ({revision}) belongs to a model on the hub, and this is a directory")
    check_is_whole(directory)
    if not (directory / "config.json").is_file():
        raise ModelRefused(f"{model}: no config.json")
    if not any(directory.glob("*.safetensors")):
        others = ", ".join(sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(pattern)))
        raise ModelRefused(f"{model}: no safetensors weights{f'; {others} may be pickles and are never opened' if others else ''}")
    return directory


def _download(model: str, revision: str, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(model, revision=revision or None, allow_patterns=patterns))
    except LocalEntryNotFoundError:
        raise ModelRefused(f"{model}: neither a directory nor in the local cache, and the hub cannot be reached") from None
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise ModelRefused(f"{model}: not a directory, and the hub says: {error}") from None


def load_config(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Returns the config of the whole model in a directory.

    Raises:
        ModelRefused: transformers does not know the architecture, or the model is not a decoder.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        text = config.get_text_config(decoder=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelRefused(f"{directory.name}: its config cannot be read: {error}") from None
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        if not isinstance(getattr(text, name, None), int):
            raise ModelRefused(f"{directory.name}: a {config.model_type} model has no {name}; only decoders can be served")
    if config.is_encoder_decoder:
        raise ModelRefused(f"{directory.name}: a {config.model_type} model is an encoder with a decoder; only decoders can be served")
    return config


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer in a model's directory; ``None`` if there is none.

    Raises:
        ModelRefused: the tokenizer's files exist but cannot be read.
    """
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # a tokenizer's own reader may raise anything
        raise ModelRefused(f"{directory.name}: its tokenizer cannot be read: {error}") from None
    return tokenizer


def load_decoder(
    directory: Path,
    *,
    num_layers: int,
    dtype: str = "float32",
    device: str = "cpu",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> Decoder:
    """Loads the first ``num_layers`` blocks of a model, without its head.

    In recurrent models the first attention layer counts the positions, so all blocks up to that layer are loaded in any case. If the
    remaining blocks would compute something else without the removed blocks, all blocks are loaded and a warning is logged.

    Args:
        directory: the model's directory.
        num_layers: number of blocks that are needed.
        dtype: dtype of weights and activations: ``float32``, ``bfloat16`` or ``float16``.
        device: device to load the model on.
        device_map: ``"auto"`` = spread the model over every CUDA device that there is, instead of loading it on ``device``.
        trust_remote_code: whether the model may bring its own Python code.

    Raises:
        ModelRefused: weights are missing or of another shape, the device does not exist, the devices have no room, or the decoder blocks
            cannot be identified.
    """
    config = load_config(directory, trust_remote_code=trust_remote_code)
    whole: int = config.get_text_config(decoder=True).num_hidden_layers
    cut = _DecoderCutter(directory.name, max(num_layers, _first_attention_layer(config) + 1))
    _load_model(directory, config, cut, dtype, trust_remote_code, device_map)
    module: torch.nn.Module = cut.decoder.eval().requires_grad_(False)
    if device_map is None:
        try:
            module.to(device)
        except (RuntimeError, AssertionError) as error:  # torch raises AssertionError if it was not built for the device
            raise ModelRefused(f"device {device!r}: {error}") from None
    if cut.later and not computes_as_whole(cut.decoder, cut.blocks, cut.later):
        logger.warning("cut off, this model computes something else: all its blocks are loaded", model_type=config.model_type)
        del cut, module  # so that the two models are not in memory at the same time
        others: dict[str, Any] = {"dtype": dtype, "device": device, "device_map": device_map, "trust_remote_code": trust_remote_code}
        return load_decoder(directory, num_layers=whole, **others)
    return Decoder(cut.decoder, cut.blocks, whole)


def build_decoder(tensors: Mapping[str, torch.Tensor], config: PreTrainedConfig, num_layers: int, name: str) -> Decoder:
    """Builds the first ``num_layers`` blocks of a model from the tensors of a checkpoint that are in memory, in float32 on the CPU.

    It may run beside a model that computes, since it builds in float32 (``in_float32``).

    Args:
        tensors: a dictionary, keyed by the names in the checkpoint, of the tensors, at least those of these blocks.
        config: config of the whole model.
        num_layers: number of blocks.
        name: name of the checkpoint, for messages.

    Raises:
        ModelRefused: weights are missing or of another shape.
    """
    config = in_float32(config)
    cut = _DecoderCutter(name, num_layers)
    _load_model(Path(name), config, cut, "float32", trust_remote_code=False, device_map=None, tensors=tensors)
    cut.decoder.eval().requires_grad_(False)
    return Decoder(cut.decoder, cut.blocks, config.get_text_config(decoder=True).num_hidden_layers)


def in_float32(config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns a copy of a config of which models are built in float32.

    transformers sets torch's default dtype to that of the model that it builds, for all threads: what another thread computes meanwhile
    would be allocated in it.
    """
    config = copy.deepcopy(config)
    for part in _with_parts(config):
        part.dtype = torch.float32
    return config


def _with_parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yields a config and the configs inside it, such as those of encoders."""
    yield config
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            yield from _with_parts(part)


class _DecoderCutter:
    """Callable that finds the text decoder inside a newly built model and removes the last blocks of that decoder.

    Args:
        name: name of the model, for messages.
        num_layers: number of blocks that remain.

    Attributes:
        decoder: the text decoder.
        blocks: the blocks that remain.
        later: the removed blocks, whose weights are never loaded.
    """

    decoder: PreTrainedModel
    blocks: torch.nn.ModuleList
    later: Sequence[torch.nn.Module]

    def __init__(self, name: str, num_layers: int) -> None:
        self._name = name
        self._num_layers = num_layers

    def __call__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config(decoder=True)
        decoder = _text_decoder(model)
        if decoder is None or decoder.config.num_hidden_layers != config.num_hidden_layers:
            raise ModelRefused(
                f"{self._name}: a {model.config.model_type} model does not give its text decoder, and cannot be served: "
                "docs/reference/parity.md lists the families that can"
            )
        self.decoder, self.blocks = decoder, _find_blocks(decoder, config.num_hidden_layers, self._name)
        self.later = list(self.blocks[self._num_layers :])
        del self.blocks[self._num_layers :]


def _load_model(
    directory: Path,
    config: PreTrainedConfig,
    cut: _DecoderCutter,
    dtype: str,
    trust_remote_code: bool,
    device_map: str | None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> None:
    def load(**options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:  # noqa: ANN401
        try:
            with _quiet_transformers():
                model_class, own_config = _model_class(config, trust_remote_code)
                loaded: Any = changed_when_built(model_class, cut).from_pretrained(
                    directory if tensors is None else None,
                    state_dict=None if tensors is None else dict(tensors),
                    config=own_config,
                    dtype=DTYPES[dtype],
                    use_safetensors=True,
                    trust_remote_code=trust_remote_code,
                    output_loading_info=True,
                    device_map=device_map,
                    **options,
                )
        except ModelRefused:
            raise
        except Exception as error:  # for a damaged file or another size, transformers and safetensors may raise anything
            raise ModelRefused(f"{directory.name}: cannot be loaded: {error}") from None
        model, loading = loaded
        return model, loading

    model, loading = load()
    tied = tied_embedding(config)
    if tied is not None and any(tied[1].endswith(name) for name in loading["missing_keys"]):
        # head and embedding are one tensor, stored under the head's name
        model, loading = load(key_mapping={HEAD_NAMES: tied[1]})
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ModelRefused(f"{directory.name}: {len(missing)} weights are missing from its files: {', '.join(missing[:5])}")
    if device_map is not None:
        _check_devices_have_room(model, directory.name)


def _model_class(config: PreTrainedConfig, trust_remote_code: bool) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Returns the class that transformers chooses for a config, and the part of the config that the class is built from."""
    with torch.device("meta"):
        model = AutoModel.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    return type(model), config if type(model.config) is type(config) else config.get_text_config()


def _check_devices_have_room(model: PreTrainedModel, name: str) -> None:
    """Refuses a model if some of its weights did not fit on the devices, since these weights would be copied from host memory or files in
    every forward pass.
    """
    left = [parameter for parameter, weight in model.named_parameters() if weight.is_meta]
    if left:
        raise ModelRefused(f"{name}: the devices have no room for {len(left)} of its weights, from {left[0]} on")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Context manager that silences transformers' progress bars, and its report of weights that were not loaded.

    The head and the last blocks are left out on purpose.
    """
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _first_attention_layer(config: PreTrainedConfig) -> int:
    """Returns the index of the first attention layer in a model that begins with recurrent layers; 0 for other models.

    The index is also 0 if the model has no layer of a kind that counts positions.
    """
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or []
    attention = (index for index, kind in enumerate(kinds) if "attention" in kind and "linear" not in kind)
    return next(attention, 0)


def _text_decoder(model: PreTrainedModel) -> PreTrainedModel | None:
    """Returns the text decoder inside a model, without the head and without image encoders; ``None`` if there is no such decoder.

    Llama 4's wrapper class, for example, contains a whole language model with its head.
    """
    decoder: PreTrainedModel | None = model if model.config.get_text_config(decoder=True) is model.config else model.get_decoder()
    if decoder is None:
        return None
    parts = (module for module in decoder.modules() if isinstance(module, PreTrainedModel))
    return next((module for module in parts if module.get_output_embeddings() is None), None)


def _find_blocks(decoder: torch.nn.Module, count: int, model: str) -> torch.nn.ModuleList:
    """Returns a decoder's list of blocks: the outermost ``ModuleList`` with ``count`` elements. Lists of experts, which lie inside blocks,
    are not outermost.
    """
    lists = [(name, module) for name, module in decoder.named_modules() if isinstance(module, torch.nn.ModuleList) and len(module) == count]
    depth = min((name.count(".") for name, _ in lists), default=0)
    outermost = [(name, module) for name, module in lists if name.count(".") == depth]
    if len(outermost) != 1:
        found = ", ".join(name for name, _ in outermost) or "none"
        raise ModelRefused(f"{model}: cannot tell its {count} decoder blocks; lists of that length: {found}")
    return outermost[0][1]
