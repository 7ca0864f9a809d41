"""Writes numbers as text in half the room of float32: bfloat16, little-endian, in base64."""

from __future__ import annotations

import base64

import numpy as np
from numpy.typing import ArrayLike, NDArray


def to_text(values: ArrayLike) -> str:
    """Returns finite numbers ``(n,)`` as text, each rounded to the nearest bfloat16, which keeps 8 bits of it."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return base64.b64encode((rounded >> np.uint32(16)).astype("<u2").tobytes()).decode()


def from_text(text: str) -> NDArray[np.float32]:
    """Returns the numbers that ``to_text`` wrote, ``(n,)``."""
    halves = np.frombuffer(base64.b64decode(text), "<u2").astype(np.uint32)
    return (halves << np.uint32(16)).view(np.float32)
