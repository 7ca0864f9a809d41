"""Translates the names that other libraries give to places in a model into taps (places where a probe can read activations), and refuses
names that stand for no tap.

hidden_states[k]                    Hugging Face: the input of block k; the last entry is after the final norm
blocks.L.hook_resid_post            TransformerLens, SAELens
model.layers[L].output[0]           nnsight; also paths of modules, such as transformer.h.L
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from probescore.types import Tap
from probescore_probes import arguments

_HIDDEN_STATES = re.compile(r"hidden_states\[(-?\d+)\]")
_TRANSFORMER_LENS = re.compile(r"blocks\.(\d+)\.(\S+)")
_LAYERS = r"(?:layers|h|blocks)(?:\[(?P<a>\d+)\]|\.(?P<b>\d+))"
_MODULE = re.compile(rf"(?:\w+\.)*{_LAYERS}(?P<rest>[\w.\[\]]*)")
_FINAL_NORM = re.compile(r"(?:\w+\.)*(?:norm|ln_f|final_layer_norm)(?:\.output(?:\[0\])?)?")

_HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "hook_in": "resid_pre",
    "hook_out": "resid_post",
}
_ENDS = {
    "": "resid_post",
    ".output": "resid_post",
    ".output[0]": "resid_post",
    ".input": "resid_pre",
    ".input[0]": "resid_pre",
    ".inputs[0]": "resid_pre",
}

OTHER_ACTIVATIONS = (
    "TransformerLens folds norms into weights, centres what writes to the stream and prepends BOS unless told otherwise: activations of a "
    "model loaded so are others than those served here; compare scores with the author's"
)
"""Note for the manifest of a probe whose tap (place in the model) was given by a name of TransformerLens."""


@dataclass(frozen=True)
class Place:
    """A tap (a place in the model where a probe reads activations), with notes about the name that the tap was given by.

    Attributes:
        tap: the tap in probescore's terms.
        notes: sentences about the name, for the manifest (description) in the probe's file.
    """

    tap: Tap
    notes: tuple[str, ...] = ()


def read_place(written: str | Tap, argument: str, num_hidden_layers: int) -> Place:
    """Returns the tap (place in the model where a probe reads activations) that a name stands for; the name may be probescore's own or
    another library's.

    Args:
        written: the name: ``"resid_post.6"``, or a name in another library's style such as ``"hidden_states[7]"``.
        argument: name of the argument that held the name, for messages.
        num_hidden_layers: number of blocks of the model.

    Raises:
        TypeError: the name is not a string.
        ValueError: the name has no known form, or the model has no such block.
    """
    if not isinstance(written, str):
        return Place(arguments.tap(written, argument, num_hidden_layers))
    name = written.strip()

    def tap(hook: str, layer: int | str) -> Tap:
        try:
            return arguments.tap(Tap(hook, int(layer)), argument, num_hidden_layers)
        except ValueError as error:
            raise ValueError(f"{error} ({name})") from None

    if found := _HIDDEN_STATES.fullmatch(name):
        return Place(hidden_state(int(found[1]), argument, num_hidden_layers))
    if found := _TRANSFORMER_LENS.fullmatch(name):
        if (hook := _HOOKS.get(found[2])) is None:
            raise ValueError(
                f"{argument}: {name}: reads inside a block, where no tap is; a probe can read hook_resid_pre, hook_resid_post, "
                "hook_attn_out and hook_mlp_out"
            )
        return Place(tap(hook, found[1]), (OTHER_ACTIVATIONS,))
    if (found := _MODULE.fullmatch(name)) and "hook_" not in name:
        layer = found["a"] or found["b"]
        if (hook := _ENDS.get(found["rest"])) is None:
            raise ValueError(
                f"{argument}: {name}: the output of a part of a block is what it adds to the stream only where no norm follows it (Gemma 2 "
                f"and 3 have one); give attn_out.{layer} or mlp_out.{layer} if it is added as it is, or resid_post.{layer} for the "
                "block's output"
            )
        return Place(tap(hook, layer))
    if _FINAL_NORM.fullmatch(name) and name != "final_norm":
        return Place(Tap("final_norm"))
    if "hook_" in name:
        raise ValueError(
            f"{argument}: {name}: no tap reads there; a probe can read blocks.L.hook_resid_pre, hook_resid_post, hook_attn_out "
            "and hook_mlp_out"
        )
    return Place(arguments.tap(name, argument, num_hidden_layers))


def hidden_state(index: int, argument: str, num_hidden_layers: int) -> Tap:
    """Returns the tap (place in the model) whose activations are an entry of Hugging Face's ``hidden_states``, which has one entry more
    than the model has blocks.

    Entry 0 is the input of block 0, and entry k the output of block k - 1, except for the last: it is the output of the final norm.

    Args:
        index: index of the entry, from 0; negative indices count from the end.
        argument: name of the argument that held the index, for messages.
        num_hidden_layers: number of blocks of the model.

    Raises:
        ValueError: there is no such entry.
    """
    entry = index + num_hidden_layers + 1 if index < 0 else index
    if not 0 <= entry <= num_hidden_layers:
        raise ValueError(
            f"{argument}: hidden_states[{index}]: the model has {num_hidden_layers} blocks and so entries 0 to {num_hidden_layers}; "
            "give one of these"
        )
    if entry == 0:
        return Tap("resid_pre", 0)
    return Tap("final_norm") if entry == num_hidden_layers else Tap("resid_post", entry - 1)


def hidden_state_of(tap: Tap, num_hidden_layers: int) -> int | None:
    """Returns the index of the entry of Hugging Face's ``hidden_states`` that holds the activations at a tap (place in the model); ``None``
    if no entry does.
    """
    for entry in range(num_hidden_layers + 1):
        found = hidden_state(entry, "tap", num_hidden_layers)
        if found == tap or (tap.hook == "resid_pre" and tap.layer and found == Tap("resid_post", tap.layer - 1)):
            return entry
    return None
