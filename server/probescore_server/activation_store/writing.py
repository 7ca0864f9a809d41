"""Writes activations that an engine computes to a directory, as shards: files that each hold the activations of some of the rollouts.

The index of the directory is written first and describes everything but the numbers. Each shard is written under a temporary name and
renamed once it is complete, so that a run can continue where an interrupted one stopped. Since the key-value cache is empty at the
beginning of each shard, the bytes are the same as without the interruption.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from probescore.types import CompletionActivations, CompletionStatus, RolloutGroup, Scope, Span, Tap
from probescore.wire.number_formats import NUMBER_FORMATS, Overflow
from probescore_server.activation_store.index import (
    INDEX,
    Label,
    ModelRead,
    Shard,
    StoredRollout,
    StoreIndex,
    StoreRefused,
    difference,
    pooled_name,
)
from probescore_server.activations import MAX_BATCH_BYTES
from probescore_server.engine.engine import Engine
from probescore_server.files import write_atomically
from probescore_server.rollouts import ActivationReads, CheckedRollout, Continuation, ResolvedOptions
from probescore_server.validation.options import parse_scope

SHARD_BYTES = 1 << 29
"""Limits the bytes of activations in a shard; a rollout with more bytes gets a shard of its own."""

SHARD_TOKENS = 1 << 16
"""Limits the tokens whose activations are computed for a shard, and so the work that an interrupted run may lose.

