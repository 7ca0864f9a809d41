"""What people write by hand with transformers: A, A sorted by length, A2 and B."""

from __future__ import annotations

import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from benchmarks.variants import Job
from benchmarks.variants.padded import Forward, Padded


def load(job: Job) -> Padded:
    if job.variant == "b":
        return Padded(job, _cut_off(_load(AutoModel, job, num_hidden_layers=job.layer + 1)), batch_sizes=(1,))
    model = _load(AutoModel if job.variant == "a2" else AutoModelForCausalLM, job)
    return Padded(job, _all_hidden_states(model, job.layer), by_length=job.variant == "a_sorted")


def _load(kind: type[AutoModel] | type[AutoModelForCausalLM], job: Job, **changes: int) -> PreTrainedModel:
    model: PreTrainedModel = kind.from_pretrained(job.model, dtype=getattr(torch, job.dtype), attn_implementation="sdpa", **changes)
    return model.to(job.device).eval()  # type: ignore[arg-type] # transformers' stubs lack this overload


def _all_hidden_states(model: PreTrainedModel, layer: int) -> Forward:
    def forward(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        states: tuple[torch.Tensor, ...] = output.hidden_states
        return states[layer + 1]

    return forward


def _cut_off(model: PreTrainedModel) -> Forward:
    read: list[torch.Tensor] = []
    # the last of the hidden states is after the final norm, so the block itself is read
    model.layers[-1].register_forward_hook(lambda _module, _inputs, output: read.append(output[0] if isinstance(output, tuple) else output))

    def forward(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        return read.pop()

    return forward
