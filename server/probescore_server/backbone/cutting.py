"""Builds a model whole and then cuts it off after some of its blocks, before any weight is read.

The number of blocks in a model's config determines more than how many there are: residual scales, which layers share keys and values,
shapes of embeddings and patterns of layers follow from it. So the config stays that of the whole model, and the list of blocks that the
model's own code has made is shortened.
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
    """Returns a subclass whose ``from_pretrained`` gives models of the original class, each changed as soon as it is built.

    ``from_pretrained`` builds a model without memory for its weights, and then reads the weights that it finds in the model. The subclass
    has the name and module of the original, from which transformers knows what belongs to a model.

    Args:
        model_class: the class that ``AutoModel`` chooses.
        change: function that changes a model; weights that it removes are not read.
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
    """Returns whether the last remaining block of a model that was cut off gives the same output as it does in the whole model.

    For the whole model, the blocks that were cut off are put in their place again, without weights, since the forward ends before them.

    Args:
        model: the decoder.
        blocks: the model's list of blocks, cut off; its content is the same afterwards.
        later: the blocks that were cut off.
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
    """Ends a forward of a model: the block whose output is wanted has been run."""


def _output(block: nn.Module, model: PreTrainedModel, ids: torch.Tensor, *, ends: bool) -> torch.Tensor | None:
    """Returns a block's output ``(1, T, hidden_size)`` float32 in a forward of the model; ``None`` if the forward fails before the block.

    The forward ends after the block if ``ends`` is true, and goes on otherwise.
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
