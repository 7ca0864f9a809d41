"""Builds a whole model without weights and then removes its last blocks, before any weight is read.

Residual scales, the layers that share keys and values, shapes of embeddings and patterns of layers also follow from the number of blocks in
a model's config. So the config stays that of the whole model, and the list of blocks that the model's own code has made is shortened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_TEST_TOKENS = 16
_ROUNDINGS = 4


def changed_when_built(model_class: type[PreTrainedModel], change: Callable[[PreTrainedModel], None]) -> type[PreTrainedModel]:
    """Returns a subclass whose ``from_pretrained`` returns models of the original class, each changed as soon as it is built.

    ``from_pretrained`` builds a model without memory for its weights, and then reads only the weights of the modules that the model still
    has. The subclass has the name and module of the original class, by which transformers recognises the code and config of a model.

    Args:
        model_class: the class that transformers' ``AutoModel`` chooses.
        change: function that changes a model in place; weights of modules that the function removes are not read.
    """

    def init(self: PreTrainedModel, *inputs: Any, **keywords: Any) -> None:  # noqa: ANN401
        model_class.__init__(self, *inputs, **keywords)
        change(self)
        left = {*self.state_dict(keep_vars=True)}
        self.all_tied_weights_keys = {name: source for name, source in self.all_tied_weights_keys.items() if {name, source} <= left}
        self.__class__ = model_class

    names = {"__module__": model_class.__module__, "__qualname__": model_class.__qualname__, "__doc__": model_class.__doc__}
    return type(model_class.__name__, (model_class,), {**names, "__init__": init})


@torch.inference_mode()
def computes_as_whole(model: PreTrainedModel, blocks: nn.ModuleList, later: Sequence[nn.Module]) -> bool:
    """Returns whether the last remaining block of a shortened model gives the same output as in the whole model.

    For the comparison, the removed blocks are put back temporarily. They need no weights, since the forward pass is stopped before it
    reaches them.

    Args:
        model: the decoder.
        blocks: the model's shortened list of blocks; its content is the same afterwards.
        later: the removed blocks.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, _TEST_TOKENS), generator=generator).to(model.device)
    last, count = blocks[-1], len(blocks)
    found = _output(last, model, ids, ends=False)
    blocks.extend(later)
    try:
        expected = _output(last, model, ids, ends=True)
    finally:
        del blocks[count:]
    if found is None or expected is None:
        return found is expected  # a model that cannot be run at all is not refused for being cut
    if torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True):
        return True
    # the kernels of devices other than a CPU may add in another order each time
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return model.device.type != "cpu" and bool(errors.median() <= _ROUNDINGS * torch.finfo(model.dtype).eps)


class _BlockReached(Exception):
    """Exception that stops a forward pass of a model once a given block has been run."""


def _output(block: nn.Module, model: PreTrainedModel, ids: torch.Tensor, *, ends: bool) -> torch.Tensor | None:
    """Returns a block's output ``(1, T, hidden_size)`` float32 in a forward pass of the model; ``None`` if the forward pass fails before
    the block.

    If ``ends`` is true, the forward pass is stopped after the block; otherwise it continues.
    """
    seen: list[torch.Tensor] = []

    def keep(_block: nn.Module, _args: object, output: torch.Tensor | Sequence[torch.Tensor]) -> None:
        seen.append((output if isinstance(output, torch.Tensor) else output[0]).float().clone())
        if ends:
            raise _BlockReached

    hook = block.register_forward_hook(keep)
    try:
        model(input_ids=ids, use_cache=False)
    except _BlockReached:
        pass
    except Exception:  # an architecture may raise anything
        return None
    finally:
        hook.remove()
    return seen[0] if seen else None
