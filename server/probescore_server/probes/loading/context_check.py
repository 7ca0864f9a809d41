"""Tests whether a probe graph's scores depend on more tokens than the ``context`` in the probe's manifest states.

A graph can be right for the golden rollouts and wrong for all other input: its results may be tied to the sizes with which it was exported,
it may ignore where a fourth sequence begins, or it may read neighbouring sequences. Therefore sequences of random rows are scored, each
alone. The sequences must keep their scores when they are packed together, permuted, placed far behind other sequences, cut where the
context says that nothing is lost, and scored a second time. The scores of a sequence alone define the meaning of the probe; they can be
compared with those of the author's code only where a probe is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from probescore_server.errors import ProbeRefused
from probescore_server.probes.format.graph import CU_SEQLENS, POSITIONS, GraphFailed, GraphInputs, WrongShape, subgraphs
from probescore_server.probes.loading.random_sequences import RandomSequences, cut_sequence, join_parts, pack_sequences, sequence_length

Run = Callable[[GraphInputs], NDArray[np.float32]]
"""Computes a probe's graph on the given inputs and returns its scores, ``(rows, labels)`` or ``(sequences, labels)`` float32.

Raises ``GraphFailed`` where the graph cannot compute them.
"""

SEQUENCES = 128
"""Limits how many sequences a probe's graph is given in one run, both in the test at load and when it serves."""

SMALLEST_CALL, QUADRATIC_CALL, LARGEST_CALL = 256, 1024, 4096
"""States how many rows a graph is given in one run: in the smallest trial, and in the largest runs of two kinds of graphs.

``QUADRATIC_CALL`` is for a graph whose memory may grow with the square of the rows, ``LARGEST_CALL`` for any other.
"""

LONGEST_SHARE = 4
"""Limits the length of a sequence that shares a run of a graph with others: at most one n-th of the run's rows, where n is this number. A
longer sequence is run by itself.
"""

ROUNDING = 1e-4
"""Limits, in standard deviations, how much a served score may depend on the other sequences of the same run."""

WRONG = 1e-2
"""States the smallest difference of scores, in standard deviations, that cannot be explained by rounding.

A difference between ``ROUNDING`` and ``WRONG`` arises where sums run over all rows of a run. The runs are then kept smaller, down to one
sequence.
"""

_SCALES = (0.0, 0.3, 1.0, 10.0, 0.0, 0.3, 1.0, 100.0)
"""Lists how far random rows lie from golden activations (those of rollouts stored in the probe file), in standard deviations; 0 stands for
golden activations in another order.
"""

_NEIGHBOURS = "a rollout's scores do not depend on its neighbours"
_LATER = "a token's score does not depend on later tokens"
_AGAIN = "the same input has the same scores each time"
_WINDOW = "a token's score depends on context.window"

# positions at which a sequence may begin in an unusually long rollout
_FAR_POSITIONS = (1_000, 100_000)
# lengths of sequences on which a graph is compared with its author's code; the longest only where memory does not grow with their square
_AUTHOR_LENGTHS, _AUTHOR_LENGTHS_LINEAR = (1024, 2048), (4096, 16_384)
# the share of a run's scores that may jump where rounding takes a number across a threshold
_EXCUSED = 0.01
_EPS = float(np.finfo(np.float32).eps)
_ROUNDED = np.array([1 - 8 * _EPS, 1 + 8 * _EPS], np.float32)


