"""Frees the device memory that an engine (a frozen model with its probes) uses while the engine sleeps, and takes the memory again on
waking.

A GPU that is shared with training is thus free for training between two steps of scoring.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from probescore.types import Transfer
from probescore_server.backbone.kv_cache import CacheBudget, KeyValueCache
from probescore_server.backbone.model_loading import Decoder
from probescore_server.engine.weight_offload import RETRY_SECONDS, WeightOffload
from probescore_server.errors import WorkerUnavailable
from probescore_server.failures import FailureKind, kind_of
from probescore_server.probes.loading.loader import LoadedProbe, StackMember
from probescore_server.probes.loading.onnx_session import ProbeSession
from probescore_server.probes.stacking.stack import Stack
from probescore_server.rollouts import EngineStatistics

STATM = Path("/proc/self/statm")


class DeviceMemory:
    """Owner of the device memory of one engine (a frozen model with its probes): weights, key-value cache and onnxruntime sessions.

    When the engine goes to sleep on a CUDA device, its weights move to pinned host memory, and the probes' onnxruntime sessions, which use
    device memory of their own, are closed and created anew on waking. Only the CUDA context, of some hundred MiB, stays on the device. On a
    CPU the weights stay where they are.

    Args:
        device: the device that the engine runs on.
        weights: function that yields the tensors that are on the device while the engine is awake.
        cache: the engine's key-value caches, which are emptied when memory is given back.
        sessions: onnxruntime sessions of the probes that hold device memory.

    Attributes:
        asleep: true while the engine sleeps and its memory is free; nothing may be computed then.
    """

    def __init__(
        self,
        device: torch.device,
        weights: Callable[[], Iterable[torch.Tensor]],
        cache: CacheBudget | KeyValueCache,
        sessions: Sequence[ProbeSession],
    ) -> None:
        self.asleep = False
        self._device = device
        self._weights = weights
        self._cache = cache
        self._sessions = sessions
        self._stacks: Collection[Stack] = ()
        self._offload = WeightOffload()

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        probes: Iterable[LoadedProbe],
        cache: CacheBudget,
        further_weights: Callable[[], Iterable[torch.Tensor]],
    ) -> DeviceMemory:
        """Returns a ``DeviceMemory`` for a model, its probes, its key-value caches, and the weights that readings have of their own."""

        def weights() -> Iterator[torch.Tensor]:
            yield from decoder.model.parameters()
            yield from decoder.model.buffers()
            yield from further_weights()

        memory = cls(decoder.device, weights, cache, [])
        memory.adopt(probes)
        return memory

    def adopt(self, probes: Iterable[LoadedProbe]) -> None:
        """Takes the probes whose device memory moves with the weights from now on, in place of all earlier probes.

        The engine must be awake.
        """
        runs = [probe.runs for probe in probes]
        self._stacks = {run.stack for run in runs if isinstance(run, StackMember)}
        self._sessions = [run for run in runs if isinstance(run, ProbeSession) and run.device.type == "cuda"]

    def sleep(self) -> Transfer:
        """Frees the memory. It returns the device, the seconds taken, the bytes of weights moved and the bytes of device memory freed.

        Nothing happens if the engine is asleep already. If an error is raised, the engine is awake as before.
        """
        if self.asleep:
            return Transfer(str(self._device))
        started, held = time.perf_counter(), self._held_bytes()
        if self._device.type == "cuda":
            self._offload.leave(self._tensors())
        for session in self._sessions:
            session.close()
        self.asleep = True
        self.free_reserves()
        return Transfer(str(self._device), time.perf_counter() - started, self._offload.bytes, held - self._held_bytes())

    def wake(self) -> Transfer:
        """Takes the memory again, with its contents as they were. It returns the device, the seconds taken, and the bytes moved and taken.

        Nothing happens if the engine is awake already.

        Raises:
            WorkerUnavailable: the device has too little free memory; the engine is asleep as before.
            RuntimeError: the weights moved back to the device differ from the original ones; the engine must not be used any more.
        """
        if not self.asleep:
            return Transfer(str(self._device))
        started, held, weight_bytes = time.perf_counter(), self._held_bytes(), self._offload.bytes
        self._offload.come_back()
        self._open_sessions()
        self.asleep = False
        return Transfer(str(self._device), time.perf_counter() - started, weight_bytes, self._held_bytes() - held)

    def _open_sessions(self) -> None:
        """Opens the probes' onnxruntime sessions. If the device has too little memory for a session, the opened sessions are closed and the
        weights moved back to host memory.
        """
        opened: list[ProbeSession] = []
        try:
            for session in self._sessions:
                session.open()
                opened.append(session)
        except Exception as error:
            if kind_of(error) is not FailureKind.MEMORY_SHORT:
                raise
            for session in opened:
                session.close()
            if self._device.type == "cuda":
                self._offload.leave(self._tensors())
            self.free_reserves()
            raise WorkerUnavailable("the device has no room for the graphs of the probes", RETRY_SECONDS) from None

    def free_reserves(self) -> None:
        """Frees the memory that only makes later work faster: the key-value cache and the unused memory that allocators keep."""
        self._cache.clear()
        self.trim()

    def trim(self) -> None:
        """Makes allocators return the unused memory that they keep; nothing that is in use is freed."""
        gc.collect()  # the frames of a caught exception may still refer to tensors
        _return_free_memory()

    def statistics(self) -> EngineStatistics:
        """Returns the bytes of memory that the engine uses now (on a CPU, the process's resident memory), and its key-value cache's bytes,
        hits and misses.
        """
        cache = self._cache
        held = self._held_bytes() if self._device.type == "cuda" else _resident_bytes()
        return EngineStatistics(held, cache.bytes, cache.hits, cache.misses)

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from self._weights()
        for stack in self._stacks:
            yield from stack.tensors()

    def _held_bytes(self) -> int:
        return torch.cuda.memory_reserved(self._device) if self._device.type == "cuda" else self._cache.bytes


def _resident_bytes() -> int:
    try:
        pages = int(STATM.read_text().split()[1])
    except OSError:  # not Linux
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _return_free_memory() -> None:
    """Makes memory allocators return the unused memory that they keep to the device and to the operating system."""
    torch.cuda.empty_cache()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # only glibc has it; without it most of a cache of 0.5 GiB stays with the process
        libc.malloc_trim(0)
