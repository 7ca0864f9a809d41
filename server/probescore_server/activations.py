"""Activations as they are asked for and as they come out: taps by name or pattern, pools, and what is read of one completion.

Plain frozen data, free of torch, as ``rollouts`` is.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from probescore.types import CompletionStatus, Hook, Tap
from probescore_server.errors import InvalidRequest

MAX_BATCH_BYTES = 1 << 30
"""Of activations, float32 on the model's device, that a batch holds at once."""


class Pool(str, Enum):
    """What becomes of the activations of the tokens that count: one row each, or one row for all, feature by feature."""

    TOKENS = "tokens"
    MEAN = "mean"
    LAST = "last"
    MAX = "max"


@dataclass(frozen=True)
class ActivationReads:
    """What is wanted of every completion.

    Attributes:
        taps: without duplicates, in the order asked.
        pools: without ``tokens``.
        tokens: whether every token's activations are wanted.
    """

    taps: tuple[Tap, ...]
    pools: tuple[Pool, ...]
    tokens: bool


@dataclass(frozen=True, eq=False)
class CompletionActivations:
    """What was read of one completion, or of a follow-up to one.

    Attributes:
        group_index, completion_index: where the completion stands in what was asked.
        id: echoed.
        status: ``NON_FINITE`` where the model gives NaN or an infinity at a tap; ``tokens`` and ``pooled`` are empty then.
        token_ids: ``(T,)`` int32, the tokens in scope: entry *i* of ``tokens`` is read at the position whose input is ``token_ids[i]``.
        selections: ``(1 + spans, T)`` bool: which of them count, for the whole scope under the mask, and for each span.
        spans: their names.
        tokens: by name of a tap ``(T, hidden_size)`` float32, whether a token counts or not; empty unless asked for.
        pooled: by name of a tap ``(1 + spans, pools, hidden_size)`` float32, pools in the order asked. NaN where nothing was selected.
        status_message: why there is nothing, for people.
        inexact_ids: some ids came from text.
        follow_ups: in the order asked.
    """

    group_index: int
    completion_index: int
    id: str
    status: CompletionStatus
    token_ids: NDArray[np.int32]
    selections: NDArray[np.bool_]
    spans: tuple[str, ...]
    tokens: Mapping[str, NDArray[np.float32]]
    pooled: Mapping[str, NDArray[np.float32]]
    status_message: str = ""
    inexact_ids: bool = False
    follow_ups: tuple[CompletionActivations, ...] = ()


def all_taps(num_hidden_layers: int) -> tuple[Tap, ...]:
    """Every tap of a model, hook by hook."""
    return tuple(Tap(hook, layer) for hook in Hook for layer in (range(num_hidden_layers) if hook.has_layer else [None]))


def matching_taps(patterns: Sequence[str | Tap] | str | Tap, known: Sequence[Tap], *, whose: str) -> tuple[Tap, ...]:
    """The taps that are meant, in the order of the patterns, then in that of ``known``.

    Args:
        patterns: each a tap, its name, or a pattern of names as a shell has them: ``resid_post.*``, ``*.6``, ``*``.
        known: what may be meant.
        whose: what has these taps, for messages.

    Raises:
        InvalidRequest: naming ``taps[i]``: it means none of them.
    """
    found: dict[Tap, None] = {}
    for index, pattern in enumerate([patterns] if isinstance(patterns, str | Tap) else patterns):
        meant = [tap for tap in known if fnmatch.fnmatchcase(str(tap), str(pattern))]
        if not meant:
            raise InvalidRequest(f"taps[{index}]", f"{str(pattern)[:100]!r} is none of {whose}: {_shown(known)}", "UNKNOWN_TAP")
        found.update(dict.fromkeys(meant))
    if not found:
        raise InvalidRequest("taps", f"at least one is needed; {whose} are {_shown(known)}")
    return tuple(found)


def resolve_pools(asked: Sequence[str] | str) -> tuple[Pool, ...]:
    """What should become of tokens, without duplicates.

    Args:
        asked: names of pools; a text is one name.

    Raises:
        InvalidRequest: naming ``pool``.
    """
    pools: dict[Pool, None] = {}
    for name in [asked] if isinstance(asked, str) else asked:
        try:
            pools[Pool(name)] = None
        except ValueError:
            raise InvalidRequest("pool", f"{str(name)[:100]!r} is none of {', '.join(pool.value for pool in Pool)}") from None
    if not pools:
        raise InvalidRequest("pool", f"at least one of {', '.join(pool.value for pool in Pool)} is needed")
    return tuple(pools)


def _shown(taps: Sequence[Tap]) -> str:
    """Names of taps, those of a hook as a range."""
    layers: dict[str, list[int]] = {}
    for tap in taps:
        layers.setdefault(str(tap.hook), []).extend([] if tap.layer is None else [tap.layer])
    shown = []
    for hook, numbers in layers.items():
        whole = len(numbers) > 2 and numbers == [*range(numbers[0], numbers[-1] + 1)]
        shown += [f"{hook}.{numbers[0]} … {hook}.{numbers[-1]}"] if whole else [f"{hook}.{number}" for number in numbers] or [hook]
    return ", ".join(shown) or "none"
