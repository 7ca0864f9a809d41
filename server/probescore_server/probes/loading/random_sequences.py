"""Sequences of random rows for a graph, like golden activations or far from them; and sequences cut, joined and packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probescore.types import Tap
from probescore_server.probes.format.graph import CU_SEQLENS, POSITIONS, GraphInputs
from probescore_server.probes.format.manifest import Manifest

# where a sequence may begin in its rollout: as after a short prompt, so that tables of positions are long enough
_MOST_POSITION = 16


@dataclass(frozen=True, eq=False)
class RandomSequences:
    """Where random rows come from.

    Attributes:
        manifest: which inputs the graph takes.
        golden: activations of golden rollouts by tap, ``(N, hidden_size)``, row by row of the same tokens.
        random: draws.
    """

    manifest: Manifest
    golden: Mapping[Tap, NDArray[np.float32]]
    random: np.random.Generator

    def sequence(self, length: int, scale: float, first: int | None = None) -> GraphInputs:
        """One sequence of rows ``scale`` standard deviations from golden ones; positions go on from ``first``, or from some low one."""
        rows = self.random.integers(len(next(iter(self.golden.values()))), size=length)
        inputs: dict[str, NDArray[Any]] = {}
        for tap in self.manifest.taps:
            golden = self.golden[tap].astype(np.float32)
            # a little in every direction: a dimension in which golden activations are all alike is one all the same
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
    """What a graph is given for several sequences in one call, from what it is given for each."""
    together = {name: np.concatenate([inputs[name] for inputs in sequences]) for name in sequences[0]}
    if CU_SEQLENS in together:
        together[CU_SEQLENS] = np.cumsum([0, *map(sequence_length, sequences)], dtype=np.int64)
    return together


def cut_sequence(inputs: GraphInputs, rows: slice) -> GraphInputs:
    """Consecutive rows of a sequence as a sequence of their own."""
    return {name: np.array([0, rows.stop - rows.start], np.int64) if name == CU_SEQLENS else array[rows] for name, array in inputs.items()}


def sequence_length(inputs: GraphInputs) -> int:
    """Rows of a sequence."""
    return len(next(iter(inputs.values())))


def join_parts(first: GraphInputs, second: GraphInputs) -> GraphInputs:
    """Two parts of one sequence, as one."""
    return cut_sequence(pack_sequences([first, second]), slice(0, sequence_length(first) + sequence_length(second)))
