"""Adds products of two narrow matrices to linear layers, as LoRA adapters do, without merging them into the weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

Product = Callable[[torch.Tensor], torch.Tensor]
"""Type of a function from rows ``(…, in_features)`` to a linear layer's outputs ``(…, out_features)``."""


def add_low_rank(layer: nn.Linear, down: torch.Tensor, up: torch.Tensor) -> None:
    """Makes a linear layer compute ``x · (W + up · down)ᵀ + bias``. Its own weight is not touched.

    In float32 the update is added to the layer's product. In a coarser dtype the rounding of that sum would swallow most of a small update;
    there the product is added to the update instead, in the matrix product itself, so that the sum is rounded once.

    Args:
        layer: a linear layer, prepacked or not.
        down: ``(r, in_features)``, of the weight's dtype and device.
        up: ``(out_features, r)``, of the weight's dtype and device, scaled.
    """
    if layer.weight.dtype == torch.float32:
        layer.forward = partial(_update_after, layer.forward, down.t(), up.t())  # type: ignore[method-assign]
    else:
        layer.forward = partial(_update_first, layer.weight.t(), layer.bias, down.t(), up.t())  # type: ignore[method-assign]


def _update_after(product: Product, down: torch.Tensor, up: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    total = product(rows)
    total.view(-1, total.shape[-1]).addmm_(rows.reshape(-1, rows.shape[-1]) @ down, up)
    return total


def _update_first(
    weight: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor, up: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    flat = rows.reshape(-1, rows.shape[-1])
    inner = flat @ down
    update = inner @ up if bias is None else torch.addmm(bias, inner, up)
    return torch.addmm(update, flat, weight).view(*rows.shape[:-1], weight.shape[1])
