"""Converts the arguments that authors of probes pass to arrays and value types, or refuses an argument with a message.

A message names the argument, its value, and what to give instead. Numbers and text are read by ``probescore_audit.arguments``. This module
reads arguments that concern a model and its probes: token ids, taps (points in a language model where a probe reads activations) and units.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probescore.types import Hook, ScoreUnit, Tap
from probescore_audit.arguments import array_of, described, kind_of, named, of_kind, real, reduction, shown, text

__all__ = [
    "Vocabulary",
    "flag",
    "kind_of",
    "named",
    "numbers",
    "of_kind",
    "real",
    "reduction",
    "rollouts",
    "sequence",
    "shown",
    "tap",
    "taps",
    "text",
    "token_ids",
    "unit",
]

_Given = Any  # whatever an author hands over


@dataclass(frozen=True)
class Vocabulary:
    """Value object with the token ids that a model can read.

    Attributes:
        size: number of ids; every id is at least 0 and below this number.
        placeholders: dictionary keyed by id, for ids that stand for an input other than text: the kind of input, such as ``image``.
    """

    size: int
    placeholders: Mapping[int, str] = field(default_factory=dict)


def flag(value: _Given, argument: str) -> bool:
    """Returns a boolean argument, which may be numpy's, as ``bool``.

    Raises:
        TypeError: the value is not a boolean.
    """
    return bool(of_kind(value, argument, (bool, np.bool_), "give True or False"))


def unit(value: _Given, argument: str) -> ScoreUnit:
    """Returns a unit of scores, given as a ``ScoreUnit`` or as its text.

    Raises:
        TypeError: the value is neither a ``ScoreUnit`` nor text.
        ValueError: there is no unit of that name.
    """
    units = ", ".join(f"ScoreUnit.{each.name}" for each in ScoreUnit)
    if not isinstance(value, str):
        raise TypeError(f"{argument}: {kind_of(value)} ({shown(value)}); give one of {units}")
    try:
        return ScoreUnit(value)
    except ValueError:
        raise ValueError(f"{argument}: {shown(value)}; give one of {units}") from None


def sequence(value: _Given, argument: str, of: str, example: str) -> list[Any]:
    """Returns the members of a list, a tuple or any other iterable except text and mappings.

    Raises:
        TypeError: the value is not iterable, or is text or a mapping.
    """
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{argument}: {kind_of(value)} ({shown(value)}); give a list of {of}, such as {example}")
    return list(value)


# --------------------------------------------------------------------------------------------------------------------------- numbers


def numbers(value: _Given, argument: str, what: str) -> NDArray[np.float64]:
    """Reads real, finite numbers of any shape into a float64 array.

    Args:
        value: the argument as the author gave it.
        argument: name of the argument, for messages.
        what: noun for the numbers, for messages.

    Raises:
        TypeError: the value does not hold numbers.
        ValueError: the numbers do not form an array, there are none, or a number is NaN or infinite.
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


# ------------------------------------------------------------------------------------------------------------------- tokens and taps


def token_ids(value: _Given, argument: str, vocabulary: Vocabulary, *, may_be_empty: bool = False) -> NDArray[np.int64]:
    """Reads the token ids of one sequence, ``(T,)`` int64.

    Raises:
        TypeError: the value does not hold token ids.
        ValueError: the ids form several sequences, there are no ids where some are needed, or an id is not one of the model's text tokens.
    """
    what = "token ids"
    if isinstance(value, (str, bytes)):
        raise TypeError(
            f"{argument}: text ({shown(value)}); give ids, tokenizer(text, add_special_tokens=False)['input_ids']: they are taken verbatim"
        )
    if isinstance(value, Mapping) or hasattr(value, "input_ids"):
        raise TypeError(f"{argument}: {kind_of(value)}; give its ids: encoding['input_ids']")
    array = array_of(value, argument, what)
    if array.ndim != 1:
        shape = f"shape {array.shape}" if array.ndim else shown(value)
        raise ValueError(f"{argument}: {shape}; give the ids of one sequence, (T,){', such as ids[0]' if array.ndim > 1 else ''}")
    if array.size == 0:
        if may_be_empty:
            return np.zeros(0, np.int64)
        raise ValueError(f"{argument}: no ids; give at least one")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{argument}: {described(value, array)}; give {what}, which are whole numbers of an integer dtype")
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
    """Yields ``(prompt_ids, completion_ids)`` of each rollout, one after another, both int64.

    Raises:
        TypeError: a rollout is not a pair of token ids.
        ValueError: an id is not one of the model's text tokens, or a completion is empty.
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
    """Reads a tap, a point in a language model, given as a ``Tap`` or as text such as ``"resid_post.6"``.

    Raises:
        TypeError: the value is neither a ``Tap`` nor text.
        ValueError: there is no hook (kind of point in the model) of that name, or the model has no decoder block of that number.
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
    """Reads a list of at least one tap (a point in a language model where a probe reads activations).

    Raises:
        TypeError: the value is not a list of taps.
        ValueError: the list is empty, there is no hook (kind of point in the model) of a given name, or the model has no decoder block of a
            given number.
    """
    if isinstance(value, Tap):
        raise TypeError(f"taps: a Tap ({value}); give a list of taps, such as [{value}]")
    found = sequence(value, "taps", "taps", f'["{value if isinstance(value, str) else "resid_post.6"}"]')
    if not found:
        raise ValueError('taps: none; give at least one, such as ["resid_post.6"]')
    return [tap(each, f"taps[{index}]", num_hidden_layers) for index, each in enumerate(found)]
