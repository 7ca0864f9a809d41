"""The run: every variant scores every unit before the next unit begins, and what they give is compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.loads import Load, Unit
from benchmarks.process import Measurement, VariantProcess
from benchmarks.ratios import Spread
from benchmarks.variants import OURS

BOUND = 1e-4
"""Largest difference of a score from A's, as a multiple of the standard deviation of A's scores, in float32."""

Truth = Callable[[Unit], NDArray[np.float32]]


@dataclass
class Record:
    """What one variant did with one load.

    Attributes:
        seconds: by repetition: of the processor, or on a GPU of the clock.
        beside_seconds: by repetition, of the same work the other way (`Load.compared`).
        errors: of every score, as multiples of the standard deviation of the unit's.
        largest_difference: of a score, absolute.
        peak_bytes: above the weights.
        tokens_computed: by repetition, as the variant counts them.
        flops: by repetition; only the floor counts them.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    beside_seconds: list[float] = field(default_factory=list)
    errors: list[NDArray[np.float64]] = field(default_factory=list)
    largest_difference: float = 0.0
    peak_bytes: int = 0
    tokens_computed: list[int] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)

    def add(self, measured: list[Measurement], beside: list[Measurement], *, by_clock: bool) -> None:
        """One repetition."""
        self.cpu_seconds.append(sum(one.cpu_seconds for one in measured))
        self.wall_seconds.append(sum(one.wall_seconds for one in measured))
        self.seconds.append((self.wall_seconds if by_clock else self.cpu_seconds)[-1])
        if beside:
            self.beside_seconds.append(sum(one.wall_seconds if by_clock else one.cpu_seconds for one in beside))
        self.peak_bytes = max(self.peak_bytes, *(one.peak_bytes for one in measured))
        self.tokens_computed.append(sum(one.facts["tokens_computed"] for one in measured))
        self.flops.append(sum(one.facts.get("flops", 0) for one in measured))

    def check(self, scores: NDArray[np.float32], truth: NDArray[np.float32]) -> None:
        """Compares the scores of a unit with the true ones, both ``(rows, probes)``.

        Raises:
            ValueError: there are not as many.
        """
        if scores.shape != truth.shape:
            raise ValueError(f"scores of shape {scores.shape}, expected {truth.shape}")
        difference = np.abs(scores.astype(np.float64) - truth)
        self.largest_difference = float(np.maximum(self.largest_difference, difference.max()))
        self.errors.append((difference / truth.std()).ravel())

    @property
    def largest_error(self) -> float:
        """As a multiple of the scores' standard deviation; NaN if any score is not finite, 0 for the floor, which gives none."""
        return float(np.concatenate(self.errors).max()) if self.errors else 0.0

    @property
    def error_percentiles(self) -> dict[str, float]:
        """p50, p99 and the largest error."""
        errors = np.concatenate(self.errors) if self.errors else np.zeros(1)
        return {"p50": float(np.percentile(errors, 50)), "p99": float(np.percentile(errors, 99)), "max": float(errors.max())}


@dataclass
class Comparison:
    """What came out for one load.

    Attributes:
        records: by variant.
        chosen: by variant, what its warm-up found.
        tokens: of one repetition: ``real``, ``padded``, ``completion``.
    """

    load: Load
    records: dict[str, Record]
    chosen: dict[str, dict[str, Any]]
    tokens: dict[str, int]

    def over(self, variant: str, base: str) -> Spread | None:
        """How often `variant` goes into `base`; ``None`` if either is not there."""
        if variant not in self.records or base not in self.records:
            return None
        return Spread.of_ratios(self.records[base].seconds, self.records[variant].seconds)

    def tokens_per_second(self, variant: str) -> float:
        """Real tokens, a prompt counted once per completion, by the clock."""
        return self.tokens["real"] / median(self.records[variant].wall_seconds)

    def beside(self, variant: str) -> Spread | None:
        """The load over the same work the other way."""
        record = self.records[variant]
        return Spread.of_ratios(record.seconds, record.beside_seconds) if record.beside_seconds else None

    def disagreeing(self, bound: float = BOUND) -> list[str]:
        """The variants with a score that is further off than the bound, or not finite."""
        return [name for name, record in self.records.items() if not record.largest_error <= bound]


def compare(
    load: Load,
    variants: Mapping[str, VariantProcess],
    *,
    vocab_size: int,
    repeats: int,
    by_clock: bool = False,
    truth: Truth | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Runs a load.

    Args:
        variants: warmed up here. Without ``truth``, ``a`` is among them.
        vocab_size: ids are below it.
        repeats: how often the load is repeated, with new ids.
        by_clock: whether time is that of the clock, as on a GPU, instead of the processor's.
        truth: the scores that are right; by default those of ``a``.
        progress: told what begins.
    """
    records = {name: Record() for name in variants}
    warm_up = next(load.units(-1, vocab_size))
    chosen = {}
    for name, variant in variants.items():
        progress(f"{load.name}: warming up {name}")
        chosen[name] = variant.warm_up(warm_up)
    for repetition in range(repeats):
        units = list(load.units(repetition, vocab_size))
        measured: dict[str, list[Measurement]] = {name: [] for name in variants}
        beside: dict[str, list[Measurement]] = {name: [] for name in variants}
        for number, unit in enumerate(units):
            # each goes first in turn, so that none is always measured after the same other
            names = list(variants)[number % len(variants) :] + list(variants)[: number % len(variants)]
            for name in names:
                progress(f"{load.name}: repetition {repetition + 1} of {repeats}, group {number + 1} of {len(units)}, {name}")
                measured[name].append(variants[name].score(unit))
                other = load.compared(unit, vocab_size) if name in OURS else None
                if other is not None:
                    beside[name].append(variants[name].score(other))
            _check(records, {name: found[-1].scores for name, found in measured.items()}, None if truth is None else truth(unit))
        for name, record in records.items():
            record.add(measured[name], beside[name], by_clock=by_clock)
    tokens = {
        "real": sum(unit.real_tokens for unit in units),
        "padded": sum(unit.padded_tokens for unit in units),
        "completion": sum(unit.completion_tokens for unit in units),
    }
    return Comparison(load, records, chosen, tokens)


def _check(records: dict[str, Record], scores: dict[str, NDArray[np.float32] | None], truth: NDArray[np.float32] | None) -> None:
    expected = scores["a"] if truth is None else truth
    if expected is None:
        raise ValueError("A gave no scores")
    for name, found in scores.items():
        if found is not None:
            records[name].check(found, expected)