def rows_tried(run: Run, model: onnx.ModelProto, around: RandomSequences, file: str) -> int:
    """Tests a probe's graph on larger and more varied inputs than it will serve, and finds the most rows that one run may be given.

    Args:
        run: function that runs the graph.
        model: the same graph as an ONNX model.
        around: source of random sequences near the golden activations (those of rollouts stored in the probe file).
        file: name of the probe file, for messages.

    Returns:
        The most rows that the graph may be given in one run if they are of several sequences; 1 means one sequence per run.

    Raises:
        ProbeRefused: the scores depend on more than the manifest's context states, or differ between two runs on the same input.
    """
    allowed = 0
    for rows in (SMALLEST_CALL, QUADRATIC_CALL if _may_be_quadratic(model) else LARGEST_CALL):
        trial = _GraphTrial(run, around, rows, file)
        if not trial.enough:
            if allowed:
                return allowed
            raise ProbeRefused(file, "graph", "no finite scores for golden activations in another order", "scores for what is like them")
        findings = list(trial.findings())
        # a sequence by itself has the right scores, even where a run on several sequences gives other scores
        alone_is_right = around.manifest.context.kind != "pointwise"
        for finding in findings:
            # where smaller runs have passed, a longer sequence is cut into pieces that its window allows
            by_company = finding.promise == _NEIGHBOURS and (alone_is_right or allowed)
            by_company = by_company or (allowed and finding.promise.startswith(_WINDOW))
            if finding.difference > (WRONG if by_company else ROUNDING):
                raise finding.refusal(file)
        if any(finding.difference > ROUNDING for finding in findings):
            break
        allowed = rows
    if allowed == LARGEST_CALL and (far := trial.far_behind()).difference > WRONG:
        raise far.refusal(file)
    return max(allowed, 1)


def far_lengths(model: onnx.ModelProto) -> tuple[int, ...]:
    """Returns the lengths, in rows, of long sequences on which a graph is compared with its author's code, as far as memory allows."""
    return _AUTHOR_LENGTHS if _may_be_quadratic(model) else _AUTHOR_LENGTHS + _AUTHOR_LENGTHS_LINEAR


def check_author_agrees(
    run: Run, author: Run, around: RandomSequences, longest: int, tolerance: float, file: str, lengths: Sequence[int] = ()
) -> None:
    """Compares a graph with its author's code on sequences of random rows, one sequence at a time.

    Among the sequences are some shorter and some longer than every example, some near golden activations and some far from them, and some
    at positions that no example has.

    Args:
        run: function that runs the graph.
        author: function that scores one sequence with the author's code; a sequence on which the code fails, or gives scores that are not
            finite, is not compared.
        around: source of random sequences near the golden activations.
        longest: number of rows of the longest example.
        tolerance: largest difference allowed, in standard deviations.
        file: name of the probe file, for messages.
        lengths: further lengths in rows to try, such as those of ``far_lengths``.

    Raises:
        ProbeRefused: the graph and the author's code differ by more than the tolerance.
    """
    short = (1, 2, 3, 5, 7, longest + 1, 2 * longest, 4 * longest + 1, min(16 * longest, QUADRATIC_CALL))
    tried = [around.sequence(length, scale) for length in short for scale in (0.0, 0.3, 1.0, 10.0)]
    tried += [around.sequence(length, 1.0) for length in lengths]
    if around.manifest.positions:
        tried += [around.sequence(longest, 1.0, first) for first in _FAR_POSITIONS]
    cases: list[tuple[GraphInputs, NDArray[np.float64]]] = []
    for inputs in tried:
        try:
            scores = np.asarray(author(inputs), np.float64)
        except Exception:  # noqa: S112 (whatever the author's code raises: it need not know such rollouts)
            continue
        scores = scores.reshape(len(scores), -1)
        if np.isfinite(scores).all():
            cases.append((inputs, scores))
    if not cases:
        return
    # two implementations round differently in every row, and not only where a threshold lies
    comparison = _ScoreComparison(run, around, np.concatenate([scores for _, scores in cases]), tolerance, excused=1.0)
    for inputs, scores in cases:
        finding = comparison.of_one(inputs, slice(None), scores, "the scores of the author's code")
        if finding.difference > tolerance:
            raise finding.refusal(file, tolerance)


