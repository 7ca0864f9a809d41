"""Workers to which something happens that the machine of a test cannot do by itself, in processes of their own."""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from probescore.types import Chat, Text
from probescore_server.engine.engine import Engine
from probescore_server.rollouts import CheckedRollout
from probescore_server.workers.main import run_worker
from probescore_server.workers.messages import WorkerSpec

LOSES_DEVICE, CRASHES = 74, 75
"""Token ids that do it, wherever they stand."""

ROOM_BYTES = 1 << 30
MESSAGE = "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress' in https://docs.nvidia.com/cuda/"


def run_on_a_device_that_fails(connection: socket.socket, spec: WorkerSpec) -> None:
    """A worker whose device is lost, as torch says it, or which crashes, when it sees one of those tokens."""
    scoring = Engine.score_rollouts

    def score_rollouts(self: Engine, rollouts: Sequence[CheckedRollout], **options: Callable[[int], bool]) -> Any:
        ids = {int(token) for rollout in rollouts for token in rollout.completion.token_ids}
        if LOSES_DEVICE in ids:
            raise torch.AcceleratorError(MESSAGE)
        if CRASHES in ids:
            os.abort()
        return scoring(self, rollouts, **options)

    Engine.score_rollouts = score_rollouts  # type: ignore[method-assign, assignment]
    run_worker(connection, spec)


def run_at_its_limit(connection: socket.socket, spec: WorkerSpec) -> None:
    """A worker that may have `ROOM_BYTES` of memory more than when it began to serve."""
    loading = Engine.load

    def load(*args: Any, **options: Any) -> Engine:
        engine = loading(*args, **options)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + ROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return engine

    Engine.load = load  # type: ignore[method-assign, assignment]
    run_worker(connection, spec)


READ_TOKENS = 40
"""Tokens of rollouts whose activations such a worker has room for at once."""
SHORT = (
    "CUDA out of memory. Tried to allocate 4.22 GiB. GPU 0 has a total capacity of 15.69 GiB of which 1.31 GiB is free. Process 71 has "
    "14.37 GiB memory in use. Of the allocated memory 13.80 GiB is allocated by PyTorch, and 216.18 MiB is reserved by PyTorch but "
    "unallocated."
)


def run_with_little_room_for_activations(connection: socket.socket, spec: WorkerSpec) -> None:
    """A worker whose device has room for the activations of `READ_TOKENS` tokens, and says so as torch does, once they are computed."""
    reading = Engine._read_batch

    def read_batch(self: Engine, rollouts: Sequence[CheckedRollout], *others: Any) -> Any:
        found = reading(self, rollouts, *others)
        if sum(rollout.tokens for rollout in rollouts) > READ_TOKENS:
            raise torch.OutOfMemoryError(SHORT)
        return found

    Engine._read_batch = read_batch  # type: ignore[method-assign]
    run_worker(connection, spec)


HANGS, CRASHES_TEXT, SLOW_SECONDS = "hangs", "crashes", 0.3
"""Words with which tokenising does it, and what any chat takes."""


def run_with_a_poor_tokenizer(connection: socket.socket, spec: WorkerSpec) -> None:
    """A worker whose chats are slow, and which never gets over some texts."""
    encoding = Engine.encode_prompt

    def encode_prompt(self: Engine, prompt: Text | Chat | str, **options: Any) -> Any:
        if isinstance(prompt, Chat):
            time.sleep(SLOW_SECONDS)
        elif isinstance(prompt, Text) and HANGS in prompt.text:
            threading.Event().wait()
        elif isinstance(prompt, Text) and CRASHES_TEXT in prompt.text:
            os.abort()
        return encoding(self, prompt, **options)

    Engine.encode_prompt = encode_prompt  # type: ignore[method-assign, assignment]
    run_worker(connection, spec)
