"""What a LoRA adapter does to one linear layer, as a formula in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class LayerUpdate:
    """Value object with the update of one linear layer: the weight becomes ``W + scale · up · down``, and with magnitudes (DoRA) each row
    of that is scaled to a length of its own.

    Attributes:
        down: LoRA's A, ``(r, in_features)``.
        up: LoRA's B, ``(out_features, r)``.
        scale: factor of the product.
        magnitudes: length of each row of the updated weight, ``(out_features,)``; ``None`` = as it comes.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    magnitudes: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Returns the rank of the update."""
        return self.down.shape[0]

    @property
    def is_nothing(self) -> bool:
        """Returns whether the update changes no weight, as that of an untrained adapter."""
        return self.magnitudes is None and (self.scale == 0 or not bool(self.up.any()) or not bool(self.down.any()))

    @property
    def scaled_up(self) -> torch.Tensor:
        """Returns ``scale · up``, ``(out_features, r)`` float64."""
        return self.up.double() * self.scale

    def updated(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the updated weight of a layer, ``(out_features, in_features)`` float64.

        Args:
            weight: the layer's own weight, of any dtype.
        """
        updated: torch.Tensor = torch.addmm(weight.double(), self.scaled_up.to(weight.device), self.down.double().to(weight.device))
        if self.magnitudes is None:
            return updated
        lengths: torch.Tensor = torch.linalg.vector_norm(updated, dim=1)
        return updated * (self.magnitudes.double().to(weight.device) / lengths).unsqueeze(1)