@dataclass(frozen=True)
class _Finding:
    """Value object with the largest difference between scores that should be equal, in standard deviations.

    The object also names the promise that the difference breaks, and the run of the graph in which the difference was found.
    """

    difference: float
    promise: str
    where: str

    def refusal(self, file: str, tolerance: float = ROUNDING) -> ProbeRefused:
        found = f"scores off by {self.difference:.2g} of their standard deviation {self.where}"
        return ProbeRefused(file, "graph", found, f"at most {tolerance:g}: {self.promise}")


@dataclass(frozen=True, eq=False)
class _ScoreComparison:
    """Comparison of the scores that a graph gives with the expected scores.

    Attributes:
        run: function that runs the graph.
        around: source of random numbers, which also knows the graph's taps (places in the model).
        usual: scores of activations that resemble golden ones, ``(N, labels)`` float64; the unit is their standard deviation, or a score's
            distance from their median where that is larger.
        tolerance: differences up to this many units count as none.
        excused: share of the scores of one run whose difference may be explained by rounding.
    """

    run: Run
    around: RandomSequences
    usual: NDArray[np.float64]
    tolerance: float = ROUNDING
    excused: float = _EXCUSED

    def of_one(self, inputs: GraphInputs, rows: slice, expected: NDArray[Any], promise: str) -> _Finding:
        """Compares the scores that a probe's graph gives for some rows of one sequence with the expected scores."""
        return self.of(inputs, rows, expected, lambda _: self.noise(inputs, rows), promise)

    def of(
        self,
        inputs: GraphInputs,
        rows: slice,
        expected: NDArray[Any],
        noise: Callable[[NDArray[np.bool_]], NDArray[np.float64]],
        promise: str,
    ) -> _Finding:
        """Compares some of the scores of one run of a graph with the expected scores.

        ``noise`` is a function that returns, for the scores that differ too much, the largest difference that rounding explains.
        """
        where = f"in a call of {sequence_length(inputs)} rows in {len(inputs.get(CU_SEQLENS, (0, 0))) - 1} sequences"
        try:
            beyond = _beyond(self.run(inputs)[rows], expected)
        except GraphFailed as failed:
            return _Finding(np.inf, f"{promise}; {failed}", where)
        unit = np.maximum(_spread(self.usual), np.abs(expected.astype(np.float64) - np.median(self.usual, axis=0)))
        over: NDArray[np.bool_] = np.any(beyond > self.tolerance * unit, axis=1)
        # The scores of a graph with thresholds jump where rounding takes a number across one; a different rounding shows by how much.
        if 0 < over.sum() <= max(1, self.excused * len(over)):
            beyond = np.maximum(beyond - np.multiply(4, noise(over)), 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return _Finding(float(np.where(beyond == 0, 0, beyond / unit).max()), promise, where)

    def noise(self, inputs: GraphInputs, rows: slice = slice(None)) -> NDArray[np.float64]:
        """Measures how much a graph's scores change if its activations are rounded differently, ``(rows, labels)``."""
        scores = self.run(inputs)[rows]
        worst = np.zeros(scores.shape)
        for _ in range(3):
            factors = {str(tap): self.around.random.choice(_ROUNDED, inputs[str(tap)].shape) for tap in self.around.manifest.taps}
            try:
                found = self.run({name: array * factors[name] if name in factors else array for name, array in inputs.items()})
            except GraphFailed:
                continue
            changed = _beyond(found[rows], scores)
            worst = np.maximum(worst, np.where(np.isfinite(changed), changed, 0))
        return worst


class _GraphTrial:
    """Trial of a graph on sequences of random rows: scores of each sequence alone are compared with its scores in larger runs.

    Args:
        run: function that runs the graph.
        around: source of the random sequences.
        rows: number of rows of all sequences together.
        file: name of the probe file, for messages.

    Attributes:
        enough: whether enough sequences of golden activations (those of rollouts stored in the probe file) have finite scores.
    """

    def __init__(self, run: Run, around: RandomSequences, rows: int, file: str) -> None:
        self._run = run
        self._around = around
        self._context = around.manifest.context
        self._random = around.random
        self._rows = rows
        self._sequences: list[GraphInputs] = []
        self._scores: list[NDArray[np.float32]] = []
        near: list[NDArray[np.float32]] = []
        golden_like = 0
        for length, scale in zip(_lengths(rows, self._random), cycle(_SCALES)):
            inputs = around.sequence(length, scale)
            scores = self._alone(inputs, file)
            if scores is None:
                continue  # a sequence without scores by itself has none in a larger call either
            self._sequences.append(inputs)
            self._scores.append(scores)
            near += [scores] if scale <= 1 else []
            golden_like += scale == 0
        self.enough = golden_like >= SEQUENCES // 8
        self._compare = _ScoreComparison(run, around, np.concatenate(near).astype(np.float64) if near else np.zeros((1, 1)))

    # ------------------------------------------------------------------------------------------------------------ the comparisons

    def findings(self) -> Iterator[_Finding]:
        """Runs the graph on many inputs, compares the scores with those of each sequence alone, and yields one finding for each run."""
        count = len(self._sequences)
        by_length = np.argsort([-sequence_length(inputs) for inputs in self._sequences], kind="stable")
        short = by_length[count // 8 :]
        few = [self._random.choice(short, size, replace=False) for size in (2, 3, 4, 5, 9, 17, 33, 65) if size < len(short)]
        every = np.arange(count)
        for order in (*few, every, every[::-1], by_length, self._random.permutation(count), every):
            yield self._together(order, _NEIGHBOURS)
        for index in (*by_length[:4], *short[:4]):
            scores = self._scores[index]
            yield self._compare.of(self._sequences[index], slice(None), scores, lambda over: np.zeros((len(over), 1)), _AGAIN)
        if self._context.kind == "pointwise":
            yield self._shuffled()
        if self._context.kind == "causal":
            yield from self._shortened()

    def far_behind(self) -> _Finding:
        """Compares the scores of a sequence alone with its scores in one run of the probe's ONNX graph over many sequences, with more
        rows than a server ever gives to the graph at once.
        """
        order = np.arange(len(self._sequences))
        return self._together(np.concatenate([order, order[::-1], order]), _NEIGHBOURS)

    def _together(self, order: NDArray[np.int64], promise: str) -> _Finding:
        sequences, scores = [self._sequences[index] for index in order], [self._scores[index] for index in order]

        def noise(over: NDArray[np.bool_]) -> NDArray[np.float64]:
            of_each = np.split(over, np.cumsum([len(each) for each in scores])[:-1])
            return np.concatenate(
                [
                    self._compare.noise(inputs) if its.any() else np.zeros(known.shape)
                    for inputs, known, its in zip(sequences, scores, of_each, strict=True)
                ]
            )

        return self._compare.of(pack_sequences(sequences), slice(None), np.concatenate(scores), noise, promise)

    def _shuffled(self) -> _Finding:
        """Compares the scores of rows mixed with the rows of other sequences with the scores of the same rows in their own sequence."""
        scores = np.concatenate(self._scores)
        order = self._random.permutation(len(scores))
        rows = {name: array[order] for name, array in pack_sequences(self._sequences).items()}
        return self._compare.of_one(rows, slice(None), scores[order], _NEIGHBOURS)

    def _shortened(self) -> Iterator[_Finding]:
        """Compares scores of sequences whose later rows, or rows before the probe's window, are removed or replaced."""
        window = self._context.window or 0
        # where memory allows it, this sequence is longer than any run on several sequences
        lone_rows = 3 * LARGEST_CALL if self._rows == LARGEST_CALL else max(self._rows, min(2 * window, LARGEST_CALL))
        lone = self._around.sequence(lone_rows, 1.0)
        longest = int(np.argmax([sequence_length(inputs) for inputs in self._sequences]))
        for inputs, scores in ((lone, self._finite(lone)), (self._sequences[longest], self._scores[longest])):
            if scores is None:
                continue
            length = len(scores)
            # positions stay those of the rollout, whatever takes the place of its tokens
            other = {**self._around.sequence(length, 10.0), **{name: inputs[name] for name in inputs if name == POSITIONS}}
            for kept in sorted({1, length // 3 + 1, length - 1} - {0, length}):
                before, after = slice(0, kept), slice(kept, length)
                for given in (cut_sequence(inputs, before), join_parts(cut_sequence(inputs, before), cut_sequence(other, after))):
                    yield self._compare.of_one(given, before, scores[before], _LATER)
            if not 0 < window < length:
                continue
            promise = f"{_WINDOW} = {window} tokens, itself included"
            for end in sorted({length, window + 1, int(self._random.integers(window + 1, length + 1))}):
                before, seen = slice(0, end - window), cut_sequence(inputs, slice(end - window, end))
                for given in (seen, join_parts(cut_sequence(other, before), seen)):
                    yield self._compare.of_one(given, slice(-1, None), scores[end - 1 : end], promise)

    def _alone(self, inputs: GraphInputs, file: str) -> NDArray[np.float32] | None:
        try:
            return self._finite(inputs)
        except WrongShape as wrong:
            raise ProbeRefused(
                file, "graph", str(wrong), f"a row of scores for each of {sequence_length(inputs)} rows, or for 1 sequence"
            ) from None

    def _finite(self, inputs: GraphInputs) -> NDArray[np.float32] | None:
        """Runs a probe's graph on one sequence alone and returns its scores, or ``None`` if the graph fails or gives scores that are not
        finite.
        """
        try:
            scores = self._run(inputs)
        except WrongShape:
            raise
        except GraphFailed:
            return None
        return scores if np.isfinite(scores).all() else None


def _lengths(rows: int, random: np.random.Generator) -> list[int]:
    """Draws random lengths of ``SEQUENCES`` sequences, a few long ones among many short ones, whose sum is nearly ``rows``."""
    long = [rows // LONGEST_SHARE, rows // 16, rows // 16 + 1]
    mean = (rows - sum(long)) / (SEQUENCES - len(long))
    short = random.integers(1, max(int(2 * mean), 2), SEQUENCES - len(long))
    return [int(length) for length in random.permutation([*long, *short])]


def _beyond(found: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns by how much scores differ beyond one rounding of the scores themselves; infinite where scores cannot be compared."""
    if found.shape != expected.shape:
        return np.full(expected.shape, np.inf)
    exact = expected.astype(np.float64)
    return np.nan_to_num(np.maximum(np.abs(found - exact) - 4 * _EPS * np.abs(exact), 0), nan=np.inf, posinf=np.inf)


def _spread(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the standard deviation of each label's scores, without the outermost scores.

    The outermost scores would make other differences seem small.
    """
    low, high = np.quantile(scores, (0.05, 0.95), axis=0)
    inner = np.clip(scores, low, high).std(axis=0)
    spread: NDArray[np.float64] = np.where(inner > 0, inner, scores.std(axis=0))
    return spread


def _may_be_quadratic(model: onnx.ModelProto) -> bool:
    """Returns whether a probe's graph may compute a value of which two axes grow with the number of input rows, so that memory grows with
    its square.
    """
    for graph in subgraphs(onnx.shape_inference.infer_shapes(model, data_prop=True).graph):
        described = (*graph.value_info, *graph.output)
        shapes = {value.name: value.type.tensor_type.shape for value in described if value.type.tensor_type.HasField("shape")}
        for name in (name for node in graph.node for name in node.output if name):
            if name not in shapes or sum(not dim.HasField("dim_value") for dim in shapes[name].dim) > 1:
                return True
    return False
