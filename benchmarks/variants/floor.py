"""The floor: the matrix products of the blocks that are loaded, on the tokens that must be computed, in the sizes in which they come.

A size is a prompt's, a completion's; on a GPU, and where everything is known at once, all is one row. No norm, no attention, no embedding,
no Python beyond this loop.
"""

import torch
from transformers import AutoModel

from benchmarks.loads import Unit
from benchmarks.variants import InProcess, Job, Scored


class Floor(InProcess):
    def __init__(self, job: Job) -> None:
        model = AutoModel.from_pretrained(job.model, dtype=getattr(torch, job.dtype), num_hidden_layers=job.layer + 1).to(job.device)
        self.linears = [module for module in model.layers.modules() if isinstance(module, torch.nn.Linear)]
        self.weights = sum(linear.weight.numel() for linear in self.linears)
        self.packed = job.device != "cpu"
        self.inputs: dict[tuple[int, int], torch.Tensor] = {}

    def warm_up(self, unit: Unit) -> dict[str, object]:
        self.score(unit)
        return {}

    @torch.inference_mode()
    def score(self, unit: Unit) -> Scored:
        sizes = [sum(unit.segment_sizes())] if self.packed or unit.at_once else unit.segment_sizes()
        for size in sizes:
            for linear in self.linears:
                linear(self.input(size, linear))
        return Scored(None, {"tokens_computed": sum(sizes), "flops": 2 * self.weights * sum(sizes)})

    def input(self, size: int, linear: torch.nn.Linear) -> torch.Tensor:
        key = size, linear.in_features
        if key not in self.inputs:
            self.inputs[key] = torch.randn(key, dtype=linear.weight.dtype, device=linear.weight.device)
        return self.inputs[key]


load = Floor
