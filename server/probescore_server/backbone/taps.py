"""Copies activations at taps (places in a decoder's blocks) while the decoder runs, and finds the modules whose outputs attention and MLP
add.

Module hooks are used instead of ``output_hidden_states``, whose last entry is not the last block's output if the model's last blocks were
removed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from probescore.types import Hook, Tap
from probescore_server.backbone.model_loading import Decoder
from probescore_server.errors import ModelRefused

_ATTENTION = re.compile(r"(^|[._])(attn|attention|self_attn|self_attention|linear_attn|post_attention\w*|post_self_attn\w*|mixer)($|[._])")
_MLP = re.compile(r"(^|[._])(mlp|ffn|feed_?forward|moe|block_sparse_moe|post_feedforward\w*|post_mlp\w*|fc2)($|[._])")
_Arguments = Sequence[torch.Tensor]
_Keywords = Mapping[str, torch.Tensor]
_ModuleOutput = torch.Tensor | Sequence[torch.Tensor]
_SUM_BOUND = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def layers_needed(taps: Sequence[Tap], num_hidden_layers: int) -> int:
    """Returns the number of blocks of a model that must be loaded to read activations at the given taps (places in the model); at least
    one.
    """
    return max(1, blocks_seen(taps, num_hidden_layers))


def blocks_seen(taps: Iterable[Tap], num_hidden_layers: int) -> int:
    """Returns the number of blocks, counted from the first, on which activations at the given taps (places in the model) depend."""
    seen = 0
    for tap in taps:
        if tap.layer is None:
            seen = num_hidden_layers
        elif tap.hook == Hook.RESID_PRE:
            seen = max(seen, tap.layer)
        else:
            seen = max(seen, tap.layer + 1)
    return seen


@dataclass(frozen=True, slots=True, eq=False)
class RowMap:
    """Value object that maps tokens of a forward pass to the rows of a buffer to which their activations are copied.

    Attributes:
        source: ``(R,)`` int64, indices of tokens in the forward pass.
        target: ``(R,)`` int64, the row of the buffer for each of these tokens.
    """

    source: torch.Tensor
    target: torch.Tensor


class TapReader:
    """Reader that copies activations at taps (places in a decoder's blocks) into buffers while the decoder runs.

    Args:
        decoder: the model.
        taps: every tap that will be read.
        added: a dictionary, keyed by tap, of the names within their block of the modules of attention and MLP that are known already, and
            of their factors. What is found later is added to it.

    Raises:
        ModelRefused: a block does not pass its output unchanged to the next block, no outputs of attention and MLP add up to the difference
            between a block's output and input, or the final norm's output has another width than the blocks' outputs.
    """

    def __init__(self, decoder: Decoder, taps: Sequence[Tap], added: dict[Tap, tuple[str, float]] | None = None) -> None:
        self._decoder = decoder
        self._added = {} if added is None else added
        ids = _random_ids(decoder)
        self._check(taps, ids, _check_residual_stream(decoder, ids))

    def over(self, decoder: Decoder) -> TapReader:
        """Returns a reader of a copy of the decoder, with other weights. It reads the same taps, also those that are added to this reader
        later: which modules are attention and MLP does not depend on weights.

        Args:
            decoder: the copy.

        Raises:
            ModelRefused: a block of the copy does not pass its output unchanged to the next block.
        """
        return TapReader(decoder, (), self._added)

    def add(self, taps: Sequence[Tap]) -> None:
        """Makes the same checks for further taps of the loaded blocks, which can be read afterwards. Nothing else may run meanwhile.

        Raises:
            ModelRefused: as of the class.
        """
        ids = _random_ids(self._decoder)
        with torch.inference_mode():
            output = _run(self._decoder, ids) if Tap(Hook.FINAL_NORM) in taps else None
        self._check(taps, ids, getattr(output, "last_hidden_state", None))

    def _check(self, taps: Sequence[Tap], ids: torch.Tensor, final_norm: torch.Tensor | None) -> None:
        if Tap(Hook.FINAL_NORM) in taps:
            _check_final_norm(self._decoder, final_norm)
        layers = {
            tap.layer for tap in taps if tap.hook in (Hook.ATTN_OUT, Hook.MLP_OUT) and tap not in self._added and tap.layer is not None
        }
        for layer in sorted(layers):
            attention, mlp, scale = _find_added_terms(self._decoder, layer, ids)
            self._added[Tap(Hook.ATTN_OUT, layer)] = (attention, scale)
            self._added[Tap(Hook.MLP_OUT, layer)] = (mlp, scale)

    @contextmanager
    def reading(self, into: Mapping[Tap, torch.Tensor], rows: RowMap | None = None) -> Iterator[None]:
        """Context manager during which each forward pass of one sequence copies activations at taps (places in the model) to buffers, as
        float32.

        Args:
            into: a dictionary, keyed by tap, of buffers ``(T, hidden_size)``; with ``rows`` a buffer may have any number of rows.
            rows: the map from tokens to rows of the buffers; ``None`` = all tokens, in order.
        """
        with ExitStack() as hooks:
            for tap, buffer in into.items():
                if tap.layer is not None:
                    hooks.callback(self._hook(tap, tap.layer, buffer, rows).remove)
            yield

    def read_final_norm(self, output: BaseModelOutput, into: Mapping[Tap, torch.Tensor], rows: RowMap | None = None) -> None:
        """Copies the final norm's output, which a forward pass returned, into the buffer for the tap (place in the model) ``final_norm``,
        if ``into`` has such a buffer.
        """
        buffer = into.get(Tap(Hook.FINAL_NORM))
        if buffer is not None and output.last_hidden_state is not None:
            _store(output.last_hidden_state, buffer, rows)

    def _hook(self, tap: Tap, layer: int, buffer: torch.Tensor, rows: RowMap | None) -> torch.utils.hooks.RemovableHandle:
        # The activation is copied at once: some architectures later change the same tensor in place.
        match tap.hook:
            case Hook.RESID_PRE if layer == 0:
                return self._decoder.blocks[0].register_forward_pre_hook(
                    lambda _, args, kwargs: _store(_block_input(args, kwargs), buffer, rows), with_kwargs=True
                )
            case Hook.RESID_PRE:
                module, scale = self._decoder.blocks[layer - 1], 1.0
            case Hook.RESID_POST:
                module, scale = self._decoder.blocks[layer], 1.0
            case _:
                name, scale = self._added[tap]
                module = self._decoder.blocks[layer].get_submodule(name)
        return module.register_forward_hook(lambda _, __, output: _store(_first(output), buffer, rows, scale))


def _store(activation: torch.Tensor, buffer: torch.Tensor, rows: RowMap | None, scale: float = 1.0) -> None:
    if rows is not None:
        selected = activation.reshape(-1, buffer.shape[1]).index_select(0, rows.source)
        buffer.index_copy_(0, rows.target, selected.to(buffer.dtype) * scale)
        return
    buffer.copy_(activation.reshape(buffer.shape))
    if scale != 1.0:
        buffer.mul_(scale)


def _first(output: _ModuleOutput) -> torch.Tensor:
    """Returns a module's output, or the first element if the output is a tuple."""
    return output if isinstance(output, torch.Tensor) else output[0]


def _block_input(args: _Arguments, kwargs: _Keywords) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _random_ids(decoder: Decoder) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(decoder.config.vocab_size, (1, 16), generator=generator).to(decoder.device)


def _run(decoder: Decoder, ids: torch.Tensor) -> BaseModelOutput:
    try:
        output: BaseModelOutput = decoder.model(input_ids=ids, use_cache=False)
    except Exception as error:  # a model that cannot be run with ids alone may raise anything
        raise ModelRefused(f"a {decoder.config.model_type} model cannot be run: {type(error).__name__}: {error}") from error
    return output


@torch.inference_mode()
def _check_residual_stream(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor | None:
    """Checks that the blocks are run in order, each on the output of the block before, and returns the final norm's output or ``None``.

    Otherwise the tap ``resid_post`` (a block's output) would not be the residual stream.

    Raises:
        ModelRefused: a block is not run, or its input is not the output of the block before it.
    """
    entered: dict[int, torch.Tensor] = {}
    left: dict[int, torch.Tensor] = {}
    with ExitStack() as hooks:
        for layer, block in enumerate(decoder.blocks):

            def enter(_block: nn.Module, args: _Arguments, kwargs: _Keywords, layer: int = layer) -> None:
                entered[layer] = _block_input(args, kwargs).clone()

            def leave(_block: nn.Module, _args: _Arguments, output: _ModuleOutput, layer: int = layer) -> None:
                left[layer] = _first(output).clone()

            hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(leave).remove)
        output = _run(decoder, ids)
    shape = (1, ids.shape[1], decoder.config.hidden_size)
    layers = range(len(decoder.blocks))
    if unused := [str(layer) for layer in layers if layer not in left]:
        raise ModelRefused(
            f"a {decoder.config.model_type} model does not run its blocks {', '.join(unused)} on text alone, so that a layer's number does "
            "not mean what it says; serve a model of text alone"
        )
    chained = len(entered) == len(left) == len(layers) and all(torch.equal(left[layer], entered[layer + 1]) for layer in layers[:-1])
    if not chained or any(tensor.shape != shape for tensor in [*entered.values(), *left.values()]):
        raise ModelRefused(f"a {decoder.config.model_type} model does not pass one residual stream {shape} from block to block")
    return getattr(output, "last_hidden_state", None)


def _check_final_norm(decoder: Decoder, final_norm: torch.Tensor | None) -> None:
    width, last = decoder.config.hidden_size, decoder.num_hidden_layers - 1
    if final_norm is None or final_norm.shape[-1] != width:
        found = "nothing" if final_norm is None else f"rows of width {final_norm.shape[-1]}"
        raise ModelRefused(
            f"final_norm: this {decoder.config.model_type} model gives {found} after its last norm, and its residual stream is {width} "
            f"wide; read resid_post.{last} instead"
        )


@torch.inference_mode()
def _find_added_terms(decoder: Decoder, layer: int, ids: torch.Tensor) -> tuple[str, str, float]:
    """Finds the two modules of a block whose outputs are the terms that attention and MLP add to the residual stream.

    The modules depend on where an architecture puts its norms (Gemma 2 has one after each) and its additions (BLOOM adds inside the
    modules). So all pairs of modules with fitting names are tried, and the pair is chosen whose outputs add up to the difference between
    the block's output and input.

    Returns:
        The names within the block of the module of attention and of that of the MLP, and the factor by which their outputs are multiplied
        before they are added.

    Raises:
        ModelRefused: no pair of outputs adds up to the difference between the block's output and input.
    """
    block = decoder.blocks[layer]
    outputs: dict[str, torch.Tensor] = {}
    entered: list[torch.Tensor] = []
    with ExitStack() as hooks:
        before = block.register_forward_pre_hook(lambda _, a, k: entered.append(_block_input(a, k).clone()), with_kwargs=True)
        hooks.callback(before.remove)
        for name, module in block.named_modules():

            def record(_module: nn.Module, _args: object, output: _ModuleOutput, name: str = name) -> None:
                first = _first(output) if isinstance(output, (torch.Tensor, tuple)) else None
                # some experts return (tokens, hidden_size), without the batch's axis
                if isinstance(first, torch.Tensor) and first.numel() == entered[0].numel():
                    outputs[name] = first.reshape(entered[0].shape).clone()

            hooks.callback(module.register_forward_hook(record).remove)
        _run(decoder, ids)
    scale = float(getattr(decoder.config, "residual_multiplier", 1.0))
    pairs = [
        (_sum_error(entered[0], scale * outputs[attention], scale * outputs[mlp], outputs[""]), attention, mlp)
        for attention in outputs
        if _ATTENTION.search(attention) and not _MLP.search(attention)
        for mlp in outputs
        if _MLP.search(mlp)
    ]
    error, attention, mlp = min(pairs, default=(float("inf"), "", ""))
    if not error <= _SUM_BOUND[decoder.dtype]:
        raise ModelRefused(
            f"attn_out.{layer}, mlp_out.{layer}: {_not_added(decoder, layer, outputs, len(pairs), error)}; "
            f"read resid_pre.{layer} or resid_post.{layer} instead"
        )
    return attention, mlp, scale


def _not_added(decoder: Decoder, layer: int, outputs: Mapping[str, torch.Tensor], pairs: int, error: float) -> str:
    """Returns the reason why attention's and the MLP's outputs in a block cannot be read separately."""
    kind = decoder.config.model_type
    if pairs == 0:
        parts = ", ".join(name for name, _ in decoder.blocks[layer].named_children())
        absent = "MLP" if any(_ATTENTION.search(name) for name in outputs) else "attention"
        return f"block {layer} of this {kind} model has no {absent} of its own (its parts: {parts})"
    return (
        f"no outputs of attention and MLP in this {kind} model's block add up to what it adds to the residual stream (of {pairs} pairs the "
        f"closest has a relative error of {error:.2g})"
    )


def _sum_error(entered: torch.Tensor, attention: torch.Tensor, mlp: torch.Tensor, left: torch.Tensor) -> float:
    """Returns how far ``entered + attention + mlp`` is from ``left``, relative to ``left - entered``; the median over tokens.

    The sum is computed in the model's own dtype and in both orders that models use, so that the right pair of modules is exact and rounding
    does not hide a wrong pair.
    """
    entered = entered.to(left.device)  # in a model on several devices, the block before this one may be on another device
    added = (left.float() - entered.float()).norm(dim=-1)
    errors = [
        ((total.float() - left.float()).norm(dim=-1) / added).median() for total in (entered + attention + mlp, attention + mlp + entered)
    ]
    return float(torch.stack(errors).min())
