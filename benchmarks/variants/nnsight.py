"""nnsight: the block is read in a trace that stops there, in padded batches."""

from __future__ import annotations

import torch
from nnsight import NNsight, save
from transformers import AutoModelForCausalLM

from benchmarks.variants import Job
from benchmarks.variants.padded import Padded


def load(job: Job) -> Padded:
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype), attn_implementation="sdpa")
    traced = NNsight(model.to(job.device).eval())

    def forward(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        with traced.trace(input_ids=ids, attention_mask=mask, use_cache=False) as tracer:
            activations = save(traced.model.layers[job.layer].output)
            tracer.stop()
        read: torch.Tensor = activations[0] if isinstance(activations, tuple) else activations
        return read

    return Padded(job, forward)
