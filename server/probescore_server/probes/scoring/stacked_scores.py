"""Scores completions with probes that run in stacks, sets of probes that are computed together.

The scores of many probes are columns of one matrix, and many columns are reduced at once.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from probescore.reductions import Reduction
from probescore.types import ProbeScores, Tap
from probescore_server.probes.loading.loader import LoadedProbe, StackMember
from probescore_server.probes.scoring.cancellation import ComputationCancelled, WantedRollouts
from probescore_server.probes.scoring.onnx_scores import non_finite_scores, non_finite_tap, overflowing_reduction, reduce_selections
from probescore_server.probes.scoring.selections import ProbeInput, ProbeInputs, ScoreTarget, SegmentRows
from probescore_server.probes.stacking.stack import Stack

MAX_SCORES = 1 << 25
"""Limits how many token scores are held at once, 128 MiB on the device and again on the host; more probes are scored in blocks."""

MAX_REDUCED_SCORES = 1 << 17
"""Limits how many token scores are reduced at once, so that the several float64 copies of the scores fit into a CPU core's cache."""


@dataclass(frozen=True, eq=False)
class StackedProbe:
    """Value object with a probe that runs in a stack, its number in the stack, and the reductions of its scores.

    A stack is a set of probes that are computed together.
    """

    probe: LoadedProbe
    member: StackMember
    reductions: tuple[Reduction, ...]

    @property
    def follow_up(self) -> tuple[int, ...]:
        """Returns the token ids that the probe appends to a completion; probes that append the same ids read the same activations."""
        return () if self.probe.manifest.follow_up is None else self.probe.manifest.follow_up.token_ids

    @property
    def tap(self) -> Tap:
        """Returns the only tap (point in the language model) that the probe reads."""
        return self.probe.manifest.taps[0]

    @property
    def labels(self) -> int:
        """Returns the number of score columns that the probe has, one for each label."""
        return len(self.probe.manifest.output.labels)

    @property
    def treatment(self) -> tuple[object, ...]:
        """Returns a key that is equal for probes whose score columns are selected, reduced and converted in the same way."""
        manifest = self.probe.manifest
        left_out = (manifest.exclude_special_tokens, manifest.special_token_ids)
        return self.follow_up, *self.product, left_out, self.reductions, self.probe.as_probability

    @property
    def product(self) -> tuple[object, ...]:
        """Returns a key that is equal for those probes of a stack whose scores are computed by the same matrix product."""
        return id(self.member.stack), self.tap


class StackedScores:
    """Scorer that computes the scores of stacked probes for a batch.

    Args:
        probe_inputs: source of the tokens that each probe reads of each completion.
        rows: map from token segments to rows of the activations.
        activations: dictionary keyed by tap (point in the language model): activations, ``(N, hidden_size)`` float32 on the model's device,
            without NaN and infinities.
        finite: dictionary keyed by tap: ``(N,)`` bool, true for rows of activations that had neither NaN nor infinity before such rows were
            set to zero.
        wanted: record of the rollouts for which a client still waits; other rollouts get no scores.
    """

    def __init__(
        self,
        probe_inputs: ProbeInputs,
        rows: SegmentRows,
        activations: Mapping[Tap, torch.Tensor],
        finite: Mapping[Tap, NDArray[np.bool_]],
        wanted: WantedRollouts,
    ) -> None:
        self._wanted = wanted
        self._probe_inputs = probe_inputs
        self._rows = rows
        self._activations = activations
        self._finite = finite

    def of(self, asked: Sequence[ScoreTarget], probes: Sequence[StackedProbe]) -> Iterator[tuple[ScoreTarget, str, ProbeScores | str]]:
        """Yields each completion with a probe's ``name@version`` and either the probe's scores or the reason why there are none."""
        alike: dict[tuple[object, ...], list[StackedProbe]] = defaultdict(list)
        for probe in probes:
            alike[probe.treatment].append(probe)
        apart: dict[tuple[int, ...], list[StackedProbe]] = defaultdict(list)
        for group in alike.values():
            apart[group[0].follow_up] += group
        for alike_read in apart.values():
            excerpt = _SelectedRows([self._probe_inputs.of(each, alike_read[0].probe.manifest) for each in asked], self._rows)
            for block in _blocks(alike_read, excerpt.count):
                scores = self._scores(block, excerpt)
                first = 0
                for _, columns in groupby(block, key=lambda probe: probe.treatment):
                    panel = list(columns)
                    last = first + sum(probe.labels for probe in panel)
                    yield from self._panel(panel, scores[:, first:last], excerpt, asked)
                    first = last

    def _scores(self, block: Sequence[StackedProbe], excerpt: _SelectedRows) -> NDArray[np.float32]:
        """Computes the token scores of a block of probes on the host, ``(selected rows, labels of all probes)`` float32."""
        device = self._activations[block[0].tap].device
        scores = torch.empty((excerpt.count, sum(probe.labels for probe in block)), dtype=torch.float32, device=device)
        first = 0
        for _, members in groupby(block, key=lambda probe: probe.product):
            of_stack = list(members)
            stack: Stack = of_stack[0].member.stack.select([probe.member.number for probe in of_stack])
            last = first + sum(stack.labels)
            start = 0
            for rows in excerpt.ranges:
                stack.score(self._activations[of_stack[0].tap][rows.start : rows.stop], scores[start : start + len(rows), first:last])
                start += len(rows)
            first = last
        first = 0
        for as_probability, columns in groupby(block, key=lambda probe: probe.probe.as_probability):
            last = first + sum(probe.labels for probe in columns)
            if as_probability:
                scores[:, first:last].sigmoid_()
            first = last
        on_host: NDArray[np.float32] = scores.cpu().numpy()
        return on_host

    def _panel(
        self, panel: Sequence[StackedProbe], scores: NDArray[np.float32], excerpt: _SelectedRows, asked: Sequence[ScoreTarget]
    ) -> Iterator[tuple[ScoreTarget, str, ProbeScores | str]]:
        """Yields the results of probes whose token scores are selected, reduced and converted in the same way, from these probes' columns
        of token scores.
        """
        tap, reductions, manifest = panel[0].tap, panel[0].reductions, panel[0].probe.manifest
        keys = [probe.probe.manifest.key for probe in panel]
        ends = np.cumsum([probe.labels for probe in panel]).tolist()
        columns = [slice(end - probe.labels, end) for probe, end in zip(panel, ends, strict=True)]
        all_finite = bool(self._finite[tap].all() and np.isfinite(scores).all())
        for each in asked:
            probe_input = self._probe_inputs.of(each, manifest)
            tokens = excerpt.tokens(scores, probe_input)
            problems = {} if all_finite else self._problems(panel, tokens, columns, probe_input)
            try:
                reduced = _reduced(tokens, probe_input.selections, reductions, functools.partial(self._wanted.check, each.rollout))
            except ComputationCancelled:
                continue
            if np.isinf(reduced).any():
                overflowing = (key for key, own in zip(keys, columns, strict=True) if np.isinf(reduced[:, :, own]).any())
                problems = {key: overflowing_reduction(key) for key in overflowing} | problems
            wanted = each.options.token_scores
            for key, own in zip(keys, columns, strict=True):
                if key in problems:
                    yield each, key, problems[key]
                else:
                    yield each, key, ProbeScores(reduced[:, :, own], tokens[:, own].copy() if key in wanted else None)

    def _problems(
        self, panel: Sequence[StackedProbe], tokens: NDArray[np.float32], columns: Sequence[slice], probe_input: ProbeInput
    ) -> dict[str, str]:
        tap = panel[0].tap
        keys = [probe.probe.manifest.key for probe in panel]
        if not self._finite[tap][self._rows.of([scored.segment for scored in probe_input.segments])].all():
            return {key: non_finite_tap(tap, key) for key in keys}
        good = np.asarray(np.isfinite(tokens).all(axis=0))
        return {key: non_finite_scores(key) for key, own in zip(keys, columns, strict=True) if not good[own].all()}


