"""The cache of keys and values: what it gives back is what was put in, for the longest known beginning, within its bytes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from probescore_server.backbone.kv_cache import KeyValueCache, KeyValues, length_of

LAYERS = 2
BYTES_PER_TOKEN = LAYERS * 2 * 2 * 3 * 4  # keys and values, 2 heads of 3, float32


def ids(*tokens: int) -> NDArray[np.int32]:
    return np.array(tokens, np.int32)


def key_values(token_ids: NDArray[np.int32]) -> KeyValues:
    """As a model's: those of a token tell of it and of everything before it."""
    sums = torch.from_numpy(np.cumsum((np.arange(len(token_ids)) + 1) * (token_ids + 1.0)))
    numbers = sums.float().view(1, 1, -1, 1).expand(1, 2, -1, 3)
    return [(numbers + layer, -numbers - layer) for layer in range(LAYERS)]


def tail(token_ids: NDArray[np.int32], count: int) -> KeyValues:
    return [(keys[:, :, len(token_ids) - count :], values[:, :, len(token_ids) - count :]) for keys, values in key_values(token_ids)]


def known(cache: KeyValueCache, *tokens: int) -> int:
    return length_of(cache.longest_prefix(ids(*tokens)))


def filled(*sequences: NDArray[np.int32], max_bytes: int = 1 << 20) -> KeyValueCache:
    cache = KeyValueCache(max_bytes)
    for sequence in sequences:
        cache.put(sequence, key_values(sequence))
    return cache


def test_longest_known_beginning_is_found() -> None:
    cache = filled(ids(1, 2, 3, 4), ids(1, 2, 9))
    assert [known(cache, 1, 2, 3, 4, 5), known(cache, 1, 2, 3), known(cache, 1, 2, 9, 9), known(cache, 1, 7), known(cache, 2)] == [
        4,
        3,
        3,
        1,
        0,
    ]


def test_tail_continues_what_is_known() -> None:
    cache = filled(ids(1, 2))
    cache.put(ids(1, 2, 3, 4), tail(ids(1, 2, 3, 4), 2))
    assert known(cache, 1, 2, 3, 4) == 4


def test_tail_of_something_unknown_is_dropped() -> None:
    cache = filled(ids(1, 2))
    cache.put(ids(1, 5, 6), tail(ids(1, 5, 6), 1))
    assert known(cache, 1, 5, 6) == 1
    assert cache.bytes == 2 * BYTES_PER_TOKEN


def test_same_tokens_are_held_once() -> None:
    cache = filled(ids(1, 2, 3), ids(1, 2, 3), ids(1, 2, 4))
    assert cache.bytes == 4 * BYTES_PER_TOKEN


def test_what_is_held_is_a_copy() -> None:
    # given keys and values that their owner goes on to change
    mine = [(keys.clone(), values.clone()) for keys, values in key_values(ids(1, 2))]
    cache = KeyValueCache(1 << 20)
    cache.put(ids(1, 2), mine)
    mine[0][0].zero_()
    torch.testing.assert_close(cache.longest_prefix(ids(1, 2)), key_values(ids(1, 2)))


def test_least_recently_used_goes_first() -> None:
    cache = filled(ids(1, 2), ids(3, 4), max_bytes=4 * BYTES_PER_TOKEN)
    known(cache, 1, 2)
    cache.put(ids(5, 6), key_values(ids(5, 6)))
    assert [known(cache, 1, 2), known(cache, 3, 4), known(cache, 5, 6)] == [2, 0, 2]


def test_what_is_larger_than_everything_is_not_kept() -> None:
    cache = filled(ids(1, 2, 3), max_bytes=2 * BYTES_PER_TOKEN)
    assert (cache.bytes, known(cache, 1, 2, 3)) == (0, 0)


def test_nothing_is_kept_in_no_bytes() -> None:
    assert known(filled(ids(1), max_bytes=0), 1) == 0


def test_cleared_cache_knows_nothing() -> None:
    cache = filled(ids(1, 2))
    cache.clear()
    assert (cache.bytes, known(cache, 1, 2)) == (0, 0)


sequences = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(lambda tokens: ids(*tokens))


@given(st.lists(st.tuples(st.booleans(), sequences), max_size=25), st.integers(0, 20))
def test_any_history_gives_true_prefixes_within_the_bytes(steps: list[tuple[bool, NDArray[np.int32]]], tokens: int) -> None:
    cache = KeyValueCache(tokens * BYTES_PER_TOKEN)
    for is_put, sequence in steps:
        if is_put:
            cache.put(sequence, key_values(sequence))
        found = cache.longest_prefix(sequence)
        count = length_of(found)
        torch.testing.assert_close(found, tail(sequence[:count], count) if count else [])
        assert cache.bytes <= tokens * BYTES_PER_TOKEN
    held = {tuple(sequence[: i + 1]) for _, sequence in steps for i in range(known(cache, *sequence))}
    assert cache.bytes == BYTES_PER_TOKEN * len(held)


@given(st.lists(sequences, max_size=12), sequences)
def test_without_pressure_the_longest_common_beginning_is_known(put: list[NDArray[np.int32]], asked: NDArray[np.int32]) -> None:
    cache = filled(*put)
    longest = max((next((i for i, (a, b) in enumerate(zip(s, asked)) if a != b), min(len(s), len(asked))) for s in put), default=0)  # noqa: B905
    assert known(cache, *asked) == longest
    assert cache.bytes == BYTES_PER_TOKEN * len({tuple(s[: i + 1]) for s in put for i in range(len(s))})
