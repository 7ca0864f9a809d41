"""Keeps the models with the adapters that probes bring: each adapter is loaded once, beside the frozen model, for all probes that bring it,
and freed with the last of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from probescore_server.backbone.kv_cache import CacheBudget, KeyValueCache
from probescore_server.errors import ProbeRefused, ReadingIncomplete, ReadingRefused
from probescore_server.files import adapter_path
from probescore_server.probes.format.manifest import AdapterReference
from probescore_server.probes.format.probe_file import ProbeFile
from probescore_server.readings.adapter import WEIGHTS_FILE
from probescore_server.readings.adapter_config import CONFIG_FILE
from probescore_server.readings.version import FrozenModel, ReadingVersion, load_version, read_brought_adapter


class AdaptedModel:
    """Frozen model with an adapter that probes bring: a reading that nobody names. Its memory is freed when nothing refers to it any more.

    Args:
        version: what is read.
        budget: the bound on all key-value caches.

    Attributes:
        version: what is read.
        cache: its key-value cache.
    """

    def __init__(self, version: ReadingVersion, budget: CacheBudget) -> None:
        self.version = version
        self.cache = KeyValueCache(budget)
        weakref.finalize(self, _free, version, self.cache, budget).atexit = False


@dataclass(frozen=True, eq=False)
class AdaptedModels:
    """Loader of the models with the adapters that the probes of one engine bring.

    Attributes:
        frozen: the model that they are made from; ``None`` = none can be made.
        budget: the bound on all key-value caches.
    """

    frozen: FrozenModel | None
    budget: CacheBudget
    _loaded: weakref.WeakValueDictionary[str, AdaptedModel] = field(default_factory=weakref.WeakValueDictionary)

    def of(self, files: Sequence[ProbeFile]) -> dict[str, AdaptedModel]:
        """Returns the model of each probe that brings an adapter, loaded and checked unless it is there already: a dictionary keyed by
        ``name@version``.

        Raises:
            ProbeRefused: an adapter would not be computed correctly, or none can be computed on this model.
        """
        return {file.manifest.key: self._model(file, file.manifest.adapter) for file in files if file.manifest.adapter is not None}

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yields the tensors that these models have of their own."""
        for model in list(self._loaded.values()):
            yield from model.version.tensors

    def _model(self, file: ProbeFile, adapter: AdapterReference) -> AdaptedModel:
        if self.frozen is None:
            problem = "an adapter beside a model that is spread over several devices, or whose own code cannot be copied"
            raise ProbeRefused(file.file, "adapter", problem, "a model on one device that transformers has the code of")
        try:
            read = read_brought_adapter(file.adapter or b"", adapter.settings, self.frozen)
            found = self._loaded.get(read.id)
            if found is None:
                found = self._loaded[read.id] = AdaptedModel(load_version(read, self.frozen), self.budget)
        except (ReadingRefused, ReadingIncomplete) as refusal:
            raise _refused(file.file, str(refusal)) from None
        return found


def _refused(file: str, problem: str) -> ProbeRefused:
    """Returns the refusal of a probe file for a problem with the adapter in which PEFT's two files are named, of which a probe keeps one in
    its manifest and the other under another name.
    """
    problem = problem.replace(f"{CONFIG_FILE}: ", "adapter.settings.").replace(CONFIG_FILE, "adapter.settings")
    problem = problem.replace(WEIGHTS_FILE, adapter_path(file).name)
    return ProbeRefused(file, "adapter", problem, "an adapter that this server computes on this model")


def _free(version: ReadingVersion, cache: KeyValueCache, budget: CacheBudget) -> None:
    budget.remove(cache)
    version.free()
    torch.cuda.empty_cache()  # nothing happens where there is no device
