"""What authors hand over, read into arrays and value types, or refused in their words: the argument, its value, what to give instead.

A value of another kind is a ``TypeError``, one that is wrong a ``ValueError``. Whatever holds numbers is taken: lists, tuples, numpy
arrays of any integer or floating dtype, torch tensors on any device, with gradients or without.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from probescore.reductions import Reduction
from probescore.types import Hook, ScoreUnit, Tap

_Kind = TypeVar("_Kind")
_Given = Any  # whatever an author hands over


@dataclass(frozen=True)
class Vocabulary:
    """The ids that a model can read.

    Attributes:
        size: they are below this.
        placeholders: those that stand for a picture or a sound, and for which.
    """

    size: int
    placeholders: Mapping[int, str] = field(default_factory=dict)


def shown(value: _Given) -> str:
    """A value as it is put into a message: short, on one line."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} of shape {tuple(value.shape)} and dtype {value.dtype}"
    written = value.__name__ if isinstance(value, type) else repr(value)
    written = " ".join(written.split())
    return written if len(written) <= 80 else written[:77] + "…"


def kind_of(value: _Given) -> str:
    """``None``, or the name of a type with its article."""
    if value is None:
        return "None"
    name = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    return name if isinstance(value, type) else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def of_kind(value: _Given, argument: str, kind: type[_Kind], remedy: str) -> _Kind:
    """A value of one type.

    Raises:
        TypeError: it is of another.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{argument}: {kind_of(value)} ({shown(value)}); {remedy}")
    return value


def flag(value: _Given, argument: str) -> bool:
    """True or false, numpy's too."""
    return bool(of_kind(value, argument, (bool, np.bool_), "give True or False"))  # type: ignore[arg-type]


def text(value: _Given, argument: str, longest: int | None = None) -> str:
    """Text of at most so many characters."""
    written = of_kind(value, argument, str, "give text")
    if longest is not None and len(written) > longest:
        raise ValueError(f"{argument}: {len(written)} characters ({shown(written)}); give at most {longest}")
    return written


def named(value: _Given, argument: str, pattern: str, rule: str) -> str:
    """Text of a pattern that ``rule`` says in words."""
    written = text(value, argument)
    if not re.fullmatch(pattern, written):
        raise ValueError(f"{argument}: {shown(written)}; give {rule}")
    return written


def unit(value: _Given, argument: str) -> ScoreUnit:
    """A unit, as itself or as text."""
    units = ", ".join(f"ScoreUnit.{each.name}" for each in ScoreUnit)
    if not isinstance(value, str):
        raise TypeError(f"{argument}: {kind_of(value)} ({shown(value)}); give one of {units}")
    try:
        return ScoreUnit(value)
    except ValueError:
        raise ValueError(f"{argument}: {shown(value)}; give one of {units}") from None


def reduction(value: _Given, argument: str) -> str:
    """A reduction as text; a ``Reduction`` too.

    Raises:
        TypeError: it is neither.
        ValueError: there is no such reduction.
    """
    if not isinstance(value, (str, Reduction)):
        raise TypeError(f'{argument}: {kind_of(value)} ({shown(value)}); give a reduction as text, such as "mean" or "topk_mean(8)"')
    try:
        return str(Reduction.parse(str(value)))
    except ValueError as error:
        raise ValueError(f"{argument}: {shown(value)}: {error}") from None


