"""Checks what a request for activations asks for: taps (places in the model) by name or pattern, and poolings. The module needs
no torch.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from probescore.types import Hook, Pool, Tap
from probescore_server.errors import InvalidRequest
from probescore_server.rollouts import ActivationReads, EngineInfo

MAX_BATCH_BYTES = 1 << 30
"""Limits the bytes of activations, float32 on the model's device, that are held at once for a batch of rollouts."""


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


def resolve_reads(
    patterns: Sequence[str | Tap] | str | Tap, pool: Sequence[str] | str, known: Sequence[Tap], *, whose: str, dtype: str = "float32"
) -> ActivationReads:
    """Returns the activations that a request asks for.

    Args:
        patterns: taps (places in the model), their names, or patterns of names, as for ``matching_taps``.
        pool: names of poolings; a string is a single name.
        known: the taps that can be matched.
        whose: name of the thing that has these taps, for messages.
        dtype: format in which numbers are sent.

    Raises:
        InvalidRequest: the message names ``taps``, ``taps[i]`` or ``pool``.
    """
    pools = resolve_pools(pool)
    return ActivationReads(
        taps=matching_taps(patterns, known, whose=whose),
        pools=tuple(each for each in pools if each is not Pool.TOKENS),
        tokens=Pool.TOKENS in pools,
        dtype=dtype,
    )


def allowed_taps(info: EngineInfo, patterns: Sequence[str]) -> tuple[Tap, ...]:
    """Returns the taps (places in the model) that a server's setting ``allow_activations`` names, in the order of the model's taps; none
    for an empty setting.
    """
    named = set(matching_taps(patterns, info.taps, whose="the taps of this model")) if patterns else set()
    return tuple(tap for tap in info.taps if tap in named)


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
