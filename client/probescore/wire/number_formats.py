"""Converts activations between float32 and the formats in which they are sent and stored: float32, bfloat16 and float16. A number too large
for the format is an error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_QUIET_NAN = np.uint16(0x7FC0)


class Overflow(Exception):
    """Exception raised when a finite number is too large for a format in which activations are sent or stored; has the ``index`` and
    ``value`` of the first such number.
    """

    def __init__(self, index: tuple[int, ...], value: float) -> None:
        super().__init__(index, value)
        self.index = index
        self.value = value


@dataclass(frozen=True)
class NumberFormat:
    """A number format in which activations are sent and stored.

    Attributes:
        name: name of the format for people, such as ``bfloat16``.
        code: name of the format in safetensors.
        item: numpy dtype of a stored number; numpy has no bfloat16, so its bits are held as integers.
        largest: largest finite number of the format.
    """

    name: str
    code: str
    item: np.dtype[np.generic]
    largest: float

    def encode(self, numbers: NDArray[np.float32]) -> NDArray[np.generic]:
        """Rounds float32 activations to the nearest number of a storage format, such as bfloat16, ties to even; NaN stays NaN.

        Raises:
            Overflow: a finite number would become infinite.
        """
        if self.name == "float32":
            return numbers
        encoded = _bfloat16(numbers) if self.name == "bfloat16" else _float16(numbers)
        largest = max(numbers.max(initial=0), -numbers.min(initial=0))
        if largest <= self.largest:
            return encoded
        # Some number is infinite, NaN, or larger than the largest number, though perhaps so little that it rounds to it.
        if self.name == "bfloat16":
            encoded[np.isnan(numbers)] = _QUIET_NAN
        overflown = np.argwhere(np.isinf(self.decode(encoded)) & np.isfinite(numbers))
        if len(overflown):
            index = tuple(int(axis) for axis in overflown[0])
            raise Overflow(index, float(numbers[index]))
        return encoded

    def decode(self, stored: NDArray[np.generic]) -> NDArray[np.float32]:
        """Returns numbers that are stored in this format, such as bfloat16, as float32 of exactly the same value."""
        if self.name == "bfloat16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32)


def _float16(numbers: NDArray[np.float32]) -> NDArray[np.generic]:
    with np.errstate(over="ignore"):
        return numbers.astype(np.float16)


def _bfloat16(numbers: NDArray[np.float32]) -> NDArray[np.generic]:
    """Rounds float32 numbers to bfloat16, ties to even, and returns their bits; the result is wrong for NaN.

    The function adds half a unit of the last kept bit, or slightly less if that bit is even, and takes the upper 16 bits.
    """
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16)


NUMBER_FORMATS = {
    number_format.name: number_format
    for number_format in (
        NumberFormat("float32", "F32", np.dtype("<f4"), float(np.finfo(np.float32).max)),
        NumberFormat("bfloat16", "BF16", np.dtype("<u2"), float(np.uint32(0x7F7F0000).view(np.float32))),
        NumberFormat("float16", "F16", np.dtype("<f2"), float(np.finfo(np.float16).max)),
    )
}
