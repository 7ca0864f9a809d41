"""Chooses, when a model is loaded, the code that runs the model on its device, by measurements on the model's real weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import structlog
import torch
from torch.nn.attention.varlen import varlen_attn

from probescore.types import Hook, Tap
from probescore_server.backbone.base import Backbone
from probescore_server.backbone.model_loading import Decoder
from probescore_server.backbone.packed.attention import Kernel
from probescore_server.backbone.packed.backbone import PackedBackbone
from probescore_server.backbone.packed.support import packed_refusal
from probescore_server.backbone.self_test import SelfTest, small_forest
from probescore_server.backbone.taps import TapReader
from probescore_server.backbone.universal.attention import CAUSAL_ATTENTION, has_causal_attention, passes_windows
from probescore_server.backbone.universal.backbone import UniversalBackbone
from probescore_server.backbone.universal.gated_mlp import multiply_in_place
from probescore_server.backbone.universal.prepacking import can_prepack, prepack
from probescore_server.errors import ModelRefused

logger = structlog.get_logger(__name__)

_QUANTILES = torch.tensor([0.5, 0.99])
_SPREAD_FACTOR = 2.0
_MIN_CAPABILITY = (8, 0)  # required by FlashAttention's kernels


def choose_backbone(decoder: Decoder, reader: TapReader, kernel: Kernel | None = None) -> tuple[Backbone, str]:
    """Returns the packed backbone on a GPU if its activations agree with those of the universal backbone, and the universal backbone
    otherwise.

    The universal backbone runs one segment (run of tokens) at a time through transformers. The packed backbone runs many segments in one
    row and is faster on a GPU.

    Args:
        decoder: the model.
        reader: reader of the model's activations at the taps (places in the model).
        kernel: attention kernel for the packed backbone; ``None`` = torch's own kernel, if there is one for this device and dtype.

    Returns:
        The backbone, and the reason for the choice as a text for people. On a GPU a warning is logged if the packed backbone is not chosen.

    Raises:
        ModelRefused: even the universal backbone gives other activations than plain forward passes of the model.
    """
    universal = universal_backbone(decoder, reader)
    if kernel is None and decoder.device.type != "cuda":
        return universal, f"the packed path does not run on {decoder.device.type}"
    refusal = "the model is on several devices" if decoder.is_spread else None
    refusal = refusal or (_kernel_refusal(decoder) if kernel is None else None) or packed_refusal(decoder)
    if refusal is None:
        packed = PackedBackbone(decoder, reader, kernel or varlen_attn)
        try:
            refusal = _disagreement(decoder, reader, universal, packed)
        except Exception as error:  # the self-test raises ModelRefused, and a device may raise anything
            refusal = str(error)
        if refusal is None:
            return packed, "the packed path agrees with the universal one"
    logger.warning("not packed: the universal path is slower on a GPU", model_type=decoder.config.model_type, reason=refusal)
    return universal, f"not packed: {refusal}"


def universal_backbone(decoder: Decoder, reader: TapReader) -> UniversalBackbone:
    """Returns the universal backbone of a model, which runs one segment (run of tokens) at a time through transformers.

    On a CPU the backbone uses those faster kernels for which the self-test passes.

    Raises:
        ModelRefused: the backbone gives other activations than plain forward passes of the model.
    """
    test = SelfTest(decoder, reader)
    undo = _speed_up(decoder)
    attention: str | None = None
    if decoder.device.type == "cpu" and has_causal_attention():
        fast = UniversalBackbone(decoder, reader, CAUSAL_ATTENTION)
        if _passes(test.check, fast) and passes_windows(decoder):
            attention = CAUSAL_ATTENTION
    backbone = UniversalBackbone(decoder, reader, attention)
    if attention is None:
        if not _passes(test.check, backbone):
            undo()
        test.check(backbone)
    together = UniversalBackbone(decoder, reader, attention, runs_together=True)
    return together if _passes(test.check_short, together) else backbone


def _speed_up(decoder: Decoder) -> Callable[[], None]:
    """Replaces parts of a model's blocks by faster code for CPUs with the same results, and returns a function that undoes the change."""
    undoing: list[Callable[[], None]] = []
    if decoder.device.type == "cpu":
        undoing.append(multiply_in_place(decoder.blocks))
    if can_prepack(decoder.device, decoder.dtype):
        undoing.append(prepack(decoder.blocks))

    def undo() -> None:
        for step in reversed(undoing):
            step()

    return undo


