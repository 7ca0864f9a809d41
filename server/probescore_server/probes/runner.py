"""From a batch's activations to the scores of its completions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from probescore.reductions import Reduction, reduce_scores
from probescore.types import CompletionScores, CompletionStatus, OutputPer, ProbeScores, ScoreUnit, Tap, score_keys
from probescore_server.backbone.forest import Forest, Placement
from probescore_server.backbone.universal import Activations
from probescore_server.probes.layout import Part, Reading, Rows, read_completion
from probescore_server.probes.manifest import Manifest
from probescore_server.probes.session import ProbeSession, session_device
from probescore_server.rollouts import EngineInfo, Rollout

MAX_ROWS_PER_CALL = 4096
"""A graph may need memory for rows × features, or for rows × rows; a longer sequence still goes in one piece."""


@dataclass(frozen=True, eq=False)
class LoadedProbe:
    """A probe that is ready to run. ``as_probability``: the sigmoid is applied to what the graph gives."""

    manifest: Manifest
    session: ProbeSession
    as_probability: bool

    @classmethod
    def of(cls, manifest: Manifest, session: ProbeSession) -> LoadedProbe:
        """As its manifest says that scores are sent."""
        return cls(manifest, session, manifest.output.unit is ScoreUnit.LOGIT and manifest.reduce_on is ScoreUnit.PROBABILITY)

    @property
    def pools(self) -> bool:
        """Whether it gives one score per rollout."""
        return self.manifest.output.per is OutputPer.ROLLOUT


@dataclass(slots=True, eq=False)
class _Calls:
    """The sequences of rows that one probe must see in a batch, each once, and later their scores."""

    numbers: dict[object, int] = field(default_factory=dict)
    sequences: list[NDArray[np.int64]] = field(default_factory=list)
    scores: list[NDArray[np.float32]] = field(default_factory=list)


class BatchScorer:
    """Scores the completions of one batch.

    Args:
        info: what is loaded.
        probes: by ``name@version``.
        special_ids: the tokenizer's special tokens, int32.
        rollouts: the batch.
        forest: where they stand.
        activations: of the forest, at every tap of the probes that the rollouts ask for.
    """

    def __init__(
        self,
        info: EngineInfo,
        probes: Mapping[str, LoadedProbe],
        special_ids: NDArray[np.int32],
        rollouts: Sequence[Rollout],
        forest: Forest,
        activations: Activations,
    ) -> None:
        self._info = info
        self._probes = probes
        self._special_ids = special_ids
        self._rollouts = rollouts
        self._forest = forest
        self._rows = Rows(forest, dict(activations.starts))
        self._activations, self._finite = _without_non_finite(activations.rows)
        self._calls: dict[str, _Calls] = {}
        self._readings: dict[tuple[int, str], Reading] = {}

    def score(self, indices: Collection[int]) -> dict[int, CompletionScores]:
        """The scores of these rollouts, by index; the activations of their segments must all be there."""
        for index in indices:
            self._plan(self._forest.placements[index], self._rollouts[index], is_follow_up=False)
        for key, calls in self._calls.items():
            calls.scores = list(self._run(self._probes[key], calls.sequences))
        return {index: self._completion(self._forest.placements[index], self._rollouts[index], is_follow_up=False) for index in indices}

    # ------------------------------------------------------------------------------------------------------------ before the graphs

    def _plan(self, placement: Placement, rollout: Rollout, *, is_follow_up: bool) -> None:
        for key in rollout.options.probes:
            manifest = self._probes[key].manifest
            reading = read_completion(
                self._forest, placement, manifest, rollout.options.scope, is_follow_up=is_follow_up, special_ids=self._special_ids
            )
            self._readings[id(placement), key] = reading
            calls = self._calls.setdefault(key, _Calls())
            for name, rows in self._sequences(self._probes[key], reading):
                if name not in calls.numbers:
                    calls.numbers[name] = len(calls.sequences)
                    calls.sequences.append(rows)
        for follow_up in placement.follow_ups:
            self._plan(follow_up, rollout, is_follow_up=True)

    def _sequences(self, probe: LoadedProbe, reading: Reading) -> Iterator[tuple[object, NDArray[np.int64]]]:
        """What the graph must be given for a reading: under a name that is the same for the same rows, the rows in order."""
        if not probe.pools:
            for part in reading.parts:
                chain = _chain(probe, part)
                yield chain, self._rows.of(chain)
            return
        for selection in reading.selections:
            if selection.any():
                yield self._pooled_name(probe, reading, selection), self._pooled_rows(probe, reading, selection)

    def _pooled_rows(self, probe: LoadedProbe, reading: Reading, selection: NDArray[np.bool_]) -> NDArray[np.int64]:
        seen = reading.parts[0].before if probe.manifest.context.sees_prompt else ()
        return np.concatenate([self._rows.of(seen), self._rows.of([part.segment for part in reading.parts])[selection]])

    def _pooled_name(self, probe: LoadedProbe, reading: Reading, selection: NDArray[np.bool_]) -> object:
        return self._pooled_rows(probe, reading, selection).tobytes()

    # ------------------------------------------------------------------------------------------------------------------- the graphs

    def _run(self, probe: LoadedProbe, sequences: Sequence[NDArray[np.int64]]) -> Iterator[NDArray[np.float32]]:
        """The scores of each sequence: ``(its rows, labels)``, or ``(1, labels)`` for a probe that pools."""
        for batch in _batches(sequences):
            scores = self._call(probe, batch)
            if len(batch) > 1 and not all(np.isfinite(each).all() for each in scores):
                # A graph may tell sequences apart by arithmetic, where NaN × 0 is NaN. Alone, none can spoil another.
                scores = [self._call(probe, [sequence])[0] for sequence in batch]
            yield from (_sigmoid(each) for each in scores) if probe.as_probability else scores

    def _call(self, probe: LoadedProbe, batch: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        rows = np.concatenate(batch)
        ends = np.cumsum([len(sequence) for sequence in batch], dtype=np.int64)
        if probe.manifest.context.kind == "pointwise":
            pieces = [rows[start : start + MAX_ROWS_PER_CALL] for start in range(0, len(rows), MAX_ROWS_PER_CALL)]
            scores = np.concatenate([probe.session.run(self._gather(probe, piece), None, self._rows.positions[piece]) for piece in pieces])
        else:
            cu_seqlens = np.concatenate([np.zeros(1, np.int64), ends])
            scores = probe.session.run(self._gather(probe, rows), cu_seqlens, self._rows.positions[rows])
        return np.split(scores, np.arange(1, len(batch)) if probe.pools else ends[:-1])

    def _gather(self, probe: LoadedProbe, rows: NDArray[np.int64]) -> dict[Tap, torch.Tensor]:
        first, last = int(rows[0]), int(rows[-1])
        if last - first + 1 == len(rows) and (np.diff(rows) == 1).all():
            return {tap: self._activations[tap][first : last + 1] for tap in probe.manifest.taps}
        indices = torch.from_numpy(rows)
        return {tap: self._activations[tap].index_select(0, indices.to(self._activations[tap].device)) for tap in probe.manifest.taps}

    # ------------------------------------------------------------------------------------------------------------- after the graphs

    def _completion(self, placement: Placement, rollout: Rollout, *, is_follow_up: bool) -> CompletionScores:
        options = rollout.options
        applied = self._info.scored_probes(options)
        scores: dict[str, ProbeScores] = {}
        problem = ""
        for key, name, scored in zip(options.probes, score_keys(applied), applied, strict=True):
            reading = self._readings[id(placement), key]
            problem = self._non_finite(key, reading)
            if problem:
                break
            scores[name] = self._probe_scores(key, reading, scored.reductions, wants_tokens=key in options.token_scores)
        continuation = placement.continuation
        return CompletionScores(
            id=continuation.id,
            status=CompletionStatus.NON_FINITE if problem else CompletionStatus.OK,
            scores={} if problem else scores,
            status_message=problem,
            prompt_ids=rollout.prompt_ids if options.return_token_ids and not is_follow_up else None,
            completion_ids=continuation.token_ids if options.return_token_ids else None,
            inexact_ids=continuation.inexact_ids,
            follow_ups=tuple(self._completion(follow_up, rollout, is_follow_up=True) for follow_up in placement.follow_ups),
        )

    def _non_finite(self, key: str, reading: Reading) -> str:
        """What keeps this reading from being scored; empty if nothing does."""
        probe, calls = self._probes[key], self._calls[key]
        for name, rows in self._sequences(probe, reading):
            for tap in probe.manifest.taps:
                if not self._finite[tap][rows].all():
                    return f"the model gives NaN or an infinity at {tap}, which probe {key} reads"
            if not np.isfinite(calls.scores[calls.numbers[name]]).all():
                return f"probe {key} gives NaN or an infinity"
        return ""

    def _probe_scores(self, key: str, reading: Reading, reductions: Sequence[Reduction], *, wants_tokens: bool) -> ProbeScores:
        probe, calls = self._probes[key], self._calls[key]
        labels = len(probe.manifest.output.labels)
        if probe.pools:
            absent = np.full((1, labels), np.nan, np.float32)
            pooled = [
                calls.scores[calls.numbers[self._pooled_name(probe, reading, selection)]] if selection.any() else absent
                for selection in reading.selections
            ]
            return ProbeScores(reduced=np.stack(pooled))
        tokens = np.concatenate([np.zeros((0, labels), np.float32), *(self._part_scores(probe, calls, part) for part in reading.parts)])
        reduced = [[reduce_scores(tokens[selection], reduction) for reduction in reductions] for selection in reading.selections]
        return ProbeScores(reduced=np.array(reduced, np.float32), tokens=tokens if wants_tokens else None)

    def _part_scores(self, probe: LoadedProbe, calls: _Calls, part: Part) -> NDArray[np.float32]:
        scores = calls.scores[calls.numbers[_chain(probe, part)]]
        return scores[len(scores) - len(self._forest.segments[part.segment].token_ids) :]


def _chain(probe: LoadedProbe, part: Part) -> tuple[int, ...]:
    """The segments that a probe is given, in order, to score a part."""
    return (*part.before, part.segment) if probe.manifest.context.sees_prompt else (part.segment,)


def _batches(sequences: Sequence[NDArray[np.int64]]) -> Iterator[list[NDArray[np.int64]]]:
    """Whole sequences, as many as fit in one call."""
    batch: list[NDArray[np.int64]] = []
    rows = 0
    for sequence in sequences:
        if batch and rows + len(sequence) > MAX_ROWS_PER_CALL:
            yield batch
            batch, rows = [], 0
        batch.append(sequence)
        rows += len(sequence)
    if batch:
        yield batch


def _without_non_finite(activations: Mapping[Tap, torch.Tensor]) -> tuple[dict[Tap, torch.Tensor], dict[Tap, NDArray[np.bool_]]]:
    """Activations where the graphs read them, and which rows are finite; the others are 0, so that no graph carries them to a neighbour."""
    cleaned, finite = {}, {}
    for tap, rows in activations.items():
        good = torch.isfinite(rows).all(dim=1)
        cleaned[tap] = rows if bool(good.all()) else torch.where(good[:, None], rows, torch.zeros_like(rows))
        cleaned[tap] = cleaned[tap].to(session_device(rows.device))
        finite[tap] = good.cpu().numpy()
    return cleaned, finite


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    # of minus the magnitude, so that exp cannot overflow
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)
