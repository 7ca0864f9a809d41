"""Defines the engine: a frozen language model with its probes on one device.

Each worker process of the server runs one engine, and a program can run an engine in its own process without any server.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from probescore.reductions import Reduction
from probescore.types import (
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
)
from probescore_server.activations import MAX_BATCH_BYTES, resolve_reads
from probescore_server.activity import ACTIVITY
from probescore_server.backbone.base import Activations
from probescore_server.backbone.forest import Forest, ProbeReads
from probescore_server.engine.activation_reading import BatchActivations, joined, result_of
from probescore_server.engine.batches import batches, read_tokens
from probescore_server.engine.loading import LoadedParts, load_parts
from probescore_server.engine.reading_loading import ReadingLoader
from probescore_server.engine.reading_passes import FROZEN_PASS, ReadingPasses
from probescore_server.errors import LimitExceeded
from probescore_server.probes.format.manifest import Manifest
from probescore_server.probes.format.probe_file import ProbeFile
from probescore_server.probes.loading.compatibility import is_accepted
from probescore_server.probes.loading.golden_check import check_golden, golden_deviation, golden_rollouts
from probescore_server.probes.loading.loader import LoadedProbe, limited_to_tried_calls, needs_trial
from probescore_server.probes.scoring.batch_scorer import BatchScorer
from probescore_server.probes.scoring.cancellation import WantedRollouts
from probescore_server.readings.version import ReadingVersion
from probescore_server.rollouts import (
    ActivationReads,
    CheckedRollout,
    Continuation,
    EngineStatistics,
    ResolvedOptions,
    RolloutResult,
)
from probescore_server.validation.options import TokenScoresWanted, parse_scope, resolve_options
from probescore_server.validation.rollouts import resolve_rollouts
from probescore_server.validation.texts import ChatLimits, pending_texts

BATCH_TOKENS = 16_384
"""Limits the tokens of one batch of ``Engine.score``, which bounds the activations in memory. A server forms batches by its own
settings.
"""


_FLOAT32_BYTES = 4

_TRIED_CASES = 4
"""Limits the number of golden rollouts (examples in a probe file) whose activations serve as the centre of random test inputs for the
probe's graph.
"""

MAX_KV_CACHE_BYTES = 1 << 30
"""Default limit on the bytes of keys and values that an engine caches; an argument of ``Engine.load`` overrides it."""


def _ignore(_: str) -> None:
    pass


def _never(_: int) -> bool:
    return False


class Engine:
    """Engine that scores rollouts with probes on a frozen language model. Engines are made by ``Engine.load``.

    Several threads may use an engine; its batches run one after the other.

    Attributes:
        info: description of the loaded model, its tokenizer and its probes.
    """

    def __init__(self, parts: LoadedParts) -> None:
        self.info = parts.info
        self._backbone = parts.backbone
        self._texts = parts.texts
        self._probes = dict(parts.probes)
        self._files = parts.files
        self._cache = parts.cache
        self._memory = parts.memory
        self._readings = parts.readings
        self._loader = ReadingLoader(parts.frozen, parts.readings, self._golden_drift)
        self._reads = {key: _reads(probe.manifest) for key, probe in parts.probes.items()}
        self._running = threading.Lock()
        self._loading = threading.Lock()

    @classmethod
    def load(
        cls,
        model: str,
        probes: Sequence[str | Path] = (),
        *,
        taps: Sequence[str | Tap] | str = (),
        revision: str = "",
        dtype: str = "float32",
        device: str = "cpu",
        device_map: str | None = None,
        accept_mismatch: Collection[str] = (),
        trust_remote_code: bool = False,
        max_kv_cache_bytes: int = MAX_KV_CACHE_BYTES,
        report: Callable[[str], None] = _ignore,
    ) -> Engine:
        """Loads a model, as deep as probes and named taps need, and makes all checks that are possible before the first request.

        Args:
            model: a directory, or the id of a model on the Hugging Face hub.
            probes: paths of probe files.
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
            report=report,
        )
        engine = cls(loaded)
        report("recomputing golden scores")
        engine._check_golden(loaded.files, accept_mismatch)
        engine._try_graphs(loaded.files)
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
            probes: probes to score with, each as ``name`` or ``name@version``; empty = every loaded probe.
            reductions: reductions from the scores of the tokens to one number each, such as ``mean``; empty = each probe's default.
            token_scores: the probes whose scores per token are returned too, or ``"all"``.
            scope: which tokens are scored: ``completion``, ``prompt`` or ``all``.
            return_token_ids: whether the result contains the token ids that were scored.
            return_token_texts: whether the result contains the text of each token that was scored.
            readings: whose activations are read: ``frozen``, and names given to ``load_reading``; empty = the frozen model's.

        Returns:
            The scores by group and completion, in the order given, and the identity of the model and probes that produced the scores.

        Raises:
            InvalidRequest: an argument is wrong; the error names the field.
        """
        options = resolve_options(
            self.info,
            probes=probes,
            reductions=reductions,
            token_scores=token_scores,
            scope=scope,
            return_token_ids=return_token_ids,
            return_token_texts=return_token_texts,
        )
        with self._readings.pinned(readings) as pinned:
            by_group = self.check_rollouts(groups, replace(options, readings=pinned.wanted))
            started = time.perf_counter()
            results = [
                result
                for batch in batches([rollout for group in by_group for rollout in group], BATCH_TOKENS)
                for result in self.score_rollouts(batch)
                if result is not None
            ]
        usage = replace(Usage.total(result.usage for result in results), compute_seconds=time.perf_counter() - started)
        scores = iter(result.scores for result in results)
        scored = self.info.scored_probes(options)
        return ScoreResult(
            groups=tuple(GroupScores(tuple(next(scores) for _ in group)) for group in by_group),
            info=ScoringInfo(self.info.model.fingerprint, self.info.tokenizer_fingerprint, scored, usage, pinned.described),
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
        with self._loading:
            self._check_awake()
            return self._loader.load(name, path, step=step, expected_id=expected_id, in_place=in_place)

    def unload_reading(self, name: str) -> Reading:
        """Lets a name mean no reading any more, and returns what it meant. Its memory is freed once the calls that began before have ended.

        Raises:
            InvalidRequest: there is no reading of this name, or it is ``frozen``.
        """
        return self._readings.remove(name)

    def readings(self) -> tuple[Reading, ...]:
        """Returns the descriptions of the readings that ``score`` can be asked for, ``frozen`` first."""
        return self._readings.described

    def activations(
        self,
        groups: Sequence[RolloutGroup],
        taps: Sequence[str | Tap] | str,
        *,
        pool: Sequence[str] | str = Pool.TOKENS,
        scope: Scope | str = Scope.COMPLETION,
        max_batch_bytes: int = MAX_BATCH_BYTES,
        is_cancelled: Callable[[int], bool] = _never,
    ) -> Iterator[CompletionActivations]:
        """Reads activations of every completion of every group: all taps in one pass, each token once.

        Everything is checked at the call; what is computed is computed as the results are asked for, a batch at a time, and whoever asks no
        more ends it. It begins with an empty key-value cache, so that the same call on the same machine gives the same bits.

        Args:
            groups: what to read.
            taps: names of taps, or patterns of names such as ``resid_post.*``, among those that the engine was loaded for.
            pool: what becomes of the tokens that count: ``mean``, ``last`` or ``max`` of each feature, in the whole scope and in each span;
                ``tokens`` for every token's activations; or several of these.
            scope: ``completion``, ``prompt`` or ``all``.
            max_batch_bytes: of activations that a batch holds at once, in float32 on the model's device.
            is_cancelled: asked for a completion's index, counted over all groups, before each piece of work that it needs; one that nobody
                wants any more is not computed, and left out.

        Returns:
            One result per completion, in order.

        Raises:
            InvalidRequest: names the field at fault.
            LimitExceeded: one completion alone has more activations than ``max_batch_bytes``.
        """
        reads = self.resolve_reads(taps, pool)
        by_group = self.check_rollouts(groups, ResolvedOptions(probes=(), scope=parse_scope(scope)))
        rollouts = [rollout for group in by_group for rollout in group]
        places = [(index, place) for index, group in enumerate(by_group) for place in range(len(group))]
        return self.read_rollouts(rollouts, places, reads, max_batch_bytes=max_batch_bytes, is_cancelled=is_cancelled)

    def resolve_reads(self, taps: Sequence[str | Tap] | str, pool: Sequence[str] | str) -> ActivationReads:
        """Checks which activations are wanted. The arguments are those of ``activations``.

        Raises:
            InvalidRequest: naming ``taps[i]`` or ``pool``.
        """
        return resolve_reads(taps, pool, self.info.taps, whose="the taps that this engine was loaded for (Engine.load(…, taps=[…]))")

    def check_rollouts(self, groups: Sequence[RolloutGroup], options: ResolvedOptions) -> list[list[CheckedRollout]]:
        """Checks groups of rollouts and tokenises their texts; returns the rollouts per group, per completion.

        Raises:
            InvalidRequest: names the field at fault.
        """
        encoded = {
            text.field: self.encode_completion(text.content, field=text.field)
            if isinstance(text.content, str)
            else self.encode_prompt(text.content, field=text.field)
            for text in pending_texts(groups)
        }
        return resolve_rollouts(groups, self.info, options, encoded=encoded)

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
        by_reads: dict[tuple[ActivationReads | None, Scope], list[int]] = {}
        for index, rollout in enumerate(rollouts):
            reads = rollout.options.activations
            by_reads.setdefault((reads, Scope.COMPLETION if reads is None else rollout.options.scope), []).append(index)
        results: list[RolloutResult | None] = [None] * len(rollouts)
        for (reads, _), indices in by_reads.items():
            alike = [rollouts[index] for index in indices]

            def is_given_up(place: int, indices: Sequence[int] = indices) -> bool:
                return is_cancelled(indices[place])

            if reads is None:
                found = dict(enumerate(self._score(alike, self._probes, is_given_up)))
            else:
                read = self._read(alike, [(0, 0)] * len(alike), reads, MAX_BATCH_BYTES, is_given_up)
                found = {place: result_of(activations, usage, reads) for place, activations, usage in read}
            for place, result in found.items():
                results[indices[place]] = result
        return results

    def read_rollouts(
        self,
        rollouts: Sequence[CheckedRollout],
        places: Sequence[tuple[int, int]],
        reads: ActivationReads,
        *,
        max_batch_bytes: int = MAX_BATCH_BYTES,
        is_cancelled: Callable[[int], bool] = _never,
    ) -> Iterator[CompletionActivations]:
        """Reads activations of checked rollouts, as ``activations`` says.

        Args:
            rollouts: from ``check_rollouts``, all of one scope.
            places: of each, what its result says of group and completion.
            reads: from ``resolve_reads``.
            max_batch_bytes: as of ``activations``.
            is_cancelled: as of ``activations``.

        Raises:
            LimitExceeded: naming ``groups[i].completions[j]``: it alone has more activations than ``max_batch_bytes``.
        """
        row_bytes = self.info.model.hidden_size * _FLOAT32_BYTES
        at_least = len(reads.taps) if reads.tokens else 1
        for rollout, (group, completion) in zip(rollouts, places, strict=True):
            if (most := read_tokens(rollout) * at_least * row_bytes) > max_batch_bytes:
                field = f"groups[{group}].completions[{completion}]"
                remedy = "allow more, ask for fewer taps, or for pools in place of tokens"
                raise LimitExceeded(field, most, "bytes of activations", "max_batch_bytes", max_batch_bytes, remedy, "TOO_LONG")
        return self._read_alone(rollouts, places, reads, max_batch_bytes, is_cancelled)

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
        self, rollouts: Sequence[CheckedRollout], probes: Mapping[str, LoadedProbe], is_cancelled: Callable[[int], bool]
    ) -> list[RolloutResult | None]:
        passes = ReadingPasses(rollouts, {key: probe.manifest.taps for key, probe in probes.items()}, self._readings)
        results = {
            reading: self._score_pass(reading, [rollouts[index] for index in indices], probes, _of(indices, is_cancelled))
            for reading, indices in passes.rollouts.items()
        }
        return [
            None if result is None else replace(result, scores=self._with_texts(result.scores, rollout))
            for result, rollout in zip(passes.together(results), rollouts, strict=True)
        ]

    def _score_pass(
        self, reading: str, rollouts: Sequence[CheckedRollout], probes: Mapping[str, LoadedProbe], is_cancelled: Callable[[int], bool]
    ) -> list[RolloutResult | None]:
        """Scores rollouts on one reading, given by ``FROZEN_PASS`` or the id of its version."""
        forest = Forest.build(rollouts, self._reads)
        wanted = WantedRollouts(is_cancelled)
        taps = {tap for key in _requested(rollouts) for tap in probes[key].manifest.taps}
        with self._run(rollouts, forest, sorted(taps, key=str), wanted, reading) as (activations, live):
            scorer = BatchScorer(self.info, probes, self._texts.special_ids, rollouts, forest, activations, wanted)
            scores = scorer.score(live)
        return [
            RolloutResult(scores[index], forest.usage(index), scorer.refused_by.get(index, ""))
            if index in scores and wanted.any((index,))
            else None
            for index in range(len(rollouts))
        ]

    def _read_alone(
        self,
        rollouts: Sequence[CheckedRollout],
        places: Sequence[tuple[int, int]],
        reads: ActivationReads,
        max_batch_bytes: int,
        is_cancelled: Callable[[int], bool],
    ) -> Iterator[CompletionActivations]:
        """Reads activations as ``_read``, from an empty key-value cache, so that the same call on the same machine gives the same bits."""
        with self._running:
            self._cache.clear()
        for _, found, _ in self._read(rollouts, places, reads, max_batch_bytes, is_cancelled):
            yield found

    def _read(
        self,
        rollouts: Sequence[CheckedRollout],
        places: Sequence[tuple[int, int]],
        reads: ActivationReads,
        max_batch_bytes: int,
        is_cancelled: Callable[[int], bool],
    ) -> Iterator[tuple[int, CompletionActivations, Usage]]:
        """Yields the index of each rollout that is not cancelled, with its activations and the tokens that were computed for it."""
        max_rows = max_batch_bytes // (self.info.model.hidden_size * _FLOAT32_BYTES)
        done = 0
        for batch in batches(rollouts, BATCH_TOKENS, max(1, max_rows // len(reads.taps))):
            # only a rollout that is alone may need more rows than there is room for: then some taps at a time
            fitting = max(1, max_rows // max(1, read_tokens(batch[0]))) if len(batch) == 1 else len(reads.taps)
            taps = [reads.taps[start : start + fitting] for start in range(0, len(reads.taps), fitting)]
            wanted = WantedRollouts(_shifted(is_cancelled, done))
            parts = [self._read_batch(batch, some, reads, wanted) for some in taps]
            for index in range(len(batch)):
                if wanted.any((index,)):
                    yield done + index, joined([part.of(index, *places[done + index]) for part in parts]), parts[0].usage(index)
            done += len(batch)
            del parts  # else there would be two batches' activations while the next is read

    def _read_batch(
        self, rollouts: Sequence[CheckedRollout], taps: Sequence[Tap], reads: ActivationReads, wanted: WantedRollouts
    ) -> BatchActivations:
        forest = Forest.build(rollouts, {})
        with self._run(rollouts, forest, taps, wanted) as (activations, live):
            return BatchActivations(forest, activations, rollouts[0].options.scope, taps, reads, live)

    @contextmanager
    def _run(
        self,
        rollouts: Sequence[CheckedRollout],
        forest: Forest,
        taps: Sequence[Tap],
        wanted: WantedRollouts,
        reading: str = FROZEN_PASS,
    ) -> Iterator[tuple[Activations, list[int]]]:
        """Runs a batch's forest. While this is open no other batch runs.

        Returns:
            The activations, and the indices of the rollouts whose activations are all there.
        """
        tokens = sum(rollout.tokens for rollout in rollouts)

        def unwanted(segment: int) -> bool:
            ACTIVITY.begin("the model", tokens)
            return not wanted.any(forest.segments[segment].rollouts)

        with self._running:
            self._check_awake()
            if reading == FROZEN_PASS:
                backbone, cache = self._backbone, self._cache
            else:
                backbone, cache = self._readings.version(reading).backbone, self._readings.cache(reading)
            activations = backbone.forward(forest, taps, skip=unwanted, cache=cache)
            yield activations, [index for index in range(len(rollouts)) if index not in wanted.cancelled]

    def _check_awake(self) -> None:
        if self._memory.asleep:
            raise RuntimeError("the engine sleeps: call wake first")

    def _golden_drift(self, version: ReadingVersion) -> dict[str, float]:
        """Returns the largest difference between each probe's scores of its golden rollouts on a version of a reading and its golden
        scores, in standard deviations of these; a dictionary keyed by ``name@version``.
        """
        drift = {}
        probes = {key: replace(probe, as_probability=False) for key, probe in self._probes.items()}
        for file in self._files:
            found: list[CompletionScores] = []
            for batch in batches(golden_rollouts(file, self.info), BATCH_TOKENS):
                forest = Forest.build(batch, self._reads)
                activations = version.backbone.forward(forest, file.manifest.taps)
                with self._running:  # the probes' sessions are for one batch at a time
                    scorer = BatchScorer(self.info, probes, self._texts.special_ids, batch, forest, activations, WantedRollouts(_never))
                    scores = scorer.score(range(len(batch)))
                found += [scores[index] for index in range(len(batch))]
            drift[file.manifest.key] = golden_deviation(file, found)
        return drift

    def _with_texts(self, scores: CompletionScores, rollout: CheckedRollout) -> CompletionScores:
        if not rollout.options.return_token_texts or not self.info.tokenizer_fingerprint:
            return scores  # without a tokenizer there is no text
        return replace(self._completion_texts(scores, rollout.completion), prompt_texts=tuple(self.decode_tokens(rollout.prompt_ids)))

    def _completion_texts(self, scores: CompletionScores, continuation: Continuation) -> CompletionScores:
        follow_ups = zip(scores.follow_ups, continuation.follow_ups, strict=True)
        return replace(
            scores,
            completion_texts=tuple(self.decode_tokens(continuation.token_ids)),
            follow_ups=tuple(self._completion_texts(*follow_up) for follow_up in follow_ups),
        )

    def _check_golden(self, files: Sequence[ProbeFile], accept_mismatch: Collection[str]) -> None:
        """Compares each probe's scores of its golden rollouts (examples in its file) with the expected scores in the file. A mismatch is
        refused, or noted if ``accept_mismatch`` names the probe.

        Probes of one author often have the same golden rollouts, so the rollouts of all files are scored together and each is run once.
        """
        by_file = [golden_rollouts(file, self.info) for file in files]
        # golden scores are in the unit of the graph's output, before any sigmoid
        probes = {key: replace(probe, as_probability=False) for key, probe in self._probes.items()}
        together = batches([rollout for rollouts in by_file for rollout in rollouts], BATCH_TOKENS)
        found = (result.scores for batch in together for result in self._score(batch, probes, _never) if result is not None)
        for file, rollouts in zip(files, by_file, strict=True):
            refusal = check_golden(file, list(islice(found, len(rollouts))), self.info.dtype)
            if refusal is None:
                continue
            if not is_accepted(file.manifest, accept_mismatch):
                raise refusal
            self._note_mismatch(file.manifest, refusal.field)

    def _try_graphs(self, files: Sequence[ProbeFile]) -> None:
        """Tests each probe's ONNX graph that may depend on its input's size, on random activations similar to those of the probe's golden
        rollouts (examples in its file) and at far larger sizes.
        """
        for file in files:
            key = file.manifest.key
            if needs_trial(file, self._probes[key]):
                self._probes[key] = limited_to_tried_calls(file, self._probes[key], self._golden_activations(file))

    def _golden_activations(self, file: ProbeFile) -> dict[Tap, NDArray[np.float32]]:
        """Returns the activations of a few of a probe's golden rollouts (examples in its file): a dictionary, keyed by tap (place in the
        model), of finite rows ``(N, hidden_size)`` float32. Row n belongs to the same token at every tap.
        """
        rollouts = next(batches(golden_rollouts(file, self.info)[:_TRIED_CASES], BATCH_TOKENS))
        with self._running:
            rows = self._backbone.forward(
                Forest.build(rollouts, self._reads), file.manifest.taps, skip=lambda _: False, cache=self._cache
            ).rows
        finite = torch.stack([torch.isfinite(each).all(dim=1) for each in rows.values()]).all(dim=0)
        return {tap: each[finite].cpu().numpy() for tap, each in rows.items()}

    def _note_mismatch(self, manifest: Manifest, field: str) -> None:
        self.info = replace(
            self.info,
            probes=tuple(
                replace(probe, accepted_mismatches=(*probe.accepted_mismatches, field))
                if (probe.name, probe.version) == (manifest.name, manifest.version)
                else probe
                for probe in self.info.probes
            ),
        )


def _reads(manifest: Manifest) -> ProbeReads:
    return ProbeReads(manifest.context.sees_prompt, () if manifest.follow_up is None else manifest.follow_up.token_ids)


def _shifted(is_cancelled: Callable[[int], bool], by: int) -> Callable[[int], bool]:
    return lambda index: is_cancelled(by + index)


def _of(indices: Sequence[int], is_cancelled: Callable[[int], bool]) -> Callable[[int], bool]:
    return lambda index: is_cancelled(indices[index])


def _requested(rollouts: Sequence[CheckedRollout]) -> set[str]:
    return {key for rollout in rollouts for key in rollout.options.probes}
