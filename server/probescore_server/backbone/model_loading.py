"""From a path or a hub id to the decoder that probes need: no head, and no block beyond the deepest that is read."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
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
    """A model cut off after some of its blocks.

    Attributes:
        model: called with ids, gives ``last_hidden_state``, which is after the final norm. Its config is the whole model's.
        blocks: the decoder blocks that are loaded, in order.
        num_hidden_layers: blocks of the whole model; the final norm means something only if all are loaded.
    """

    model: PreTrainedModel
    blocks: torch.nn.ModuleList
    num_hidden_layers: int

    @property
    def config(self) -> PreTrainedConfig:
        """Of the text model."""
        return self.model.config

    @property
    def cache_layers(self) -> list[Any]:
        """New layers of a cache, as transformers would make them for the blocks that are loaded."""
        return DynamicCache(config=self.config).layers[: len(self.blocks)]

    @property
    def device(self) -> torch.device:
        """Where it runs; if it is spread, where ids go in."""
        return self.model.device

    @property
    def is_spread(self) -> bool:
        """Whether its blocks are on several devices."""
        return len({parameter.device for parameter in self.model.parameters()}) > 1

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.model.dtype


def resolve_model(model: str, *, revision: str = "", trust_remote_code: bool = False) -> Path:
    """The directory that holds a model: itself if it is one, else a snapshot from the hub.

    Raises:
        ModelRefused: no such directory or model, the hub cannot be reached, or there are no safetensors weights.
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
    """The whole model's config.

    Raises:
        ModelRefused: transformers does not know the architecture, or it has no decoder blocks.
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
    """The model's tokenizer; ``None`` if it comes without one.

    Raises:
        ModelRefused: there is one, and it cannot be read.
    """
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a tokenizer's own reader raises
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

    A recurrent model keeps its count of positions with its attention layers, so that the first of these is loaded in any case. All blocks
    are loaded of a model that computes something else without the last ones; a warning is logged then.

    Args:
        directory: of the model.
        num_layers: blocks.
        dtype: of weights and activations.
        device: where to.
        device_map: ``"auto"`` = over every CUDA device that there is, instead of to ``device``.
        trust_remote_code: let the model bring its own Python code.

    Raises:
        ModelRefused: weights are missing or of another shape, the device is not there, the devices have no room, or the decoder blocks
            cannot be told.
    """
    config = load_config(directory, trust_remote_code=trust_remote_code)
    whole: int = config.get_text_config(decoder=True).num_hidden_layers
    cut = _DecoderCutter(directory.name, max(num_layers, _first_attention_layer(config) + 1))
    _load_model(directory, config, cut, dtype, trust_remote_code, device_map)
    module: torch.nn.Module = cut.decoder.eval().requires_grad_(False)
    if device_map is None:
        try:
            module.to(device)
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
            raise ModelRefused(f"device {device!r}: {error}") from None
    if cut.later and not computes_as_whole(cut.decoder, cut.blocks, cut.later):
        logger.warning("cut off, this model computes something else: all its blocks are loaded", model_type=config.model_type)
        del cut, module  # not to hold both
        others: dict[str, Any] = {"dtype": dtype, "device": device, "device_map": device_map, "trust_remote_code": trust_remote_code}
        return load_decoder(directory, num_layers=whole, **others)
    return Decoder(cut.decoder, cut.blocks, whole)


class _DecoderCutter:
    """Finds the decoder of a model that has been built, and cuts it off.

    Args:
        name: of the model, for messages.
        num_layers: blocks that stay.

    Attributes:
        decoder: the text model.
        blocks: those of its blocks that stay.
        later: those that were cut off, which are never given weights.
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
    directory: Path, config: PreTrainedConfig, cut: _DecoderCutter, dtype: str, trust_remote_code: bool, device_map: str | None
) -> None:
    def load(**options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:  # noqa: ANN401
        try:
            with _quiet_transformers():
                model_class, own_config = _model_class(config, trust_remote_code)
                loaded: Any = changed_when_built(model_class, cut).from_pretrained(
                    directory,
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
        except Exception as error:  # a damaged file, a size that differs: transformers and safetensors raise what they like
            raise ModelRefused(f"{directory.name}: cannot be loaded: {error}") from None
        model, loading = loaded
        return model, loading

    model, loading = load()
    tied = tied_embedding(config)
    if tied is not None and any(tied[1].endswith(name) for name in loading["missing_keys"]):
        # one tensor for both, stored under the head's name
        model, loading = load(key_mapping={HEAD_NAMES: tied[1]})
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ModelRefused(f"{directory.name}: {len(missing)} weights are missing from its files: {', '.join(missing[:5])}")
    if device_map is not None:
        _check_devices_have_room(model, directory.name)


def _model_class(config: PreTrainedConfig, trust_remote_code: bool) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that transformers chooses for a config, and the part of the config that it is built from."""
    with torch.device("meta"):
        model = AutoModel.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    return type(model), config if type(model.config) is type(config) else config.get_text_config()


def _check_devices_have_room(model: PreTrainedModel, name: str) -> None:
    """What did not fit is in host memory or in files, and would be copied to a device again for every forward."""
    left = [parameter for parameter, weight in model.named_parameters() if weight.is_meta]
    if left:
        raise ModelRefused(f"{name}: the devices have no room for {len(left)} of its weights, from {left[0]} on")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the report that the head and the later blocks were left out, which is meant, and without bars in logs."""
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
    """Of a model that begins with recurrent layers; 0 for others, and where no layer is of a kind that counts positions."""
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or []
    attention = (index for index, kind in enumerate(kinds) if "attention" in kind and "linear" not in kind)
    return next(attention, 0)


def _text_decoder(model: PreTrainedModel) -> PreTrainedModel | None:
    """Below whatever wraps it: encoders of images beside it, and a head (Llama 4's wrapper holds a whole language model)."""
    decoder: PreTrainedModel | None = model if model.config.get_text_config(decoder=True) is model.config else model.get_decoder()
    if decoder is None:
        return None
    parts = (module for module in decoder.modules() if isinstance(module, PreTrainedModel))
    return next((module for module in parts if module.get_output_embeddings() is None), None)


def _find_blocks(decoder: torch.nn.Module, count: int, model: str) -> torch.nn.ModuleList:
    """The list of blocks is the outermost ``ModuleList`` of the right length; lists of experts lie inside blocks."""
    lists = [(name, module) for name, module in decoder.named_modules() if isinstance(module, torch.nn.ModuleList) and len(module) == count]
    depth = min((name.count(".") for name, _ in lists), default=0)
    outermost = [(name, module) for name, module in lists if name.count(".") == depth]
    if len(outermost) != 1:
        found = ", ".join(name for name, _ in outermost) or "none"
        raise ModelRefused(f"{model}: cannot tell its {count} decoder blocks; lists of that length: {found}")
    return outermost[0][1]
