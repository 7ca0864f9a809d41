"""Defines the engine: a frozen language model with its probes on one device.

Each worker process of the server runs one engine, and a program can run an engine in its own process without any server.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from probescore.reductions import Reduction
from probescore.types import (
    FROZEN,
    Chat,
    CompletionActivations,
    CompletionScores,
    GroupScores,
    LoadedReading,
    Pool,
    Reading,
    RolloutGroup,
    Scope,
    ScoreResult,
    ScoringInfo,
    Tap,
    Text,
    Transfer,
    Usage,
    with_unmet_conditions,
)
from probescore_server.activations import MAX_BATCH_BYTES, resolve_reads
from probescore_server.activity import ACTIVITY
from probescore_server.backbone.base import Activations, Backbone
from probescore_server.backbone.forest import Forest
from probescore_server.backbone.kv_cache import KeyValueCache
from probescore_server.engine.activation_reading import BatchActivations, joined, of_reading, result_of
from probescore_server.engine.batches import batches, read_tokens
from probescore_server.engine.fair_lock import FairLock
from probescore_server.engine.loading import LoadedParts, load_parts
from probescore_server.engine.probe_proving import LIVE_BATCH_TOKENS, ProbeProver
from probescore_server.engine.reading_loading import ReadingLoader
from probescore_server.engine.reading_passes import FROZEN_PASS, Pass, ReadingPasses
from probescore_server.engine.served_probes import ServedProbes
from probescore_server.errors import LimitExceeded, ProbeRefused
from probescore_server.probes.format.probe_file import ProbeFile
from probescore_server.probes.loading.golden_check import golden_deviation, golden_rollouts
from probescore_server.probes.scoring.batch_scorer import BatchScorer
from probescore_server.probes.scoring.cancellation import WantedRollouts
from probescore_server.readings.version import ReadingVersion
from probescore_server.rollouts import (
    ActivationReads,
    CheckedRollout,
    Continuation,
    EngineInfo,
    EngineStatistics,
    ResolvedOptions,
    RolloutResult,
)
from probescore_server.validation.calibrated_rollouts import OutsideRollouts, calibrations_with_conditions
from probescore_server.validation.options import TokenScoresWanted, check_readings_of_probes, parse_scope, resolve_options
from probescore_server.validation.rollouts import resolve_rollouts
from probescore_server.validation.texts import ChatLimits, pending_texts

BATCH_TOKENS = 16_384
"""Limits the tokens of one batch of ``Engine.score``, which bounds the activations in memory. A server forms batches by its own
settings.
"""

_FLOAT32_BYTES = 4

MAX_KV_CACHE_BYTES = 1 << 30
"""Default limit on the bytes of keys and values that an engine caches; an argument of ``Engine.load`` overrides it."""


def _ignore(_: str) -> None:
    pass


def _never(_: int) -> bool:
    return False


class Engine:
    """Engine that scores rollouts with probes on a frozen language model. Engines are made by ``Engine.load``.

    Several threads may use an engine; its batches run one after the other.
    """

    def __init__(self, parts: LoadedParts) -> None:
        self._backbone = parts.backbone
        self._texts = parts.texts
        self._served = parts.probes
        self._cache = parts.cache
        self._memory = parts.memory
        self._readings = parts.readings
        self._loader = ReadingLoader(parts.frozen, parts.readings, lambda: self._served, self._golden_drift)
        self._running = FairLock()
        self._loading = threading.Lock()
        self._prover = ProbeProver(
            parts.texts, parts.reader, parts.adapted, self._loaded_beside, self._alone, self._score, self._weights_of
        )

    @property
    def info(self) -> EngineInfo:
        """Returns the description of the loaded model, its tokenizer and its probes."""
        return self._served.info

    @classmethod
    def load(
        cls,
        model: str,
        probes: Sequence[str | Path | ProbeFile] = (),
        *,
        taps: Sequence[str | Tap] | str = (),
        revision: str = "",
        dtype: str = "float32",
        device: str = "cpu",
        device_map: str | None = None,
        accept_mismatch: Collection[str] = (),
        trust_remote_code: bool = False,
        max_kv_cache_bytes: int = MAX_KV_CACHE_BYTES,
        min_layers: int = 0,
        report: Callable[[str], None] = _ignore,
    ) -> Engine:
        """Loads a model, as deep as probes and named taps need, and makes all checks that are possible before the first request.

        Args:
            model: a directory, or the id of a model on the Hugging Face hub.
            probes: paths of probe files, or probe files that are read already.
            taps: where ``activations`` may read, in addition to where the probes read: names of taps, or patterns of names such as
                ``resid_post.*``.
            revision: branch, tag or commit of a model on the hub; empty = its default branch.
            dtype: dtype of weights and activations: ``float32``, ``bfloat16`` or ``float16``.
            device: ``cpu``, ``cuda`` or ``cuda:0``.
            device_map: ``"auto"`` = spread the model over every CUDA device that there is, or load it on the CPU if there is none, instead
                of on ``device``. For models larger than one device; needs accelerate.
            accept_mismatch: probes (``name`` or ``name@version``) to serve although they were made for another model or tokenizer, or do
                not reproduce the scores of the examples in their files (golden scores); every response then says so. A probe that cannot
                run on this model is refused in any case.
            trust_remote_code: whether the model may bring its own Python code, which is then run.
            max_kv_cache_bytes: bytes of keys and values to keep on the device for later prompts with the same beginning; 0 = none.
            min_layers: number of blocks to load at least, also if probes and taps need fewer.
            report: function that is called with a line of text for people as each step of loading begins.

        Raises:
            ModelRefused: the model cannot be loaded, or its activations cannot be computed correctly.
            ProbeRefused: a probe file is not valid, was not made for this model, or gives other scores than its golden ones.
            InvalidRequest: an entry of ``taps`` matches no tap of the model.
        """
        loaded = load_parts(
            model,
            probes,
            taps=taps,
            revision=revision,
            dtype=dtype,
            device=device,
            device_map=device_map,
            accept_mismatch=accept_mismatch,
            trust_remote_code=trust_remote_code,
            max_kv_cache_bytes=max_kv_cache_bytes,
            min_layers=min_layers,
            report=report,
        )
        engine = cls(loaded)
        report("recomputing golden scores")
        engine._served = engine._prover.proven(loaded.probes, loaded.files, loaded.files, accept_mismatch, BATCH_TOKENS, math.inf)
        engine._memory.adopt(engine._served.loaded.values())
        loaded.cache.clear()
        report("ready")
        return engine

    # -------------------------------------------------------------------------------------------------------------------- for people

    def score(
        self,
        groups: Sequence[RolloutGroup],
        *,
        probes: Sequence[str] = (),
        reductions: Sequence[Reduction | str] = (),
        token_scores: TokenScoresWanted = (),
        scope: Scope | str = Scope.COMPLETION,
        return_token_ids: bool = False,
        return_token_texts: bool = False,
        readings: Sequence[str] = (),
    ) -> ScoreResult:
        """Scores every completion of every rollout group.

        Args:
            groups: rollout groups, each a prompt and its completions, as token ids or as text.
            probes: probes to score with, each as ``name@version``, or as ``name`` for its highest version; empty = the highest version of
                each name.
            reductions: reductions from the scores of the tokens to one number each, such as ``mean``; empty = each probe's default.
            token_scores: the probes whose scores per token are returned too, or ``"all"``.
            scope: which tokens are scored: ``completion``, ``prompt`` or ``all``.
            return_token_ids: whether the result contains the token ids that were scored.
            return_token_texts: whether the result contains the text of each token that was scored.
            readings: whose activations are read: ``frozen``, and names given to ``load_reading``; empty = the frozen model's. A probe that
                brings an adapter is read with it, as part of ``frozen``, and has no scores on other readings; where one is served, name the
                probes to read.

        Returns:
            The scores by group and completion, in the order given, and the identity of the model and probes that produced the scores.

        Raises:
            InvalidRequest: an argument is wrong; the error names the field.
        """
        served = self._served  # to the end, whatever is served meanwhile
        options = resolve_options(
            served.info,
            probes=probes,
            reductions=reductions,
            token_scores=token_scores,
            scope=scope,
            return_token_ids=return_token_ids,
            return_token_texts=return_token_texts,
        )
        check_readings_of_probes(served.info, options.probes, readings)
        with self._readings.pinned(readings, served.taps) as pinned:
            by_group = self._checked(groups, replace(options, readings=pinned.wanted), served.info)
            started = time.perf_counter()
            results = [
                result
                for batch in batches([rollout for group in by_group for rollout in group], BATCH_TOKENS)
                for result in self._score(batch, served, _never)
                if result is not None
            ]
        usage = replace(Usage.total(result.usage for result in results), compute_seconds=time.perf_counter() - started)
        scored = served.info.scored_probes(options)
        calibrations = calibrations_with_conditions(served.info, options)
        outside = OutsideRollouts.of(by_group, calibrations, options.scope, served.info.bos_token_id)
        if outside is not None:
            # There are none where a completion could not be scored, and where frozen was not asked for: thresholds are of its scores alone.
            has_scores = [bool(result.scores.scores) for result in results]
            scored = outside.noted(scored, np.where(has_scores, np.arange(len(results)), -1))
        scores = iter(with_unmet_conditions([result.scores for result in results], scored))
        return ScoreResult(
            groups=tuple(GroupScores(tuple(islice(scores, len(group)))) for group in by_group),
            info=ScoringInfo(served.info.model.fingerprint, served.info.tokenizer_fingerprint, scored, usage, pinned.described),
        )

    def load_reading(
        self, name: str, path: str | Path, *, step: int | None = None, expected_id: str | None = None, in_place: bool = False
    ) -> LoadedReading:
        """Loads a LoRA adapter, or a checkpoint of the whole model, beside the frozen model, whose probes can then read it, too.

        The engine scores meanwhile. The name means the new version once all checks have passed; calls that began before end with the
        version that the name meant then. The frozen model's weights are never written, and its scores stay the same bit by bit.

        Args:
            name: the name by which ``score`` asks for the reading. A reading of this name is replaced.
            path: directory that the adapter or checkpoint was saved to.
            step: label to tell versions apart, such as the training step.
            expected_id: id of the only version that is to be loaded, such as the one that another server has loaded; ``None`` = any.
            in_place: whether the version that the name means is freed first, so that there is never room needed for both. Calls that name
                the reading wait meanwhile. If loading fails, the name means nothing.

        Returns:
            The reading, what it replaced, and how far it moves the scores of each probe's golden rollouts.

        Raises:
            InvalidRequest: an argument is wrong; the error names it.
            ReadingRefused: the files would not be computed correctly: they are damaged, of a kind that is not computed, of another model,
                or not those of ``expected_id``.
            ReadingIncomplete: the files are being written; a later try may succeed.
        """
        with self._loaded_beside():
            return self._loader.load(name, path, step=step, expected_id=expected_id, in_place=in_place)

    def unload_reading(self, name: str) -> Reading:
        """Lets a name mean no reading any more, and returns what it meant. Its memory is freed once the calls that began before have ended.

        Raises:
            InvalidRequest: there is no reading of this name, or it is ``frozen``.
        """
        return self._readings.remove(name, self._served.taps)

    def readings(self) -> tuple[Reading, ...]:
        """Returns the descriptions of the readings that ``score`` can be asked for, ``frozen`` first.

        What they say of probes is true of those that are served now.
        """
        return self._readings.described(self._served.taps)

    def activations(
        self,
        groups: Sequence[RolloutGroup],
        taps: Sequence[str | Tap] | str,
        *,
        pool: Sequence[str] | str = Pool.TOKENS,
        scope: Scope | str = Scope.COMPLETION,
        max_batch_bytes: int = MAX_BATCH_BYTES,
        is_cancelled: Callable[[int], bool] = _never,
        reading: str = "",
    ) -> Iterator[CompletionActivations]:
        """Reads activations of every completion of every group: all taps in one pass, each token once.

        All arguments are checked when the method is called. Activations are computed batch by batch, as the caller asks for results; a
        caller that asks for no more ends the computation. The key-value cache is empty at the beginning, so that the same call on the same
        machine gives the same bits.

        Args:
            groups: the rollout groups whose activations are read, each a prompt and its completions.
            taps: names of taps, or patterns of names such as ``resid_post.*``, among those that the engine was loaded for.
            pool: how the activations of the tokens that count are pooled: ``mean``, ``last`` or ``max`` of each feature, in the whole scope
                and in each span; ``tokens`` for every token's activations; or several of these.
            scope: the tokens that are read: ``completion``, ``prompt`` or ``all``.
            max_batch_bytes: limit on the bytes of activations that a batch holds at once, in float32 on the model's device.
            is_cancelled: function that is called with a completion's index, counted over all groups, before each piece of work that the
                completion needs; if it returns true, the completion is not computed and has no result.
            reading: whose activations are read: ``frozen``, or a name given to ``load_reading``; empty = the frozen model's. The name
                means the same version from the call to the last result, also if it is given to another version meanwhile; each result
                says which. The version's memory is held until the results are read, or the iterator is closed or dropped.

        Returns:
            One result per completion, in order.

        Raises:
            InvalidRequest: an argument is wrong; the error names the field at fault.
            LimitExceeded: one completion alone has more activations than ``max_batch_bytes``.
        """
        reads = self.resolve_reads(taps, pool)
        by_group = self.check_rollouts(groups, ResolvedOptions(probes=(), scope=parse_scope(scope)))
        rollouts = [rollout for group in by_group for rollout in group]
        places = [(index, place) for index, group in enumerate(by_group) for place in range(len(group))]
        if not reading:
            return self.read_rollouts(rollouts, places, reads, max_batch_bytes=max_batch_bytes, is_cancelled=is_cancelled)
        self._check_read_bytes(rollouts, places, reads, max_batch_bytes)
        return self._read_pinned(reading, rollouts, places, reads, max_batch_bytes, is_cancelled)

    def resolve_reads(self, taps: Sequence[str | Tap] | str, pool: Sequence[str] | str) -> ActivationReads:
        """Checks the taps (places in the model) and poolings (such as means) that a request for activations names, and returns them. The
        arguments are those of ``activations``.

        Raises:
            InvalidRequest: a tap or pooling is not known; the error names ``taps[i]`` or ``pool``.
        """
        return resolve_reads(taps, pool, self.info.taps, whose="the taps that this engine was loaded for (Engine.load(…, taps=[…]))")

    def check_rollouts(self, groups: Sequence[RolloutGroup], options: ResolvedOptions) -> list[list[CheckedRollout]]:
        """Checks groups of rollouts and tokenises their texts. Returns the checked rollouts, one list for each group.

        Raises:
            InvalidRequest: an argument is wrong; the error names the field at fault.
        """
        return self._checked(groups, options, self.info)

    def _checked(self, groups: Sequence[RolloutGroup], options: ResolvedOptions, info: EngineInfo) -> list[list[CheckedRollout]]:
        encoded = {
            text.field: self.encode_completion(text.content, field=text.field)
            if isinstance(text.content, str)
            else self.encode_prompt(text.content, field=text.field)
            for text in pending_texts(groups)
        }
        return resolve_rollouts(groups, info, options, encoded=encoded)

    def encode_prompt(self, prompt: Text | Chat | str, *, field: str = "prompt", limits: ChatLimits | None = None) -> NDArray[np.int32]:
        """Returns the token ids ``(P,)`` int32 of a prompt that is a text, or a chat, which the model's chat template renders.

        Args:
            prompt: the text or chat.
            field: path of the prompt in the request, for error messages.
            limits: limits on the chat's rendering; ``None`` = no limits.

        Raises:
            InvalidRequest: there is no tokenizer or chat template, the chat exceeds its limits or is refused by the template, or the ids
                begin with BOS twice; the error names ``field``.
        """
        return self._texts.encode_prompt(prompt, field, limits)

    def encode_completion(self, text: str, *, field: str = "completion") -> NDArray[np.int32]:
        """Returns the token ids ``(T,)`` int32 of a completion's text, without special tokens.

        Args:
            text: the text.
            field: path of the completion in the request, for error messages.

        Raises:
            InvalidRequest: there is no tokenizer, or the text is not valid Unicode; the error names ``field``.
        """
        return self._texts.encode_completion(text, field)

    def generation_prompt_ids(self) -> tuple[int, ...]:
        """Returns the token ids with which the model's chat template ends every prompt; empty if there is no template."""
        return self._texts.generation_prompt_ids()

    def decode_tokens(self, ids: Sequence[int] | NDArray[np.int32]) -> list[str]:
        """Returns the text of each token id, for people; joined, the texts are the text of the whole sequence."""
        return self._texts.decode_tokens(ids)

    # -------------------------------------------------------------------------------------------------------------------- for workers

    def score_rollouts(
        self, rollouts: Sequence[CheckedRollout], *, is_cancelled: Callable[[int], bool] = _never
    ) -> list[RolloutResult | None]:
        """Scores one batch of checked rollouts, and reads activations of those whose options ask for activations instead.

        Args:
            rollouts: rollouts that ``resolve_rollouts`` has checked; rollouts of different requests may be mixed.
            is_cancelled: function that returns true if the rollout with a given index is cancelled. The function is called before each
                piece of work; work that only cancelled rollouts need is not done.

        Returns:
            One result for each rollout; ``None`` for a rollout that was cancelled.
        """
        by_reads: dict[tuple[ActivationReads | None, Scope, str], list[int]] = {}
        for index, rollout in enumerate(rollouts):
            options = rollout.options
            if options.activations is None:
                by_reads.setdefault((None, Scope.COMPLETION, ""), []).append(index)
            else:
                reading_id = options.readings[0].id if options.readings else ""
                by_reads.setdefault((options.activations, options.scope, reading_id), []).append(index)
        results: list[RolloutResult | None] = [None] * len(rollouts)
        for (reads, _, reading_id), indices in by_reads.items():
            alike = [rollouts[index] for index in indices]

            def is_given_up(place: int, indices: Sequence[int] = indices) -> bool:
                return is_cancelled(indices[place])

            if reads is None:
                found = dict(enumerate(self._score(alike, self._served, is_given_up)))
            else:
                weights = self._weights_at(reads.taps, reading_id)
                read = self._read(alike, [(0, 0)] * len(alike), reads, MAX_BATCH_BYTES, is_given_up, *weights)
                found = {place: result_of(activations, usage, reads) for place, activations, usage in read}
            for place, result in found.items():
                results[indices[place]] = result
        return results

    def prepare_probes(
        self, files: Sequence[ProbeFile], *, accept_mismatch: Collection[str] = (), max_batch_seconds: float = math.inf
    ) -> tuple[ServedProbes, list[ProbeRefused]]:
        """Makes another set of probes ready beside the one that is served, with every check of ``load``, and changes nothing yet.

        Probes that are served already are taken as they are. A new file that fails a check is left out. Another thread may score
        meanwhile: it waits for a batch of golden rollouts of at most ``LIVE_BATCH_TOKENS`` tokens at a time.

        Args:
            files: all probes of the new set.
            accept_mismatch: as of ``load``.
            max_batch_seconds: the longest that one batch of golden rollouts may take.

        Returns:
            The new set, for ``adopt_probes``, and the refusal of each file that is left out. A file that needs blocks which
            are not loaded is refused with ``needs_layers``.

        Raises:
            ProbeRefused: a probe that is served already cannot be loaded again.
        """
        return self._prover.prepared(files, self._served, accept_mismatch, max_batch_seconds)

    def serves(self, file: ProbeFile) -> bool:
        """Returns whether the engine serves the probe of a file, with exactly the file's content."""
        return self._served.has(file.manifest)

    def adopt_probes(self, probes: ServedProbes) -> None:
        """Serves another set of probes from the next batch on. The memory of the probes that are not in it is freed."""
        with self._alone():
            self._memory.adopt(probes.loaded.values())
            self._served = probes

    def read_rollouts(
        self,
        rollouts: Sequence[CheckedRollout],
        places: Sequence[tuple[int, int]],
        reads: ActivationReads,
        *,
        max_batch_bytes: int = MAX_BATCH_BYTES,
        is_cancelled: Callable[[int], bool] = _never,
    ) -> Iterator[CompletionActivations]:
        """Computes activations of rollouts that were checked before, batch by batch, as ``activations`` describes.

        Args:
            rollouts: the rollouts that ``check_rollouts`` returned, all of one scope.
            places: index of the group and of the completion that each rollout's result states.
            reads: the taps (places in the model) and poolings that ``resolve_reads`` returned.
            max_batch_bytes: limit on the bytes of activations that a batch holds at once, as in ``activations``.
            is_cancelled: function that tells whether a rollout's result is not wanted any more, as in ``activations``.

        Raises:
            LimitExceeded: one completion alone has more activations than ``max_batch_bytes``; the error names
                ``groups[i].completions[j]``.
        """
        self._check_read_bytes(rollouts, places, reads, max_batch_bytes)
        return self._read_afresh(rollouts, places, reads, max_batch_bytes, is_cancelled)

    def trim(self) -> None:
        """Returns memory that is free, such as that of probes that are not served any more, to the device and the operating system."""
        self._memory.trim()

    def free_memory(self) -> None:
        """Frees the memory that only makes later batches faster: the key-value cache and the unused memory that allocators keep."""
        with self._running:
            self._memory.free_reserves()

    def statistics(self) -> EngineStatistics:
        """Returns the bytes of device memory that the engine uses now, and the bytes, hits and misses of its key-value cache."""
        with self._running:
            return self._memory.statistics()

    def sleep(self) -> Transfer:
        """Frees the engine's device memory until ``wake`` is called, once the batch that is being computed has ended.

        The weights move to pinned host memory and the key-value cache is dropped; on a CPU the weights stay. A sleeping engine can still
        tokenise texts. Nothing happens if the engine sleeps already.

        Returns:
            The device, the seconds taken, the bytes of weights moved and the bytes of device memory freed.
        """
        with self._loading, self._running:  # what is loaded beside is read from the weights
            return self._memory.sleep()

    def wake(self) -> Transfer:
        """Takes the engine's device memory again, with every weight bit by bit as before. Nothing happens if the engine is awake already.

        Returns:
            The device, the seconds taken, the bytes of weights moved and the bytes of device memory taken.

        Raises:
            WorkerUnavailable: the device has too little free memory; the engine still sleeps.
            RuntimeError: the weights moved back to the device differ from the original ones; the engine must not be used any more.
        """
        with self._running:
            return self._memory.wake()

    def _score(
        self, rollouts: Sequence[CheckedRollout], probes: ServedProbes, is_cancelled: Callable[[int], bool]
    ) -> list[RolloutResult | None]:
        passes = ReadingPasses(rollouts, probes, self._readings)
        results = {
            each: self._score_pass(passes.of(each), probes, _of(indices, is_cancelled), *self._weights_of(each, probes))
            for each, indices in passes.rollouts.items()
        }
        return [
            None if result is None else self._with_texts(result, rollout)
            for result, rollout in zip(passes.together(results), rollouts, strict=True)
        ]

    def _weights_of(self, each: Pass, probes: ServedProbes) -> tuple[Backbone, KeyValueCache]:
        """Returns what runs a forward pass, and its key-value cache."""
        if each == FROZEN_PASS:
            return self._backbone, self._cache
        if each.brought:
            model = next(model for model in probes.adapted.values() if model.version.id == each.id)
            return model.version.backbone, model.cache
        return self._readings.version(each.id).backbone, self._readings.cache(each.id)

    def _weights_at(self, taps: Sequence[Tap], reading_id: str) -> tuple[Backbone, KeyValueCache]:
        """Returns what reads activations of a version of a reading at some taps (places in the model), and its key-value cache: those of
        the frozen model if the version changes nothing there, or the id is empty.
        """
        if not reading_id or not self._readings.version(reading_id).changes(taps):
            return self._backbone, self._cache
        return self._readings.version(reading_id).backbone, self._readings.cache(reading_id)

    def _score_pass(
        self,
        rollouts: Sequence[CheckedRollout],
        probes: ServedProbes,
        is_cancelled: Callable[[int], bool],
        backbone: Backbone,
        cache: KeyValueCache | None,
    ) -> list[RolloutResult | None]:
        """Scores rollouts on one reading, given by what runs it and its key-value cache."""
        forest = Forest.build(rollouts, probes.reads)
        wanted = WantedRollouts(is_cancelled)
        taps = sorted(probes.taps_of(_requested(rollouts)), key=str)
        with self._run(rollouts, forest, taps, wanted, backbone, cache) as (activations, live):
            scorer = BatchScorer(probes.info, probes.loaded, self._texts.special_ids, rollouts, forest, activations, wanted)
            scores = scorer.score(live)
        return [
            RolloutResult(scores[index], forest.usage(index), scorer.refused_by.get(index, ""))
            if index in scores and wanted.any((index,))
            else None
            for index in range(len(rollouts))
        ]

    def _check_read_bytes(
        self, rollouts: Sequence[CheckedRollout], places: Sequence[tuple[int, int]], reads: ActivationReads, max_batch_bytes: int
    ) -> None:
        row_bytes = self.info.model.hidden_size * _FLOAT32_BYTES
        at_least = len(reads.taps) if reads.tokens else 1
        for rollout, (group, completion) in zip(rollouts, places, strict=True):
            if (most := read_tokens(rollout) * at_least * row_bytes) > max_batch_bytes:
                field = f"groups[{group}].completions[{completion}]"
                remedy = "allow more, ask for fewer taps, or for pools in place of tokens"
                raise LimitExceeded(field, most, "bytes of activations", "max_batch_bytes", max_batch_bytes, remedy, "TOO_LONG")

    def _read_pinned(
        self,
        name: str,
        rollouts: Sequence[CheckedRollout],
        places: Sequence[tuple[int, int]],
        reads: ActivationReads,
        max_batch_bytes: int,
        is_cancelled: Callable[[int], bool],
    ) -> Iterator[CompletionActivations]:
        """Reads activations as ``_read_afresh``, of the version of a reading that its name means now.

        Raises:
            InvalidRequest: naming ``reading``: there is no such reading.
        """
        pin = ExitStack()
        (meant,) = pin.enter_context(self._readings.pinned([name], self._served.taps, "reading")).described
        reading_id = "" if meant.name == FROZEN else meant.id

        def read() -> Iterator[CompletionActivations]:
            with pin:
                for found in self._read_afresh(rollouts, places, reads, max_batch_bytes, is_cancelled, reading_id):
                    yield of_reading(found, meant)

        results = read()
        weakref.finalize(results, pin.close)  # what was never asked for anything is not closed
        return results

    def _read_afresh(
        self,
        rollouts: Sequence[CheckedRollout],
        places: Sequence[tuple[int, int]],
        reads: ActivationReads,
        max_batch_bytes: int,
        is_cancelled: Callable[[int], bool],
        reading_id: str = "",
    ) -> Iterator[CompletionActivations]:
        """Reads activations as ``_read``, from an empty key-value cache, so that the same call on the same machine gives the same bits."""
        backbone, cache = self._weights_at(reads.taps, reading_id)
        with self._running:
            cache.clear()
        for _, found, _ in self._read(rollouts, places, reads, max_batch_bytes, is_cancelled, backbone, cache):
            yield found

    def _read(
        self,
        rollouts: Sequence[CheckedRollout],
        places: Sequence[tuple[int, int]],
        reads: ActivationReads,
        max_batch_bytes: int,
        is_cancelled: Callable[[int], bool],
        backbone: Backbone,
        cache: KeyValueCache,
    ) -> Iterator[tuple[int, CompletionActivations, Usage]]:
        """Yields the index of each rollout that is not cancelled, with its activations and the tokens that were computed for it."""
        max_rows = max_batch_bytes // (self.info.model.hidden_size * _FLOAT32_BYTES)
        done = 0
        for batch in batches(rollouts, BATCH_TOKENS, max(1, max_rows // len(reads.taps))):
            # only a rollout that is alone may need more rows than there is room for: then some taps at a time
            fitting = max(1, max_rows // max(1, read_tokens(batch[0]))) if len(batch) == 1 else len(reads.taps)
            taps = [reads.taps[start : start + fitting] for start in range(0, len(reads.taps), fitting)]
            wanted = WantedRollouts(_shifted(is_cancelled, done))
            parts = [self._read_batch(batch, some, reads, wanted, backbone, cache) for some in taps]
            for index in range(len(batch)):
                if wanted.any((index,)):
                    yield done + index, joined([part.of(index, *places[done + index]) for part in parts]), parts[0].usage(index)
            done += len(batch)
            del parts  # else there would be two batches' activations while the next is read

    def _read_batch(
        self,
        rollouts: Sequence[CheckedRollout],
        taps: Sequence[Tap],
        reads: ActivationReads,
        wanted: WantedRollouts,
        backbone: Backbone,
        cache: KeyValueCache,
    ) -> BatchActivations:
        forest = Forest.build(rollouts, {})
        with self._run(rollouts, forest, taps, wanted, backbone, cache) as (activations, live):
            return BatchActivations(forest, activations, rollouts[0].options.scope, taps, reads, live)

    @contextmanager
    def _run(
        self,
        rollouts: Sequence[CheckedRollout],
        forest: Forest,
        taps: Sequence[Tap],
        wanted: WantedRollouts,
        backbone: Backbone,
        cache: KeyValueCache | None,
    ) -> Iterator[tuple[Activations, list[int]]]:
        """Runs a batch's forest. While this is open no other batch runs.

        Returns:
            The activations, and the indices of the rollouts whose activations are all there.
        """
        tokens = sum(rollout.tokens for rollout in rollouts)

        def unwanted(segment: int) -> bool:
            ACTIVITY.begin("the model", tokens)
            return not wanted.any(forest.segments[segment].rollouts)

        with self._alone():
            activations = backbone.forward(forest, taps, skip=unwanted, cache=cache)
            yield activations, [index for index in range(len(rollouts)) if index not in wanted.cancelled]

    def _golden_drift(self, version: ReadingVersion, probes: ServedProbes) -> dict[str, float]:
        """Returns the largest difference between each probe's scores of its golden rollouts on a version of a reading and its golden
        scores, in standard deviations of these; a dictionary keyed by ``name@version``, without probes that bring an adapter.

        Batches wait meanwhile: the version may be one that they run.
        """
        raw = probes.with_raw_scores(probes.plain)
        by_probe = {key: golden_rollouts(probes.loaded[key].manifest, probes.info, key) for key in probes.plain}
        together = batches([rollout for rollouts in by_probe.values() for rollout in rollouts], LIVE_BATCH_TOKENS)
        results = (result for batch in together for result in self._score_pass(batch, raw, _never, version.backbone, None))
        found = (result.scores for result in results if result is not None)
        return {key: golden_deviation(probes.loaded[key].manifest, [*islice(found, len(rollouts))]) for key, rollouts in by_probe.items()}

    def _with_texts(self, result: RolloutResult, rollout: CheckedRollout) -> RolloutResult:
        if not rollout.options.return_token_texts or not self.info.tokenizer_fingerprint:
            return result  # without a tokenizer there is no text
        scores = self._completion_texts(result.scores, rollout.completion)
        return replace(result, scores=replace(scores, prompt_texts=tuple(self.decode_tokens(rollout.prompt_ids))))

    def _completion_texts(self, scores: CompletionScores, continuation: Continuation) -> CompletionScores:
        follow_ups = zip(scores.follow_ups, continuation.follow_ups, strict=True)
        return replace(
            scores,
            completion_texts=tuple(self.decode_tokens(continuation.token_ids)),
            follow_ups=tuple(self._completion_texts(*follow_up) for follow_up in follow_ups),
        )

    @contextmanager
    def _loaded_beside(self) -> Iterator[None]:
        """Context manager during which the engine stays awake, and something is made of the frozen model's weights beside its batches."""
        with self._loading:
            self._check_awake()
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Context manager during which the engine is awake and runs no batch."""
        with self._running:
            self._check_awake()
            yield

    def _check_awake(self) -> None:
        if self._memory.asleep:
            raise RuntimeError("the engine sleeps: call wake first")


def _shifted(is_cancelled: Callable[[int], bool], by: int) -> Callable[[int], bool]:
    return lambda index: is_cancelled(by + index)


def _of(indices: Sequence[int], is_cancelled: Callable[[int], bool]) -> Callable[[int], bool]:
    return lambda index: is_cancelled(indices[index])


def _requested(rollouts: Sequence[CheckedRollout]) -> set[str]:
    return {key for rollout in rollouts for key in rollout.options.probes}
