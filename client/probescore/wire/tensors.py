"""Converts numpy arrays to and from ``Tensor`` messages of protobuf, and defines the exception for a message that violates the protobuf
contract.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probescore.v1 import tensor_pb2

FLOAT32 = tensor_pb2.DATA_TYPE_FLOAT32
INT32 = tensor_pb2.DATA_TYPE_INT32
INT64 = tensor_pb2.DATA_TYPE_INT64
UINT32 = tensor_pb2.DATA_TYPE_UINT32
BOOL = tensor_pb2.DATA_TYPE_BOOL
BFLOAT16 = tensor_pb2.DATA_TYPE_BFLOAT16
FLOAT16 = tensor_pb2.DATA_TYPE_FLOAT16

_LITTLE_ENDIAN: dict[tensor_pb2.DataType.ValueType, np.dtype[Any]] = {
    FLOAT32: np.dtype("<f4"),
    INT32: np.dtype("<i4"),
    INT64: np.dtype("<i8"),
    UINT32: np.dtype("<u4"),
    BOOL: np.dtype("?"),
    BFLOAT16: np.dtype("<u2"),  # numpy has no bfloat16: its bits
    FLOAT16: np.dtype("<f2"),
}


class MessageError(ValueError):
    """Exception raised when a message, or a value that is to be put into a message, violates the protobuf contract.

    Args:
        field: path of the faulty field, as in the ``.proto`` file: ``groups[2].completions[0].mask``.
        problem: description of the fault.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field = field
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


def array_to_tensor(array: NDArray[Any], dtype: tensor_pb2.DataType.ValueType) -> tensor_pb2.Tensor:
    """Converts a numpy array to a ``Tensor`` message of the given element type; the caller must ensure that the array's values fit the
    type.
    """
    return tensor_pb2.Tensor(dtype=dtype, shape=array.shape, data=array.astype(_LITTLE_ENDIAN[dtype], copy=False).tobytes())


def tensor_to_array(tensor: tensor_pb2.Tensor, field: str, dtypes: Collection[tensor_pb2.DataType.ValueType], rank: int) -> NDArray[Any]:
    """Converts a ``Tensor`` message to a read-only array over the message's bytes; nothing is allocated before the shape is known to match
    the number of bytes.

    Args:
        tensor: the message, as received.
        field: path of the tensor in the request or response, for error messages.
        dtypes: element types that the contract allows for this field.
        rank: number of axes that the contract requires for this field.

    Raises:
        MessageError: the element type or rank is not allowed, an axis is negative, the shape does not match the number of bytes, or a bool
            is not 0 or 1.
    """
    element, data = tensor.dtype, tensor.data
    if element not in dtypes:
        allowed = " or ".join(tensor_pb2.DataType.Name(dtype) for dtype in dtypes)
        raise MessageError(field, f"dtype is {_dtype_name(element)}; expected {allowed}")
    if len(tensor.shape) != rank:
        raise MessageError(field, f"shape has {len(tensor.shape)} axes; expected {rank}")
    shape = tuple(tensor.shape)
    if min(shape, default=0) < 0:
        raise MessageError(field, f"shape {list(shape)} has a negative axis")
    dtype = _LITTLE_ENDIAN[element]
    # Python's integers: the product of a hostile shape cannot wrap around to the number of bytes
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise MessageError(field, f"data has {len(data)} bytes; shape {list(shape)} of {_dtype_name(element)} needs {expected}")
    if element == BOOL and (np.frombuffer(data, np.uint8) > 1).any():
        raise MessageError(field, f"data holds a byte of value {max(data)}; a bool is 0 or 1")
    try:
        return np.frombuffer(data, dtype).reshape(shape)
    except ValueError:
        # no elements, and another axis longer than numpy can count
        raise MessageError(field, f"shape {list(shape)} is too large") from None


def _dtype_name(dtype: int) -> str:
    value = tensor_pb2.DataType.DESCRIPTOR.values_by_number.get(dtype)
    return str(dtype) if value is None else str(value.name)
