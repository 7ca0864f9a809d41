"""TransformerLens, stopped at the probed block, in padded batches. It brings its own attention, in plain torch."""

from __future__ import annotations

import torch
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.variants import Job
from benchmarks.variants.padded import Padded


def load(job: Job) -> Padded:
    model = TransformerBridge.boot_transformers(job.model, device=job.device, dtype=getattr(torch, job.dtype))

    def forward(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        activations: torch.Tensor = model(ids, attention_mask=mask, return_type=None, stop_at_layer=job.layer + 1)
        return activations

    return Padded(job, forward)
