"""The probe as a part of the loss: what training on a probe should not be, and is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

LAYER = 1  # of the probe's tap


class ProbeInLoss:
    """The mean over rollouts of ``softplus(score)``, the loss of a probe that should say no, on the policy's own activations and with their
    gradient.

    The score itself has no lower end: nothing else would be learned any more than to lower it.
    """

    def __init__(self, model: Any, direction: Path, layer: int = LAYER) -> None:  # noqa: ANN401 - of transformers
        arrays = np.load(direction)
        self._weight = torch.tensor(arrays["weight"], dtype=torch.float32)
        self._bias = float(arrays["bias"])
        self._states: torch.Tensor
        model.model.layers[layer].register_forward_hook(self._keep)

    def _keep(self, module: object, inputs: object, output: Any) -> None:  # noqa: ANN401 - of transformers
        if torch.is_grad_enabled():  # not while rollouts are sampled
            self._states = output[0] if isinstance(output, tuple) else output

    def __call__(self, completion_mask: torch.Tensor) -> torch.Tensor:
        """Of the forward pass that was the last, for ``completion_mask (B, T)``."""
        states = self._states[:, -completion_mask.shape[1] :]
        scores = ((states @ self._weight + self._bias) * completion_mask).sum(dim=1) / completion_mask.sum(dim=1)
        return torch.nn.functional.softplus(scores).mean()
