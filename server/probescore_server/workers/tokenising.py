"""Tokenises the texts of requests in worker processes, and tries again if a worker process is lost meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from probescore_server.errors import WorkerLost, WorkerLostTwice
from probescore_server.validation.texts import PendingText
from probescore_server.workers.handle import WorkerHandle

MAX_LOSSES = 3
"""After so many worker processes were lost with a request, its caller is told to try again later, since the cause could not be found."""


async def encode(workers: Sequence[WorkerHandle], texts: Sequence[PendingText]) -> dict[str, NDArray[np.int32]]:
    """Tokenises the texts of one request on the first worker that is up. If that worker is lost, the texts are tried on another one.

    If no other worker is up, this waits until the lost one is back. A loss that another request may have caused does not count against
    these texts. If they are the cause, each text is tried by itself, and one with which a worker is lost again is refused.

    Returns:
        The token ids of each text, ``(T,)`` int32, by ``PendingText.field``.

    Raises:
        InvalidRequest: a text cannot be tokenised; names its field.
        WorkerUnavailable: no worker is up, or it ended; or ``MAX_LOSSES`` workers were lost, each time perhaps for another cause.
        WorkerLostTwice: a worker was lost with the texts, and another one with the text that the error names.
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
