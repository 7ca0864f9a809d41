"""Finds out whether a model can run packed: on one row with the tokens of several sequences.

Nothing but causal attention, called in a way that the kernel supports, may let one token of a row affect another.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch

from probescore_server.backbone.model_loading import Decoder
from probescore_server.backbone.packed.attention import MAX_HEAD_DIM, PACKED_ATTENTION, kernel_head_dim
from probescore_server.backbone.rotary import changing_rope_types
from probescore_server.backbone.self_test import ROW_ERROR_BOUND
from probescore_server.backbone.universal.attention import UnknownAttention, attending

_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})
_REHEARSAL_TOKENS = 32


def packed_refusal(decoder: Decoder) -> str | None:
    """Returns the reason why a model must not run packed, on one row with the tokens of several sequences; ``None`` if no
    reason is known.
    """
    return next(_objections(decoder), None)


def _objections(decoder: Decoder) -> Iterator[str]:
    config = decoder.config
    others = sorted(set(_layer_types(decoder)) - _KNOWN_LAYERS)
    if others:
        yield f"it has layers of type {', '.join(others)}"
    if getattr(config, "attn_temperature_tuning", None):
        yield "it scales queries by their place in the row"
    changing = changing_rope_types(config)
    if changing:
        yield f"its rotary embedding ({', '.join(changing)}) may depend on the length of the row"
    if "position_ids" not in inspect.signature(decoder.model.forward).parameters:
        yield "it takes no positions"
        return
    try:
        forwards, backwards = _RecordedForward(), _RecordedForward()
        forwards.run(decoder, backwards=False)
        backwards.run(decoder, backwards=True)
    except UnknownAttention as objection:
        yield str(objection)
        return
    except Exception as error:  # an architecture that needs its own attention may raise anything
        yield f"it cannot be run with another attention function: {type(error).__name__}: {error}"
        return
    yield from _attention_objections(decoder, forwards)
    row_errors = (forwards.seen - backwards.seen).norm(dim=1) / forwards.seen.norm(dim=1)
    if not float(row_errors.median()) <= ROW_ERROR_BOUND[decoder.dtype]:
        yield "its tokens depend on their neighbours also without attention"


def _attention_objections(decoder: Decoder, rehearsal: _RecordedForward) -> Iterator[str]:
    if len(rehearsal.windows) != len(decoder.blocks):
        yield f"{len(decoder.blocks)} blocks call transformers' attention interface {len(rehearsal.windows)} times"
        return
    windows = [decoder.config.sliding_window if kind == "sliding_attention" else None for kind in _layer_types(decoder)]
    if rehearsal.windows != windows:
        yield f"its layers ask for windows {rehearsal.windows} where its config says {windows}"
    if max(rehearsal.head_dims) > MAX_HEAD_DIM:
        yield f"it has heads of width {max(rehearsal.head_dims)}, and the kernel takes {MAX_HEAD_DIM}"
    if rehearsal.dtypes != {decoder.dtype}:
        yield f"it attends in {', '.join(sorted(str(dtype).removeprefix('torch.') for dtype in rehearsal.dtypes))}"


def _layer_types(decoder: Decoder) -> list[str]:
    """Returns the attention type of each loaded block. A model without such a list has a window in every block or in none."""
    config, count = decoder.config, len(decoder.blocks)
    kinds: list[str] | None = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds[:count]
    return ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"] * count


class _RecordedForward:
    """Runs a model once with an attention function that returns zeros and records the arguments with which layers call it.

    Attributes:
        windows: window of each call, in tokens; ``None`` = no window.
        head_dims: head width of each call, as the kernel would get it.
        dtypes: dtypes of queries, keys and values.
        seen: ``(T, …)`` float32, each token's queries, keys, values and last activations, in order of position.
    """

    def __init__(self) -> None:
        self.windows: list[int | None] = []
        self.head_dims: list[int] = []
        self.dtypes: set[torch.dtype] = set()
        self.seen = torch.zeros(0)
        self._inputs: list[torch.Tensor] = []

    @torch.inference_mode()
    def run(self, decoder: Decoder, *, backwards: bool) -> None:
        """Runs a row of random tokens at their positions; with ``backwards``, the last token comes first."""
        generator = torch.Generator().manual_seed(0)
        positions = torch.arange(_REHEARSAL_TOKENS, device=decoder.device).unsqueeze(0)
        ids = torch.randint(decoder.config.vocab_size, positions.shape, generator=generator).to(decoder.device)
        if backwards:
            ids, positions = ids.flip(1), positions.flip(1)
        with attending(decoder, PACKED_ATTENTION):
            output = decoder.model(input_ids=ids, position_ids=positions, use_cache=False, packed_attention=self)
        seen = torch.cat([*self._inputs, output.last_hidden_state[0].float()], dim=1)
        self.seen = seen.flip(0) if backwards else seen

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Records the arguments of one layer's attention, and returns zeros in the shape of ``LayerAttention``'s result."""
        self.windows.append(window)
        self.head_dims.append(kernel_head_dim(query, value))
        self.dtypes |= {query.dtype, key.dtype, value.dtype}
        self._inputs += [tensor[0].transpose(0, 1).flatten(1).float() for tensor in (query, key, value)]
        return value.new_zeros((1, query.shape[2], query.shape[1], value.shape[-1]))
