"""Classifies an exception by its text: too little memory, a failed device, or another cause.

torch, cuBLAS, cuDNN, Triton, onnxruntime, numpy and Python each report these events in their own way, most of them only in the message, and
the exception type of the same event differs between versions. So the message decides, and this module needs none of those libraries.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum


class FailureKind(Enum):
    """Enumeration of the kinds of failure of a computation: too little memory, a lost device, or another cause."""

    MEMORY_SHORT = "memory short"
    """Kind of failure: there was too little memory. The same work in smaller pieces may fit."""
    DEVICE_LOST = "device lost"
    """Kind of failure: this process can never compute on its device again, since a CUDA context does not survive such an error."""
    OTHER = "other"
    """Kind of failure that does not come from the machine: the work itself, or the server's code, is at fault."""


# These are errors after which every further call of the process fails, also one that asks for memory.
_LOST = re.compile(
    r"illegal memory access|illegal instruction|illegal address|misaligned address|invalid program counter|invalid address space"
    r"|device-side assert triggered|unspecified launch (failure|error)|launch (timed out|failed)|uncorrectable|\bECC error"
    r"|hardware stack error|GPU is lost|fallen off the bus|MMU fault"
    r"|CUDA_ERROR_(ILLEGAL|LAUNCH|ECC|ASSERT|HARDWARE|MISALIGNED|INVALID_PC|CONTEXT_IS_DESTROYED)"
    r"|cudaError(Illegal|Launch|ECC|Assert|Hardware|Misaligned|InvalidPc|ContextIsDestroyed)",
    re.IGNORECASE,
)
_MEMORY = re.compile(
    r"out of memory|OutOfMemory|OUT_OF_MEMORY|cudaErrorMemoryAllocation|_ALLOC_FAILED|ALLOCATION_FAILED"
    r"|DefaultCPUAllocator|not enough memory|insufficient memory|cannot allocate memory|failed to allocate memory|unable to allocate"
    r"|smaller than requested bytes|bad_alloc|bad allocation",
    re.IGNORECASE,
)
# These are the other errors that only a device raises.
_DEVICE = re.compile(
    r"\b(CUDA|HIP) (unknown |driver |runtime )?error\b|\bcuda runtime error\b|\bCUDA_ERROR_|\bcudaError[A-Z]|Triton Error \[(CUDA|HIP)\]"
    r"|\b(CUDA|HIP|CUBLAS|CUDNN|CUFFT|CUSPARSE|CUSOLVER|ROCBLAS|MIOPEN) failure\b"
    r"|(CUBLAS|CUDNN|CUFFT|CUSPARSE|CUSOLVER)_STATUS_(NOT_INITIALIZED|EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)"
    r"|CUFFT_(INTERNAL_ERROR|EXEC_FAILED)",
    re.IGNORECASE,
)


def kind_of(error: BaseException) -> FailureKind:
    """Returns the kind of failure that an exception, or any exception that caused it, reports.

    If the chain of exceptions reports both a lost device and too little memory, the lost device counts.
    """
    kinds = {_own_kind(each) for each in _chain(error)}
    return next((kind for kind in (FailureKind.DEVICE_LOST, FailureKind.MEMORY_SHORT) if kind in kinds), FailureKind.OTHER)


def _own_kind(error: BaseException) -> FailureKind:
    text = str(error)
    types = {base.__name__ for base in type(error).__mro__}
    if _LOST.search(text):
        return FailureKind.DEVICE_LOST
    if types & {"MemoryError", "OutOfMemoryError"} or _MEMORY.search(text):
        return FailureKind.MEMORY_SHORT
    if "AcceleratorError" in types or _DEVICE.search(text):
        return FailureKind.DEVICE_LOST
    return FailureKind.OTHER


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an exception and then each exception that caused it, also those hidden by ``raise … from None``."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__
