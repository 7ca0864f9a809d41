"""Converts the arguments that authors of probes pass to numbers and text, or refuses an argument with a message.

A message names the argument, its value, and what to give instead. A value of the wrong type raises ``TypeError``, and a wrong value of the
right type raises ``ValueError``. Numbers may be given as lists, tuples, numpy arrays of any integer or floating dtype, or torch tensors on
any device, with or without gradients.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from probescore.reductions import Reduction

_Kind = TypeVar("_Kind")
_Given = Any  # whatever an author hands over


def shown(value: _Given) -> str:
    """Returns an argument's value as short text on one line, for an error message."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} of shape {tuple(value.shape)} and dtype {value.dtype}"
    written = value.__name__ if isinstance(value, type) else repr(value)
    written = " ".join(written.split())
    return written if len(written) <= 80 else written[:77] + "…"


def kind_of(value: _Given) -> str:
    """Returns the name of a value's type with its article, such as ``a list``; for ``None`` the text ``None``."""
    if value is None:
        return "None"
    name = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    return name if isinstance(value, type) else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def of_kind(value: _Given, argument: str, kind: type[_Kind] | tuple[type[_Kind], ...], remedy: str) -> _Kind:
    """Returns a value after a check that it has the given type or one of several given types.

    Raises:
        TypeError: the value is of another type.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{argument}: {kind_of(value)} ({shown(value)}); {remedy}")
    return value


def text(value: _Given, argument: str, longest: int | None = None) -> str:
    """Returns a text argument, of at most ``longest`` characters if ``longest`` is given.

    Raises:
        TypeError: the value is not text.
        ValueError: the text is too long.
    """
    written = str(of_kind(value, argument, str, "give text"))  # numpy's too
    if longest is not None and len(written) > longest:
        raise ValueError(f"{argument}: {len(written)} characters ({shown(written)}); give at most {longest}")
    return written


def named(value: _Given, argument: str, pattern: str, rule: str) -> str:
    """Returns a text that matches a pattern; ``rule`` describes the pattern in words, for the message.

    Raises:
        TypeError: the value is not text.
        ValueError: the text does not match the pattern.
    """
    written = text(value, argument)
    if not re.fullmatch(pattern, written):
        raise ValueError(f"{argument}: {shown(written)}; give {rule}")
    return written


def reduction(value: _Given, argument: str) -> str:
    """Returns the name of a reduction of token scores to one score, such as ``"mean"``; the reduction may be given as text or as a
    ``Reduction``.

    Raises:
        TypeError: the value is neither text nor a ``Reduction``.
        ValueError: there is no reduction of that name.
    """
    if not isinstance(value, (str, Reduction)):
        raise TypeError(f'{argument}: {kind_of(value)} ({shown(value)}); give a reduction as text, such as "mean" or "topk_mean(8)"')
    try:
        return str(Reduction.parse(str(value)))
    except ValueError as error:
        raise ValueError(f"{argument}: {shown(value)}: {error}") from None


def real(value: _Given, argument: str, what: str) -> NDArray[np.float64]:
    """Reads real numbers of any shape into a float64 array; NaN and infinities are accepted, and left to the caller to check.

    Raises:
        TypeError: the value does not hold real numbers.
        ValueError: the numbers do not form an array, for example because rows differ in length.
    """
    array = array_of(value, argument, what)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{argument}: {described(value, array)}; give {what} as floating-point numbers")
    return array.astype(np.float64)


def number(value: _Given, argument: str, what: str) -> float:
    """Reads a single real number; NaN and infinities are accepted, and left to the caller to check.

    Raises:
        TypeError: the value is not a real number.
        ValueError: the value holds several numbers, or none.
    """
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{argument}: {shown(value)}; give {what}")
    array = real(value, argument, what)
    if array.size != 1:
        raise ValueError(f"{argument}: {array.size} numbers; give {what}")
    return float(array.reshape(()))


def array_of(value: _Given, argument: str, what: str) -> NDArray[Any]:
    """Converts a value that holds numbers to a numpy array of its own dtype; an array of objects is read only if all objects are numbers.

    Raises:
        TypeError: the value does not hold numbers.
        ValueError: the numbers do not form an array, for example because rows differ in length.
    """
    if value is None or isinstance(value, (str, bytes, Mapping, set, frozenset, Iterator)):
        raise TypeError(f"{argument}: {kind_of(value)} ({shown(value)}); give {what} as a list or an array")
    if callable(
        getattr(value, "detach", None)
    ):  # a torch tensor, which may have a dtype that numpy lacks, or gradients, or lie on another device
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() and value.element_size() < 4 else value.numpy()
    elif isinstance(value, Sequence) and any(callable(getattr(entry, "detach", None)) for entry in value):
        value = [array_of(entry, argument, what) for entry in value]
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{argument}: lists of different lengths or depths; give {what} in one shape") from None
    if array.dtype.kind == "O":
        if not all(isinstance(entry, (int, float, np.number)) and not isinstance(entry, bool) for entry in array.ravel()):
            raise TypeError(f"{argument}: {described(value, array)}; give {what} in one shape, as numbers")
        try:
            array = np.array(array.tolist())
        except (ValueError, OverflowError):
            array = array.astype(np.float64)
    return array


def described(value: _Given, array: NDArray[Any]) -> str:
    """Returns a description of the numbers in an argument that is refused, for the error message.

    Args:
        value: the value, as an author gives it.
        array: the same value as an array, from ``array_of``.
    """
    if array.dtype.kind == "O":
        odd = next((entry for entry in array.ravel() if not isinstance(entry, (int, float, np.number)) or isinstance(entry, bool)), None)
        return f"an entry is {kind_of(odd)} ({shown(odd)})" if array.ndim else f"{kind_of(value)} ({shown(value)})"
    kinds = {"U": "text", "S": "bytes", "b": "True and False", "c": "complex numbers", "f": "floating-point numbers"}
    return f"{kinds.get(array.dtype.kind, f'numbers of dtype {array.dtype}')} ({shown(value)})"
