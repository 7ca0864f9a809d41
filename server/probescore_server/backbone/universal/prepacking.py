"""Stores the weights of linear layers in the blocked layout of oneDNN, once at load: on a CPU, products with them are faster.

oneDNN adds up the products of a row and a column one after the other, so that rounding errors grow with the root of their number: at a
width of 576 the errors are one and a half times those of the matrix product that plain torch uses, at 2,048 more than twice. In trained
models, in which a few tokens have activations a thousand times as large as other tokens ("massive activations"), such errors change scores.
So the inputs are divided into blocks, and the sums of the blocks are added up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

TYPICAL_ROWS = 512
"""Number of input rows of a linear layer for which the layout of its weight is optimised; any number of rows can be multiplied."""

ADDED_IN_A_ROW = 128
"""Limits the number of inputs of a linear layer that are multiplied and added up one after the other; the sums of such blocks are then
added.

Plain torch (MKL) takes 192; fewer leave a margin for rounding errors, and cost proportionally more time.
"""

ADDED_BYTES = 8 << 20
"""Limits the bytes of a linear layer's partial sums that are added up at a time. To stay below the limit, fewer rows are computed at once.

More bytes would not stay in the CPU's caches, and from 32 MiB on the system's allocator would request new memory from the kernel for every
block's sums.
"""

_BLOCK_MULTIPLE = 16  # number of floats in a cache line

# oneDNN compiles a product for each number of rows that it meets, and two caches keep them, by default 1,024 each of up to half a megabyte.
# The layers of a model need few at a time. Both variables are read at the first use.
_CACHED_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}


def can_prepack(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether the installed torch can store weights of the given device and dtype in oneDNN's layout; torch's operators for this
    are not public.
    """
    if device.type != "cpu" or dtype != torch.float32:
        return False
    has_operators = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_operators and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@torch.inference_mode()
def prepack(blocks: nn.ModuleList) -> Callable[[], None]:
    """Replaces the weight of every linear layer in the given blocks by a copy in oneDNN's blocked layout, which is faster on a CPU.

    Returns:
        A function that restores the plain weights.
    """
    for variable, capacity in _CACHED_PRODUCTS.items():
        os.environ.setdefault(variable, capacity)
    shared = _shared_weights(blocks)
    packed = [layer for layer in blocks.modules() if type(layer) is nn.Linear and layer.weight.numel() and id(layer.weight) not in shared]
    for layer in packed:
        prepack_layer(layer)

    def undo() -> None:
        for layer in packed:
            plain = plain_weight(layer)
            del layer.forward
            layer.weight = nn.Parameter(plain, requires_grad=False)

    return undo


def prepack_layer(layer: nn.Linear) -> None:
    """Replaces the plain weight of a linear layer by a copy in oneDNN's blocked layout; the layer multiplies with it, and adds its present
    bias.
    """
    widths = _widths(layer.in_features)
    parts = [_laid_out(block) for block in torch.split(layer.weight.detach(), widths, 1)]
    # Replaces the plain weight, which is freed. Code that multiplies by it directly fails, as no other operator takes this layout.
    layer.weight = nn.Parameter(parts[0], requires_grad=False)
    # set on the instance, so that hooks and checks of the layer's type work as before
    layer.forward = partial(_linear, parts, widths, layer.out_features, layer.bias)  # type: ignore[method-assign]


def is_prepacked(layer: nn.Module) -> bool:
    """Returns whether a layer's weight is in oneDNN's blocked layout."""
    forward = vars(layer).get("forward")
    return isinstance(forward, partial) and forward.func is _linear


def plain_weight(layer: nn.Linear) -> torch.Tensor:
    """Returns a linear layer's weight ``(out_features, in_features)``; of a prepacked layer a plain copy, bit by bit the weight that was
    prepacked.
    """
    if not is_prepacked(layer):
        return layer.weight.detach()
    parts: Sequence[torch.Tensor] = vars(layer)["forward"].args[0]
    return torch.cat([part.to_dense() for part in parts], 1)


def _laid_out(block: torch.Tensor) -> torch.Tensor:
    laid_out: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(block.contiguous(), TYPICAL_ROWS)
    return laid_out


def _widths(inputs: int) -> list[int]:
    """Returns the widths of the blocks into which a linear layer's input row is divided: as few blocks as possible, of about equal
    width.
    """
    count = -(-inputs // ADDED_IN_A_ROW)
    width = -(-inputs // (count * _BLOCK_MULTIPLE)) * _BLOCK_MULTIPLE
    return [min(width, inputs - start) for start in range(0, inputs, width)]


def _linear(parts: Sequence[torch.Tensor], widths: list[int], outputs: int, bias: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    at_once = max(1, ADDED_BYTES // (rows.element_size() * outputs))
    if rows[..., 0].numel() <= at_once:
        return _sum_of_blocks(parts, widths, bias, rows)
    products = rows.new_empty(*rows.shape[:-1], outputs)
    for some_rows, some_products in zip(
        torch.split(rows.flatten(0, -2), at_once), torch.split(products.flatten(0, -2), at_once), strict=True
    ):
        some_products.copy_(_sum_of_blocks(parts, widths, bias, some_rows))
    return products


def _sum_of_blocks(parts: Sequence[torch.Tensor], widths: list[int], bias: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    blocks = torch.split(rows, widths, -1)
    total: torch.Tensor = torch.ops.mkldnn._linear_pointwise(blocks[0], parts[0], bias, "none", [], "")
    for block, part in zip(blocks[1:], parts[1:], strict=True):
        total += torch.ops.mkldnn._linear_pointwise(block, part, None, "none", [], "")
    return total


def _shared_weights(blocks: nn.ModuleList) -> set[int]:
    """Returns the set of ``id(weight)`` of each weight that several layers share; prepacking would give each layer its own copy."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in blocks.modules():
        for parameter in module._parameters.values():
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
