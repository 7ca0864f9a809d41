"""What a rollout's activations are, by plain Hugging Face: the whole model, no cache, one sequence at a time.

Nothing of probescore's is used here. The residual stream is what the model itself reports as ``hidden_states`` (entry *i* goes into block
*i*, and the last entry is after the final norm); only what is not in that list is caught as it leaves its module.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel

Array = NDArray[np.floating[Any]]

# The modules whose outputs are added to the residual stream, read from each architecture's source.
_TERMS = {
    "gpt2": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),  # the modules themselves return the stream after the addition
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
}


class Reference:
    """A whole model that reads one sequence at a time.

    Args:
        directory: of the model.
        dtype: what it computes in.

    Attributes:
        layers: number of decoder blocks.
        routing_margin: smallest gap seen between the router logits of the last expert chosen and the first one left out.
    """

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        # grouped matrix products, which are what transformers chooses for experts, there are none of in float64
        experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
        self.model = AutoModel.from_pretrained(directory, dtype=dtype, **experts).eval()
        self.routing_margin = float("inf")
        blocks = self.model.h if hasattr(self.model, "h") else self.model.layers
        self.layers = len(blocks)
        self._seen: dict[str, torch.Tensor] = {}
        self._read: dict[tuple[int, ...], dict[str, Array]] = {}
        attention, mlp = _TERMS.get(self.model.config.model_type, ("self_attn", "mlp"))
        for layer, block in enumerate(blocks):
            linear = hasattr(block, "linear_attn")
            self._catch(block.get_submodule("linear_attn" if linear else attention), f"attn_out.{layer}")
            self._catch(block.get_submodule(mlp), f"mlp_out.{layer}")
        self._catch(blocks[-1], f"resid_post.{self.layers - 1}")
        for module in self.model.modules():
            if type(module).__name__.lower().endswith("topkrouter"):
                module.register_forward_hook(self._watch_router)

    def activations(self, token_ids: Sequence[int]) -> dict[str, Array]:
        """Activations at every tap, each ``(T, hidden_size)``."""
        key = tuple(int(token) for token in token_ids)
        if key not in self._read:
            self._read[key] = self._run(key)
        return self._read[key]

    def _run(self, token_ids: tuple[int, ...]) -> dict[str, Array]:
        self._seen.clear()
        with torch.no_grad():
            output = self.model(torch.tensor([token_ids]), use_cache=False, output_hidden_states=True)
        assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
        found = {name: value[0].numpy() for name, value in self._seen.items()}
        found["final_norm"] = output.last_hidden_state[0].numpy()
        for layer in range(self.layers):
            found[f"resid_pre.{layer}"] = output.hidden_states[layer][0].numpy()
            if layer > 0:
                found[f"resid_post.{layer - 1}"] = output.hidden_states[layer][0].numpy()
        return found

    def _catch(self, module: torch.nn.Module, name: str) -> None:
        def keep(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            self._seen[name] = output[0] if isinstance(output, tuple) else output

        module.register_forward_hook(keep)

    def _watch_router(self, router: Any, _inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        ordered = output[0].sort(dim=-1, descending=True).values
        gaps = ordered[:, router.top_k - 1] - ordered[:, router.top_k]
        self.routing_margin = min(self.routing_margin, float(gaps.min()))
