"""Linear layers' weights in the blocked layout of oneDNN, laid out once at load: on a CPU, products with them are faster."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

TYPICAL_ROWS = 512
"""Rows of a product that the layout is chosen for; any number may come."""

# oneDNN compiles a product for each number of rows that it meets, and two caches keep them, by default 1,024 each of up to half a megabyte.
# The layers of a model need few at a time. Both are read when first used.
_CACHED_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}


def can_prepack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch has the operators, which are not among its public functions, for weights of this kind."""
    if device.type != "cpu" or dtype != torch.float32:
        return False
    has_operators = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_operators and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@torch.inference_mode()
def prepack(blocks: nn.ModuleList) -> Callable[[], None]:
    """Lays out the weight of every linear layer of these blocks anew, in place of the plain one.

    Returns:
        What puts the plain ones back.
    """
    for variable, capacity in _CACHED_PRODUCTS.items():
        os.environ.setdefault(variable, capacity)
    shared = _shared_weights(blocks)
    packed = [layer for layer in blocks.modules() if type(layer) is nn.Linear and layer.weight.numel() and id(layer.weight) not in shared]
    for layer in packed:
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), TYPICAL_ROWS)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        # on the instance, so that hooks and checks of the layer's type go on as before
        layer.forward = partial(_linear, weight, layer.bias)  # type: ignore[method-assign]

    def undo() -> None:
        for layer in packed:
            del layer.forward
            layer.weight = nn.Parameter(layer.weight.detach().to_dense(), requires_grad=False)

    return undo


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


def _shared_weights(blocks: nn.ModuleList) -> set[int]:
    """Weights that stand in several places: each would get a copy of its own."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in blocks.modules():
        for parameter in module._parameters.values():
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
