"""Tokenises the texts of requests, whatever becomes of the worker that does it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from probescore_server.errors import WorkerLost, WorkerLostTwice
from probescore_server.validation.texts import PendingText
from probescore_server.workers.handle import WorkerHandle

MAX_LOSSES = 3
"""After so many workers that were lost with a request, its caller is told to come back: who is to blame could not be found out."""


async def encode(workers: Sequence[WorkerHandle], texts: Sequence[PendingText]) -> dict[str, NDArray[np.int32]]:
    """Tokenises the texts of one request, by the first worker that is up. If it is lost, another one does it, or the same once it is back.

    What a worker does of other requests at the same time is not held against this one. If its own texts are why, each is tried by itself,
    and one that does it again is refused.

    Returns:
        Ids ``(T,)`` int32 by `PendingText.field`.

    Raises:
        InvalidRequest: a text that cannot be tokenised, naming its field.
        WorkerUnavailable: no worker is up, or it died; or `MAX_LOSSES` were lost, each time perhaps for something else.
        WorkerLostTwice: a worker was lost with the texts, and another with the one that it names.
        InternalFault: something else went wrong.
    """
    ids: dict[str, NDArray[np.int32]] = {}
    left: deque[Sequence[PendingText]] = deque([texts])
    losses, suspected = 0, False
    while left:
        worker = next((worker for worker in workers if worker.up), workers[0])
        try:
            ids |= await worker.encode(left[0])
        except WorkerLost as error:
            losses += 1
            if error.order and suspected:
                raise WorkerLostTwice(left[0][0].field, "", error.problem) from None
            if losses == MAX_LOSSES:
                raise
            if error.order:
                suspected, left = True, deque([text] for text in texts)
            if not any(worker.up for worker in workers):
                await worker.until_back()
        else:
            left.popleft()
    return ids
