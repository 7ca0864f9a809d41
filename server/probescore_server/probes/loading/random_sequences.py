"""Draws sequences of random activation rows as input of a probe's graph, and cuts, joins and packs sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probescore.types import Tap
from probescore_server.probes.format.graph import CU_SEQLENS, POSITIONS, GraphInputs
from probescore_server.probes.format.manifest import Manifest

# a sequence begins at a position below this, as after a short prompt, so that a graph's table of positions is long enough
_MOST_POSITION = 16


@dataclass(frozen=True, eq=False)
class RandomSequences:
    """Source of random sequences of activations near a probe's golden activations or far from them.

    Attributes:
        manifest: the probe's manifest, which states the inputs of its graph.
        golden: activations of golden rollouts (stored with the scores of the author's code), a dictionary keyed by tap (place in the
            model), ``(N, hidden_size)`` float32 each; row i is of the same token at every tap.
        random: random number generator.
    """

    manifest: Manifest
    golden: Mapping[Tap, NDArray[np.float32]]
    random: np.random.Generator

    def sequence(self, length: int, scale: float, first: int | None = None) -> GraphInputs:
        """Draws one sequence of ``length`` rows that lie ``scale`` standard deviations from golden activations (those of rollouts stored in
        the probe file).

        Positions start at ``first``, or at a random position below 16, and increase by one per row.
        """
        rows = self.random.integers(len(next(iter(self.golden.values()))), size=length)
        inputs: dict[str, NDArray[Any]] = {}
        for tap in self.manifest.taps:
            golden = self.golden[tap].astype(np.float32)
            # a little is added in every direction, so that a dimension in which all golden activations are alike is varied too
            spread = golden.std(axis=0) + np.float32(1e-3) * np.sqrt(np.square(golden).mean())
            inputs[str(tap)] = golden[rows] + np.float32(scale) * spread * self.random.standard_normal(
                (length, golden.shape[1]), np.float32
            )
        if self.manifest.cu_seqlens:
            inputs[CU_SEQLENS] = np.array([0, length], np.int64)
        if self.manifest.positions:
            inputs[POSITIONS] = (self.random.integers(_MOST_POSITION) if first is None else first) + np.arange(length)
        return inputs


def pack_sequences(sequences: Sequence[GraphInputs]) -> GraphInputs:
    """Packs several sequences, each given as the inputs of a graph, into the inputs of one run of the graph."""
    together = {name: np.concatenate([inputs[name] for inputs in sequences]) for name in sequences[0]}
    if CU_SEQLENS in together:
        together[CU_SEQLENS] = np.cumsum([0, *map(sequence_length, sequences)], dtype=np.int64)
    return together


def cut_sequence(inputs: GraphInputs, rows: slice) -> GraphInputs:
    """Returns consecutive rows of a sequence as a new sequence; both sequences are given as the inputs of a graph."""
    return {name: np.array([0, rows.stop - rows.start], np.int64) if name == CU_SEQLENS else array[rows] for name, array in inputs.items()}


def sequence_length(inputs: GraphInputs) -> int:
    """Returns the number of rows of a random sequence, which is held as the inputs of a probe's graph."""
    return len(next(iter(inputs.values())))


def join_parts(first: GraphInputs, second: GraphInputs) -> GraphInputs:
    """Joins two parts of one random sequence, each held as the inputs of a probe's graph, into one sequence."""
    return cut_sequence(pack_sequences([first, second]), slice(0, sequence_length(first) + sequence_length(second)))
