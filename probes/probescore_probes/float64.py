"""Runs a reference model in float64, to measure how far its float32 activations are from exact ones.

Weights are widened to float64 block by block. A model of 4 billion parameters therefore needs additional memory for its embeddings and one
block only, not twice the memory of all its weights. Where transformers asks for float32 by name (norms, softmax, rotary embeddings, linear
attention), it gets float64 too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from probescore.types import Tap, TokenIds
from probescore_probes.reference import ReferenceModel


def float64_activations(reference: ReferenceModel, token_ids: TokenIds, taps: Sequence[Tap]) -> dict[Tap, NDArray[np.float64]]:
    """Computes the activations of one sequence at some taps (points in the model) in float64; the model is left unchanged.

    Returns:
        Dictionary keyed by tap of activations, ``(T, hidden_size)`` float64.

    Raises:
        Exception: any error of a model or device that does not support float64.
    """
    decoder: torch.nn.Module = reference.model.get_decoder()
    with _plain_experts(decoder), _in_float64(decoder), _NoFloat32():
        found = reference.activations(token_ids, taps)
    return {tap: rows.astype(np.float64) for tap, rows in found.items()}


class _NoFloat32(TorchFunctionMode):
    """Context manager that replaces float32 with float64 in the arguments of every torch function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if func is torch.Tensor.float:
            return args[0].double()
        widened = [torch.float64 if argument is torch.float32 else argument for argument in args]
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*widened, **named)


@contextmanager
def _in_float64(decoder: torch.nn.Module) -> Iterator[None]:
    """Widens a decoder to float64 within the context: each block only while the block runs, and everything else at once."""
    blocks = [module for module in decoder.modules() if isinstance(module, torch.nn.ModuleList)]
    inner = [block for block in max(blocks, key=_size, default=torch.nn.ModuleList()) if list(block.parameters())]
    running: dict[torch.nn.Module, ExitStack] = {}

    def enter(block: torch.nn.Module, _args: object) -> None:
        running[block] = ExitStack()
        running[block].enter_context(_widened(list(chain(block.parameters(), block.buffers()))))

    def leave(block: torch.nn.Module, _args: object, _output: object) -> None:
        running.pop(block).close()

    def close_all() -> None:  # those of a block that raised
        for stack in running.values():
            stack.close()

    of_blocks = {id(tensor) for block in inner for tensor in chain(block.parameters(), block.buffers())}
    others = [tensor for tensor in chain(decoder.parameters(), decoder.buffers()) if id(tensor) not in of_blocks]
    with ExitStack() as undone:
        undone.callback(close_all)
        for block in inner:
            undone.callback(block.register_forward_pre_hook(enter).remove)
            undone.callback(block.register_forward_hook(leave, prepend=True).remove)
        undone.enter_context(_widened(others))
        yield


@contextmanager
def _plain_experts(decoder: torch.nn.Module) -> Iterator[None]:
    """Switches off the fused products of mixture-of-experts layers within the context, since the fused products do not exist in float64."""
    found = (getattr(module, "config", None) for module in decoder.modules())
    configs = {id(config): config for config in found if isinstance(config, PreTrainedConfig)}
    chosen = [(config, config._experts_implementation) for config in configs.values()]
    try:
        for config, _ in chosen:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, implementation in chosen:
            config._experts_implementation = implementation


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def _widened(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Widens parameters and buffers to float64 within the context; afterwards, their original values are restored exactly."""
    narrow = [(tensor, tensor.data) for tensor in tensors if tensor.is_floating_point()]
    try:
        for tensor, data in narrow:
            tensor.data = data.double()
        yield
    finally:
        for tensor, data in narrow:
            tensor.data = data
