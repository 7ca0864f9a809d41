"""Defines the index of a directory of stored activations and the layout of its shards (files that each hold some of the rollouts), both
known before any activation is computed.

``index.json`` describes the model, the activations that were asked for, and the division of rollouts into shards. A shard is a safetensors
file with these tensors, in which the shard's rollouts are concatenated:

    token_ids             (tokens,) int32           the tokens in scope: prompt, completion or both
    mask                  (tokens,) bool            which of them count
    finite                (rollouts,) bool          whether activations are finite at every tap; if not, all are NaN
    resid_post.6          (tokens, width)           if every token's activations were asked for
    resid_post.6/mean     (rows, width)             for each pool: of each rollout the whole scope under the mask, then its spans

A follow-up (token ids appended to a finished completion) counts as a rollout of its own, placed after its completion.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from probescore.types import Span
from probescore.wire.number_formats import NUMBER_FORMATS, NumberFormat

INDEX = "index.json"
FORMAT = "probescore-activations"
FORMAT_VERSION = 1

Label: TypeAlias = str | int | float | bool | None


class StoreRefused(ValueError):
    """Exception raised when activations cannot be stored on disk, or read from there, as asked; its message gives the reason and the
    remedy.
    """


@dataclass(frozen=True)
class StoredRollout:
    """The entry of a completion in the index of stored activations, or of a follow-up (token ids appended to a finished completion).

    Attributes:
        group, completion: position in the data, from 0.
        follow_up: path from the completion to the follow-up, as an index at each level; empty for the completion itself.
        id: id of the completion in the data.
        label: label of the completion in the data.
        tokens: number of tokens in scope.
        spans: spans within ``[0, tokens]``.
    """

    group: int
    completion: int
    follow_up: tuple[int, ...]
    id: str
    label: Label
    tokens: int
    spans: tuple[Span, ...] = ()

    @property
    def rows(self) -> int:
        """Returns the number of rows of pooled activations that are stored for a rollout under one pooling at one tap (place in the model):
        one for the whole scope, then one for each named span.
        """
        return 1 + len(self.spans)


@dataclass(frozen=True)
class ModelRead:
    """Description of the model whose activations are stored, and of how the model was run.

    Attributes:
        id, revision, fingerprint, tokenizer_fingerprint, hidden_size, num_hidden_layers: facts about the model, as a server reports them.
        dtype: dtype that the model computed in.
        device: kind of device, such as ``cuda``.
        execution_path: implementation that ran the model, as a server reports it: ``universal`` or ``packed``.
        max_batch_bytes: limit on the bytes of activations in a batch; batches of other rollouts would change the last bits of the numbers.
    """

    id: str
    revision: str
    fingerprint: str
    tokenizer_fingerprint: str
    hidden_size: int
    num_hidden_layers: int
    dtype: str
    device: str
    execution_path: str
    max_batch_bytes: int


@dataclass(frozen=True)
class TensorPlace:
    """The place of a tensor in a shard, a file with a part of the stored activations.

    Attributes:
        code: format of the numbers, as safetensors names it.
        item: dtype of the numbers in numpy.
        start: offset of the tensor's first byte in the file.
    """

    code: str
    item: np.dtype[np.generic]
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """Returns the number of bytes of one row of a stored tensor, that is, of one entry along its first axis."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.item.itemsize


@dataclass(frozen=True, eq=False)
class Shard:
    """A shard: one file with the activations of some of the rollouts.

    Attributes:
        name: name of the file.
        rollouts: the rollouts in the file, in order.
    """

    name: str
    rollouts: tuple[StoredRollout, ...]

    @cached_property
    def first_tokens(self) -> tuple[int, ...]:
        """Returns the index of each rollout's first token among all tokens of a shard (file of stored activations), followed by the number
        of tokens of the shard.
        """
        return tuple(accumulate((rollout.tokens for rollout in self.rollouts), initial=0))

    @cached_property
    def first_rows(self) -> tuple[int, ...]:
        """Returns the index of each rollout's first row among the rows of pooled activations in a shard (file of stored activations),
        followed by the number of these rows.
        """
        return tuple(accumulate((rollout.rows for rollout in self.rollouts), initial=0))


