"""A model that is cut off computes what the whole one does, to the last bit, in every architecture that can be made small."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from parity_models import ARCHITECTURES, LAYERS, write_model
from transformers import AutoModel

from probescore.types import Tap
from probescore_server.backbone.model_loading import DTYPES, Decoder, load_decoder
from probescore_server.backbone.selection import universal_backbone
from probescore_server.backbone.self_test import SelfTest
from probescore_server.backbone.taps import TapReader

_KINDS = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_STATES = {"mamba_num_heads": 4, "mamba_n_heads": 4, "mamba_head_dim": 32, "mamba_d_head": 32, "ssm_state_size": 8, "mamba_d_state": 8}
_LATENT = {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
_PER_LAYER = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8}
_LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

MORE: dict[str, dict[str, Any]] = {
    # what depends on the number of blocks: a residual scale; patterns of layers; who shares keys and values; shapes of embeddings
    "minicpm3": {**_LATENT, "head_dim": 8},
    "nemotron_h": {**_STATES, "n_groups": 1, "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"]},
    "zamba2": {**_STATES, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1},
    "gemma3n_text": {**_PER_LAYER, "num_kv_shared_layers": 1, "laurel_rank": 8, "layer_types": _LOCAL_AND_GLOBAL},
    "gemma4_text": {**_PER_LAYER, "num_kv_shared_layers": 1, "global_head_dim": 16, "layer_types": _LOCAL_AND_GLOBAL},
    "falcon_h1": {**_STATES, "mamba_d_ssm": 128, "mamba_n_groups": 1},
    "bamba": {**_STATES, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {**_STATES, "layer_types": ["mamba", "attention", "mamba", "attention"]},
    "qwen3_5_text": {"layer_types": _KINDS, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "cohere2": {"sliding_window": 8, "layer_types": _LOCAL_AND_GLOBAL},
    "llama4_text": {"attention_chunk_size": 8, "num_local_experts": 4, "interleave_moe_layer_step": 2},
    "exaone4": {"sliding_window": 8, "sliding_window_pattern": 4},
    "granite": {"residual_multiplier": 0.3},
    "olmo3": {"sliding_window": 8},
    "glm4": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "deepseek_v2": {
        **_LATENT,
        "num_experts_per_tok": 2,
        "topk_method": "greedy",
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "moe_intermediate_size": 32,
    },
}

COUNTING = """
from transformers import LlamaConfig, LlamaModel

class CountingConfig(LlamaConfig):
    model_type = "counting"

class CountingModel(LlamaModel):
    config_class = CountingConfig

    def forward(self, input_ids=None, **others):
        {what_depends_on_the_number_of_blocks}
        return super().forward(inputs_embeds=embeddings, **others)
"""
OF_LAYERS = "embeddings = self.embed_tokens(input_ids) / len(self.layers)"
OF_CONFIG = "embeddings = self.embed_tokens(input_ids) / self.config.num_hidden_layers"
OF_LAST = "embeddings = self.embed_tokens(input_ids); self.layers[self.config.num_hidden_layers - 1]"


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A model with code of its own that makes something of the number of its blocks."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")

    def write(what: str) -> Path:
        directory = write_model(tmp_path / "model", "llama")
        (directory / "counting.py").write_text(COUNTING.format(what_depends_on_the_number_of_blocks=what))
        config = json.loads((directory / "config.json").read_text())
        config |= {"model_type": "counting", "auto_map": {"AutoConfig": "counting.CountingConfig", "AutoModel": "counting.CountingModel"}}
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return write


def outputs(decoder: torch.nn.Module, block: torch.nn.Module) -> torch.Tensor:
    """What a block gives for some ids, ``(1, 20, hidden_size)``."""
    seen: list[torch.Tensor] = []
    hook = block.register_forward_hook(
        lambda _block, _inputs, output: seen.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    with torch.inference_mode():
        decoder(input_ids=torch.randint(4, 128, (1, 20), generator=torch.Generator().manual_seed(1)), use_cache=False)
    hook.remove()
    return seen[0]


def whole_outputs(directory: Path, cut: Decoder, layer: int, **options: Any) -> torch.Tensor:
    """The same of the whole model, as transformers loads it."""
    whole = AutoModel.from_pretrained(directory, dtype=cut.dtype, **options).eval()
    blocks = whole.get_submodule(next(name for name, module in cut.model.named_modules() if module is cut.blocks))
    assert len(blocks) == cut.num_hidden_layers == LAYERS
    return outputs(whole, blocks[layer])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE])
def test_cut_off_model_gives_what_the_whole_gives_to_the_last_bit(architecture: str, dtype: str, tmp_path: Path) -> None:
    directory = write_model(tmp_path, architecture, **MORE.get(architecture, {}))
    cut = load_decoder(directory, num_layers=2, dtype=dtype)
    assert (len(cut.blocks), cut.dtype) == (2, DTYPES[dtype])
    assert torch.equal(outputs(cut.model, cut.blocks[1]), whole_outputs(directory, cut, 1))


@pytest.mark.parametrize("architecture", ["minicpm3", "nemotron_h", "zamba2", "gemma4_text", "cohere2", "llama4_text"])
def test_what_depends_on_depth_runs_through_the_cache_as_well(architecture: str, tmp_path: Path) -> None:
    decoder = load_decoder(write_model(tmp_path, architecture, **MORE[architecture]), num_layers=2)
    reader = TapReader(decoder, [Tap("resid_post", 1)])
    test = SelfTest(decoder, reader)
    assert test.check(universal_backbone(decoder, reader)) < 1e-4


def test_no_weight_of_a_later_block_is_read(tmp_path: Path) -> None:
    directory = write_model(tmp_path, "nemotron_h", **MORE["nemotron_h"])
    decoder = load_decoder(directory, num_layers=2)
    names = [name for name, weight in decoder.model.named_parameters() if not weight.is_meta]
    assert names == [name for name, _ in decoder.model.named_parameters()]
    assert not [name for name in names if name.startswith(("layers.2.", "layers.3."))]


def test_model_with_code_of_its_own_is_cut_with_the_config_of_the_whole(counting: Callable[[str], Path]) -> None:
    directory = counting(OF_CONFIG)
    cut = load_decoder(directory, num_layers=2, trust_remote_code=True)
    assert (len(cut.blocks), type(cut.model).__name__) == (2, "CountingModel")
    assert torch.equal(outputs(cut.model, cut.blocks[1]), whole_outputs(directory, cut, 1, trust_remote_code=True))


@pytest.mark.parametrize("what", [OF_LAYERS, OF_LAST], ids=["counts its blocks", "needs its last block"])
def test_model_that_cannot_be_cut_is_loaded_whole(what: str, counting: Callable[[str], Path]) -> None:
    directory = counting(what)
    with structlog.testing.capture_logs() as logs:
        loaded = load_decoder(directory, num_layers=2, trust_remote_code=True)
    assert [log["log_level"] for log in logs] == ["warning"]
    assert len(loaded.blocks) == LAYERS
    assert torch.equal(outputs(loaded.model, loaded.blocks[1]), whole_outputs(directory, loaded, 1, trust_remote_code=True))
