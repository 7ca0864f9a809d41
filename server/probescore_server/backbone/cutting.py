"""A model that is built whole and then cut off after some of its blocks, before any weight is read.

The number of blocks says more than how many there are: residual scales, which layers share keys and values, shapes of embeddings and
patterns of layers follow from it. So the config stays the whole model's, and what is shortened is the list that its own code has made.
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
    """A class whose ``from_pretrained`` gives models of the original one, each changed as soon as it is built.

    ``from_pretrained`` builds a model without memory for its weights, and then reads those that it finds in it. The class has the name
    and module of the original, by which transformers knows what belongs to a model.

    Args:
        model_class: as ``AutoModel`` chooses it.
        change: what is done to a model; what it takes away is not read.
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
    """Whether the last of these blocks gives what it gives as a part of the whole model.

    The whole model is the same one with the blocks that were cut off in their place again, without weights, since nobody comes that far.

    Args:
        model: the decoder.
        blocks: of the model, cut off.
        later: those that were cut off.
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
    # the kernels of other devices may add in another order each time
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return model.device.type != "cpu" and bool(errors.median() <= _ROUNDINGS * torch.finfo(model.dtype).eps)


class _BlockReached(Exception):
    """The block that was waited for has been run."""


def _output(block: nn.Module, model: PreTrainedModel, ids: torch.Tensor, *, ends: bool) -> torch.Tensor | None:
    """What a block gives in a forward, which ends there or goes on, ``(1, T, hidden_size)`` float32; ``None`` if it fails before that."""
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
    except Exception:  # whatever an architecture raises
        return None
    finally:
        hook.remove()
    return seen[0] if seen else None