A rollout with more tokens gets a shard of its own.
"""

_PARTIAL = ".partial"


def _ignore(_done: int, _total: int) -> None:
    pass


@dataclass(frozen=True, eq=False)
class StorePlan:
    """A plan of the files of activations that a run will write, known before any activation is computed; ``StorePlan.make`` makes it.

    Attributes:
        index: index of the directory to be written.
        engine: engine that will compute the activations.
        reads: taps (places in the model) and poolings to compute.
        rollouts: for each shard (file with some of the rollouts) its rollouts, each with its group and completion number in the data.
    """

    index: StoreIndex
    engine: Engine
    reads: ActivationReads
    rollouts: tuple[tuple[tuple[CheckedRollout, tuple[int, int]], ...], ...]

    @property
    def bytes(self) -> int:
        """Returns the size of all files of the planned directory together, in bytes."""
        return len(self.index.content) + sum(map(self.index.file_bytes, self.index.shards))

    @property
    def completions(self) -> int:
        """Returns the number of completions whose activations the plan computes and stores."""
        return sum(map(len, self.rollouts))

    @classmethod
    def make(
        cls,
        engine: Engine,
        groups: Sequence[RolloutGroup],
        *,
        taps: Sequence[str | Tap] | str,
        pool: Sequence[str] | str = ("mean", "last"),
        scope: Scope | str = Scope.COMPLETION,
        dtype: str = "float32",
        labels: Sequence[Sequence[Label]] = (),
        max_batch_bytes: int = MAX_BATCH_BYTES,
    ) -> StorePlan:
        """Checks a request to store activations, and divides its rollouts into shards: files of bounded size.

        Args:
            engine: engine that is loaded for these taps.
            groups: prompts with their completions.
            taps: taps (places in the model) as for ``Engine.activations``.
            pool: poolings as for ``Engine.activations``.
            scope: tokens that are read: ``completion``, ``prompt`` or ``all``.
            dtype: dtype that activations are stored in: ``float32``, ``bfloat16`` or ``float16``.
            labels: for each group the labels of its completions; empty = not labelled.
            max_batch_bytes: limit on the bytes of activations that are held at once, in float32 on the model's device.

        Raises:
            InvalidRequest: the request is wrong; the message names the field at fault.
            LimitExceeded: a single completion has more activations than ``max_batch_bytes``.
            StoreRefused: ``dtype`` is not known, or the number of labels is not the number of completions.
        """
        if dtype not in NUMBER_FORMATS:
            raise StoreRefused(f"dtype {dtype!r} is none of {', '.join(NUMBER_FORMATS)}")
        reads = engine.resolve_reads(taps, pool)
        options = ResolvedOptions(probes=(), scope=parse_scope(scope))
        if labels and [*map(len, labels)] != [len(group.completions) for group in groups]:
            raise StoreRefused("labels: one is needed for each completion of each group, or none at all")
        placed = [
            (rollout, (group, completion))
            for group, rollouts in enumerate(engine.check_rollouts(groups, options))
            for completion, rollout in enumerate(rollouts)
        ]
        rollouts, places = [rollout for rollout, _ in placed], [place for _, place in placed]
        engine.read_rollouts(rollouts, places, reads, max_batch_bytes=max_batch_bytes)  # refuses at the call, and begins nothing
        info = engine.info
        index = StoreIndex(
            model=ModelRead(
                id=info.model.id,
                revision=info.model.revision,
                fingerprint=info.model.fingerprint,
                tokenizer_fingerprint=info.tokenizer_fingerprint,
                hidden_size=info.model.hidden_size,
                num_hidden_layers=info.model.num_hidden_layers,
                dtype=info.dtype,
                device=info.device.partition(":")[0],
                execution_path=info.execution_path,
                max_batch_bytes=max_batch_bytes,
            ),
            taps=tuple(map(str, reads.taps)),
            pools=tuple(pool.value for pool in reads.pools),
            tokens=reads.tokens,
            scope=options.scope.value,
            dtype=dtype,
            data_sha256=_digest(rollouts),
            shards=(),
        )
        stored = [[*_stored_rollouts(rollout, place, labels[place[0]][place[1]] if labels else None)] for rollout, place in placed]
        shares = [*_shares(index, placed, stored)]
        shards = tuple(
            Shard(f"activations-{number:05}.safetensors", tuple(view for place in share for view in stored[place]))
            for number, share in enumerate(shares)
        )
        return cls(replace(index, shards=shards), engine, reads, tuple(tuple(placed[place] for place in share) for share in shares))

    def write(self, directory: Path, progress: Callable[[int, int], None] = _ignore) -> None:
        """Computes and writes those shards (files with the activations of some of the rollouts) that the directory does not
        hold yet.

        Args:
            directory: directory to write to; made if it does not exist, else empty or left by an earlier run of the same plan.
            progress: called at the beginning and after each completion, with the number of completions that are done and of all.

        Raises:
            StoreRefused: the directory has other content, another run writes to it, the disk has no room, or a number is too large for the
                dtype.
            OSError: a file cannot be written.
        """
        check_target(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with _claimed(directory):
            self._begin(directory)
            missing = [number for number, shard in enumerate(self.index.shards) if not self.index.is_whole(directory, shard)]
            _check_room(directory, sum(self.index.file_bytes(self.index.shards[number]) for number in missing))
            done = self.completions - sum(len(self.rollouts[number]) for number in missing)
            progress(done, self.completions)
            for number in missing:
                shard = self.index.shards[number]
                rollouts, places = zip(*self.rollouts[number], strict=True)
                with _shard_file(directory / shard.name, self.index, shard) as file:
                    for found in self.engine.read_rollouts(rollouts, places, self.reads, max_batch_bytes=self.index.model.max_batch_bytes):
                        file.add(found)
                        done += 1
                        progress(done, self.completions)

    def _begin(self, directory: Path) -> None:
        index = directory / INDEX
        if index.exists():
            found = StoreIndex.parse(index.read_bytes(), index)
            if differs := difference(found, self.index):
                raise StoreRefused(f"{directory}: holds other activations ({differs}); give another directory, or remove it")
        for partial in directory.glob(f"*{_PARTIAL}"):
            partial.unlink()
        if not index.exists():
            _check_room(directory, self.bytes)
            write_atomically(index, self.index.content)


def store_activations(
    engine: Engine,
    groups: Sequence[RolloutGroup],
    directory: Path | str,
    *,
    taps: Sequence[str | Tap] | str,
    pool: Sequence[str] | str = ("mean", "last"),
    scope: Scope | str = Scope.COMPLETION,
    dtype: str = "float32",
    labels: Sequence[Sequence[Label]] = (),
    max_batch_bytes: int = MAX_BATCH_BYTES,
    progress: Callable[[int, int], None] = _ignore,
) -> None:
    """Computes a model's activations for rollouts and writes them to a directory that ``StoredActivations`` can read; continues where an
    earlier run stopped.

    The arguments and errors are those of ``StorePlan.make`` and ``StorePlan.write``.
    """
    plan = StorePlan.make(engine, groups, taps=taps, pool=pool, scope=scope, dtype=dtype, labels=labels, max_batch_bytes=max_batch_bytes)
    plan.write(Path(directory), progress)


def check_target(directory: Path) -> None:
    """Checks that a directory is fit for activations to be stored in, before any activation is computed.

    Raises:
        StoreRefused: the path is no directory, or the directory has other content than stored activations.
    """
    if directory.exists() and not directory.is_dir():
        raise StoreRefused(f"{directory}: is no directory; give another place")
    if directory.is_dir() and not (directory / INDEX).exists() and any(directory.iterdir()):
        raise StoreRefused(f"{directory}: is not empty, and holds no activations; give another directory")


@contextmanager
def _shard_file(path: Path, index: StoreIndex, shard: Shard) -> Iterator[_ShardFile]:
    """Opens a shard (file of stored activations) for writing under a temporary name, and renames it to its final name only if it was
    written without an error.
    """
    partial = path.with_name(path.name + _PARTIAL)
    try:
        with partial.open("xb") as file:
            # The whole size is reserved, so that a disk that others fill meanwhile fails here and not in the middle of writing.
            os.posix_fallocate(file.fileno(), 0, index.file_bytes(shard))
            shard_file = _ShardFile(file.fileno(), index, shard)
            yield shard_file
            os.fsync(file.fileno())
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _ShardFile:
    """Writer of activations into the open file of a shard, which holds the activations of some of the rollouts, one rollout after the
    other.
    """

    def __init__(self, descriptor: int, index: StoreIndex, shard: Shard) -> None:
        self._descriptor = descriptor
        self._index = index
        self._shard = shard
        self._places = index.layout(shard)
        self._next = 0
        self._write(0, index.header(shard))

    def add(self, found: CompletionActivations) -> None:
        """Writes the activations of the next completion and of its follow-ups (token ids appended to a completion)."""
        view = self._next
        self._next += 1
        token, row = self._shard.first_tokens[view], self._shard.first_rows[view]
        is_finite = found.status is CompletionStatus.OK
        self._put("token_ids", token, found.token_ids)
        self._put("mask", token, found.selections[0])
        self._put("finite", view, np.array([is_finite]))
        for tap in self._index.taps:
            if self._index.tokens:
                self._put_numbers(tap, token, found.tokens[tap] if is_finite else self._nothing(len(found.token_ids)), found)
            for column, pool in enumerate(self._index.pools):
                rows = found.pooled[tap][:, column] if is_finite else self._nothing(len(found.selections))
                self._put_numbers(pooled_name(tap, pool), row, rows, found)
        for follow_up in found.follow_ups:
            self.add(follow_up)

    def _nothing(self, rows: int) -> NDArray[np.float32]:
        return np.full((rows, self._index.model.hidden_size), np.nan, np.float32)

    def _put_numbers(self, name: str, first: int, rows: NDArray[np.float32], found: CompletionActivations) -> None:
        try:
            self._put(name, first, self._index.number_format.encode(rows))
        except Overflow as overflow:
            number_format = self._index.number_format
            raise StoreRefused(
                f"{name}: {overflow.value:,.6g} in row {overflow.index[0]} of groups[{found.group_index}].completions"
                f"[{found.completion_index}] is beyond {number_format.name}, whose largest number is {number_format.largest:,.6g}; store "
                f"{'bfloat16 or ' if number_format.name == 'float16' else ''}float32 in another directory"
            ) from None

    def _put(self, name: str, first: int, rows: NDArray[np.generic]) -> None:
        place = self._places[name]
        self._write(place.start + first * place.row_bytes, np.ascontiguousarray(rows, place.item).tobytes())

    def _write(self, start: int, content: bytes) -> None:
        view = memoryview(content)
        while view:
            written = os.pwrite(self._descriptor, view, start)
            view, start = view[written:], start + written


@contextmanager
def _claimed(directory: Path) -> Iterator[None]:
    """Context manager that locks a directory of stored activations, so that no other run writes to the directory at the same time."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreRefused(f"{directory}: another run is writing to it; wait for its end, or give another directory") from None
        yield
    finally:
        os.close(descriptor)


