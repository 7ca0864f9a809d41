"""Represents the labelled rollouts that a probe is fitted on, before and after their texts are tokenised.

An *example* is the part of a rollout that one label is about: a whole completion under its mask, or a passage of the completion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby

import numpy as np
from numpy.typing import NDArray

from probescore.types import Chat, Completion, RolloutGroup, Span, Text
from probescore_server.engine.engine import Engine

TRAIN, CALIBRATION, TEST, OOD = SPLITS = ("train", "calibration", "test", "ood")
WEIGHTS = (1e-6, 1e6)
"""The smallest and the largest weight: beyond them, sums of weights lose the digits of the others."""
PASSAGE = "passage"
"""Name of the span (token range) by which a request to the engine marks the labelled passage of a completion."""


@dataclass(frozen=True)
class Passage:
    """A part of a completion with its own label, from ``start`` to before ``end``: in characters of a text, or in tokens of token ids."""

    start: int
    end: int
    positive: bool


@dataclass(frozen=True, eq=False)
class LabelledRollout:
    """A prompt with one completion and its labels, as read from one line of a data file.

    Attributes:
        prompt: the prompt as a text, a chat or token ids.
        completion: the completion with its mask; its spans and follow-ups (token ids appended to a completion) are ignored.
        positive: whether the whole completion has the behaviour; ``None`` = only its passages are labelled.
        where: the line and field, for messages.
        group: name of the group; rollouts of one group are never divided between splits; ``None`` = derived from equal texts.
        split: one of ``SPLITS``; ``None`` = drawn at random.
        slice: name of a part of the data that is evaluated separately.
        weight: how many times the rollout counts in fitting and evaluation.
        passages: parts of the completion with labels of their own.
        token_labels: a label for each token of a completion given as token ids; ``None`` for a token without a label.
    """

    prompt: Text | Chat | Sequence[int]
    completion: Completion
    positive: bool | None
    where: str
    group: str | None = None
    split: str | None = None
    slice: str = ""
    weight: float = 1.0
    passages: tuple[Passage, ...] = ()
    token_labels: tuple[bool | None, ...] | None = None


@dataclass(frozen=True, eq=False)
class Example:
    """The token ids of one labelled completion, or of one labelled passage of a completion.

    Attributes:
        prompt_ids, completion_ids: token ids, ``(P,)`` and ``(T,)`` int32.
        mask: which tokens of the completion count, ``(T,)`` bool; ``None`` = all.
        passage: ``(start, end)`` in tokens of the completion; ``None`` = the whole completion.
        form: how the prompt was given: ``text``, ``text with special tokens``, ``chat`` or ``ids``.
        text: the texts of prompt and completion, as far as they were given as text; used to test other forms of the prompt.
    """

    prompt_ids: NDArray[np.int32]
    completion_ids: NDArray[np.int32]
    mask: NDArray[np.bool_] | None
    passage: tuple[int, int] | None
    positive: bool
    where: str
    group: str | None
    split: str | None
    slice: str
    weight: float
    form: str
    prompt_text: str | None = None
    inexact: bool = field(default=False)

    @property
    def selected(self) -> NDArray[np.bool_]:
        """Returns which tokens of the completion the label is about, ``(T,)`` bool."""
        kept = np.ones(len(self.completion_ids), bool) if self.mask is None else self.mask.copy()
        if self.passage is not None:
            kept[: self.passage[0]] = False
            kept[self.passage[1] :] = False
        return kept

    def rollout(self) -> RolloutGroup:
        """Returns the request to the engine that scores this labelled completion or passage: the rollout, with the passage as its one span
        (token range).
        """
        spans = () if self.passage is None else (Span(PASSAGE, *self.passage),)
        return RolloutGroup(self.prompt_ids, [Completion(self.completion_ids, mask=self.mask, spans=spans)])


def tokenised(rollouts: Sequence[LabelledRollout], engine: Engine) -> list[Example]:
    """Tokenises labelled rollouts as an engine would, and returns their examples: one for each labelled completion or passage.

    Raises:
        ValueError: a weight is out of range, an example has no token to read, a passage lies outside its completion, or labels and tokens
            differ in number; the message names the line.
    """
    prompts: dict[tuple[object, ...], NDArray[np.int32]] = {}
    examples = []
    for rollout in rollouts:
        if not WEIGHTS[0] <= rollout.weight <= WEIGHTS[1]:
            raise ValueError(f"{rollout.where}: weight: {rollout.weight:.3g}; give a number from {WEIGHTS[0]:g} to {WEIGHTS[1]:g}")
        prompt_ids = _prompt_ids(rollout, engine, prompts)
        content = rollout.completion.tokens
        is_text = isinstance(content, str)
        if isinstance(content, str):
            ids = engine.encode_completion(content, field=f"{rollout.where}: completion")
        else:
            ids = np.asarray(content, np.int32)
        if not len(ids):
            raise ValueError(f"{rollout.where}: the completion has no tokens; leave the rollout out, or give a completion")
        mask = None if rollout.completion.mask is None else np.asarray(rollout.completion.mask, bool)
        if mask is not None and len(mask) != len(ids):
            raise ValueError(f"{rollout.where}: mask: {len(mask)} entries for {len(ids)} tokens; give one for each")
        for passage, positive in _labelled_parts(rollout, ids, engine):
            example = Example(
                prompt_ids=prompt_ids,
                completion_ids=ids,
                mask=mask,
                passage=passage,
                positive=positive,
                where=rollout.where,
                group=rollout.group,
                split=rollout.split,
                slice=rollout.slice,
                weight=rollout.weight,
                form=_form(rollout.prompt),
                prompt_text=rollout.prompt.text if isinstance(rollout.prompt, Text) else None,
                inexact=is_text or isinstance(rollout.prompt, Text | Chat),
            )
            if not example.selected.any():
                part = "the completion" if passage is None else f"tokens {passage[0]} to {passage[1]} of the completion"
                raise ValueError(f"{rollout.where}: no token of {part} counts under its mask; leave it out, or change the mask")
            examples.append(example)
    return examples


def facts(examples: Sequence[Example]) -> dict[str, object]:
    """Returns facts about the data for a report, such as numbers of examples and of positives."""
    lengths = np.array([example.selected.sum() for example in examples])
    return {
        "examples": len(examples),
        "positives": sum(example.positive for example in examples),
        "negatives": sum(not example.positive for example in examples),
        "slices": dict(Counter(example.slice for example in examples if example.slice)),
        "prompt_forms": dict(Counter(example.form for example in examples)),
        "tokens_median": float(np.median(lengths)),
        "tokens_largest": int(lengths.max()),
        "prompt_tokens_median": float(np.median([len(example.prompt_ids) for example in examples])),
    }


def _prompt_ids(rollout: LabelledRollout, engine: Engine, known: dict[tuple[object, ...], NDArray[np.int32]]) -> NDArray[np.int32]:
    prompt = rollout.prompt
    if not isinstance(prompt, Text | Chat):
        return np.asarray(prompt, np.int32)
    key = (repr(prompt),)
    if key not in known:
        known[key] = engine.encode_prompt(prompt, field=f"{rollout.where}: prompt")
    return known[key]


def _form(prompt: Text | Chat | Sequence[int]) -> str:
    if isinstance(prompt, Text):
        return "text with special tokens" if prompt.add_special_tokens else "text"
    return "chat" if isinstance(prompt, Chat) else "ids"


def _labelled_parts(rollout: LabelledRollout, ids: NDArray[np.int32], engine: Engine) -> Iterator[tuple[tuple[int, int] | None, bool]]:
    if rollout.positive is not None:
        yield None, rollout.positive
    content = rollout.completion.tokens
    to_tokens: Callable[[Passage], tuple[int, int]] = _tokens_of_characters(content, ids, engine) if isinstance(content, str) else _bounds
    size = len(content)
    for passage in rollout.passages:
        if not 0 <= passage.start < passage.end <= size:
            unit = "characters" if isinstance(content, str) else "tokens"
            raise ValueError(
                f"{rollout.where}: span [{passage.start}, {passage.end}] of a completion of {size} {unit}; give 0 ≤ start < end ≤ {size}"
            )
        yield to_tokens(passage), passage.positive
    if rollout.token_labels is not None:
        if len(rollout.token_labels) != len(ids):
            raise ValueError(f"{rollout.where}: token_labels: {len(rollout.token_labels)} for {len(ids)} tokens; give one for each")
        start = 0
        for label, run in groupby(rollout.token_labels):
            end = start + len(list(run))
            if label is not None:
                yield (start, end), label
            start = end


def _bounds(passage: Passage) -> tuple[int, int]:
    return passage.start, passage.end


def _tokens_of_characters(text: str, ids: NDArray[np.int32], engine: Engine) -> Callable[[Passage], tuple[int, int]]:
    """Returns a function from a passage, in characters of a text, to the range of the tokens that contain a character of the passage."""
    ends = list(accumulate(len(piece) for piece in engine.decode_tokens(ids)))
    starts = [0, *ends[:-1]]
    # Some tokenizers decode to a leading space that the text does not have.
    ahead = (ends[-1] if ends else 0) - len(text)

    def tokens(passage: Passage) -> tuple[int, int]:
        within = [
            index
            for index, (start, end) in enumerate(zip(starts, ends, strict=True))
            if start - ahead < passage.end and end - ahead > passage.start
        ]
        return (within[0], within[-1] + 1) if within else (0, 0)

    return tokens


def counts_by(examples: Sequence[Example], splits: Mapping[str, NDArray[np.int64]]) -> dict[str, dict[str, int]]:
    """Counts the positives, negatives and groups of each split."""
    return {
        name: {
            "positives": sum(examples[index].positive for index in indices),
            "negatives": sum(not examples[index].positive for index in indices),
        }
        for name, indices in splits.items()
    }