def sequence(value: _Given, argument: str, of: str, example: str) -> list[Any]:
    """The members of a list, a tuple or whatever else is gone through, but not of a text or a mapping.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{argument}: {kind_of(value)} ({shown(value)}); give a list of {of}, such as {example}")
    return list(value)


# --------------------------------------------------------------------------------------------------------------------------- numbers


def numbers(value: _Given, argument: str, what: str) -> NDArray[np.float64]:
    """Real, finite numbers of any shape, in float64.

    Args:
        value: as an author has it.
        argument: its name.
        what: what the numbers are, for messages.

    Raises:
        TypeError: these are no numbers.
        ValueError: they do not form one shape, or one is NaN or infinite.
    """
    array = real(value, argument, what)
    if array.size == 0:
        raise ValueError(f"{argument}: no numbers (shape {array.shape}); give {what}")
    wrong = ~np.isfinite(array)
    if wrong.any():
        where = np.argwhere(wrong)[0].tolist()
        first = f"{array[tuple(where)]} at {argument}{where}" if where else f"{float(array)}"
        raise ValueError(f"{argument}: {int(wrong.sum())} of {array.size} numbers are not finite (first: {first}); give finite ones")
    return array


def real(value: _Given, argument: str, what: str) -> NDArray[np.float64]:
    """Real numbers of any shape, in float64; NaN and infinities are left to the caller.

    Raises:
        TypeError: these are no numbers.
        ValueError: they do not form one shape.
    """
    array = _array(value, argument, what)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{argument}: {_described(value, array)}; give {what} as floating-point numbers")
    return array.astype(np.float64)


def number(value: _Given, argument: str, what: str) -> float:
    """A single real number; NaN and infinities are left to the caller."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{argument}: {shown(value)}; give {what}")
    array = real(value, argument, what)
    if array.size != 1:
        raise ValueError(f"{argument}: {array.size} numbers; give {what}")
    return float(array.reshape(()))


def _array(value: _Given, argument: str, what: str) -> NDArray[Any]:
    """As numpy has it; of objects only if they are numbers."""
    if value is None or isinstance(value, (str, bytes, Mapping, set, frozenset, Iterator)):
        raise TypeError(f"{argument}: {kind_of(value)} ({shown(value)}); give {what} as a list or an array")
    if callable(getattr(value, "detach", None)):  # a torch tensor: of a dtype that numpy may lack, or with gradients, or elsewhere
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() and value.element_size() < 4 else value.numpy()
    elif isinstance(value, Sequence) and any(callable(getattr(entry, "detach", None)) for entry in value):
        value = [_array(entry, argument, what) for entry in value]
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{argument}: lists of different lengths or depths; give {what} in one shape") from None
    if array.dtype.kind == "O":
        if not all(isinstance(entry, (int, float, np.number)) and not isinstance(entry, bool) for entry in array.ravel()):
            raise TypeError(f"{argument}: {_described(value, array)}; give {what} in one shape, as numbers")
        try:
            array = np.array(array.tolist())
        except (ValueError, OverflowError):
            array = array.astype(np.float64)
    return array


def _described(value: _Given, array: NDArray[Any]) -> str:
    if array.dtype.kind == "O":
        odd = next((entry for entry in array.ravel() if not isinstance(entry, (int, float, np.number)) or isinstance(entry, bool)), None)
        return f"an entry is {kind_of(odd)} ({shown(odd)})" if array.ndim else f"{kind_of(value)} ({shown(value)})"
    kinds = {"U": "text", "S": "bytes", "b": "True and False", "c": "complex numbers", "f": "floating-point numbers"}
    return f"{kinds.get(array.dtype.kind, f'numbers of dtype {array.dtype}')} ({shown(value)})"


# ------------------------------------------------------------------------------------------------------------------- tokens and taps


def token_ids(value: _Given, argument: str, vocabulary: Vocabulary, *, may_be_empty: bool = False) -> NDArray[np.int64]:
    """Ids of one sequence, ``(T,)``.

    Raises:
        TypeError: these are no ids.
        ValueError: they are of several sequences, none, or none of the model's.
    """
    what = "token ids"
    if isinstance(value, (str, bytes)):
        raise TypeError(
            f"{argument}: text ({shown(value)}); give ids, tokenizer(text, add_special_tokens=False)['input_ids']: they are taken verbatim"
        )
    if isinstance(value, Mapping) or hasattr(value, "input_ids"):
        raise TypeError(f"{argument}: {kind_of(value)}; give its ids: encoding['input_ids']")
    array = _array(value, argument, what)
    if array.ndim != 1:
        shape = f"shape {array.shape}" if array.ndim else shown(value)
        raise ValueError(f"{argument}: {shape}; give the ids of one sequence, (T,){', such as ids[0]' if array.ndim > 1 else ''}")
    if array.size == 0:
        if may_be_empty:
            return np.zeros(0, np.int64)
        raise ValueError(f"{argument}: no ids; give at least one")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{argument}: {_described(value, array)}; give {what}, which are whole numbers of an integer dtype")
    outside = (array < 0) | (array >= vocabulary.size)
    if outside.any():
        index = int(np.argmax(outside))
        raise ValueError(f"{argument}: id {array[index]} at index {index}; the model's ids are 0 to {vocabulary.size - 1}")
    ids = array.astype(np.int64)
    for index, given in enumerate(ids.tolist()):
        if given in vocabulary.placeholders:
            of = vocabulary.placeholders[given]
            raise ValueError(
                f"{argument}: id {given} at index {index} stands for {of} input, which is not read; give rollouts of text alone"
            )
    return ids


