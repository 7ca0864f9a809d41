"""Queues the texts that wait to be tokenised in a worker process.

Requests take turns, text by text, so that no request waits for all texts of another one. A single text cannot be split, since its ids could
change. Short texts have a lane of their own, that is, a queue with one thread, so that they never wait behind a long one.
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
"""A text of at most this many UTF-8 bytes, which takes some ten milliseconds to tokenise, counts as short."""


class TokenisingLane(Enum):
    """Names the two queues of texts, of which each has one thread that tokenises its texts one after the other."""

    SHORT = "short"
    LONG = "long"


@dataclass(eq=False, slots=True)
class _PendingRequest:
    """Holds what is tokenised of one request's texts.

    Attributes:
        left: number of texts that have no token ids yet.
        ids: token ids of the other texts, ``(T,)`` int32, by ``PendingText.field``.
    """

    left: int
    ids: dict[str, NDArray[np.int32]] = field(default_factory=dict)


class TextQueue:
    """Holds the texts of requests, each request under its number, until they are tokenised. Any thread may call any method."""

    def __init__(self) -> None:
        self._requests: dict[int, _PendingRequest] = {}
        self._lanes: dict[TokenisingLane, OrderedDict[int, deque[PendingText]]] = {lane: OrderedDict() for lane in TokenisingLane}
        self._in_hand = dict.fromkeys(TokenisingLane, TextBeingTokenised())
        self._changed = threading.Condition()

    def add(self, number: int, texts: Sequence[PendingText]) -> None:
        """Adds the texts of a request, at least one, under the request's number."""
        by_lane: dict[TokenisingLane, deque[PendingText]] = {}
        for text in texts:
            by_lane.setdefault(TokenisingLane.SHORT if text.bytes <= SHORT_BYTES else TokenisingLane.LONG, deque()).append(text)
        with self._changed:
            self._requests[number] = _PendingRequest(len(texts))
            for lane, waiting in by_lane.items():
                self._lanes[lane][number] = waiting
            self._changed.notify_all()

    def take(self, lane: TokenisingLane) -> tuple[int, PendingText]:
        """Waits for a text in one of the two queues, and takes the next one of the request whose turn it is.

        It returns the request's number and the text.

        The caller must have finished the text that it took before from the same queue.
        """
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
        """Returns the text that is being tokenised in each lane, in the order of ``TokenisingLane``, also if its request was dropped."""
        with self._changed:
            return tuple(self._in_hand.values())

    def done(self, number: int, text: PendingText, ids: NDArray[np.int32]) -> dict[str, NDArray[np.int32]] | None:
        """Notes the token ids of a text, and returns those of the whole request if it was the request's last text.

        Returns:
            Token ids, ``(T,)`` int32, by ``PendingText.field``; ``None`` if texts are left, or if the request was dropped.
        """
        with self._changed:
            request = self._requests.get(number)
            if request is None:
                return None
            request.ids[text.field] = ids
            request.left -= 1
            return None if request.left else self._requests.pop(number).ids

    def drop(self, number: int) -> bool:
        """Removes a request that failed or that nobody waits for; returns whether it was still in the queue or being tokenised."""
        with self._changed:
            for queue in self._lanes.values():
                queue.pop(number, None)
            return self._requests.pop(number, None) is not None
