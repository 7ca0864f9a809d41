"""Converts the padded tensors that ``generate()`` of ``transformers`` takes and returns to rollouts that contain exactly the prompt's
tokens and the sampled tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, SupportsIndex, Union

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probescore.errors import FieldViolation, InvalidRequestError
from probescore.types import Completion, RolloutGroup

TokenIdOrIds = Union[SupportsIndex, Sequence[int], NDArray[Any], None]


def rollouts_from_padded(
    sequences: ArrayLike,
    prompt_length: SupportsIndex,
    *,
    eos_token_id: TokenIdOrIds,
    attention_mask: ArrayLike | None = None,
    pad_token_id: SupportsIndex | None = None,
    completion_mask: ArrayLike | None = None,
    completions_per_prompt: SupportsIndex = 1,
) -> list[RolloutGroup]:
    """Removes the padding from the sequences that ``generate()`` of ``transformers`` returned, and cuts each completion after its first EOS
    token, which is kept; returns rollout groups.

    ::

        sequences = model.generate(**inputs, num_return_sequences=8)
        groups = rollouts_from_padded(
            sequences,
            inputs["input_ids"].shape[1],
            attention_mask=inputs["attention_mask"],
            eos_token_id=model.generation_config.eos_token_id,
            completions_per_prompt=8,
        )

    Prompts may be padded on either side and may hold EOS. Arrays are anything that numpy reads, and tensors of torch on any device; torch
    need not be installed. Ambiguous input is refused.

    Args:
        sequences: integers ``(B, P + T)``; each row is a padded prompt of width ``P``, followed by the tokens sampled after the prompt.
        prompt_length: ``P``, the width of the padded prompts, the same for all rows.
        eos_token_id: one id or several, as in ``generation_config.eos_token_id``; ``None``: no token ends a completion.
        attention_mask: 0 and 1 of any type, 1 = a token. ``(B, P)`` as ``generate()`` was given it, or one row per prompt, ``(B /
            completions_per_prompt, P)``; or over everything, ``(B, P + T)``, which then also says where completions end. The mask is
            required, unless ``pad_token_id`` is given, differs from every EOS id, and does not stand at the beginning of every prompt or at
            the end of every prompt.
        pad_token_id: the token id used as padding. If it is given, padding is also removed from the end of a completion without EOS.
        completion_mask: 0 and 1 ``(B, T)``, 1 = the sampled token counts in reductions. The mask is cut like the completion and stored in
            the completion.
        completions_per_prompt: number of consecutive rows with the same prompt, equal to ``num_return_sequences`` of ``generate()``.

    Returns:
        One group per prompt, in the order of the rows; ids are int64 copies.

    Raises:
        InvalidRequestError: an argument of the wrong shape, type or range; a row without prompt or completion; a mask with holes, or a mask
            that does not fit these sequences; tokens after an EOS that are not padding; padding that cannot be told from tokens; rows of
            one group with different prompts. ``field`` names the argument.
    """
    rows = _PaddedRows.of(sequences, prompt_length, eos_token_id, pad_token_id)
    per_prompt = _index(completions_per_prompt, "completions_per_prompt", 1)
    count, width = rows.ids.shape
    if count % per_prompt:
        _refuse("completions_per_prompt", f"{per_prompt} does not divide the {count} rows of sequences")
    mask = None if attention_mask is None else _attention_mask(attention_mask, rows, per_prompt)
    starts, ends = rows.prompt_bounds(None if mask is None else mask[:, : rows.prompt_length])
    whole = mask is not None and mask.shape[1] == width
    lengths = rows.masked_lengths(mask[:, rows.prompt_length :]) if mask is not None and whole else rows.lengths()
    counted = None if completion_mask is None else _completion_mask(completion_mask, rows, lengths)
    groups = []
    for first in range(0, count, per_prompt):
        prompt = rows.kept(first, starts[first], ends[first])
        completions = []
        for row in range(first, first + per_prompt):
            if not np.array_equal(prompt, rows.kept(row, starts[row], ends[row])):
                order = f"those of one prompt must follow each other, {per_prompt} at a time"
                _refuse("completions_per_prompt", f"rows {first} and {row} of sequences have different prompts; {order}")
            ids = rows.kept(row, rows.prompt_length, rows.prompt_length + lengths[row])
            completions.append(Completion(ids, mask=None if counted is None else counted[row, : lengths[row]].copy()))
        groups.append(RolloutGroup(prompt, completions))
    return groups


@dataclass(frozen=True, eq=False)
class _PaddedRows:
    """Rows of token ids as ``generate()`` of ``transformers`` returns them, each a padded prompt with its padded completion, with the
    special-token ids that are needed to find the padding. ``eos`` is empty if no token ends a completion.
    """

    ids: NDArray[np.int64]
    prompt_length: int
    eos: NDArray[np.int64]
    pad: int | None

    @classmethod
    def of(
        cls, sequences: ArrayLike, prompt_length: SupportsIndex, eos_token_id: TokenIdOrIds, pad_token_id: SupportsIndex | None
    ) -> _PaddedRows:
        ids = _array(sequences, "sequences")
        if ids.ndim != 2:
            _refuse("sequences", f"has shape {ids.shape}; two axes are expected, rows and tokens")
        if ids.dtype.kind not in "iu":
            _refuse("sequences", f"holds {ids.dtype}; token ids are integers")
        length = _index(prompt_length, "prompt_length", 1)
        if length >= ids.shape[1]:
            _refuse("prompt_length", f"{length} leaves no completion of the {ids.shape[1]} tokens of each row")
        pad = None if pad_token_id is None else _index(pad_token_id, "pad_token_id", 0)
        return cls(ids.astype(np.int64), length, _eos_ids(eos_token_id), pad)

    def kept(self, row: int, start: int, end: int) -> NDArray[np.int64]:
        ids = self.ids[row, start:end].copy()
        if (ids < 0).any():
            column = start + int(np.argmax(ids < 0))
            _refuse("sequences", f"[{row}, {column}] is {self.ids[row, column]}, and no padding; token ids are not negative")
        return ids

    def prompt_bounds(self, mask: NDArray[np.bool_] | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the indices at which the prompt in each of B padded rows begins and ends, as two arrays ``(B,)``."""
        prompts = self.ids[:, : self.prompt_length]
        field = "attention_mask"
        if mask is None:
            mask, field = self._prompts_without_padding(prompts), "pad_token_id"
        empty = ~mask.any(axis=1)
        if empty.any():
            _refuse(field, f"leaves no token of the prompt of row {int(np.argmax(empty))}")
        starts = mask.argmax(axis=1)
        ends = mask.shape[1] - mask[:, ::-1].argmax(axis=1)
        holes = ends - starts != mask.sum(axis=1)
        if holes.any():
            _refuse(field, f"takes tokens out of the middle of the prompt of row {int(np.argmax(holes))}; padding is on one side")
        padding = np.unique(prompts[~mask])
        if len(padding) > 1 or (self.pad is not None and len(padding) and padding[0] != self.pad):
            expected = "one id" if self.pad is None else f"pad_token_id {self.pad}"
            found = ", ".join(map(str, padding[:5]))
            _refuse(
                field, f"is 0 where the prompts of sequences hold {found}; padding is {expected}: it is not the mask of these sequences"
            )
        return starts, ends

    def _prompts_without_padding(self, prompts: NDArray[np.int64]) -> NDArray[np.bool_]:
        if self.pad is None:
            _refuse("attention_mask", "is needed, or pad_token_id, to tell padding from tokens; without any padding give ones")
        mask: NDArray[np.bool_] = prompts != self.pad
        if self.pad in self.eos and not mask[:, [0, -1]].all():
            _refuse("attention_mask", f"is needed: pad_token_id {self.pad} is an EOS too, with which a prompt may begin or end")
        if len(mask) and not mask[:, [0, -1]].any(axis=0).all():
            _refuse("attention_mask", f"is needed: every prompt begins, or ends, with pad_token_id {self.pad}, so that it may be a token")
        return mask

    def masked_lengths(self, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Returns the number of tokens of the completion in each of B padded rows, ``(B,)``, according to an attention mask over the
        completions. Refuses a mask that does not agree with the first EOS token.
        """
        lengths = mask.sum(axis=1)
        holes = (mask[:, 1:] & ~mask[:, :-1]).any(axis=1) | ((lengths > 0) & ~mask[:, 0])
        if holes.any():
            _refuse("attention_mask", f"takes tokens out of the completion of row {int(np.argmax(holes))} before its end")
        self._refuse_empty("attention_mask", lengths)
        first = self._first_eos()
        for row in np.flatnonzero(first + 1 < lengths):
            where = f"[{row}, {self.prompt_length + first[row] + 1}]"
            _refuse("attention_mask", f"{where} is 1, after the first EOS; with eos_token_id=None the mask alone decides")
        for row in np.flatnonzero((first == lengths) & (first < mask.shape[1])):
            where = f"[{row}, {self.prompt_length + first[row]}]"
            why = "as in a mask made of sequences != pad_token_id where that is an EOS"
            _refuse("attention_mask", f"{where} is 0 at the first EOS, {why}: set it to 1, or if it was not sampled give eos_token_id=None")
        return np.asarray(lengths, np.int64)

    def lengths(self) -> NDArray[np.int64]:
        """Returns the number of tokens of the completion in each of B padded rows, ``(B,)``: up to the completion's first EOS, inclusive,
        or else up to the padding at its end.
        """
        completions = self.ids[:, self.prompt_length :]
        first, width = self._first_eos(), completions.shape[1]
        lengths = np.minimum(first + 1, width)
        filler = self._filler(completions, lengths)
        unended = first == width
        if filler is not None and filler not in self.eos:
            ends_in = (completions[:, ::-1] == filler).argmin(axis=1)
            ends_in = np.where((completions == filler).all(axis=1), width, ends_in)
            stripped = unended & (ends_in > 0)
            if self.pad is None and stripped.any():
                row = int(np.argmax(stripped))
                problem = f"ends in {filler}, which is padding elsewhere: give pad_token_id, or an attention_mask over everything"
                _refuse("sequences", f"[{row}] has no EOS and {problem}")
            lengths = np.where(stripped, width - ends_in, lengths)
        self._refuse_empty("sequences", lengths)
        if self.pad is not None and self.pad not in self.eos and (completions[:, 0] == self.pad).any():
            row = int(np.argmax(completions[:, 0] == self.pad))
            where = f"[{row}, {self.prompt_length}]"
            _refuse("sequences", f"{where} is padding, where the completion begins: is prompt_length the width of the padded prompts?")
        return lengths

    def _filler(self, completions: NDArray[np.int64], lengths: NDArray[np.int64]) -> int | None:
        """Returns the token id that fills completions after their EOS token, or ``None`` if no completion has such padding."""
        after = np.arange(completions.shape[1]) >= lengths[:, None]
        others = after & ~np.isin(completions, self.eos)
        found = np.unique(completions[others])
        filler = self.pad if self.pad is not None else int(found[0]) if len(found) else None
        # nothing comes after padding, not even an EOS
        wrong = after & (completions != filler) & (others | np.logical_or.accumulate(others, axis=1))
        if wrong.any():
            row, column = (int(index) for index in np.argwhere(wrong)[0])
            where = f"[{row}, {self.prompt_length + column}] is {completions[row, column]}, after the first EOS, and no padding"
            _refuse("sequences", f"{where}: is eos_token_id right? An attention_mask over everything says where completions end")
        return filler

    def _first_eos(self) -> NDArray[np.int64]:
        """Returns the index of the first EOS token in the completion of each of B padded rows, ``(B,)``; for a completion without EOS, the
        width of the padded completions.
        """
        ends = np.isin(self.ids[:, self.prompt_length :], self.eos)
        return np.asarray(np.where(ends.any(axis=1), ends.argmax(axis=1), ends.shape[1]), np.int64)

    def _refuse_empty(self, field: str, lengths: NDArray[np.int64]) -> None:
        if (lengths == 0).any():
            _refuse(field, f"leaves no token of the completion of row {int(np.argmax(lengths == 0))}")


def _attention_mask(given: ArrayLike, rows: _PaddedRows, per_prompt: int) -> NDArray[np.bool_]:
    mask = _mask(given, "attention_mask")
    count, width = rows.ids.shape
    if per_prompt > 1 and mask.shape == (count // per_prompt, rows.prompt_length):
        return np.repeat(mask, per_prompt, axis=0)
    if mask.shape not in ((count, rows.prompt_length), (count, width)):
        _refuse("attention_mask", f"has shape {mask.shape}; {(count, rows.prompt_length)} or {(count, width)} is expected")
    return mask


def _completion_mask(given: ArrayLike, rows: _PaddedRows, lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
    mask = _mask(given, "completion_mask")
    expected = (rows.ids.shape[0], rows.ids.shape[1] - rows.prompt_length)
    if mask.shape != expected:
        _refuse("completion_mask", f"has shape {mask.shape}; {expected} is expected")
    beyond = mask & (np.arange(expected[1]) >= lengths[:, None])
    if beyond.any():
        row, column = (int(index) for index in np.argwhere(beyond)[0])
        _refuse("completion_mask", f"[{row}, {column}] is 1, after the end of the completion of {lengths[row]} tokens")
    return mask


def _mask(given: ArrayLike, field: str) -> NDArray[np.bool_]:
    array = _array(given, field)
    wrong = ~np.isin(array, (0, 1)) if array.dtype.kind in "biuf" else np.ones(array.shape, np.bool_)
    if wrong.any():
        index = tuple(int(axis) for axis in np.argwhere(wrong)[0])
        _refuse(field, f"{list(index)} is {array[index]}; a mask holds 0 and 1 only")
    return array.astype(np.bool_)


def _array(given: ArrayLike, field: str) -> NDArray[Any]:
    if hasattr(given, "sequences"):
        _refuse(field, f"is a {type(given).__name__}; give its .sequences")
    if isinstance(given, np.ma.MaskedArray):
        _refuse(field, "is a masked array, whose mask would be lost; give the numbers and an attention_mask")
    try:
        detach = getattr(given, "detach", None)
        if detach is not None:  # a tensor of torch, wherever it is
            tensor = detach().cpu()
            try:
                array = np.asarray(tensor.numpy())
            except TypeError:  # bfloat16, which numpy does not have
                array = np.asarray(tensor.float().numpy())
        else:
            array = np.asarray(given)
    except Exception as error:  # whatever a user's object raises
        _refuse(field, f"cannot be read as an array: {str(error)[:200]}")
    if array.dtype.kind not in "biuf":
        _refuse(field, f"holds {array.dtype}; numbers of one length per row are expected, got {type(given).__name__}")
    return array


def _eos_ids(given: TokenIdOrIds) -> NDArray[np.int64]:
    if given is None:
        return np.zeros(0, np.int64)
    try:
        return np.array([_index(given, "eos_token_id", 0)])  # type: ignore[arg-type] # several raise
    except TypeError:
        array = _array(given, "eos_token_id")  # type: ignore[arg-type] # one was returned
    if array.ndim != 1 or (array.size and (array.dtype.kind not in "iu" or array.min() < 0)):
        _refuse("eos_token_id", f"is {given!r}; an id, several ids or None is expected")
    return array.astype(np.int64)


def _index(given: SupportsIndex, field: str, least: int) -> int:
    """Returns an argument as an integer. Raises ``TypeError`` for ``eos_token_id`` if the value may be a list of ids, and
    ``InvalidRequestError`` for any other value that is not an integer of at least ``least``.
    """
    if isinstance(given, (bool, np.bool_)):
        _refuse(field, f"is {given}; an integer is expected")
    try:
        number = operator.index(given)
    except TypeError:
        if field == "eos_token_id" and not isinstance(given, (str, float)):
            raise
        _refuse(field, f"is {given!r}; an integer is expected")
    if number < least:
        _refuse(field, f"is {number}; at least {least} is expected")
    return number


def _refuse(field: str, problem: str) -> NoReturn:
    raise InvalidRequestError(
        f"{field}{'' if problem.startswith('[') else ' '}{problem}",
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        (FieldViolation(field, problem),),
    ) from None
