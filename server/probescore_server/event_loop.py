"""Decides which work runs on the event loop of the front process, which owns the gRPC port, and which work runs in a thread.

Work of more than about a millisecond on the loop would delay every other RPC. Switching threads costs more time than a small piece of work
itself, so each kind of work has a size up to which it stays on the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

# These limit the work on a request, which is parsed and then checked.
MAX_BYTES_PARSED_ON_LOOP = 65_536
MAX_BYTES_CHECKED_ON_LOOP = 4096

# These limit the work on a response: its scores, its bytes, and the rollouts that are counted in metrics.
MAX_SCORES_ON_LOOP = 64
MAX_BYTES_WRITTEN_ON_LOOP = 65_536
MAX_ROLLOUTS_COUNTED_AT_ONCE = 64

# These limit the messages that are pickled on the loop for a worker process: each item takes some µs, and more with thousands of ids.
MAX_ROLLOUTS_PICKLED_ON_LOOP = 64
MAX_SPANS_PICKLED_ON_LOOP = 1024
MAX_TEXTS_PICKLED_ON_LOOP = 1024
MAX_TEXT_BYTES_PICKLED_ON_LOOP = 65_536

# This limits the messages from a worker process that are unpickled on the loop: about the size of 300 results, at some 6 µs each.
MAX_BYTES_UNPICKLED_ON_LOOP = 16_384


async def off_the_loop(work: Callable[..., Result], *args: object, small: bool, **options: object) -> Result:
    """Calls the function ``work`` with the given arguments and returns its result. The call runs on the event loop itself if ``small`` is
    true, else in a thread.
    """
    return work(*args, **options) if small else await asyncio.to_thread(work, *args, **options)
