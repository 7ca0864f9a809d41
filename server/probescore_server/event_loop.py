"""What runs on an event loop and what in a thread beside it: work that takes longer than about a millisecond would hold up every call.

Switching threads costs more than a small call's work itself, so that each kind of work has a limit up to which it stays on the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

# A request: parsed, and checked once it is.
MAX_BYTES_PARSED_ON_LOOP = 65_536
MAX_BYTES_CHECKED_ON_LOOP = 4096

# An answer: its scores, and its bytes.
MAX_SCORES_ON_LOOP = 64
MAX_BYTES_WRITTEN_ON_LOOP = 65_536
MAX_ROLLOUTS_COUNTED_AT_ONCE = 64

# What goes to a worker: some µs each, and more with thousands of ids.
MAX_ROLLOUTS_PICKLED_ON_LOOP = 64
MAX_SPANS_PICKLED_ON_LOOP = 1024
MAX_TEXTS_PICKLED_ON_LOOP = 1024
MAX_TEXT_BYTES_PICKLED_ON_LOOP = 65_536

# What comes from one: results of 300 rollouts, say, at some 6 µs each.
MAX_BYTES_UNPICKLED_ON_LOOP = 16_384


async def off_the_loop(work: Callable[..., Result], *args: object, small: bool, **options: object) -> Result:
    """Does work in a thread, or here if it is ``small``."""
    return work(*args, **options) if small else await asyncio.to_thread(work, *args, **options)
