"""Loads a version of a reading: a copy of the frozen decoder with the changes of an adapter or a checkpoint, checked and ready to run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from probescore.fingerprints import tokenizer_fingerprint
from probescore.types import Hook, Reading, ReadingKind, Tap
from probescore_server.backbone.base import Backbone
from probescore_server.backbone.copying import changed_copy, discard
from probescore_server.backbone.model_loading import Decoder, load_tokenizer
from probescore_server.backbone.self_test import SelfTest
from probescore_server.backbone.taps import TapReader, blocks_seen
from probescore_server.errors import ModelRefused, ReadingIncomplete, ReadingRefused
from probescore_server.probes.format.fingerprints import model_fingerprint
from probescore_server.readings.adapter import WEIGHTS_FILE, Adapter, adapter_of, read_adapter
from probescore_server.readings.adapter_config import CONFIG_FILE, AdapterConfig
from probescore_server.readings.changes import PlannedChanges, changes_of_adapter, changes_of_checkpoint, expected_weights
from probescore_server.readings.checkpoint import CONFIG, WEIGHTS, read_checkpoint
from probescore_server.readings.files_read import FilesRead, tensors_in
from probescore_server.readings.structure import DecoderStructure
from probescore_server.readings.verification import check_layers


@dataclass(frozen=True, eq=False)
class FrozenModel:
    """Value object with what readings are made from and compared with.

    Attributes:
        skeleton: a copy of the decoder that never runs.
        reader: reader of the frozen decoder's activations, which taps are added to when probes come.
        backbone: the backbone that runs the frozen decoder.
        config: config of the whole model.
        settings: the settings of the config that change activations.
        fingerprint: of the model.
        tokenizer_fingerprint: of the tokenizer; empty = none.
    """

    skeleton: Decoder
    reader: TapReader
    backbone: Backbone
    config: PreTrainedConfig
    settings: dict[str, object]
    fingerprint: str
    tokenizer_fingerprint: str

    @cached_property
    def structure(self) -> DecoderStructure:
        """Returns the modules of the whole decoder."""
        return DecoderStructure.of(self.skeleton)


@dataclass(frozen=True, eq=False)
class ReadingVersion:
    """Value object with one version of a reading, ready to run.

    All that is loaded of the decoder is changed as the files say, whether a probe sees it today or not: probes come and go while a version
    stays.

    Attributes:
        id: digest of the frozen model's fingerprint and of everything that was read.
        kind: whether an adapter or a checkpoint was read.
        model_fingerprint: of the model whose files hold the weights.
        decoder: the copied decoder.
        backbone: what runs it.
        tensors: the tensors that no other reading has.
        changed_layers: indices of the loaded blocks with changed weights.
        changes_input: whether something before the blocks is changed, such as the embedding.
        changes_final_norm: whether the norm after the blocks is changed, and all blocks are loaded, so that a probe may read it.
        unseen_tensors: number of tensors in the files that no probe can see, since they are not of the loaded part.
    """

    id: str
    kind: ReadingKind
    model_fingerprint: str
    decoder: Decoder
    backbone: Backbone
    tensors: list[torch.Tensor]
    changed_layers: tuple[int, ...]
    changes_input: bool
    changes_final_norm: bool
    unseen_tensors: int

    def changes(self, taps: Collection[Tap]) -> bool:
        """Returns whether activations at some of these taps may be other than the frozen model's."""
        if (self.changes_input and taps) or (self.changes_final_norm and Tap(Hook.FINAL_NORM) in taps):
            return True
        return bool(self._changed_before(taps))

    def described(self, name: str, step: int | None, taps: Collection[Tap]) -> Reading:
        """Returns the description of the version under a name.

        Args:
            name: the name.
            step: the label that was given when the name was.
            taps: all taps that the probes read which are served.
        """
        return Reading(
            name=name,
            id=self.id,
            kind=self.kind,
            step=step,
            model_fingerprint=self.model_fingerprint,
            golden_verified=not self.changes(taps),
            changed_layers=self._changed_before(taps),
            unseen_tensors=self.unseen_tensors,
        )

    def _changed_before(self, taps: Collection[Tap]) -> tuple[int, ...]:
        seen = blocks_seen(taps, self.decoder.num_hidden_layers)
        return tuple(layer for layer in self.changed_layers if layer < seen)

    def free(self) -> None:
        """Frees the memory that only this version uses. Nothing may run it any more."""
        self.tensors.clear()
        discard(self.decoder)


@dataclass(frozen=True, eq=False)
class WeightsRead:
    """Value object with the files of an adapter or a checkpoint as they were read, before anything is made of them.

    Attributes:
        id: digest of the frozen model's fingerprint and of everything that was read.
        kind: whether an adapter or a checkpoint was read.
        model_fingerprint: of the model whose files hold the weights.
        unseen: number of tensors in the files that no probe can see.
        weights_file: name of the file with the weights, for messages.
        plan: function that returns what changes in the frozen decoder.
    """

    id: str
    kind: ReadingKind
    model_fingerprint: str
    unseen: int
    weights_file: str
    plan: Callable[[Decoder], PlannedChanges]


