"""Moves weights from their device to host memory, and back, unchanged bit by bit.

Storages move, not tensors: parameters, buffers and everything else that refers to them remain the same objects, so that tied weights stay
tied. Anything that depends on addresses instead, such as a captured CUDA graph, must be thrown away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from probescore_server.errors import WorkerUnavailable
from probescore_server.failures import FailureKind, kind_of

PIECE_BYTES = 1 << 26
"""Gives the bytes of one piece of the host memory that holds weights while they are away from their device.

Memory is taken in pieces because torch rounds pinned memory up to a power of two, which for one large piece could be twice the weights.
"""

RETRY_SECONDS = 1.0


@dataclass(frozen=True, eq=False)
class _OffloadedStorage:
    """Holds an emptied torch storage, with the number of bytes and the checksum of the content that was moved out of it."""

    storage: torch.UntypedStorage
    bytes: int
    checksum: int


class WeightOffload:
    """Moves the memory of tensors between their device and host memory, which is pinned if the device is a CUDA device.

    Args:
        piece_bytes: size of one piece of host memory in bytes, a power of two. Host memory is taken once, and kept for the next move.
    """

    def __init__(self, piece_bytes: int = PIECE_BYTES) -> None:
        self._piece_bytes = piece_bytes
        self._pieces: list[torch.Tensor] = []
        self._offloaded: list[_OffloadedStorage] = []

    @property
    def bytes(self) -> int:
        """Returns how many bytes of weights are in host memory now."""
        return sum(away.bytes for away in self._offloaded)

    def leave(self, tensors: Iterable[torch.Tensor]) -> None:
        """Moves the memory of the given tensors to the host. Nothing may read the tensors until ``come_back``. If this fails, nothing has
        moved.
        """
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
        """Moves all weights from host memory back to their device.

        Raises:
            WorkerUnavailable: the device has no room. All weights are still in host memory, and a later try may succeed.
            RuntimeError: the content that came back differs from the content that left. The weights must not be used.
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
        """Yields the contents in parts, one after the other, each with a view of the host memory of the same size that it is copied to or
        from.
        """
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
    """Returns a storage's content as a tensor ``(bytes,)`` uint8 that shares the storage's memory."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _checksums(contents: Sequence[torch.Tensor]) -> list[int]:
    """Returns the sum of each content's bytes, read as integers, modulo 2**64. Each is computed on its own device."""
    words = [content.view(torch.int64 if len(content) % 8 == 0 else torch.uint8) for content in contents]
    return torch.stack([word.sum(dtype=torch.int64).to(words[0].device) for word in words]).tolist() if words else []


def _wait_for(contents: Sequence[torch.Tensor]) -> None:
    for device in {content.device for content in contents if content.is_cuda}:
        torch.cuda.synchronize(device)


def _release(storages: Iterable[torch.UntypedStorage]) -> None:
    for storage in storages:
        storage.resize_(0)
