"""The texts that wait to be tokenised. Requests take turns, text by text, so that nobody waits for all of another's.

A single text cannot be split, since its ids could change: short ones have a lane of their own, and never wait behind a long one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from probescore.types import Chat
from probescore_server.activity import TextBeingTokenised
from probescore_server.validation.texts import PendingText

SHORT_BYTES = 16_384
"""What takes some ten milliseconds."""


class TokenisingLane(Enum):
    """Which texts go one after the other."""

    SHORT = "short"
    LONG = "long"


@dataclass(eq=False, slots=True)
class _PendingRequest:
    """`left`: texts that have no ids yet. `ids`: by `PendingText.field`."""

    left: int
    ids: dict[str, NDArray[np.int32]] = field(default_factory=dict)


class TextQueue:
    """The texts of requests, each request under its number. Any thread may call any method."""

    def __init__(self) -> None:
        self._requests: dict[int, _PendingRequest] = {}
        self._lanes: dict[TokenisingLane, OrderedDict[int, deque[PendingText]]] = {lane: OrderedDict() for lane in TokenisingLane}
        self._in_hand = dict.fromkeys(TokenisingLane, TextBeingTokenised())
        self._changed = threading.Condition()

    def add(self, number: int, texts: Sequence[PendingText]) -> None:
        """Queues the texts of a request, at least one."""
        by_lane: dict[TokenisingLane, deque[PendingText]] = {}
        for text in texts:
            by_lane.setdefault(TokenisingLane.SHORT if text.bytes <= SHORT_BYTES else TokenisingLane.LONG, deque()).append(text)
        with self._changed:
            self._requests[number] = _PendingRequest(len(texts))
            for lane, waiting in by_lane.items():
                self._lanes[lane][number] = waiting
            self._changed.notify_all()

    def take(self, lane: TokenisingLane) -> tuple[int, PendingText]:
        """Waits for a text, and takes it: the next one of the request whose turn it is. Whoever takes has done with the one before."""
        queue = self._lanes[lane]
        with self._changed:
            before = self._in_hand[lane].number
            self._in_hand[lane] = TextBeingTokenised(before)
            while not queue:
                self._changed.wait()
            number, waiting = queue.popitem(last=False)
            text = waiting.popleft()
            if waiting:
                queue[number] = waiting
            self._in_hand[lane] = TextBeingTokenised(before + 1, number, text.bytes, isinstance(text.content, Chat))
        return number, text

    def in_hand(self) -> tuple[TextBeingTokenised, ...]:
        """What each lane has taken, in the order of `TokenisingLane`; also of a request that was dropped since."""
        with self._changed:
            return tuple(self._in_hand.values())

    def done(self, number: int, text: PendingText, ids: NDArray[np.int32]) -> dict[str, NDArray[np.int32]] | None:
        """Notes the ids of a text; returns those of the whole request if that was the last, and ``None`` before, or if it was dropped."""
        with self._changed:
            request = self._requests.get(number)
            if request is None:
                return None
            request.ids[text.field] = ids
            request.left -= 1
            return None if request.left else self._requests.pop(number).ids

    def drop(self, number: int) -> bool:
        """Gives a request up, since it failed or nobody waits for it; returns whether it was still there."""
        with self._changed:
            for queue in self._lanes.values():
                queue.pop(number, None)
            return self._requests.pop(number, None) is not None
