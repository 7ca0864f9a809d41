"""Weights that leave their device for host memory, and come back bit by bit as they were.

Storages move, not tensors: parameters, buffers and everything else that refers to them stay the objects that they are, so that tied
weights stay tied. What knows addresses instead, such as a captured CUDA graph, must be thrown away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from probescore_server.errors import WorkerUnavailable
from probescore_server.failures import FailureKind, kind_of

PIECE_BYTES = 1 << 26
"""Host memory is taken in pieces: torch rounds pinned memory up to a power of two, which for one large piece could be twice the weights."""

RETRY_SECONDS = 1.0


@dataclass(frozen=True, eq=False)
class _OffloadedStorage:
    """A storage that holds nothing now, and what it held."""

    storage: torch.UntypedStorage
    bytes: int
    checksum: int


class WeightOffload:
    """Moves the memory of tensors between their device and host memory, which is pinned if the device is a CUDA device.

    Args:
        piece_bytes: of host memory; a power of two. It is taken once, and kept for the next time.
    """

    def __init__(self, piece_bytes: int = PIECE_BYTES) -> None:
        self._piece_bytes = piece_bytes
        self._pieces: list[torch.Tensor] = []
        self._offloaded: list[_OffloadedStorage] = []

    @property
    def bytes(self) -> int:
        """How many are away."""
        return sum(away.bytes for away in self._offloaded)

    def leave(self, tensors: Iterable[torch.Tensor]) -> None:
        """Moves the tensors' memory to the host. Until it is back nothing may read them. If this fails, nothing has moved."""
        by_address = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors if tensor.nbytes}
        storages = list(by_address.values())
        contents = [_bytes_of(storage) for storage in storages]
        self._take_host_memory(contents)
        checksums = _checksums(contents)
        for content, copy in self._parts(contents):
            copy.copy_(content, non_blocking=True)
        _wait_for(contents)
        self._offloaded = [
            _OffloadedStorage(storage, storage.nbytes(), checksum) for storage, checksum in zip(storages, checksums, strict=True)
        ]
        _release(storages)

    def come_back(self) -> None:
        """Moves everything back.

        Raises:
            WorkerUnavailable: the device has no room. Everything is still away, and a later try may succeed.
            RuntimeError: what came back is not what left. The weights must not be used.
        """
        try:
            for away in self._offloaded:
                away.storage.resize_(away.bytes)
        except Exception as error:
            if kind_of(error) is not FailureKind.MEMORY_SHORT:
                raise
            _release([away.storage for away in self._offloaded])
            torch.cuda.empty_cache()
            problem = f"the device has no room for the {self.bytes / 2**30:.2f} GiB of weights that are in host memory"
            raise WorkerUnavailable(problem, RETRY_SECONDS) from None
        contents = [_bytes_of(away.storage) for away in self._offloaded]
        for content, copy in self._parts(contents):
            content.copy_(copy, non_blocking=True)
        if _checksums(contents) != [away.checksum for away in self._offloaded]:
            raise RuntimeError("the weights that came back from host memory are not those that left")
        self._offloaded = []

    def _take_host_memory(self, contents: Sequence[torch.Tensor]) -> None:
        missing = sum(map(len, contents)) - sum(map(len, self._pieces))
        pinned = any(content.is_cuda for content in contents)
        while missing > 0:
            self._pieces.append(torch.empty(min(self._piece_bytes, missing), dtype=torch.uint8, pin_memory=pinned))
            missing -= len(self._pieces[-1])

    def _parts(self, contents: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Parts of the contents, one after the other, each with the host memory for it."""
        pieces = iter(self._pieces)
        room = torch.empty(0, dtype=torch.uint8)
        for content in contents:
            while len(content):
                if not len(room):
                    room = next(pieces)
                size = min(len(content), len(room))
                yield content[:size], room[:size]
                content, room = content[size:], room[size:]


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """A storage's content ``(bytes,)`` uint8, not copied."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _checksums(contents: Sequence[torch.Tensor]) -> list[int]:
    """The sum of each content as integers, modulo 2**64; computed where it is, and collected where the first is."""
    words = [content.view(torch.int64 if len(content) % 8 == 0 else torch.uint8) for content in contents]
    return torch.stack([word.sum(dtype=torch.int64).to(words[0].device) for word in words]).tolist() if words else []


def _wait_for(contents: Sequence[torch.Tensor]) -> None:
    for device in {content.device for content in contents if content.is_cuda}:
        torch.cuda.synchronize(device)


def _release(storages: Iterable[torch.UntypedStorage]) -> None:
    for storage in storages:
        storage.resize_(0)