def rollouts(value: _Given, argument: str, vocabulary: Vocabulary) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """``(prompt_ids, completion_ids)`` of each, one after another.

    Raises:
        TypeError: one is no pair of ids.
        ValueError: ids are none of the model's, or a completion is empty.
    """
    example = "[(prompt_ids, completion_ids), …]"
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{argument}: {kind_of(value)} ({shown(value)}); give a list of rollouts, {example}")
    for index, rollout in enumerate(value):
        name = f"{argument}[{index}]"
        if not isinstance(rollout, (tuple, list)):
            raise TypeError(f"{name}: {kind_of(rollout)} ({shown(rollout)}); give a pair (prompt_ids, completion_ids)")
        if len(rollout) != 2:
            raise ValueError(f"{name}: {len(rollout)} entries ({shown(rollout)}); give a pair (prompt_ids, completion_ids)")
        prompt, completion = rollout
        yield (
            token_ids(prompt, f"{name} prompt_ids", vocabulary, may_be_empty=True),
            token_ids(completion, f"{name} completion_ids", vocabulary),
        )


def tap(value: _Given, argument: str, num_hidden_layers: int) -> Tap:
    """Where to read, as a ``Tap`` or as ``str(tap)`` writes it.

    Raises:
        TypeError: it is neither.
        ValueError: there is no such hook, or the model has no such block.
    """
    *others, last = (f"{hook}.N" if hook.has_layer else str(hook) for hook in Hook)
    hooks = f"{', '.join(others)} or {last}"
    if isinstance(value, Tap):
        hook, layer = value.hook, value.layer
    elif isinstance(value, str):
        hook, dot, number = value.partition(".")
        if dot and not (number.isascii() and number.isdecimal()):
            raise ValueError(f"{argument}: {shown(value)}: the layer {number!r} is not a number; give {hooks}")
        layer = int(number) if dot else None
    else:
        raise TypeError(f"{argument}: {kind_of(value)} ({shown(value)}); give {hooks}, as text or as a Tap")
    if hook not in tuple(Hook):
        raise ValueError(f"{argument}: {value!s}: no such tap; give {hooks}")
    if (layer is not None) != Hook(hook).has_layer:
        raise ValueError(f"{argument}: {value!s}: {'no layer' if layer is not None else 'a layer'} for hook {hook}; give {hooks}")
    if layer is None:
        return Tap(hook)
    if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)):
        raise TypeError(f"{argument}: {value!s}: the layer is {kind_of(layer)}; give a whole number")
    if not 0 <= layer < num_hidden_layers:
        raise ValueError(
            f"{argument}: {value!s}: the model has {num_hidden_layers} blocks, counted from 0; give layer 0 to {num_hidden_layers - 1}"
        )
    return Tap(hook, int(layer))


def taps(value: _Given, num_hidden_layers: int) -> list[Tap]:
    """Several of them; at least one."""
    if isinstance(value, Tap):
        raise TypeError(f"taps: a Tap ({value}); give a list of taps, such as [{value}]")
    found = sequence(value, "taps", "taps", f'["{value if isinstance(value, str) else "resid_post.6"}"]')
    if not found:
        raise ValueError('taps: none; give at least one, such as ["resid_post.6"]')
    return [tap(each, f"taps[{index}]", num_hidden_layers) for index, each in enumerate(found)]
