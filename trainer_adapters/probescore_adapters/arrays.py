"""Converts the token ids, masks, rewards and group keys that a trainer passes to plain numpy arrays and Python values.

Trainers store these values in lists, numpy, torch, JAX, pandas or pyarrow, with gradients, on devices, in bfloat16. A value is either read
with its intended meaning, or refused with an error that names the field. Containers that carry more than numbers (masked entries, missing
values, a sparse layout, a shard of a distributed tensor) are never read as if they were plain numbers. No module here imports a tensor
library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probescore import FieldViolation, InvalidRequestError

# dtypes of torch that numpy does not have
_NARROW_FLOATS = ("bfloat16", "float8")


def as_ids(given: object, field: str) -> NDArray[np.int64]:
    """Converts token ids of any array library to ``(T,)`` int64; ``T`` may be 0.

    Raises:
        InvalidRequestError: the value is not a flat sequence of integers; the error names ``field``.
    """
    array = _flat(given, field, "token ids")
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.dtype.kind not in "iu":
        raise _refused(field, f"token ids must be integers, got {array.dtype}")
    if array.dtype == np.uint64 and (large := array > np.iinfo(np.int64).max).any():
        index = int(np.flatnonzero(large)[0])
        raise _refused(f"{field}[{index}]", f"{array[index]} is no token id")
    return array.astype(np.int64)


def as_mask(given: object, length: int | None, field: str) -> NDArray[np.bool_]:
    """Converts a mask of any array library to ``(T,)`` booleans.

    Args:
        given: 0 and 1, as booleans, integers or floating-point numbers.
        length: ``T``, the expected number of entries; ``None`` = unknown.
        field: name of the mask's field, for error messages.

    Raises:
        InvalidRequestError: an entry is neither 0 nor 1 (such as -100, NaN or 0.5), or the length differs from ``length``.
    """
    array = _flat(given, field, "a mask of 0 and 1")
    if length is not None and len(array) != length:
        raise _refused(field, f"{len(array)} entries for {length} tokens")
    if array.size and array.dtype.kind not in "biuf":
        raise _refused(field, f"a mask holds 0 and 1, got {array.dtype}")
    wrong = np.flatnonzero(~np.isin(array, (0, 1)))
    if wrong.size:
        raise _refused(f"{field}[{wrong[0]}]", f"a mask holds 0 and 1, got {array[wrong[0]]}")
    return array.astype(bool)


def as_rewards(given: object, count: int, field: str) -> NDArray[np.float64]:
    """Converts rewards of any array library to ``(n,)`` float64.

    Raises:
        InvalidRequestError: the value does not consist of ``count`` finite numbers; the error names the first entry that is not a finite
            number.
    """
    array = _flat(given, field, "rewards")
    if len(array) != count:
        raise _refused(field, f"must be {count} finite numbers, one for each rollout; got {len(array)}")
    if array.size and array.dtype.kind not in "biuf":
        raise _refused(field, f"must be {count} finite numbers, got {array.dtype}")
    rewards = array.astype(np.float64)
    wrong = np.flatnonzero(~np.isfinite(rewards))
    if wrong.size:
        raise _refused(f"{field}[{wrong[0]}]", f"must be a finite number, got {rewards[wrong[0]]}")
    return rewards


def as_numbers(given: object, field: str) -> NDArray[np.float64]:
    """Converts numbers of any array library and any shape to float64; NaN and infinities are kept.

    Raises:
        InvalidRequestError: the value contains something other than numbers.
    """
    array = _array(given, field)
    if array.size and array.dtype.kind not in "biuf":
        raise _refused(field, f"expected numbers, got {array.dtype}")
    return array.astype(np.float64)


def as_list(given: Iterable[Any] | None, field: str) -> list[Any]:
    """Converts the rows of a batch, in any container, to a list; a generator is read to its end.

    Raises:
        InvalidRequestError: the value is a single item (such as one string) and not a batch of items.
    """
    if given is None or isinstance(given, (str, bytes)):
        raise _refused(field, f"expected one for each rollout, got {given!r:.60}")
    try:
        return list(given)
    except TypeError:
        raise _refused(field, f"expected one for each rollout, got {type(given).__name__}") from None


def as_group_key(given: object, field: str) -> Hashable | None:
    """Returns a hashable key of a rollout's group: keys are equal if the values are equal, whatever library stores them. ``None`` stays
    ``None``.

    Raises:
        InvalidRequestError: the key cannot be compared by value: NaN, or an object that is equal to itself only.
    """
    if isinstance(given, np.generic):
        given = given.item()
    elif _is_array(given):
        # words are a value too
        given = given.tolist() if isinstance(given, np.ndarray) and given.dtype.kind in "USO" else _array(given, field).tolist()
    if isinstance(given, (list, tuple)):
        return tuple(as_group_key(entry, f"{field}[{index}]") for index, entry in enumerate(given))
    if isinstance(given, float) and math.isnan(given):
        raise _refused(field, "NaN is no key of a group: it equals nothing")
    if not isinstance(given, Hashable):
        raise _refused(field, f"{type(given).__name__} is no key of a group: give a number, text or a tuple")
    if given is not None and type(given).__eq__ is object.__eq__:
        raise _refused(field, f"{type(given).__name__} is no key of a group: each is equal to itself only; give a number or text")
    return given


def _refused(field: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {problem}", "INVALID_ARGUMENT", violations=(FieldViolation(field, problem),))


def _flat(given: object, field: str, what: str) -> NDArray[Any]:
    if given is None or isinstance(given, (str, bytes, dict, set, frozenset)):
        raise _refused(field, f"expected {what}, got {given!r:.60}")
    array = _array(given, field)
    if array.ndim != 1:
        raise _refused(field, f"expected {what} in a flat sequence, got the shape {array.shape}")
    return array


def _array(given: Any, field: str) -> NDArray[Any]:  # noqa: ANN401 - of any library
    """Converts numbers of any shape to a numpy array; the dtype of an empty sequence is not meaningful."""
    if isinstance(given, np.ma.MaskedArray):
        if np.ma.getmaskarray(given).any():
            raise _refused(field, "has masked entries, which have no number")
        given = given.data
    elif _is_torch(given):
        given = _of_torch(given, field)
    elif callable(missing := getattr(given, "isna", None)):
        if np.asarray(missing()).any():
            raise _refused(field, "has missing values")
        given = given.tolist()
    elif callable(listed := getattr(given, "to_pylist", None)):
        given = listed()
    elif _is_scipy_sparse(given):
        raise _refused(field, "is sparse: give a dense array")
    if not isinstance(given, np.ndarray) and not hasattr(given, "__array__") and isinstance(given, Iterable):
        entries = list(given)
        # the usual case, in which looking at each entry would take longer than reading it
        given = entries if set(map(type, entries)) <= {int, float, bool} else [*_plain_entries(entries, field)]
    try:
        array = np.asarray(given)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise _refused(field, f"is no array of numbers: {error}") from None
    if array.dtype.kind in "OcMmVUS":
        # if one entry is at fault it is named
        for index, entry in enumerate(array.flat):
            if not isinstance(entry, (bool, int, float, np.bool_, np.integer, np.floating)):
                raise _refused(f"{field}[{index}]", f"expected a number, got {entry!r:.60}")
        if array.dtype.kind == "O":
            array = np.asarray(array.tolist())
        if array.dtype.kind not in "biuf":
            raise _refused(field, "holds numbers that no array can")
    return array


def _plain_entries(given: Iterable[Any], field: str) -> Iterator[Any]:
    for index, entry in enumerate(given):
        if entry is None:
            raise _refused(f"{field}[{index}]", "expected a number, got None")
        yield _array(entry, f"{field}[{index}]") if _is_array(entry) else entry


def _is_array(given: object) -> bool:
    return isinstance(given, np.ndarray) or _is_torch(given) or (hasattr(given, "__array__") and hasattr(given, "shape"))


def _is_torch(given: object) -> bool:
    return hasattr(given, "detach") and hasattr(given, "cpu")


def _is_scipy_sparse(given: object) -> bool:
    return hasattr(given, "tocoo") and hasattr(given, "nnz")


def _of_torch(tensor: Any, field: str) -> NDArray[Any]:  # noqa: ANN401 - torch is the trainer's
    unusual: tuple[tuple[bool, str], ...] = (
        (hasattr(tensor, "full_tensor"), "is one shard of a distributed tensor: call full_tensor()"),
        (bool(getattr(tensor, "is_nested", False)), "is a nested tensor: give a list of tensors"),
        (str(getattr(tensor, "layout", "torch.strided")) != "torch.strided", "is sparse: call to_dense()"),
        (bool(getattr(tensor, "is_quantized", False)), "is quantised: call dequantize()"),
        (getattr(getattr(tensor, "device", None), "type", "") == "meta", "has no numbers: it is on the meta device"),
    )
    for applies, problem in unusual:
        if applies:
            raise _refused(field, problem)
    plain = tensor.detach().cpu()
    resolved: Callable[[], Any] | None = getattr(plain, "resolve_neg", None)
    plain = plain if resolved is None else resolved()
    if any(narrow in str(plain.dtype) for narrow in _NARROW_FLOATS):
        plain = plain.float()
    array: NDArray[Any] = plain.numpy()
    return array
