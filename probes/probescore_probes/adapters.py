"""Puts a LoRA adapter that a probe brings into the weights of a plain Hugging Face model, by the formulas of the papers.

What an adapter may have is checked as a server checks it. What it computes is not: the formulas here are nobody else's, so that golden
vectors are an independent check of the server's.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from transformers import PreTrainedModel

from probescore_probes import arguments
from probescore_server.errors import ReadingRefused
from probescore_server.files import MAX_ADAPTER_BYTES, UnreadableFile, read_regular_file
from probescore_server.probes.format.fingerprints import without_wrappers
from probescore_server.readings.adapter import WEIGHTS_FILE, adapter_of
from probescore_server.readings.adapter_config import CONFIG_FILE, AdapterConfig
from probescore_server.readings.structure import DecoderStructure, name_as_trained

_MAX_SETTINGS_BYTES = 1 << 26
_PEFT = "base_model.model."
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_PART = re.compile(r"(?P<layer>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.[^.]+)??(\.weight)?")
_WHOLE = re.compile(r"\.modules_to_save(\.[^.]+)?(?=\.)")


@dataclass(frozen=True, eq=False)
class BroughtAdapter:
    """Value object with a LoRA adapter that a probe brings.

    Attributes:
        content: the content of the file with its tensors, as it is written beside the probe file.
        settings: those settings of PEFT's that say what it computes.
    """

    content: bytes
    settings: Mapping[str, Any]


def read_adapter(directory: Path | str) -> BroughtAdapter:
    """Reads the files of a LoRA adapter as PEFT writes them.

    Raises:
        TypeError: the argument is not a path.
        ValueError: a file is missing or cannot be read, or a setting is one that servers do not compute.
    """
    if not isinstance(directory, (str, Path)):
        found = f"{arguments.kind_of(directory)} ({arguments.shown(directory)})"
        raise TypeError(f"adapter: {found}; give the directory that PEFT saved it to, as text or Path")
    folder = Path(directory)
    for name in _PICKLES:
        if (folder / name).is_file() and not (folder / WEIGHTS_FILE).is_file():
            raise ValueError(f"adapter: {name} may be a pickle, which can run code, and is never opened; save it as {WEIGHTS_FILE}")
    try:
        written = read_regular_file(folder / CONFIG_FILE, _MAX_SETTINGS_BYTES)
        content = read_regular_file(folder / WEIGHTS_FILE, MAX_ADAPTER_BYTES)
    except UnreadableFile as error:
        missing = next((name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).exists()), "")
        what = f"{missing} is not there" if missing else str(error)
        raise ValueError(f"adapter: {what}; give the directory that PEFT saved it to, with {CONFIG_FILE} and {WEIGHTS_FILE}") from None
    try:
        AdapterConfig.parse(written)
    except ReadingRefused as refusal:
        raise ValueError(f"adapter: {refusal}") from None
    return BroughtAdapter(content, AdapterConfig.written(json.loads(written)))


def with_adapter(model: PreTrainedModel, adapter: BroughtAdapter, blocks: str) -> PreTrainedModel:
    """Returns a copy of a model with an adapter in its weights, which shares all other weights.

    Args:
        model: the whole model.
        adapter: the adapter.
        blocks: name of the list of blocks in the model's decoder, such as ``layers``.

    Raises:
        ValueError: a server would not compute the adapter correctly on this model.
    """
    try:
        tensors = safetensors.torch.load(adapter.content)
    except safetensors.SafetensorError as error:
        raise ValueError(f"adapter: {WEIGHTS_FILE} is damaged ({error}); copy or save it again") from None
    decoder: torch.nn.Module = model.get_decoder()
    depth = len(decoder.get_submodule(blocks))  # type: ignore[arg-type]
    try:
        adapter_of(
            tensors, AdapterConfig.parse(json.dumps(dict(adapter.settings)).encode()), DecoderStructure(decoder, blocks, depth, depth)
        )
    except ReadingRefused as refusal:
        raise ValueError(f"adapter: {refusal}") from None
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    adapted: PreTrainedModel = copy.deepcopy(model, shared)
    changed: torch.nn.Module = adapted.get_decoder()
    names = {without_wrappers(name): name for name, _ in changed.named_modules()}
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    trained_as: dict[str, str] = {}
    for written, tensor in tensors.items():
        name = name_as_trained(written)
        part = _PART.fullmatch(name)
        path, _, attribute = (part["layer"], "", part["part"]) if part else _WHOLE.sub("", name).rpartition(".")
        found = names.get(without_wrappers(path))
        if found is not None:  # else it lies beside the decoder, such as the head
            by_layer.setdefault(found, {})[attribute] = tensor
            trained_as[found] = path.removeprefix(_PEFT) if path.startswith(_PEFT) else f"model.{without_wrappers(path)}"
    for name, parts in by_layer.items():
        layer = changed.get_submodule(name)
        if "lora_A" in parts:
            parts = {"weight": _updated(layer, trained_as[name], parts, adapter.settings)}
        for attribute, value in parts.items():
            old = layer.get_parameter(attribute)
            setattr(layer, attribute, torch.nn.Parameter(value.to(old.device, old.dtype), requires_grad=False))
    return adapted


def _updated(layer: torch.nn.Module, name: str, parts: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> torch.Tensor:
    """Returns the weight of a layer with its update: ``W + s · B · A``, with DoRA scaled row by row to the trained lengths, in float64."""
    weight: torch.Tensor = layer.get_parameter("weight").detach().double()
    down, up = (parts[part].double().to(weight.device) for part in ("lora_A", "lora_B"))
    alpha = settings["lora_alpha"]
    for pattern, own in settings.get("alpha_pattern", {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = own
    scale = alpha / math.sqrt(len(down)) if settings.get("use_rslora") else alpha / len(down)
    weight = weight + scale * (up @ down)
    if "lora_magnitude_vector" in parts:
        lengths = parts["lora_magnitude_vector"].double().to(weight.device)
        weight = weight * (lengths / weight.norm(dim=1))[:, None]
    return weight