def read_weights(path: str | Path, frozen: FrozenModel) -> WeightsRead:
    """Reads the files of an adapter or a checkpoint, each once.

    Args:
        path: directory with ``adapter_config.json``, or with ``config.json`` of a whole model, beside the weights.
        frozen: the model that is served.

    Raises:
        ReadingRefused: the files are none that are computed here, or of another model; the error names the file and what in it.
        ReadingIncomplete: files are missing, incomplete or change while they are read.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise ReadingRefused("path", f"{directory.name!r} is no directory that this server sees")
    files = FilesRead(directory)
    if files.has(CONFIG_FILE):
        config = AdapterConfig.parse(files.content(CONFIG_FILE))
        adapter = read_adapter(files, config, frozen.structure)
        found = _of_adapter(adapter, config, dict(files.digests)[WEIGHTS_FILE], frozen)
    elif files.has(CONFIG):
        checkpoint = read_checkpoint(files, frozen.structure, frozen.config, frozen.settings)
        found = WeightsRead(
            _identity(frozen, ReadingKind.CHECKPOINT, [digest for name, digest in files.digests if name != CONFIG]),
            ReadingKind.CHECKPOINT,
            _fingerprint(directory),
            checkpoint.unseen,
            WEIGHTS,
            lambda skeleton: changes_of_checkpoint(skeleton, checkpoint.decoder(frozen.config, skeleton)),
        )
    elif any(directory.glob("*.safetensors")) or not any(directory.iterdir()):
        raise ReadingIncomplete(f"neither {CONFIG_FILE} nor {CONFIG} is there: the files are being written, or are not all there")
    else:
        raise ReadingRefused("path", f"{directory.name!r} has neither {CONFIG_FILE} (an adapter) nor {CONFIG} (a checkpoint)")
    _check_tokenizer(directory, frozen.tokenizer_fingerprint)
    files.check_unchanged()
    return found


def read_brought_adapter(content: bytes, settings: Mapping[str, Any], frozen: FrozenModel) -> WeightsRead:
    """Reads an adapter that was read from its file already, such as one that a probe brings.

    Args:
        content: the content of the file with its tensors.
        settings: its settings, as PEFT writes them.
        frozen: the model that is served.

    Raises:
        ReadingRefused: it is none that is computed here, or of another model; the error names PEFT's file and what in it.
    """
    config = AdapterConfig.parse(json.dumps(settings).encode())
    return _of_adapter(
        adapter_of(tensors_in(content, WEIGHTS_FILE), config, frozen.structure), config, hashlib.sha256(content).hexdigest(), frozen
    )


def load_version(read: WeightsRead, frozen: FrozenModel) -> ReadingVersion:
    """Makes a version of a reading of the files that were read, and checks that it computes what they say.

    Raises:
        ReadingRefused: a changed layer computes other outputs than its formula, or the model cannot be run with these weights.
    """
    planned = read.plan(frozen.skeleton)
    decoder, tensors = changed_copy(frozen.skeleton, planned.weights)
    for name, weight in expected_weights(frozen.skeleton, planned):
        check_layers(decoder, {name: weight}, read.weights_file)
    seen = {name for name in planned.names if frozen.structure.is_seen(name)}
    layers = {name: frozen.structure.layer_of(name) for name in seen}
    norms = {name for name in seen if frozen.structure.is_final_norm(name)}
    try:
        reader = frozen.reader.over(decoder)
        backbone = frozen.backbone.over(decoder, reader)
        test = SelfTest(decoder, reader)
        test.check(backbone)
        test.check_short(backbone)
    except ModelRefused as error:
        raise ReadingRefused(read.weights_file, f"the model cannot be run with these weights: {error}") from None
    return ReadingVersion(
        id=read.id,
        kind=read.kind,
        model_fingerprint=read.model_fingerprint,
        decoder=decoder,
        backbone=backbone,
        tensors=tensors,
        changed_layers=tuple(sorted({layer for layer in layers.values() if layer is not None})),
        changes_input=any(layer is None and name not in norms for name, layer in layers.items()),
        changes_final_norm=bool(norms),
        unseen_tensors=read.unseen,
    )


def _of_adapter(adapter: Adapter, config: AdapterConfig, digest: str, frozen: FrozenModel) -> WeightsRead:
    return WeightsRead(
        _identity(frozen, ReadingKind.ADAPTER, [digest, config.meaning]),
        ReadingKind.ADAPTER,
        frozen.fingerprint,
        adapter.unseen,
        WEIGHTS_FILE,
        lambda skeleton: changes_of_adapter(skeleton, adapter),
    )


def _identity(frozen: FrozenModel, kind: ReadingKind, parts: Sequence[str]) -> str:
    return "sha256:" + hashlib.sha256(json.dumps([frozen.fingerprint, kind.value, *parts]).encode()).hexdigest()


def _fingerprint(directory: Path) -> str:
    try:
        return model_fingerprint(directory)
    except ModelRefused:
        raise ReadingIncomplete("the weights changed while they were read: they are being written") from None


def _check_tokenizer(directory: Path, expected: str) -> None:
    """Refuses files with another tokenizer beside them. Without a tokenizer's files nothing is compared: what transformers makes up then
    would have a fingerprint, too.
    """
    try:
        tokenizer = load_tokenizer(directory)
    except ModelRefused:
        raise ReadingRefused("tokenizer", "its files cannot be read; leave them out, or save the frozen model's own") from None
    if tokenizer is None or not expected:
        return
    found = tokenizer_fingerprint(tokenizer)
    if found != expected:
        problem = f"found a tokenizer {found}, expected {expected}, the frozen model's: its ids would mean other text"
        raise ReadingRefused("tokenizer", problem)
