"""Makes copies of a decoder that share every tensor which they do not change, so that other weights can be read beside the frozen ones.

A copy has its own modules and config, so that its hooks, its attention function and its changed layers are its own: the frozen decoder is
never written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from probescore_server.backbone.low_rank import add_low_rank
from probescore_server.backbone.model_loading import Decoder
from probescore_server.backbone.universal.prepacking import is_prepacked, plain_weight, prepack_layer


@dataclass(frozen=True, eq=False)
class WeightChanges:
    """Value object with what a copy of a decoder has of its own.

    Attributes:
        tensors: a dictionary, keyed by the name of a parameter or buffer in the decoder, of new values in the plain layout.
        low_rank: a dictionary, keyed by the name of a linear layer in the decoder, of matrices ``down`` ``(r, in_features)`` and ``up``
            ``(out_features, r)``, whose product is added to the layer's weight.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    low_rank: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


def shared_copy(decoder: Decoder) -> Decoder:
    """Returns a copy of a decoder with modules and a config of its own, and with the very same tensors.

    The decoder must not be running: a copy would take over the hooks of what runs.
    """
    memo: dict[int, object] = {id(tensor): tensor for module in decoder.model.modules() for tensor in _tensors(vars(module))}
    model = copy.deepcopy(decoder.model, memo)
    blocks: Any = memo[id(decoder.blocks)]
    return Decoder(model, blocks, decoder.num_hidden_layers)


@torch.inference_mode()
def changed_copy(skeleton: Decoder, changes: WeightChanges) -> tuple[Decoder, list[torch.Tensor]]:
    """Returns a copy of a decoder with some weights changed, and the tensors that only the copy has.

    Args:
        skeleton: a decoder that never runs.
        changes: what the copy has of its own.
    """
    decoder = shared_copy(skeleton)
    own: list[torch.Tensor] = []
    by_module: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in changes.tensors.items():
        module, _, attribute = name.rpartition(".")
        by_module.setdefault(module, {})[attribute] = tensor
    for path, tensors in by_module.items():
        own += _replace(decoder.model.get_submodule(path), tensors)
    for path, (down, up) in changes.low_rank.items():
        layer: Any = decoder.model.get_submodule(path)
        matrices = [matrix.to(layer.weight.device, layer.weight.dtype).contiguous() for matrix in (down, up)]
        add_low_rank(layer, *matrices)
        own += matrices
    return decoder, own


def discard(decoder: Decoder) -> None:
    """Takes all tensors from a copy that nobody runs any more, so that those which only the copy has are freed at once.

    A module and the function that it is bound to refer to one another: otherwise the memory would wait for a garbage collection, for which
    all threads wait about a second.
    """
    for module in decoder.model.modules():
        vars(module).pop("forward", None)
        module._parameters.clear()
        module._buffers.clear()


def _replace(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Replaces parameters and buffers of one module, and returns what it now has of its own."""
    prepacked = isinstance(module, nn.Linear) and is_prepacked(module)
    if isinstance(module, nn.Linear) and prepacked:
        plain = plain_weight(module)
        del module.forward  # it has the old bias in it
        module.weight = nn.Parameter(plain, requires_grad=False)
    for attribute, tensor in tensors.items():
        old = getattr(module, attribute)
        new = tensor.to(old.device, old.dtype, copy=True).contiguous()
        if attribute in module._parameters:
            module._parameters[attribute] = nn.Parameter(new, requires_grad=False)
        else:
            module._buffers[attribute] = new
    if isinstance(module, nn.Linear) and prepacked:
        prepack_layer(module)
        return [*vars(module)["forward"].args[0], *([module.bias] if "bias" in tensors else [])]
    return [getattr(module, attribute) for attribute in tensors]


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """Yields the tensors inside a module's attributes, such as the prepacked weight that its ``forward`` is bound to."""
    match value:
        case torch.Tensor():
            yield value
        case partial():
            yield from _tensors([*value.args, *value.keywords.values()])
        case dict():
            yield from _tensors([*value.values()])
        case list() | tuple() | set():
            for entry in value:
                yield from _tensors(entry)