def _passes(check: Callable[[Backbone], object], backbone: Backbone) -> bool:
    try:
        check(backbone)
    except ModelRefused as refusal:
        logger.info("a faster execution is not used: it does not give the activations of this model", reason=str(refusal))
        return False
    return True


def _kernel_refusal(decoder: Decoder) -> str | None:
    """Returns the reason why torch's attention kernel cannot run on the model's device or in its dtype; ``None`` if it can."""
    if decoder.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel computes in float16 and bfloat16, not in {str(decoder.dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(decoder.device)
    if capability < _MIN_CAPABILITY:
        return f"the kernel needs compute capability {_MIN_CAPABILITY[0]}.{_MIN_CAPABILITY[1]}, and this is {capability[0]}.{capability[1]}"
    return None


def _disagreement(decoder: Decoder, reader: TapReader, universal: Backbone, packed: Backbone) -> str | None:
    """Returns a text that says how activations of the packed backbone differ from those of the universal one by more than rounding;
    ``None`` if they do not.

    The median and the 99th percentile of the rows' relative errors are compared with a bound. The bound is twice the larger of two
    differences: between two batchings on the universal backbone (shared prompts, and one sequence at a time), and between the universal
    backbone and itself with every block's input rounded once more. The first difference alone is not enough, since the kernels of two
    batchings may happen to give the same bits.
    """
    test = SelfTest(decoder, reader)
    test.check(packed)
    tap = Tap(Hook.RESID_POST, len(decoder.blocks) - 1)

    def rows(backbone: Backbone) -> torch.Tensor:
        return backbone.forward(small_forest(decoder), [tap]).rows[tap]

    shared = universal.forward(small_forest(decoder), [tap])
    expected = shared.rows[tap]
    with _rounding_once_more(decoder):
        rounded = rows(universal)
    batchings = _quantiles(test.row_errors(shared))
    found = _quantiles(_relative(rows(packed), expected))
    allowed = _SPREAD_FACTOR * torch.maximum(batchings, _quantiles(_relative(rounded, expected)))
    if bool((found <= allowed).all()):
        return None
    return (
        f"relative errors of {found[0]:.2g} (median) and {found[1]:.2g} (99th percentile) against the universal path, "
        f"allowed {allowed[0]:.2g} and {allowed[1]:.2g}"
    )


def _relative(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Returns the relative error of each row of activations ``found`` against the same row of ``expected``, ``(N,)`` float32."""
    errors: torch.Tensor = torch.linalg.vector_norm(found - expected, dim=1) / torch.linalg.vector_norm(expected, dim=1)
    return errors


def _quantiles(errors: torch.Tensor) -> torch.Tensor:
    """Returns the median and the 99th percentile of the errors of many rows of activations, ``(2,)`` on the CPU."""
    return torch.quantile(errors.cpu(), _QUANTILES)


@contextmanager
def _rounding_once_more(decoder: Decoder) -> Iterator[None]:
    """Context manager that changes the input of every block at random, by up to half a unit of its dtype's precision."""
    generator = torch.Generator(decoder.device).manual_seed(0)
    unit = torch.finfo(decoder.dtype).eps

    def disturb(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        noise = torch.rand(hidden_states.shape, generator=generator, device=hidden_states.device) - 0.5
        disturbed = (hidden_states * (1 + unit * noise)).to(hidden_states.dtype)
        return ((disturbed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": disturbed})

    with ExitStack() as hooks:
        for block in decoder.blocks:
            hooks.callback(block.register_forward_pre_hook(disturb, with_kwargs=True).remove)
        yield
