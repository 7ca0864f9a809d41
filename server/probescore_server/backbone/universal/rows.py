"""Chooses the short sequences of a forest that run together, as the padded rows of one forward pass.

A forest is a batch of token segments arranged in trees, so that shared prefixes are computed once. A forward pass reads every weight once,
whatever it computes, so that a few tokens take nearly as long as some hundred. The rows of a forward pass are padded at the end to the
length of the longest row, where a causal model does not look.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from probescore_server.backbone.forest import Forest
from probescore_server.backbone.kv_cache import common_beginning

MAX_ROW_TOKENS = 128
"""Limits the tokens of a sequence that runs together with others; a longer sequence gets a forward pass of its own."""

MAX_FORWARD_TOKENS = 512
"""Limits the tokens of all rows of a forward pass, padding included. A higher limit would not be faster."""

FEW_TOKENS = 128
"""Number of tokens of a forward pass up to which it is faster to pad rows of different lengths than to run a second forward pass."""

MAX_PADDING = 1 / 8
"""Limits the share of padding in the tokens of a forward pass with more than ``FEW_TOKENS`` tokens."""


@dataclass(frozen=True, slots=True)
class Row:
    """Value object with a chain of token segments (runs of tokens) without branches, which runs as one row of a forward pass.

    Attributes:
        segments: each segment is the only continuation of the one before, and nothing continues the last. Only the last segment may be read
            by probes: attention multiplies masked tokens by zero, so that NaN of a later token would spread to earlier ones.
        tokens: number of tokens of all segments.
    """

    segments: tuple[int, ...]
    tokens: int


def short_row(forest: Forest, children: Sequence[Sequence[int]], first: int) -> Row | None:
    """Returns the row of a forward pass that begins with the given segment (run of tokens). Returns ``None`` if the segments after it
    branch, if the row would be too long, or if probes read activations before the row's end.
    """
    segments, tokens = [first], len(forest.segments[first].token_ids)
    while tokens <= MAX_ROW_TOKENS:
        match children[segments[-1]]:
            case []:
                return Row(tuple(segments), tokens)
            case [only] if not forest.segments[segments[-1]].read:
                segments.append(only)
                tokens += len(forest.segments[only].token_ids)
            case _:
                return None
    return None


def together(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Divides sequences, each a row, among forward passes, and yields the rows of each pass: as many rows of similar length as fit into
    one.
    """
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: row.tokens):
        size = row.tokens * (len(batch) + 1)
        real = row.tokens + sum(each.tokens for each in batch)
        if batch and (size > MAX_FORWARD_TOKENS or (size > FEW_TOKENS and size - real > MAX_PADDING * size)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def shared_beginnings(forest: Forest, rows: Sequence[Row]) -> list[int]:
    """Returns for each row (sequence of tokens) the number of its first tokens that are also the first tokens of another row."""
    ids = [np.concatenate([forest.segments[index].token_ids for index in row.segments]) for row in rows]
    order = sorted(range(len(rows)), key=lambda number: ids[number].astype(">i4").tobytes())
    shared = [0] * len(rows)
    for one, other in pairwise(order):
        both = common_beginning(ids[one], ids[other])
        shared[one], shared[other] = max(shared[one], both), max(shared[other], both)
    return shared