class _SelectedRows:
    """Selection of those rows of a batch's activations that some probes read of some completions, each row once and in order.

    Attributes:
        ranges: ranges of the selected rows among the batch's rows.
        count: number of selected rows.
    """

    def __init__(self, probe_inputs: Sequence[ProbeInput], rows: SegmentRows) -> None:
        self.ranges: list[range] = []
        self.count = 0
        self._places: dict[int, range] = {}
        segments = {scored.segment for probe_input in probe_inputs for scored in probe_input.segments}
        for segment, own in sorted(((segment, rows.range_of(segment)) for segment in segments), key=lambda each: each[1].start):
            self._places[segment] = range(self.count, self.count + len(own))
            self.count += len(own)
            if self.ranges and self.ranges[-1].stop == own.start:
                own = range(self.ranges.pop().start, own.stop)
            self.ranges.append(own)

    def tokens(self, scores: NDArray[np.float32], probe_input: ProbeInput) -> NDArray[np.float32]:
        """Picks the scores of the T tokens that a probe reads of one completion from the scores of all rows of a batch: ``(T, labels)``, a
        view if these rows are adjacent.
        """
        places = [self._places[scored.segment] for scored in probe_input.segments]
        if len(places) == 1:
            return scores[places[0].start : places[0].stop]
        return np.concatenate([scores[:0], *(scores[place.start : place.stop] for place in places)])


def _blocks(probes: Sequence[StackedProbe], rows: int) -> Iterator[list[StackedProbe]]:
    """Groups probes into blocks, each with at most ``MAX_SCORES`` token scores, so that the scores fit into memory."""
    block: list[StackedProbe] = []
    columns = 0
    for probe in probes:
        if block and (columns + probe.labels) * rows > MAX_SCORES:
            yield block
            block, columns = [], 0
        block.append(probe)
        columns += probe.labels
    if block:
        yield block


def _reduced(
    tokens: NDArray[np.float32], selections: NDArray[np.bool_], reductions: Sequence[Reduction], check: Callable[[], None]
) -> NDArray[np.float32]:
    """Reduces token scores to one number for each selection of tokens, each reduction (such as the mean) and each label: ``(selections,
    reductions, labels)`` float32.

    Some columns are reduced at a time, more of them if fewer tokens are selected.
    """
    reduced = np.empty((len(selections), len(reductions), tokens.shape[1]), np.float32)
    for row, selection in enumerate(selections):
        selected = tokens if selection.all() else tokens[selection]
        whole = np.ones((1, len(selected)), np.bool_)
        step = max(1, MAX_REDUCED_SCORES // max(1, len(selected)))
        for first in range(0, tokens.shape[1], step):
            columns = slice(first, first + step)
            reduced[row, :, columns] = reduce_selections(selected[:, columns], whole, reductions, check)[0]
    return reduced
