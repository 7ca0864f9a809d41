"""Queues the texts that wait to be tokenised in a worker process.

Requests take turns, text by text, so that no request waits for all texts of another one. A single text cannot be split, since its token ids
could change. Short texts have a separate lane, that is, a queue with one thread, so that they never wait behind a long text.
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
"""Largest number of UTF-8 bytes of a short text. Tokenising a text of this size takes some ten milliseconds."""


class TokenisingLane(Enum):
    """Enumeration of the two queues of texts (short and long). Each queue has one thread, which tokenises the queue's texts one after the
    other.
    """

    SHORT = "short"
    LONG = "long"


@dataclass(eq=False, slots=True)
class _PendingRequest:
    """Record of one request some of whose texts are not tokenised yet, with the token ids of its other texts.

    Attributes:
        left: number of texts that have no token ids yet.
        ids: a dictionary, keyed by ``PendingText.field``, of the token ids ``(T,)`` int32 of the texts that are tokenised already.
    """

    left: int
    ids: dict[str, NDArray[np.int32]] = field(default_factory=dict)


class TextQueue:
    """Queue of the texts of requests that must be tokenised, each request under its number. Any thread may call any method."""

    def __init__(self) -> None:
        self._requests: dict[int, _PendingRequest] = {}
        self._lanes: dict[TokenisingLane, OrderedDict[int, deque[PendingText]]] = {lane: OrderedDict() for lane in TokenisingLane}
        self._in_hand = dict.fromkeys(TokenisingLane, TextBeingTokenised())
        self._changed = threading.Condition()

    def add(self, number: int, texts: Sequence[PendingText]) -> None:
        """Adds the texts of a request, at least one text, to the queue of texts to be tokenised, under the request's number."""
        by_lane: dict[TokenisingLane, deque[PendingText]] = {}
        for text in texts:
            by_lane.setdefault(TokenisingLane.SHORT if text.bytes <= SHORT_BYTES else TokenisingLane.LONG, deque()).append(text)
        with self._changed:
            self._requests[number] = _PendingRequest(len(texts))
            for lane, waiting in by_lane.items():
                self._lanes[lane][number] = waiting
            self._changed.notify_all()

    def take(self, lane: TokenisingLane) -> tuple[int, PendingText]:
        """Waits for a text in one of the two queues, takes the next text of the request whose turn it is, and returns the request's number
        and the text.

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
        """Returns the text that is being tokenised in each of the two queues (short and long texts), in the order of ``TokenisingLane``,
        even if the text's request was dropped.
        """
        with self._changed:
            return tuple(self._in_hand.values())

    def done(self, number: int, text: PendingText, ids: NDArray[np.int32]) -> dict[str, NDArray[np.int32]] | None:
        """Stores the token ids of a text of a request. If this was the request's last text, the token ids of all texts of the request are
        returned.

        Returns:
            A dictionary, keyed by ``PendingText.field``, of token ids ``(T,)`` int32; ``None`` if texts are left, or if the request was
            dropped.
        """
        with self._changed:
            request = self._requests.get(number)
            if request is None:
                return None
            request.ids[text.field] = ids
            request.left -= 1
            return None if request.left else self._requests.pop(number).ids

    def drop(self, number: int) -> bool:
        """Removes a request that failed or whose result is not needed any more from the queue of texts to be tokenised. Returns whether the
        request still had texts in the queue or being tokenised.
        """
        with self._changed:
            for queue in self._lanes.values():
                queue.pop(number, None)
            return self._requests.pop(number, None) is not None
