"""Reads a whole checkpoint of the model that is served, as training saves it, cut at the depth at which the frozen model is cut."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from probescore_server.backbone.checkpoint import HEAD_NAMES, tied_embedding
from probescore_server.backbone.model_loading import Decoder, build_decoder
from probescore_server.errors import ModelRefused, ReadingIncomplete, ReadingRefused
from probescore_server.probes.format.fingerprints import decoder_settings, stands_beside, without_wrappers
from probescore_server.readings.files_read import FilesRead
from probescore_server.readings.structure import DecoderStructure, name_as_trained

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Value object with the part of a checkpoint that lies in the decoder which is loaded.

    Attributes:
        tensors: a dictionary, keyed by the names in the files, of tensors.
        unseen: number of tensors in the files that no probe can see.
    """

    tensors: Mapping[str, torch.Tensor]
    unseen: int

    def decoder(self, config: PreTrainedConfig, like: Decoder) -> Decoder:
        """Returns the decoder that the tensors make, with as many blocks as another.

        Args:
            config: config of the whole frozen model, to which the checkpoint's is equal in all that matters.
            like: the frozen decoder.

        Raises:
            ReadingRefused: tensors are missing or of another shape.
        """
        try:
            return build_decoder(self.tensors, config, len(like.blocks), "the checkpoint")
        except ModelRefused as error:
            raise ReadingRefused(WEIGHTS, str(error)) from None


def read_checkpoint(files: FilesRead, structure: DecoderStructure, config: PreTrainedConfig, settings: Mapping[str, object]) -> Checkpoint:
    """Reads the tensors of a checkpoint. Every byte of its weights is read; what is not in the loaded part of the decoder is not kept.

    Args:
        files: the checkpoint's directory.
        structure: of the decoder.
        config: config of the whole frozen model.
        settings: the frozen model's settings that change activations.

    Raises:
        ReadingRefused: the checkpoint's config says another model, its weights are in another format, or a number is not finite.
        ReadingIncomplete: a file is missing or being written.
    """
    _check_settings(files.content(CONFIG), settings)
    block = re.compile(rf"{re.escape(without_wrappers(structure.blocks))}\.(\d+)\.")
    keeps_head = tied_embedding(config) is not None
    found: dict[str, torch.Tensor] = {}
    unseen = 0

    def wanted(written: str) -> bool:
        nonlocal unseen
        bare = without_wrappers(name_as_trained(written))
        layer = block.match(bare)
        unseen += stands_beside(bare) or (layer is not None and int(layer[1]) >= structure.depth)
        if layer is not None:
            return int(layer[1]) < structure.depth
        return not stands_beside(bare) or (keeps_head and re.match(HEAD_NAMES, bare) is not None)

    for name in _weight_files(files):
        tensors = files.tensors(name, wanted)
        for written, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ReadingRefused(f"{name}: {written[:300]}", "it has numbers that are not finite")
            expected = structure.shape_of(name_as_trained(written))
            if expected is not None and expected != tensor.shape:
                raise ReadingRefused(f"{name}: {written[:300]}", f"found shape {list(tensor.shape)}, expected {list(expected)}")
            found[name_as_trained(written)] = tensor
    if not found:
        raise ReadingRefused(WEIGHTS, "it has no tensors of the decoder")
    return Checkpoint(found, unseen)


def _check_settings(config_file: bytes, expected: Mapping[str, object]) -> None:
    try:
        found = decoder_settings(config_file, "the checkpoint")
    except ModelRefused as error:
        raise ReadingRefused(CONFIG, str(error)) from None
    for name in sorted(expected.keys() | found.keys(), key=lambda name: (name != "model_type", name)):
        if found.get(name) != expected.get(name):
            shown = [repr(settings.get(name))[:100] for settings in (found, expected)]
            raise ReadingRefused(f"{CONFIG}: {name}", f"found {shown[0]}, expected {shown[1]}, as the frozen model has it")


def _weight_files(files: FilesRead) -> list[str]:
    if files.has(WEIGHTS):
        return [WEIGHTS]
    if not files.has(INDEX):
        for name in _PICKLES:
            if files.has(name):
                raise ReadingRefused(name, "may be a pickle and is never opened: save the checkpoint as safetensors")
        raise ReadingIncomplete(f"neither {WEIGHTS} nor {INDEX} is there: the files are being written, or are not all there")
    try:
        names = sorted(set(json.loads(files.content(INDEX))["weight_map"].values()))
        if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) for name in names):
            raise ReadingRefused(INDEX, "a shard's name is no name of a file")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ReadingIncomplete(f"{INDEX} has no weight_map from tensor names to file names: it is being written") from None
    return names