@dataclass(frozen=True, eq=False)
class StoreIndex:
    """The index of a directory of activations: it describes the files that the directory holds once the run that writes them is complete.

    Attributes:
        model: the model whose activations are stored.
        taps: names of taps (places in the model).
        pools: poolings, of ``mean``, ``last`` and ``max``.
        tokens: whether every token's activations are stored.
        scope: tokens that were read: ``completion``, ``prompt`` or ``all``.
        dtype: dtype that activations are stored in.
        data_sha256: digest of all token ids and masks.
        shards: the shards, in order.
    """

    model: ModelRead
    taps: tuple[str, ...]
    pools: tuple[str, ...]
    tokens: bool
    scope: str
    dtype: str
    data_sha256: str
    shards: tuple[Shard, ...]

    @property
    def number_format(self) -> NumberFormat:
        """Returns the number format, such as bfloat16, of the activations that an index describes."""
        return NUMBER_FORMATS[self.dtype]

    @cached_property
    def content(self) -> bytes:
        """Returns this index of stored activations as the content of the file ``index.json``."""
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **{each.name: getattr(self, each.name) for each in fields(self)},
            "model": asdict(self.model),
            "shards": [{"name": shard.name, "rollouts": [_as_json(rollout) for rollout in shard.rollouts]} for shard in self.shards],
        }
        return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @classmethod
    def parse(cls, content: bytes, path: Path) -> StoreIndex:
        """Returns the index of stored activations that the content of a file ``index.json`` describes.

        Raises:
            StoreRefused: the content is no index, or an index of another version.
        """
        try:
            parsed = json.loads(content)
            if parsed["format"] != FORMAT:
                raise KeyError(FORMAT)
            if parsed["format_version"] != FORMAT_VERSION:
                raise StoreRefused(
                    f"{path}: format_version {parsed['format_version']!r} is not {FORMAT_VERSION}, the one that is read here"
                )
            return cls(
                model=ModelRead(**parsed["model"]),
                taps=tuple(parsed["taps"]),
                pools=tuple(parsed["pools"]),
                tokens=parsed["tokens"],
                scope=parsed["scope"],
                dtype=NUMBER_FORMATS[parsed["dtype"]].name,
                data_sha256=parsed["data_sha256"],
                shards=tuple(Shard(shard["name"], tuple(map(_from_json, shard["rollouts"]))) for shard in parsed["shards"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, StoreRefused):
                raise
            raise StoreRefused(f"{path}: no index of activations ({type(error).__name__}: {error})") from None

    def layout(self, shard: Shard) -> dict[str, TensorPlace]:
        """Returns the place of each tensor in a shard (file of stored activations), as a dictionary keyed by the tensor's name."""
        return self._laid_out(shard)[1]

    def header(self, shard: Shard) -> bytes:
        """Returns the bytes at the beginning of a shard (file of stored activations): a safetensors header that includes the digest of the
        directory's index.
        """
        return self._laid_out(shard)[0]

    def file_bytes(self, shard: Shard) -> int:
        """Returns the size of a shard (file of stored activations), in bytes."""
        last = [*self.layout(shard).values()][-1]
        return last.start + last.shape[0] * last.row_bytes

    def is_whole(self, directory: Path, shard: Shard) -> bool:
        """Returns whether a directory has the complete file of a shard (part of the stored activations): a file of the expected size, whose
        header has the digest of the directory's index.
        """
        header = self.header(shard)
        try:
            with (directory / shard.name).open("rb") as file:
                return file.read(len(header)) == header and os.fstat(file.fileno()).st_size == self.file_bytes(shard)
        except FileNotFoundError:
            return False

    def _laid_out(self, shard: Shard) -> tuple[bytes, dict[str, TensorPlace]]:
        entries: dict[str, Any] = {"__metadata__": {"format": FORMAT, "index_sha256": self._digest}}
        end = 0
        tensors = [*self._tensors(shard)]
        for name, code, item, shape in tensors:
            start, end = end, end + int(np.prod(shape, dtype=np.int64)) * item.itemsize
            entries[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
        described = json.dumps(entries, separators=(",", ":")).encode()
        described += b" " * (-len(described) % 8)
        header = len(described).to_bytes(8, "little") + described
        return header, {
            name: TensorPlace(code, item, shape, len(header) + entries[name]["data_offsets"][0]) for name, code, item, shape in tensors
        }

    def _tensors(self, shard: Shard) -> Iterator[tuple[str, str, np.dtype[np.generic], tuple[int, ...]]]:
        """Returns the name, format and shape of each tensor of a shard (file of stored activations), widest formats first, so that each
        tensor is aligned.
        """
        tokens, rows = shard.first_tokens[-1], shard.first_rows[-1]
        ids = ("token_ids", "I32", np.dtype("<i4"), (tokens,))
        number_format, width = self.number_format, self.model.hidden_size
        ids_first = number_format.item.itemsize < ids[2].itemsize
        if ids_first:
            yield ids
        for tap in self.taps:
            if self.tokens:
                yield tap, number_format.code, number_format.item, (tokens, width)
            for pool in self.pools:
                yield pooled_name(tap, pool), number_format.code, number_format.item, (rows, width)
        if not ids_first:
            yield ids
        yield "mask", "BOOL", np.dtype(np.bool_), (tokens,)
        yield "finite", "BOOL", np.dtype(np.bool_), (len(shard.rollouts),)


def pooled_name(tap: str, pool: str) -> str:
    """Returns the name of the tensor, in a file of stored activations, that holds the activations of a tap (place in the model) under a
    pooling, such as ``resid_post.6/mean``.
    """
    return f"{tap}/{pool}"


def difference(found: StoreIndex, expected: StoreIndex) -> str:
    """Returns a text that describes the first difference between the indices of two directories of stored activations; empty if the indices
    are equal.
    """
    for name in [each.name for each in fields(ModelRead)]:
        theirs, ours = getattr(found.model, name), getattr(expected.model, name)
        if theirs != ours:
            return f"model.{name}: {_shown(theirs)} there and {_shown(ours)} here"
    for name in ("taps", "pools", "tokens", "scope", "dtype"):
        if getattr(found, name) != getattr(expected, name):
            return f"{name}: {_shown(getattr(found, name))} there and {_shown(getattr(expected, name))} here"
    if found.data_sha256 != expected.data_sha256:
        return "the rollouts are others"
    return "" if found.content == expected.content else "ids, labels, spans or the cut into shards are others"


def _shown(value: object) -> str:
    shown = ", ".join(map(str, value)) if isinstance(value, tuple) else repr(value)
    return shown if len(shown) <= 100 else shown[:97] + "…"


def _as_json(rollout: StoredRollout) -> dict[str, Any]:
    """Returns the JSON form of a rollout's entry in the index of stored activations, without fields that have default values, since an
    index may have a million entries.
    """
    content: dict[str, Any] = {"group": rollout.group, "completion": rollout.completion, "tokens": rollout.tokens}
    if rollout.follow_up:
        content["follow_up"] = rollout.follow_up
    if rollout.id:
        content["id"] = rollout.id
    if rollout.label is not None:
        content["label"] = rollout.label
    if rollout.spans:
        content["spans"] = [(span.name, span.start, span.end) for span in rollout.spans]
    return content


def _from_json(content: Mapping[str, Any]) -> StoredRollout:
    spans: Sequence[tuple[str, int, int]] = content.get("spans", ())
    return StoredRollout(
        group=content["group"],
        completion=content["completion"],
        follow_up=tuple(content.get("follow_up", ())),
        id=content.get("id", ""),
        label=content.get("label"),
        tokens=content["tokens"],
        spans=tuple(Span(*span) for span in spans),
    )
