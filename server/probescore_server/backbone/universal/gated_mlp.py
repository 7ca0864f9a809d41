"""Makes gated MLPs reuse the tensors that they have just computed: on a CPU, a new tensor for each step costs more than the step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation

_TEST_ROWS = 3
_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


@torch.inference_mode()
def multiply_in_place(blocks: nn.ModuleList) -> Callable[[], None]:
    """Makes every ``down_proj(act_fn(gate_proj(x)) * up_proj(x))`` of the given blocks multiply in place.

    The names of a module's parts do not tell what the module computes, so each module's outputs are compared with those of the change
    first.

    Returns:
        A function that undoes the change.
    """
    changed = [module for module in blocks.modules() if _is_gated(module)]
    for module in changed:
        # set on the instance, so that hooks of the module work as before
        module.forward = partial(_forward, module)

    def undo() -> None:
        for module in changed:
            del module.forward

    return undo


def _forward(module: Any, rows: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - its parts are known by name alone
    gate = module.gate_proj(rows)
    gate = nn.functional.silu(gate, inplace=True) if isinstance(module.act_fn, (nn.SiLU, SiLUActivation)) else module.act_fn(gate)
    down: torch.Tensor = module.down_proj(gate.mul_(module.up_proj(rows)))
    return down


def _is_gated(module: nn.Module) -> bool:
    if {name for name, _ in module.named_children()} != _PARTS or not isinstance(module.gate_proj, nn.Linear):
        return False
    weight = module.gate_proj.weight
    rows = torch.randn((1, _TEST_ROWS, module.gate_proj.in_features), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    try:
        expected, found = module(rows), _forward(module, rows)
    except Exception:  # a module that is called in another way may raise anything
        return False
    return bool(((found - expected).abs().max() <= 1e-5 * expected.abs().max()).item())  # not for NaN
