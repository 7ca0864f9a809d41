"""Loads a model and probe files into the parts of an engine, and makes all checks that do not need scores."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import structlog
from transformers import PreTrainedConfig

from probescore.fingerprints import tokenizer_fingerprint
from probescore.types import FROZEN, ModelInfo, Reading, ReadingKind, Tap
from probescore_server.activations import all_taps, matching_taps
from probescore_server.backbone.base import Backbone
from probescore_server.backbone.copying import shared_copy
from probescore_server.backbone.kv_cache import CacheBudget, KeyValueCache
from probescore_server.backbone.media_placeholders import placeholder_tokens
from probescore_server.backbone.model_files import ModelFiles
from probescore_server.backbone.model_loading import DTYPES, Decoder, load_config, load_decoder, load_tokenizer, resolve_model
from probescore_server.backbone.rotary import max_unchanged_positions
from probescore_server.backbone.selection import choose_backbone
from probescore_server.backbone.taps import TapReader, layers_needed
from probescore_server.backbone.tokenizer import TextEncoder
from probescore_server.engine.adapted_models import AdaptedModels
from probescore_server.engine.device_memory import DeviceMemory
from probescore_server.engine.reading_set import ReadingSet
from probescore_server.engine.served_probes import ServedProbes, describe_probes
from probescore_server.errors import ModelRefused
from probescore_server.files import read_regular_file
from probescore_server.probes.format.fingerprints import decoder_settings, model_fingerprint
from probescore_server.probes.format.probe_file import ProbeFile
from probescore_server.probes.loading.compatibility import check_accepted_names, check_fits, read_probe_files
from probescore_server.probes.loading.loader import load_probes
from probescore_server.readings.files_read import MAX_SETTINGS_BYTES
from probescore_server.readings.version import FrozenModel
from probescore_server.rollouts import EngineInfo

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class LoadedParts:
    """Value object with the parts of an engine (a frozen model with its probes on one device).

    Attributes:
        backbone: the model, cut after the deepest block that a probe reads.
        texts: the model's tokenizer.
        reader: the reader of the model's activations, which further taps can be added to.
        probes: the loaded probes, with the description of the model.
        files: the probe files, sorted by name, then version.
        cache: an empty cache for keys and values.
        memory: the owner of the device memory of all these parts.
        frozen: what other readings are made from; ``None`` = none can be made.
        readings: the set of other readings, empty at first.
        adapted: the loader of the adapters that probes bring.
    """

    backbone: Backbone
    reader: TapReader
    texts: TextEncoder
    probes: ServedProbes
    files: Sequence[ProbeFile]
    cache: KeyValueCache
    memory: DeviceMemory
    frozen: FrozenModel | None
    readings: ReadingSet
    adapted: AdaptedModels


def load_parts(
    model: str,
    probes: Sequence[str | Path | ProbeFile],
    *,
    taps: Sequence[str | Tap] | str,
    revision: str,
    dtype: str,
    device: str,
    device_map: str | None,
    accept_mismatch: Collection[str],
    trust_remote_code: bool,
    max_kv_cache_bytes: int,
    min_layers: int,
    report: Callable[[str], None],
) -> LoadedParts:
    """Loads a model, only as deep as its probes and the named taps are, and the probe files into the parts of an engine.

    The arguments are those of ``Engine.load``, and the same errors are raised.
    """
    if dtype not in DTYPES:
        raise ModelRefused(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    report(f"reading {len(probes)} probe files")
    files = read_probe_files(probes)
    check_accepted_names(files, accept_mismatch)
    directory = resolve_model(model, revision=revision, trust_remote_code=trust_remote_code)
    model_files = ModelFiles.of(directory)
    config = load_config(directory, trust_remote_code=trust_remote_code)
    num_hidden_layers = config.get_text_config(decoder=True).num_hidden_layers
    named = matching_taps(taps, all_taps(num_hidden_layers), whose="the taps of this model") if taps else ()
    read = sorted({*named, *(tap for file in files for tap in file.manifest.taps)}, key=str)
    report("computing the model's fingerprint")
    described = _describe(model, directory, revision, config)
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    texts = TextEncoder(tokenizer)
    fingerprint = "" if tokenizer is None else tokenizer_fingerprint(tokenizer)
    accepted = {
        file.manifest.key: check_fits(
            file,
            described,
            fingerprint,
            accept_mismatch,
            bos_token_id=texts.bos_token_id,
            further_special_ids=texts.further_special_ids,
        )
        for file in files
    }

    needed = max(min_layers, layers_needed(read, described.num_hidden_layers))
    report(f"loading {needed} of {described.num_hidden_layers} blocks in {dtype}")
    decoder = load_decoder(
        directory, num_layers=needed, dtype=dtype, device=device, device_map=device_map, trust_remote_code=trust_remote_code
    )
    content = model_files.digest(decoder, min_layers)
    model_files.check_unchanged()
    report("testing the forward pass")
    reader = TapReader(decoder, read)
    backbone, reason = choose_backbone(decoder, reader)
    report(f"{backbone.name} execution path: {reason}")
    loaded = load_probes(files, decoder.device)
    info = EngineInfo(
        model=replace(described, num_loaded_layers=len(decoder.blocks)),
        content=content[len(decoder.blocks)],
        shallower=content,
        tokenizer_fingerprint=fingerprint,
        bos_token_id=texts.bos_token_id,
        probes=(),
        device=str(decoder.device),
        dtype=dtype,
        execution_path=backbone.name,
        max_unchanged_positions=max_unchanged_positions(decoder.config),
        placeholders=placeholder_tokens(config, tokenizer),
        taps=named,
    )
    frozen = _frozen(decoder, reader, backbone, info, config, directory)
    budget = CacheBudget(max_kv_cache_bytes)
    adapted = AdaptedModels(frozen, budget)
    served = ServedProbes.of(describe_probes(info, files, accepted, {}), loaded, adapted.of(files))
    readings = ReadingSet(
        Reading(FROZEN, described.fingerprint, ReadingKind.FROZEN, None, described.fingerprint, golden_verified=True), budget
    )
    memory = DeviceMemory.of(decoder, loaded.values(), budget, lambda: chain(readings.tensors(), adapted.tensors()))
    return LoadedParts(backbone, reader, texts, served, files, KeyValueCache(budget), memory, frozen, readings, adapted)


def _frozen(
    decoder: Decoder, reader: TapReader, backbone: Backbone, info: EngineInfo, config: PreTrainedConfig, directory: Path
) -> FrozenModel | None:
    """Returns what other readings are made from; ``None`` for a model on several devices, or one whose own code cannot be copied."""
    if decoder.is_spread:
        return None
    try:
        skeleton = shared_copy(decoder)
    except Exception as error:  # a model's own code may hold anything
        logger.info("no other readings can be loaded beside this model: it cannot be copied", reason=f"{type(error).__name__}: {error}")
        return None
    settings = decoder_settings(read_regular_file(directory / "config.json", MAX_SETTINGS_BYTES), directory.name)
    return FrozenModel(skeleton, reader, backbone, config, settings, info.model.fingerprint, info.tokenizer_fingerprint)


def _describe(model: str, directory: Path, revision: str, config: PreTrainedConfig) -> ModelInfo:
    text = config.get_text_config(decoder=True)
    return ModelInfo(
        # a path concerns the operator alone: clients are told only its last component
        id=directory.resolve().name if Path(model).expanduser().is_dir() else model,
        revision=revision,
        fingerprint=model_fingerprint(directory),
        model_type=config.model_type,
        hidden_size=text.hidden_size,
        num_hidden_layers=text.num_hidden_layers,
        num_loaded_layers=0,
        vocab_size=text.vocab_size,
        max_position_embeddings=getattr(text, "max_position_embeddings", None) or 0,
    )