def free_bytes(directory: Path) -> int:
    """Returns the number of free bytes on the disk that holds a directory, or will hold it once it exists."""
    there = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def _check_room(directory: Path, needed: int) -> None:
    free = free_bytes(directory)
    if needed > free:
        raise StoreRefused(
            f"{directory}: {needed / 1e9:,.2f} GB are to be written, and {free / 1e9:,.2f} GB are free; ask for fewer taps, for pools in "
            "place of tokens, or for bfloat16"
        )


def _stored_rollouts(rollout: CheckedRollout, place: tuple[int, int], label: Label) -> Iterator[StoredRollout]:
    scope = rollout.options.scope

    def tree(continuation: Continuation, path: tuple[int, ...]) -> Iterator[StoredRollout]:
        before = len(rollout.prompt_ids) if scope is not Scope.COMPLETION and not path else 0
        own = 0 if scope is Scope.PROMPT and not path else len(continuation.token_ids)
        spans = tuple(Span(span.name, before + span.start, before + span.end) for span in continuation.spans)
        yield StoredRollout(*place, path, continuation.id, label, before + own, spans)
        for index, follow_up in enumerate(continuation.follow_ups):
            yield from tree(follow_up, (*path, index))

    return tree(rollout.completion, ())


def _shares(
    index: StoreIndex, placed: Sequence[tuple[CheckedRollout, tuple[int, int]]], stored: Sequence[Sequence[StoredRollout]]
) -> Iterator[list[int]]:
    """Divides rollouts into shards (files of stored activations), and yields, for each shard, a list of its rollouts' indices."""
    row_bytes = index.model.hidden_size * index.number_format.item.itemsize * len(index.taps)
    share: list[int] = []
    bytes_, tokens, prompt = 0, 0, b""
    for number, ((rollout, _), views) in enumerate(zip(placed, stored, strict=True)):
        size = row_bytes * sum(view.tokens * index.tokens + view.rows * len(index.pools) for view in views)
        own = rollout.prompt_ids.tobytes()
        cost = rollout.completion.tree_tokens + (len(rollout.prompt_ids) if own != prompt or not share else 0)
        if share and (bytes_ + size > SHARD_BYTES or tokens + cost > SHARD_TOKENS):
            yield share
            share, bytes_, tokens = [], 0, 0
            cost = rollout.completion.tree_tokens + len(rollout.prompt_ids)
        share.append(number)
        bytes_, tokens, prompt = bytes_ + size, tokens + cost, own
    yield share


def _digest(rollouts: Sequence[CheckedRollout]) -> str:
    """Returns the SHA-256 digest of rollouts: of all token ids and masks, and of the order of completions and follow-ups (token ids
    appended to a completion).
    """
    digest = hashlib.sha256()

    def add(array: NDArray[np.generic]) -> None:
        digest.update(len(array).to_bytes(8, "little") + array.tobytes())

    def tree(continuation: Continuation) -> None:
        add(continuation.token_ids)
        mask = np.ones(len(continuation.token_ids), np.bool_) if continuation.mask is None else continuation.mask
        add(mask)
        digest.update(len(continuation.follow_ups).to_bytes(8, "little"))
        for follow_up in continuation.follow_ups:
            tree(follow_up)

    for rollout in rollouts:
        add(rollout.prompt_ids)
        tree(rollout.completion)
    return digest.hexdigest()
