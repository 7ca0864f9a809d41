"""Which short sequences of a forest run together, as the rows of one forward.

A forward reads every weight once, whatever it computes, so that a few tokens cost nearly as much as some hundred. Rows are as long as the
longest and padded behind, where no causal model looks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from probescore_server.backbone.forest import Forest
from probescore_server.backbone.kv_cache import common_beginning

MAX_ROW_TOKENS = 128
"""Of a sequence that is run with others: a longer one fills a forward by itself."""

MAX_FORWARD_TOKENS = 512
"""Of all rows of a forward, padding included. More would not be faster."""

FEW_TOKENS = 128
"""Up to so many, padding costs less than another forward."""

MAX_PADDING = 1 / 8
"""Of a forward's tokens, once there are more."""


@dataclass(frozen=True, slots=True)
class Row:
    """A segment and what alone continues it, as one sequence.

    Attributes:
        segments: each the only one that continues the one before; nothing continues the last. Only the last may be read: where attention
            multiplies by zero what it must not see, NaN of a later token would reach it.
        tokens: of all of them.
    """

    segments: tuple[int, ...]
    tokens: int


def short_row(forest: Forest, children: Sequence[Sequence[int]], first: int) -> Row | None:
    """The row that begins with a segment; ``None`` if it branches, is read on the way, or is long."""
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
    """Rows of about the same length, as many as fit into a forward."""
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
    """For each row, with how many tokens another one begins as it does."""
    ids = [np.concatenate([forest.segments[index].token_ids for index in row.segments]) for row in rows]
    order = sorted(range(len(rows)), key=lambda number: ids[number].astype(">i4").tobytes())
    shared = [0] * len(rows)
    for one, other in pairwise(order):
        both = common_beginning(ids[one], ids[other])
        shared[one], shared[other] = max(shared[one], both), max(shared[other], both)
    return shared
