"""Defines the set of probes that an engine (a frozen model with its probes) serves at one time, together with their description."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from probescore.types import ProbeInfo, Tap
from probescore_server.activations import all_taps
from probescore_server.backbone.forest import ProbeReads
from probescore_server.engine.adapted_models import AdaptedModel
from probescore_server.probes.format.manifest import AdapterReference, Manifest
from probescore_server.probes.format.probe_file import ProbeFile
from probescore_server.probes.loading.compatibility import probe_info
from probescore_server.probes.loading.loader import LoadedProbe
from probescore_server.rollouts import EngineInfo


@dataclass(frozen=True, eq=False)
class ServedProbes:
    """Value object with the probes that an engine serves at one time. An engine changes its probes by taking another such object.

    Attributes:
        info: description of the model and of these probes.
        loaded: the probes, a dictionary keyed by ``name@version``.
        reads: which tokens each probe reads, keyed in the same way.
        adapted: the model with the adapter that a probe brings, keyed in the same way; probes that bring none are not in it.
    """

    info: EngineInfo
    loaded: Mapping[str, LoadedProbe]
    reads: Mapping[str, ProbeReads]
    adapted: Mapping[str, AdaptedModel]

    @classmethod
    def of(cls, info: EngineInfo, loaded: Mapping[str, LoadedProbe], adapted: Mapping[str, AdaptedModel]) -> ServedProbes:
        """Returns the set of some loaded probes, all of which ``info`` describes, with the models of those that bring an adapter."""
        return cls(info, dict(loaded), {key: _reads(probe.manifest) for key, probe in loaded.items()}, dict(adapted))

    @cached_property
    def plain(self) -> tuple[str, ...]:
        """Returns the keys ``name@version`` of the probes that bring no adapter: they read any reading that a request names."""
        return tuple(key for key in self.loaded if key not in self.adapted)

    @cached_property
    def taps(self) -> frozenset[Tap]:
        """Returns every tap (place in the model) that some probe of the set reads on the readings that a request names."""
        return self.taps_of(self.plain)

    def taps_of(self, keys: Iterable[str]) -> frozenset[Tap]:
        """Returns the taps (places in the model) that some probes of the set read, given by their keys ``name@version``."""
        return frozenset(tap for key in keys for tap in self.loaded[key].manifest.taps)

    def with_raw_scores(self, keys: Iterable[str]) -> ServedProbes:
        """Returns the same set, in which some probes give scores in the unit of their graph's output, before any sigmoid, as golden scores
        are.
        """
        return self.with_loaded({key: replace(self.loaded[key], as_probability=False) for key in keys})

    def has(self, manifest: Manifest) -> bool:
        """Returns whether a probe is in the set, with exactly the content that its manifest states."""
        own = self.loaded.get(manifest.key)
        if own is None:
            return False
        return (own.manifest.graph_sha256, own.manifest.manifest_sha256) == (manifest.graph_sha256, manifest.manifest_sha256)

    def with_loaded(self, changed: Mapping[str, LoadedProbe]) -> ServedProbes:
        """Returns the same set with some of its probes loaded in another way."""
        return replace(self, loaded={**self.loaded, **changed})

    def with_accepted(self, manifest: Manifest, field: str) -> ServedProbes:
        """Returns the same set, in whose description one probe has a further check that failed and that the operator has accepted."""
        probes = tuple(
            replace(probe, accepted_mismatches=(*probe.accepted_mismatches, field)) if probe.key == manifest.key else probe
            for probe in self.info.probes
        )
        return replace(self, info=replace(self.info, probes=probes))


def describe_probes(
    info: EngineInfo, files: Sequence[ProbeFile], accepted: Mapping[str, tuple[str, ...]], known: Mapping[str, ProbeInfo]
) -> EngineInfo:
    """Returns the description of a loaded model with the description of its probes.

    Args:
        info: description of the model.
        files: the files of all probes, in order.
        accepted: the failed checks that the operator has accepted, a dictionary keyed by ``name@version``.
        known: descriptions that are made already, keyed in the same way.
    """
    manifests = [file.manifest for file in files]
    taps = {*info.taps, *(tap for manifest in manifests for tap in manifest.taps)}
    return replace(
        info,
        probes=tuple(known.get(manifest.key) or probe_info(manifest, accepted[manifest.key]) for manifest in manifests),
        adapters={manifest.key: _digest(manifest.adapter) for manifest in manifests if manifest.adapter is not None},
        expects_bos={manifest.key: manifest.expects_bos for manifest in manifests},
        max_follow_up_tokens={manifest.key: len(manifest.follow_up.token_ids) for manifest in manifests if manifest.follow_up is not None},
        excluding_special_tokens=frozenset(manifest.key for manifest in manifests if manifest.exclude_special_tokens),
        pools_with_prompt=frozenset(
            manifest.key for manifest in manifests if manifest.context.kind == "rollout" and manifest.context.sees_prompt
        ),
        taps=tuple(tap for tap in all_taps(info.model.num_hidden_layers) if tap in taps),
    )


def _reads(manifest: Manifest) -> ProbeReads:
    return ProbeReads(manifest.context.sees_prompt, () if manifest.follow_up is None else manifest.follow_up.token_ids)


def _digest(adapter: AdapterReference) -> str:
    """Returns a digest of an adapter's tensors and settings: probes with the same one are scored in the same pass of the model."""
    return f"sha256:{hashlib.sha256(json.dumps(adapter.model_dump(), sort_keys=True).encode()).hexdigest()}"
