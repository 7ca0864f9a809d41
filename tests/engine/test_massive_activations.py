"""Scores of tokens with massive activations: as near to float64 as plain Hugging Face in float32 is.

Trained models have a few tokens with activations a thousand times as large as the others', often the first one and line breaks
(https://arxiv.org/abs/2402.17762). An MLP makes them of many large terms that mostly cancel, so that what rounding does to a sum on its way
is seen in the scores. Random weights have nothing of the kind; here they are made. `make parity-trained` shows the same on trained weights.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from parity_bound import further_than_plain_float32
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from probescore.types import Scope, Tap
from probescore_server.backbone.forest import Forest
from probescore_server.backbone.model_loading import load_decoder
from probescore_server.backbone.selection import universal_backbone
from probescore_server.backbone.taps import TapReader
from probescore_server.rollouts import CheckedRollout, Continuation, ResolvedOptions

Sequences = list[NDArray[np.int32]]

HIDDEN, INTERMEDIATE, VOCAB = 64, 4096, 96
SINK = 5
MARK, OUTLIER = 3, 7  # coordinates: where the sink's embedding is large, and where its activation gets massive
TAP = Tap("resid_post", 1)
SETTINGS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    whole = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SETTINGS), dtype=torch.float32)
    random = torch.Generator().manual_seed(0)
    first, second = slice(None, INTERMEDIATE // 2), slice(INTERMEDIATE // 2, None)
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=random) / (1 if "embed" in name else math.sqrt(weight.shape[1])))
        embeddings, block = whole.model.embed_tokens.weight, whole.model.layers[0]
        embeddings[:, MARK] = 0
        embeddings[SINK] *= 0.3
        embeddings[SINK, MARK] = 8
        block.self_attn.o_proj.weight[MARK] = 0
        block.mlp.gate_proj.weight[:, MARK] = 1
        block.mlp.up_proj.weight[first, MARK] = 1.01
        block.mlp.up_proj.weight[second, MARK] = -1
        block.mlp.down_proj.weight[OUTLIER] = 0.7
    directory = tmp_path_factory.mktemp("massive")
    whole.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    random = np.random.default_rng(0)
    found = []
    for _ in range(30):
        ids = random.integers(SINK + 1, VOCAB, 120, np.int32)
        ids[random.random(120) < 0.03] = SINK
        ids[0] = SINK
        found.append(ids)
    return found


def plain(model: Path, sequences: Sequences, dtype: torch.dtype) -> NDArray[np.float64]:
    """What plain Hugging Face gives at the tap, ``(tokens, hidden)``."""
    whole = AutoModel.from_pretrained(model, dtype=dtype).eval()
    seen: list[torch.Tensor] = []
    whole.layers[1].register_forward_hook(lambda _block, _inputs, output: seen.append(output if torch.is_tensor(output) else output[0]))
    with torch.inference_mode():
        for ids in sequences:
            whole(input_ids=torch.from_numpy(ids).long().unsqueeze(0), use_cache=False)
    return torch.cat([rows[0] for rows in seen]).double().numpy()


def ours(model: Path, sequences: Sequences) -> NDArray[np.float64]:
    decoder = load_decoder(model, num_layers=2)
    backbone = universal_backbone(decoder, TapReader(decoder, [TAP]))
    options = ResolvedOptions(probes=(), scope=Scope.ALL)
    forests = [Forest.build([CheckedRollout(ids[:50], Continuation(ids[50:]), options)], {}) for ids in sequences]
    return torch.cat([backbone.forward(forest, [TAP]).rows[TAP] for forest in forests]).double().numpy()


def test_scores_of_massive_activations_are_no_further_from_float64_than_plain_float32_is(model: Path, sequences: Sequences) -> None:
    exact = plain(model, sequences, torch.float64)
    # given tokens like those of trained models
    assert 500 < np.abs(exact).max() / np.median(np.abs(exact)) < 5000
    directions = np.random.default_rng(1).standard_normal((HIDDEN, 8))
    found, float32, float64 = (rows @ directions for rows in (ours(model, sequences), plain(model, sequences, torch.float32), exact))
    # and at which plain float32 itself is in most directions not within 1e-4 of the standard deviation
    assert (np.abs(float32 - float64) > 1e-4 * float64.std(axis=0)).any(axis=0).sum() > 4
    assert [further_than_plain_float32(found[:, i], float32[:, i], float64[:, i]) for i in range(8)] == [{}] * 8
