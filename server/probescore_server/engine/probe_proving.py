"""Proves probes on the loaded model before an engine serves them: each must reproduce its golden scores, and depend on no more than its
manifest states.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from probescore.types import Tap
from probescore_server.backbone.base import Backbone
from probescore_server.backbone.forest import Forest
from probescore_server.backbone.kv_cache import KeyValueCache
from probescore_server.backbone.taps import TapReader, layers_needed
from probescore_server.backbone.tokenizer import TextEncoder
from probescore_server.engine.adapted_models import AdaptedModels
from probescore_server.engine.batches import batches
from probescore_server.engine.reading_passes import Pass, own_pass
from probescore_server.engine.served_probes import ServedProbes, describe_probes
from probescore_server.errors import ModelRefused, ProbeRefused
from probescore_server.probes.format.probe_file import ProbeFile
from probescore_server.probes.loading.compatibility import check_fits, is_accepted, read_probe_files
from probescore_server.probes.loading.golden_check import check_golden, golden_rollouts
from probescore_server.probes.loading.loader import limited_to_tried_calls, load_probes, needs_trial
from probescore_server.rollouts import CheckedRollout, EngineInfo, RolloutResult

LIVE_BATCH_TOKENS = 2048
"""Limits the tokens of one batch of golden rollouts of a probe that is added while the engine serves others. Their batches wait meanwhile.
"""

_TRIED_CASES = 4
"""Limits the number of golden rollouts (examples in a probe file) around whose activations random inputs are drawn, to test the probe's
graph.
"""

_TRIED_TOKENS = 16_384

ScoreBatch = Callable[[Sequence[CheckedRollout], ServedProbes, Callable[[int], bool]], Sequence[RolloutResult | None]]
"""Type of a function that scores one batch of rollouts with a set of probes, and is told which rollouts are cancelled."""


@dataclass(frozen=True, eq=False)
class ProbeProver:
    """Prover of the probes of one engine (a frozen model with its probes on one device).

    Attributes:
        texts: the model's tokenizer.
        reader: the reader of the model's activations, which taps (places in the model) are added to.
        adapted: the loader of the adapters that probes bring.
        beside: function that returns a context manager during which the engine stays awake, and batches run.
        alone: function that returns a context manager during which the engine is awake and runs no batch.
        score: function that scores a batch.
        weights_of: function that returns what runs a forward pass of a set of probes, and its key-value cache.
    """

    texts: TextEncoder
    reader: TapReader
    adapted: AdaptedModels
    beside: Callable[[], AbstractContextManager[None]]
    alone: Callable[[], AbstractContextManager[None]]
    score: ScoreBatch
    weights_of: Callable[[Pass, ServedProbes], tuple[Backbone, KeyValueCache]]

    def prepared(
        self, files: Sequence[ProbeFile], served: ServedProbes, accept_mismatch: Collection[str], max_batch_seconds: float
    ) -> tuple[ServedProbes, list[ProbeRefused]]:
        """Makes another set of probes ready beside the one that is served, as ``Engine.prepare_probes`` describes."""
        refusals: list[ProbeRefused] = []
        # What is served goes before another file of its name and version; and by its key, since the path may be that of a newer file.
        known = [replace(file, file=f"the {file.manifest.key} that is served") for file in files if served.has(file.manifest)]
        new = [file for file in files if not served.has(file.manifest)]
        while True:
            try:
                return self._prepared([*known, *new], served, accept_mismatch, max_batch_seconds), refusals
            except ProbeRefused as refusal:
                left = [file for file in new if file.file != refusal.file]
                if len(left) == len(new):
                    raise
                refusals.append(refusal.with_traceback(None))  # in its frames is what was loaded for the file
                new = left

    def _prepared(
        self, files: Sequence[ProbeFile], served: ServedProbes, accept_mismatch: Collection[str], max_batch_seconds: float
    ) -> ServedProbes:
        """Loads and proves a set of probes; raises ``ProbeRefused`` for the first file that fails a check."""
        files = read_probe_files(files)
        by_key = {file.manifest.key: file for file in files}
        new = [file for key, file in by_key.items() if key not in served.loaded]
        accepted = {file.manifest.key: self._check_fits(file, served.info, accept_mismatch) for file in new}
        with self.beside():
            adapted = self.adapted.of(new) | {key: model for key, model in served.adapted.items() if key in by_key}
        loaded = load_probes(files, torch.device(served.info.device), served.loaded)
        described = {probe.key: probe for probe in served.info.probes}
        probes = ServedProbes.of(describe_probes(served.info, files, accepted, described), loaded, adapted)
        again = [file for file in files if loaded[file.manifest.key] is not served.loaded.get(file.manifest.key)]
        return self.proven(probes, new, again, accept_mismatch, LIVE_BATCH_TOKENS, max_batch_seconds)

    def _check_fits(self, file: ProbeFile, info: EngineInfo, accept_mismatch: Collection[str]) -> tuple[str, ...]:
        """Checks a file against the loaded model, and makes sure that the probe's taps can be read; returns the accepted mismatches."""
        model = info.model
        accepted = check_fits(
            file,
            model,
            info.tokenizer_fingerprint,
            accept_mismatch,
            bos_token_id=self.texts.bos_token_id,
            further_special_ids=self.texts.further_special_ids,
        )
        if (needed := layers_needed(file.manifest.taps, model.num_hidden_layers)) > model.num_loaded_layers:
            expected = (
                f"blocks that are loaded, the first {model.num_loaded_layers}: restart the server, which loads as many as its probes need, "
                "or start it with --deeper-probes load, which does so beside the running model"
            )
            raise ProbeRefused(file.file, "inputs", f"a tap that needs {needed} blocks", expected, needed)
        with self.alone():
            try:
                self.reader.add(file.manifest.taps)
            except ModelRefused as refusal:
                raise ProbeRefused(file.file, "inputs", str(refusal), "taps that can be read of this model") from None
        return accepted

    def proven(
        self,
        probes: ServedProbes,
        new: Sequence[ProbeFile],
        changed: Sequence[ProbeFile],
        accept_mismatch: Collection[str],
        batch_tokens: int,
        max_batch_seconds: float,
    ) -> ServedProbes:
        """Recomputes golden scores, and tries graphs on random sequences; returns the set with what was found.

        Args:
            probes: the set.
            new: the files whose golden scores are recomputed.
            changed: the files whose graphs are tried unless they need no trial.
            accept_mismatch: names of the probes whose mismatches the operator accepts.
            batch_tokens: limit on the tokens of one batch of golden rollouts.
            max_batch_seconds: the longest that such a batch may take.

        Raises:
            ProbeRefused: the first file that fails a check.
        """
        probes = self._check_golden(probes, new, accept_mismatch, batch_tokens, max_batch_seconds)
        for file in changed:
            key = file.manifest.key
            if needs_trial(file, probes.loaded[key]):
                probes = probes.with_loaded({key: limited_to_tried_calls(file, probes.loaded[key], self._golden_activations(file, probes))})
        return probes

    def _check_golden(
        self, probes: ServedProbes, files: Sequence[ProbeFile], accept_mismatch: Collection[str], batch_tokens: int, max_seconds: float
    ) -> ServedProbes:
        """Compares each probe's scores of its golden rollouts (examples in its file) with the expected scores in the file. A mismatch is
        refused, or noted in the set that is returned if ``accept_mismatch`` names the probe.

        Probes of one author often have the same golden rollouts, so the rollouts of all files are scored together and each is run once.
        """
        by_file = [golden_rollouts(file.manifest, probes.info, file.file) for file in files]
        raw = probes.with_raw_scores(file.manifest.key for file in files)
        together = batches([rollout for rollouts in by_file for rollout in rollouts], batch_tokens)
        found = (result for batch in together for result in self.score(batch, raw, _after(max_seconds)))
        for file, rollouts in zip(files, by_file, strict=True):
            results = [result.scores for result in islice(found, len(rollouts)) if result is not None]
            if len(results) < len(rollouts):
                raise ProbeRefused(
                    file.file, "golden", f"golden scores that take longer than {max_seconds:g} s to recompute", "a faster probe"
                )
            refusal = check_golden(file, results, probes.info.dtype)
            if refusal is None:
                continue
            if not is_accepted(file.manifest, accept_mismatch):
                raise refusal
            probes = probes.with_accepted(file.manifest, refusal.field)
        return probes

    def _golden_activations(self, file: ProbeFile, probes: ServedProbes) -> dict[Tap, NDArray[np.float32]]:
        """Returns the activations of a few of a probe's golden rollouts (examples in its file): a dictionary, keyed by tap (place in the
        model), of finite rows ``(N, hidden_size)`` float32. Row n belongs to the same token at every tap.
        """
        rollouts = next(batches(golden_rollouts(file.manifest, probes.info, file.file)[:_TRIED_CASES], _TRIED_TOKENS))
        backbone, cache = self.weights_of(own_pass(file.manifest.key, probes), probes)
        with self.alone():
            rows = backbone.forward(Forest.build(rollouts, probes.reads), file.manifest.taps, skip=lambda _: False, cache=cache).rows
        finite = torch.stack([torch.isfinite(each).all(dim=1) for each in rows.values()]).all(dim=0)
        return {tap: each[finite].cpu().numpy() for tap, each in rows.items()}


def _after(seconds: float) -> Callable[[int], bool]:
    """Returns a function that cancels a batch's rollouts after some seconds, counted from the batch's first step."""
    end: list[float] = []

    def is_cancelled(_: int) -> bool:
        end[:] = end or [time.monotonic() + seconds]
        return time.monotonic() > end[0]

    return is_cancelled
