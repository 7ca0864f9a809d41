"""Makes of what an adapter or a checkpoint says the changes of a copied decoder: which layers get a narrow product beside their weight,
which get weights of their own, and which stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from probescore_server.backbone.copying import WeightChanges
from probescore_server.backbone.model_loading import Decoder
from probescore_server.backbone.universal.prepacking import is_prepacked, plain_weight
from probescore_server.readings.adapter import Adapter
from probescore_server.readings.layer_update import LayerUpdate

MERGED_ABOVE_RANK = 64
"""Rank above which an update is merged into a weight of the layer's own where weights are prepacked, on a CPU.

A forward pass with updates of rank 16 beside its layers takes 1.07 times that of the frozen model, of rank 64 1.23 times. With merged
weights it takes no more than the frozen model's, and as much memory as all changed layers.
"""


@dataclass(frozen=True, eq=False)
class PlannedChanges:
    """Value object with the changes of a copied decoder.

    Attributes:
        weights: the changes.
        updates: a dictionary, keyed by the name of a linear layer, of the updates that the changes come from.
    """

    weights: WeightChanges
    updates: Mapping[str, LayerUpdate]

    @property
    def names(self) -> frozenset[str]:
        """Returns the names of the modules with changed weights."""
        tensors = {name.rpartition(".")[0] for name in self.weights.tensors}
        return frozenset(tensors | {*self.weights.low_rank})


@torch.inference_mode()
def changes_of_adapter(skeleton: Decoder, adapter: Adapter) -> PlannedChanges:
    """Returns what an adapter changes in a decoder. What it leaves as it is, such as layers whose B is still zero, is not changed.

    Args:
        skeleton: the frozen decoder, as it is copied.
        adapter: what the adapter's files say.
    """
    tensors = {name: new for name, new in adapter.replaced.items() if not _is_same(skeleton, name, new)}
    updates = {name: update for name, update in adapter.updates.items() if not update.is_nothing}
    low_rank: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, update in updates.items():
        layer: Any = skeleton.model.get_submodule(name)
        if update.magnitudes is not None or (is_prepacked(layer) and update.rank > MERGED_ABOVE_RANK):
            tensors[f"{name}.weight"] = update.updated(plain_weight(layer)).to(layer.weight.dtype)
        else:
            low_rank[name] = (update.down, update.scaled_up)
    return PlannedChanges(WeightChanges(tensors, low_rank), updates)


@torch.inference_mode()
def changes_of_checkpoint(skeleton: Decoder, checkpoint: Decoder) -> PlannedChanges:
    """Returns what a checkpoint changes in a decoder; tensors that are equal, bit by bit, stay the frozen ones.

    Args:
        skeleton: the frozen decoder, as it is copied.
        checkpoint: the checkpoint, cut at the same depth, with plain weights.
    """
    state = checkpoint.model.state_dict()
    return PlannedChanges(WeightChanges({name: new for name, new in state.items() if not _is_same(skeleton, name, new)}), {})


def expected_weights(skeleton: Decoder, planned: PlannedChanges) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the name of each changed linear layer, and the weight ``(out_features, in_features)`` float64 that it must multiply with."""
    for name in sorted(planned.names):
        layer = skeleton.model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            if name in planned.updates:
                yield name, planned.updates[name].updated(plain_weight(layer))
            else:
                yield name, planned.weights.tensors.get(f"{name}.weight", plain_weight(layer)).double()


def _is_same(skeleton: Decoder, name: str, new: torch.Tensor) -> bool:
    path, _, attribute = name.rpartition(".")
    module = skeleton.model.get_submodule(path)
    old = plain_weight(module) if isinstance(module, nn.Linear) and attribute == "weight" else getattr(module, attribute)
    return torch.equal(old, new.to(old.device, old.dtype))
