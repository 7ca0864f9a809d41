"""Defines the engine: a frozen language model with its probes on one device.

Each worker process of the server runs one engine, and a program can run an engine in its own process without any server.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from probescore.reductions import Reduction
from probescore.types import (
    Chat,
    CompletionScores,
    GroupScores,
    RolloutGroup,
    Scope,
    ScoreResult,
    ScoringInfo,
    Tap,
    Text,
    Transfer,
    Usage,
)
from probescore_server.activity import ACTIVITY
from probescore_server.backbone.base import Backbone
from probescore_server.backbone.forest import Forest, ProbeReads
from probescore_server.backbone.kv_cache import KeyValueCache
from probescore_server.backbone.tokenizer import TextEncoder
from probescore_server.engine.device_memory import DeviceMemory
from probescore_server.engine.loading import load_parts
from probescore_server.probes.format.manifest import Manifest
from probescore_server.probes.format.probe_file import ProbeFile
from probescore_server.probes.loading.compatibility import is_accepted
from probescore_server.probes.loading.golden_check import check_golden, golden_rollouts
from probescore_server.probes.loading.loader import LoadedProbe, limited_to_tried_calls, needs_trial
from probescore_server.probes.scoring.batch_scorer import BatchScorer
from probescore_server.probes.scoring.cancellation import WantedRollouts
from probescore_server.rollouts import CheckedRollout, Continuation, EngineInfo, EngineStatistics, RolloutResult
from probescore_server.validation.options import TokenScoresWanted, resolve_options
from probescore_server.validation.rollouts import resolve_rollouts
from probescore_server.validation.texts import ChatLimits, pending_texts

BATCH_TOKENS = 16_384
"""Limits the tokens of one batch of ``Engine.score``, which bounds the activations in memory. A server forms batches by its own
settings.
"""


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

    def __init__(
        self,
        info: EngineInfo,
        backbone: Backbone,
        texts: TextEncoder,
        probes: Mapping[str, LoadedProbe],
        cache: KeyValueCache,
        memory: DeviceMemory,
    ) -> None:
        self.info = info
        self._backbone = backbone
        self._texts = texts
        self._probes = dict(probes)
        self._cache = cache
        self._memory = memory
        self._reads = {key: _reads(probe.manifest) for key, probe in probes.items()}
        self._running = threading.Lock()

    @classmethod
    def load(
        cls,
        model: str,
        probes: Sequence[str | Path] = (),
        *,
        revision: str = "",
        dtype: str = "float32",
        device: str = "cpu",
        device_map: str | None = None,
        accept_mismatch: Collection[str] = (),
        trust_remote_code: bool = False,
        max_kv_cache_bytes: int = MAX_KV_CACHE_BYTES,
        report: Callable[[str], None] = _ignore,
    ) -> Engine:
        """Loads a model, only as deep as the probes need, and makes all checks that are possible before the first request.

        Args:
            model: a directory, or the id of a model on the Hugging Face hub.
            probes: paths of probe files.
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
        """
        loaded = load_parts(
            model,
            probes,
            revision=revision,
            dtype=dtype,
            device=device,
            device_map=device_map,
            accept_mismatch=accept_mismatch,
            trust_remote_code=trust_remote_code,
            max_kv_cache_bytes=max_kv_cache_bytes,
            report=report,
        )
        engine = cls(loaded.info, loaded.backbone, loaded.texts, loaded.probes, loaded.cache, loaded.memory)
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
        encoded = {
            text.field: self.encode_completion(text.content, field=text.field)
            if isinstance(text.content, str)
            else self.encode_prompt(text.content, field=text.field)
            for text in pending_texts(groups)
        }
        by_group = resolve_rollouts(groups, self.info, options, encoded=encoded)
        started = time.perf_counter()
        results = [
            result
            for batch in _batches([rollout for group in by_group for rollout in group])
            for result in self.score_rollouts(batch)
            if result is not None
        ]
        usage = replace(Usage.total(result.usage for result in results), compute_seconds=time.perf_counter() - started)
        scores = iter(result.scores for result in results)
        return ScoreResult(
            groups=tuple(GroupScores(tuple(next(scores) for _ in group)) for group in by_group),
            info=ScoringInfo(self.info.model.fingerprint, self.info.tokenizer_fingerprint, self.info.scored_probes(options), usage),
        )

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
        """Scores one batch of checked rollouts.

        Args:
            rollouts: rollouts that ``resolve_rollouts`` has checked; rollouts of different requests may be mixed.
            is_cancelled: function that returns true if the rollout with a given index is cancelled. The function is called before each
                piece of work; work that only cancelled rollouts need is not done.

        Returns:
            One result for each rollout; ``None`` for a rollout that was cancelled.
        """
        return self._score(rollouts, self._probes, is_cancelled)

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
        with self._running:
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
        forest = Forest.build(rollouts, self._reads)
        wanted = WantedRollouts(is_cancelled)
        tokens = sum(rollout.tokens for rollout in rollouts)

        def unwanted(segment: int) -> bool:
            ACTIVITY.begin("the model", tokens)
            return not wanted.any(forest.segments[segment].rollouts)

        taps = {tap for key in _requested(rollouts) for tap in probes[key].manifest.taps}
        with self._running:
            if self._memory.asleep:
                raise RuntimeError("the engine sleeps: call wake first")
            activations = self._backbone.forward(forest, sorted(taps, key=str), skip=unwanted, cache=self._cache)
            live = [index for index in range(len(rollouts)) if index not in wanted.cancelled]
            scorer = BatchScorer(self.info, probes, self._texts.special_ids, rollouts, forest, activations, wanted)
            scores = scorer.score(live)
        return [
            RolloutResult(self._with_texts(scores[index], rollout), forest.usage(index), scorer.refused_by.get(index, ""))
            if index in scores and wanted.any((index,))
            else None
            for index, rollout in enumerate(rollouts)
        ]

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
        batches = _batches([rollout for rollouts in by_file for rollout in rollouts])
        found = (result.scores for batch in batches for result in self._score(batch, probes, _never) if result is not None)
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
        rollouts = next(_batches(golden_rollouts(file, self.info)[:_TRIED_CASES]))
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


def _requested(rollouts: Sequence[CheckedRollout]) -> set[str]:
    return {key for rollout in rollouts for key in rollout.options.probes}


def _batches(rollouts: Sequence[CheckedRollout]) -> Iterator[list[CheckedRollout]]:
    """Yields rollouts, in order, in batches of at most ``BATCH_TOKENS`` tokens each; a longer rollout is a batch by itself.

    Tokens that rollouts of a batch share, such as those of one prompt, are counted once.
    """
    batch: list[CheckedRollout] = []
    counted: set[Hashable] = set()
    tokens = 0
    for rollout in rollouts:
        costs = _costs(rollout)
        more = sum(cost for name, cost in costs.items() if name not in counted)
        if batch and tokens + more > BATCH_TOKENS:
            yield batch
            batch, counted, tokens, more = [], set(), 0, sum(costs.values())
        batch.append(rollout)
        counted |= costs.keys()
        tokens += more
    if batch:
        yield batch


def _costs(rollout: CheckedRollout) -> dict[Hashable, int]:
    """Returns a dictionary of the numbers of tokens of a rollout's prompt and of its completion with follow-ups (texts that continue the
    completion). Equal token sequences have equal keys, so that shared tokens can be counted once.
    """
    prompt, completion = rollout.prompt_ids.tobytes(), rollout.completion
    own = completion if completion.follow_ups else completion.token_ids.tobytes()
    return {prompt: len(rollout.prompt_ids), (prompt, own): completion.tree_tokens}
