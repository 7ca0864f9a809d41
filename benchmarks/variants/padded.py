"""Padded batches: how Hugging Face, TransformerLens and nnsight are given sequences. Only the forward pass is theirs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks.loads import Unit
from benchmarks.variants import InProcess, Job, Scored

Forward = Callable[[torch.Tensor, "torch.Tensor | None"], torch.Tensor]
"""From ids ``(B, T)`` and their mask ``(B, T)``, ``None`` if nothing is padded, to the activations ``(B, T, hidden_size)``."""


class Padded(InProcess):
    """Scores rollouts in padded batches, of all that are known together.

    Args:
        batch_sizes: of which the quickest is found in the warm-up.
        by_length: whether rollouts are sorted first, so that those of one length come together.
    """

    def __init__(self, job: Job, forward: Forward, *, batch_sizes: tuple[int, ...] = (4, 8, 16), by_length: bool = False) -> None:
        self._forward = forward
        self._directions = torch.from_numpy(np.load(job.directions)).to(job.device)
        self._batch_sizes = batch_sizes
        self._batch_size = batch_sizes[0]
        self._by_length = by_length

    def warm_up(self, unit: Unit) -> dict[str, Any]:
        most = max(sum(len(call.completions) for call in calls) for calls in unit.rounds)
        # a batch holds no more than is known
        sizes = sorted({min(size, most) for size in self._batch_sizes})
        seconds = {size: self._seconds(unit, size) for size in sizes} if len(sizes) > 1 else {sizes[0]: 0.0}
        self._batch_size = min(seconds, key=seconds.__getitem__)
        return {"batch_size": self._batch_size}

    def _seconds(self, unit: Unit, batch_size: int) -> float:
        self._batch_size = batch_size
        started = time.perf_counter()
        self.score(unit)  # ends with a copy to the host, so a device has finished
        return time.perf_counter() - started

    @torch.inference_mode()
    def score(self, unit: Unit) -> Scored:
        directions = self._directions[: unit.probes or None]
        rows = []
        for calls in unit.rounds:
            sequences = [torch.from_numpy(sequence) for call in calls for sequence in call.sequences()]
            prompts = [len(call.prompt) for call in calls for _ in call.completions]
            order = sorted(range(len(sequences)), key=lambda index: len(sequences[index])) if self._by_length else range(len(sequences))
            scores = {}
            for start in range(0, len(sequences), self._batch_size):
                batch = order[start : start + self._batch_size]
                activations = self._activations([sequences[index] for index in batch])
                for index, row in zip(batch, activations, strict=True):
                    tokens = row[prompts[index] : len(sequences[index])].float() @ directions.T
                    scores[index] = (tokens if unit.per_token else tokens.mean(0, keepdim=True)).cpu().numpy()
            rows += [scores[index] for index in range(len(sequences))]
        return Scored(np.concatenate(rows), {"tokens_computed": unit.padded_tokens})

    def _activations(self, sequences: list[torch.Tensor]) -> torch.Tensor:
        device = self._directions.device
        ids = pad_sequence(sequences, batch_first=True).to(device)
        if len({len(sequence) for sequence in sequences}) == 1:
            return self._forward(ids, None)
        mask = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True).to(device)
        return self._forward(ids, mask)
