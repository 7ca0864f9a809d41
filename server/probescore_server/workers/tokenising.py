"""Tokenises the texts of requests in worker processes, and tries again if a worker process dies meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from probescore_server.errors import WorkerLost, WorkerLostTwice
from probescore_server.validation.texts import PendingText
from probescore_server.workers.handle import WorkerHandle

MAX_LOSSES = 3
"""Number of deaths of worker processes, while they tokenise the texts of one request, after which the client is told to try again later.
The cause could then not be found.
"""


async def encode(workers: Sequence[WorkerHandle], texts: Sequence[PendingText]) -> dict[str, NDArray[np.int32]]:
    """Tokenises the texts of one request on the first worker that is up. If that worker process dies, the texts are tried on another
    worker.

    If no other worker is up, the coroutine waits until the dead one is restarted. A death that another request may have caused does not
    count against these texts. If these texts are the cause, each text is tried alone, and a text with which a worker process dies again is
    refused.

    Returns:
        A dictionary, keyed by ``PendingText.field``, of the token ids of each text, ``(T,)`` int32.

    Raises:
        InvalidRequest: a text cannot be tokenised; the error names the text's field.
        WorkerUnavailable: no worker is up, the worker process ended, or ``MAX_LOSSES`` worker processes died, each perhaps for another
            cause.
        WorkerLostTwice: a worker process died with the texts, and another one with the text that the error names.
        InternalFault: tokenising failed for any other reason.
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
