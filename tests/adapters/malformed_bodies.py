"""Bodies that no trainer sends: each is one that a trainer does send, broken in one of the ways in which bodies break."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

BODIES: dict[str, dict[str, Any]] = {
    "/openrlhf": {"query": ["w5 w6 w7 w8 </s>"], "prompts": ["w5 w6"], "labels": ["w7"]},
    "/slime": {"prompt": "w5 w6", "response": " w7 w8 </s>", "label": "w7"},
    "/v1/score": {"rollouts": [{"prompt": [1, 5, 6], "completion": [7, 8, 2], "mask": [1, 1, 0]}], "step": 3},
}
DEEP = 100_000
ODD_VALUES: list[Any] = [
    *(None, True, 0, -1, 2**31, 10**40, 1.5, float("nan"), float("inf"), -float("inf")),
    *("", "\ud800", "w9 " * 300, {}, {"role": "user"}),
    *([], [None], [[]], [""], ["w5"] * 5000, [1, 5], [1.5], [-1], [10**9], [5] * 600),
    *([{"role": "user", "content": "w5"}], [{"role": "user", "content": 5}]),
]


def malformed(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """``count`` routes and what to post to them."""
    chance = random.Random(seed)
    for _ in range(count):
        route = chance.choice(list(BODIES))
        yield route, chance.choice(BREAKS)(json.loads(json.dumps(BODIES[route])), chance)


def _written(body: Any) -> bytes:
    return json.dumps(body).encode()


def _odd_value(body: Any, chance: random.Random) -> bytes:
    """Somewhere, at any depth."""
    place, key = body, chance.choice(list(body))
    while isinstance(place[key], (list, dict)) and place[key] and chance.random() < 0.7:
        place = place[key]
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
    place[key] = chance.choice(ODD_VALUES)
    return _written(body)


def _missing_key(body: Any, chance: random.Random) -> bytes:
    del body[chance.choice(list(body))]
    return _written(body)


def _unknown_key(body: Any, chance: random.Random) -> bytes:
    return _written({**body, chance.choice(["x", "", "\ud800", "prompt ", "x" * 10_000]): chance.choice(ODD_VALUES)})


def _other_shape(body: Any, chance: random.Random) -> bytes:
    return _written(chance.choice([[body], [], {}, None, 5, "w5", True, [body] * 3]))


def _cut(body: Any, chance: random.Random) -> bytes:
    written = _written(body)
    return written[: chance.randrange(len(written))]


def _flipped_bytes(body: Any, chance: random.Random) -> bytes:
    written = bytearray(_written(body))
    for _ in range(chance.randint(1, 4)):
        written[chance.randrange(len(written))] = chance.randrange(256)
    return bytes(written)


def _other_encoding(body: Any, chance: random.Random) -> bytes:
    return _written(body).decode().encode(chance.choice(["utf-16", "utf-32", "utf-8-sig"]))


def _deep(body: Any, chance: random.Random) -> bytes:
    key = chance.choice(list(body)).encode()
    opened, closed = chance.choice([(b"[", b"]"), (b'{"a":', b"}")])
    depth = chance.choice([50, 500, DEEP])
    return b'{"' + key + b'": ' + opened * depth + b"1" + closed * (depth if chance.random() < 0.5 else 0) + b"}"


def _long_number(body: Any, chance: random.Random) -> bytes:
    key = chance.choice(list(body))
    written = _written({**body, key: "NUMBER"})
    return written.replace(
        b'"NUMBER"', chance.choice([b"9" * 10_000, b"1e999", b"-1e999", b"1" + b"0" * 400 + b".5", b"0x10", b"01", b"+1"])
    )


def _noise(body: Any, chance: random.Random) -> bytes:
    del body
    return chance.randbytes(chance.choice([0, 1, 10, 1000]))


BREAKS: list[Callable[[Any, random.Random], bytes]] = [
    _odd_value,
    _odd_value,
    _odd_value,
    _missing_key,
    _unknown_key,
    _other_shape,
    _cut,
    _flipped_bytes,
    _other_encoding,
    _deep,
    _long_number,
    _noise,
]
