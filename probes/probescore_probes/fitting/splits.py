"""Groups rollouts that belong together, and divides whole groups between the splits of the data and between folds.

Rollouts of one problem resemble each other beyond their label. Fitting on one and testing on another would overstate how good a probe is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probescore_probes.fitting.labelled_rollouts import CALIBRATION, OOD, SPLITS, TEST, TRAIN, Example

SHARES = {TRAIN: 0.6, CALIBRATION: 0.2, TEST: 0.2}
LARGEST_GROUP = 0.5
"""Limits the share of the data in one group; a larger group would leave nothing to test on."""

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Split:
    """The division of examples into splits, such as those for fitting and for testing.

    Attributes:
        groups: number of each example's group, ``(n,)``.
        named: whether the data named the groups; else they were derived from equal texts.
        given: whether the data named the splits; else they were drawn.
        parts: indices of examples, a dictionary keyed by the split's name, with every one of ``SPLITS``; ``ood`` may be empty.
    """

    groups: Indices
    named: bool
    given: bool
    parts: dict[str, Indices]

    def __getitem__(self, name: str) -> Indices:
        return self.parts[name]

    def count_groups(self, name: str) -> int:
        """Counts the groups of rollouts in one split of the data, such as the one for testing."""
        return len(np.unique(self.groups[self.parts[name]]))


def split(examples: Sequence[Example], seed: int) -> Split:
    """Groups examples and divides the groups into splits of 60, 20 and 20%, or into the splits that the data names.

    Raises:
        ValueError: some examples name a group or a split and others do not, there are too few groups, one group is most of the data, a
            group is in two splits, or a split or all of the data lacks a class.
    """
    outside = np.array([example.split == OOD for example in examples])
    groups, named = _groups_inside_and_outside(examples, outside)
    given = [example.split is not None for example in examples if example.split != OOD]
    if any(given) and not all(given):
        missing = next(example.where for example in examples if example.split is None)
        raise ValueError(f"{missing}: no split, where other lines have one; give every line one of {', '.join(SPLITS)}, or none")
    _check_enough(examples, groups, outside)
    if any(given):
        parts = {name: np.flatnonzero([example.split == name for example in examples]) for name in SPLITS}
        _check_sides(examples, groups, parts)
    else:
        parts = _drawn(groups, outside, np.array([example.positive for example in examples]), seed)
    for name in SHARES:
        for kind, word in ((True, "positive"), (False, "negative")):
            if not any(examples[int(index)].positive is kind for index in parts[name]):
                remedy = "give every split both kinds" if any(given) else "give more groups that have one, or name the splits"
                raise ValueError(f"split: no {word} example among {len(parts[name])} for {name}; {remedy}")
    return Split(groups, named, any(given), parts)


def groups_of(examples: Sequence[Example]) -> tuple[Indices, bool]:
    """Returns the number of each example's group, and whether the data named the groups.

    Groups without names are the connected components of the examples in a slice, linked by equal prompts and by equal completions.

    Raises:
        ValueError: the data name the groups of only some examples, or the components are too large to divide.
    """
    names = [example.group for example in examples]
    if any(name is not None for name in names):
        if None in names:
            raise ValueError(f"{examples[names.index(None)].where}: no group, where other lines have one; give every line one, or none")
        return np.unique(np.array(names), return_inverse=True)[1].astype(np.int64), True
    groups = _components(examples)
    largest = int(np.bincount(groups).max()) if len(groups) else 0
    if len(examples) > 1 and largest > LARGEST_GROUP * len(examples):
        raise ValueError(
            f"group: {largest} of {len(examples)} examples are tied together by equal prompts and equal completions, which leaves nothing "
            'to test on; say what belongs together by "group" in each line, such as the id of the problem'
        )
    return groups, False


def _check_enough(examples: Sequence[Example], groups: Indices, outside: NDArray[np.bool_]) -> None:
    kinds = {example.positive for example, other in zip(examples, outside, strict=True) if not other}
    count = int((~outside).sum())
    if not count:
        raise ValueError(f"split: {len(examples)} examples, and all are {OOD}; give some to fit and to test on")
    if len(kinds) == 1:
        word = "positive" if kinds == {True} else "negative"
        raise ValueError(f"label: all {count} examples are {word}; a probe is fitted on both kinds, in several groups each")
    if (found := len(np.unique(groups[~outside]))) < len(SHARES):
        raise ValueError(
            f"group: {found} among {count} examples, and each of {', '.join(SHARES)} takes at least one whole group; give at least "
            f"{len(SHARES)}, of both labels"
        )


def _groups_inside_and_outside(examples: Sequence[Example], outside: NDArray[np.bool_]) -> tuple[Indices, bool]:
    """Groups the examples of other distributions apart: they come from other files, whose names of groups are of another kind, or none."""
    groups = np.empty(len(examples), np.int64)
    inside, named = groups_of([example for example, other in zip(examples, outside, strict=True) if not other])
    groups[~outside] = inside
    groups[outside] = len(examples) + _components([example for example, other in zip(examples, outside, strict=True) if other])
    return groups, named


def _components(examples: Sequence[Example]) -> Indices:
    """Numbers the groups: by name or, where there is none, the connected components of a slice (part of the data) by equal prompts and
    equal completions.
    """
    parent = list(range(len(examples)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[object, ...], int] = {}
    for index, example in enumerate(examples):
        for key in _ties(example):
            parent[root(index)] = root(first.setdefault(key, index))
    return np.unique([root(index) for index in range(len(examples))], return_inverse=True)[1].astype(np.int64)


def _ties(example: Example) -> Iterator[tuple[object, ...]]:
    """Yields the keys (such as the text of a prompt) that an example shares with the other examples of its group."""
    if example.group is not None:
        yield "group", example.group
        return
    if len(example.prompt_ids):  # an empty prompt makes no two rollouts alike
        yield "prompt", example.slice, example.prompt_ids.tobytes()
    yield "completion", example.slice, example.completion_ids.tobytes()


def shared_texts(examples: Sequence[Example], parts: dict[str, Indices]) -> tuple[int, int]:
    """Counts the distinct prompts, and the distinct completions, that occur both in the examples for fitting and in those for testing."""
    sides = [{index for name in names for index in parts[name]} for names in ((TRAIN,), (CALIBRATION, TEST))]
    prompts = [{examples[index].prompt_ids.tobytes() for index in side if len(examples[index].prompt_ids)} for side in sides]
    completions = [{examples[index].completion_ids.tobytes() for index in side} for side in sides]
    return len(prompts[0] & prompts[1]), len(completions[0] & completions[1])


def folds(groups: Indices, positive: NDArray[np.bool_], count: int, seed: int) -> Iterator[tuple[Indices, Indices]]:
    """Yields ``count`` folds, each as the indices of examples to fit on and of examples held out; every example is held out once.

    Whole groups are distributed over the folds, the largest first, by their numbers of positives and negatives, so that every fold has both
    classes as far as the groups allow.
    """
    dealt = _dealt(groups, positive, np.full(count, 1 / count), seed)
    for fold in range(count):
        held_out = np.flatnonzero(dealt == fold)
        if len(held_out):
            yield np.flatnonzero(dealt != fold), held_out


def _drawn(groups: Indices, outside: NDArray[np.bool_], positive: NDArray[np.bool_], seed: int) -> dict[str, Indices]:
    inside = np.flatnonzero(~outside)
    dealt = _dealt(groups[inside], positive[inside], np.array(list(SHARES.values())), seed)
    parts = {name: inside[dealt == number] for number, name in enumerate(SHARES)}
    return {**parts, OOD: np.flatnonzero(outside)}


def _dealt(groups: Indices, positive: NDArray[np.bool_], shares: NDArray[np.float64], seed: int) -> Indices:
    """Assigns whole groups to ``len(shares)`` parts, each group to the part that most lacks its classes; returns each example's part."""
    numbers, member = np.unique(groups, return_inverse=True)
    sizes = np.stack([np.bincount(member, weights=kind, minlength=len(numbers)) for kind in (positive, ~positive)], axis=1)
    order = np.random.default_rng(seed).permutation(len(numbers))
    order = order[np.argsort(-sizes[order].sum(axis=1), kind="stable")]
    totals = np.maximum(sizes.sum(axis=0), 1)
    wanted = shares[:, None] * totals
    part_of = np.zeros(len(numbers), np.int64)
    have = np.zeros_like(wanted)
    for group in order:
        lacking = ((wanted - have) / wanted) @ (sizes[group] / totals)
        part_of[group] = int(np.argmax(lacking))
        have[part_of[group]] += sizes[group]
    return part_of[member]


def _check_sides(examples: Sequence[Example], groups: Indices, parts: dict[str, Indices]) -> None:
    side: dict[int, tuple[str, int]] = {}
    for name in SHARES:
        for index in parts[name]:
            other, first = side.setdefault(int(groups[index]), (name, int(index)))
            if other != name and examples[index].group is not None:
                raise ValueError(
                    f"{examples[index].where}: group {examples[index].group!r} is in {name}, and in {other} at {examples[first].where}; "
                    "a group must stand on one side"
                )
