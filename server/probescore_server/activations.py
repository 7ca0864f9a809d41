"""Defines requests for activations and their results: taps (places in the model) by name or pattern, poolings, and the activations of one
completion.

The classes are plain frozen data and need no torch, as those of ``rollouts``.
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
"""Limits the bytes of activations, float32 on the model's device, that are held at once for a batch of rollouts."""


class Pool(str, Enum):
    """Enumeration of what is returned of the activations of the tokens that count.

    ``tokens`` gives one row for each token; each of the others pools all tokens to one row, feature by feature.
    """

    TOKENS = "tokens"
    MEAN = "mean"
    LAST = "last"
    MAX = "max"


@dataclass(frozen=True)
class ActivationReads:
    """The activations that a request asks for, the same for every completion.

    Attributes:
        taps: taps (places in the model) without duplicates, in the order of the request.
        pools: poolings, without ``tokens``.
        tokens: whether the request asks for every token's activations.
    """

    taps: tuple[Tap, ...]
    pools: tuple[Pool, ...]
    tokens: bool


@dataclass(frozen=True, eq=False)
class CompletionActivations:
    """The activations of one completion, or of a follow-up (token ids appended to a finished completion and read as a fork of it).

    Attributes:
        group_index, completion_index: position of the completion in the request.
        id: id that the request gave the completion.
        status: ``NON_FINITE`` if the model gives NaN or an infinity at a tap (place in the model); ``tokens`` and ``pooled`` are then
            empty.
        token_ids: tokens in scope, ``(T,)`` int32: entry *i* of ``tokens`` is read at the position whose input is ``token_ids[i]``.
        selections: which tokens count, ``(1 + spans, T)`` bool: in the whole scope under the mask, then in each span.
        spans: names of the spans.
        tokens: activations ``(T, hidden_size)`` float32 of all tokens in scope, whether they count or not, a dictionary keyed by tap name;
            empty unless asked for.
        pooled: pooled activations ``(1 + spans, pools, hidden_size)`` float32, a dictionary keyed by tap name, with poolings in the order
            of the request; NaN if no token counts.
        status_message: why there are no activations, for people.
        inexact_ids: whether some token ids were obtained by tokenising text.
        follow_ups: activations of the completion's follow-ups, in the order of the request.
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
    """Returns every tap (place where activations can be read) of a model with a given number of blocks: for each kind of place, all blocks
    in order.
    """
    return tuple(Tap(hook, layer) for hook in Hook for layer in (range(num_hidden_layers) if hook.has_layer else [None]))


def matching_taps(patterns: Sequence[str | Tap] | str | Tap, known: Sequence[Tap], *, whose: str) -> tuple[Tap, ...]:
    """Returns the taps that names or patterns match, in the order of the patterns, then in that of ``known``.

    Args:
        patterns: taps, their names, or patterns of names with shell wildcards: ``resid_post.*``, ``*.6``, ``*``.
        known: the taps that can be matched.
        whose: name of the thing that has these taps, for messages.

    Raises:
        InvalidRequest: a pattern matches no tap; the message names it as ``taps[i]``.
    """
    found: dict[Tap, None] = {}
    for index, pattern in enumerate([patterns] if isinstance(patterns, str | Tap) else patterns):
        meant = [tap for tap in known if fnmatch.fnmatchcase(str(tap), str(pattern))]
        if not meant:
            raise InvalidRequest(f"taps[{index}]", f"{str(pattern)[:100]!r} is none of {whose}: {_shown(known)}")
        found.update(dict.fromkeys(meant))
    if not found:
        raise InvalidRequest("taps", f"at least one is needed; {whose} are {_shown(known)}")
    return tuple(found)


def resolve_pools(asked: Sequence[str] | str) -> tuple[Pool, ...]:
    """Returns the poolings that a request asks for, without duplicates.

    Args:
        asked: names of poolings; a string is a single name.

    Raises:
        InvalidRequest: a name is not known; the message names the field ``pool``.
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
    """Formats names of taps (places in the model) for a message; consecutive layers become a range, ``resid_post.0 … resid_post.5``."""
    layers: dict[str, list[int]] = {}
    for tap in taps:
        layers.setdefault(str(tap.hook), []).extend([] if tap.layer is None else [tap.layer])
    shown = []
    for hook, numbers in layers.items():
        whole = len(numbers) > 2 and numbers == [*range(numbers[0], numbers[-1] + 1)]
        shown += [f"{hook}.{numbers[0]} … {hook}.{numbers[-1]}"] if whole else [f"{hook}.{number}" for number in numbers] or [hook]
    return ", ".join(shown) or "none"
