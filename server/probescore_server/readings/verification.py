"""Checks each changed layer of a copied decoder against its formula in float64, on random rows, before anything is scored with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from probescore_server.backbone.model_loading import Decoder
from probescore_server.errors import ReadingRefused

ROWS = 8
BOUND = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Dictionary, keyed by dtype, of the bound on the relative error of a layer's outputs: of rounding in float32, of a few roundings in the
coarser dtypes.
"""


@torch.inference_mode()
def check_layers(decoder: Decoder, expected: Mapping[str, torch.Tensor], field: str) -> None:
    """Checks that linear layers multiply with the weights that they should have.

    Args:
        decoder: the copy.
        expected: a dictionary, keyed by a linear layer's name in the decoder, of its weight ``(out_features, in_features)`` float64.
        field: the file that the weights come from, for the error.

    Raises:
        ReadingRefused: a layer gives other outputs; it is named.
    """
    for name, weight in expected.items():
        layer: Any = decoder.model.get_submodule(name)
        rows = torch.randn((1, ROWS, layer.in_features), generator=torch.Generator().manual_seed(0))
        rows = rows.to(layer.weight.device, decoder.dtype)
        due = rows.double() @ weight.to(rows.device).T
        if layer.bias is not None:
            due += layer.bias.double()
        error = float((layer(rows).double() - due).norm() / due.norm())
        if not error <= BOUND[decoder.dtype]:
            problem = f"the changed layer {name} computes other outputs than its formula: relative error {error:.2g}"
            raise ReadingRefused(field, f"{problem}, allowed {BOUND[decoder.dtype]:g}")
