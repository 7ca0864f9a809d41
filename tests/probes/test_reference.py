"""The reference: what each tap is, told from the model's own weights and from first principles."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from models import HIDDEN_SIZE, LAYERS, tiny_model
from transformers import AutoModelForCausalLM

from probescore import tokenizer_fingerprint
from probescore.types import Tap
from probescore_probes import ReferenceModel, model_fingerprint, reference_activations
from probescore_server.errors import ModelRefused

IDS = [1, 17, 9, 44, 31, 8, 23]
HOOKS = ("resid_pre", "attn_out", "mlp_out", "resid_post")
EVERY_TAP = [Tap(hook, layer) for hook in HOOKS for layer in range(LAYERS)] + [Tap("final_norm")]

# Norms before, after or around the modules; additions in sequence, in parallel, scaled, or inside the modules.
ARCHITECTURES = "llama qwen3 gemma2 gemma3_text gpt2 gpt_neox olmo2 phi3 cohere granite bloom mixtral opt"


@pytest.mark.parametrize("architecture", ARCHITECTURES.split())
def test_what_enters_a_block_and_what_it_adds_make_what_leaves_it(architecture):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture)).eval()

    read = reference_activations(model, IDS, EVERY_TAP)

    for layer in range(LAYERS):
        entering, attention, mlp, leaving = (read[Tap(hook, layer)] for hook in HOOKS)
        assert np.abs(entering + attention + mlp - leaving).max() < 1e-4 * np.abs(leaving).max()
        if layer + 1 < LAYERS:
            assert np.array_equal(leaving, read[Tap("resid_pre", layer + 1)])


def test_what_granite_scales_before_it_adds_is_read_scaled():
    model = AutoModelForCausalLM.from_pretrained(tiny_model("granite"), residual_multiplier=0.25).eval()

    read = reference_activations(model, IDS, EVERY_TAP)

    entering, attention, mlp, leaving = (read[Tap(hook, 1)] for hook in HOOKS)
    assert np.abs(entering + attention + mlp - leaving).max() < 1e-4 * np.abs(leaving).max()


def test_the_taps_are_those_of_a_qwen3_block_computed_by_hand():
    model = AutoModelForCausalLM.from_pretrained(tiny_model("qwen3")).eval()
    read = {tap: torch.from_numpy(array) for tap, array in reference_activations(model, IDS, EVERY_TAP).items()}
    last = model.model.layers[LAYERS - 1]

    with torch.inference_mode():
        middle = read[Tap("resid_pre", LAYERS - 1)] + read[Tap("attn_out", LAYERS - 1)]
        mlp = last.mlp(last.post_attention_layernorm(middle))
        normed = model.model.norm(read[Tap("resid_post", LAYERS - 1)])

    assert torch.equal(read[Tap("resid_pre", 0)], model.model.embed_tokens(torch.tensor(IDS)))
    assert torch.allclose(read[Tap("mlp_out", LAYERS - 1)], mlp, atol=1e-5)
    assert torch.allclose(read[Tap("final_norm")], normed, atol=1e-5)
    assert not torch.allclose(read[Tap("final_norm")], read[Tap("resid_post", LAYERS - 1)], atol=0.1)


def test_activations_are_one_row_of_float32_per_token(reference):
    read = reference.activations(np.array(IDS), ["resid_post.1", Tap("final_norm")])

    assert {str(tap): (array.shape, array.dtype) for tap, array in read.items()} == {
        "resid_post.1": ((len(IDS), HIDDEN_SIZE), np.float32),
        "final_norm": ((len(IDS), HIDDEN_SIZE), np.float32),
    }


def test_a_layer_that_the_model_does_not_have_is_named(reference):
    with pytest.raises(ValueError, match=r"resid_post\.4: the model has 4 blocks, counted from 0"):
        reference.activations(IDS, ["resid_post.4"])


def test_a_hook_that_does_not_exist_is_named(reference):
    with pytest.raises(ValueError, match=r"resid_mid\.1: no such tap"):
        reference_activations(reference.model, IDS, [Tap("resid_mid", 1)])


def test_a_model_whose_attention_and_mlp_do_not_add_up_gives_no_attn_out(reference):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("qwen3")).eval()
    handle = model.model.layers[1].register_forward_hook(lambda _, __, output: output * 1.5)

    with pytest.raises(ValueError, match=r"attn_out\.1: no attention and MLP output"):
        reference_activations(model, IDS, [Tap("attn_out", 1)])
    handle.remove()


def test_a_config_that_counts_other_blocks_than_the_model_has_is_an_error():
    model = AutoModelForCausalLM.from_pretrained(tiny_model("qwen3"))
    model.config.num_hidden_layers = LAYERS + 1

    with pytest.raises(ValueError, match="found no list of 5 decoder blocks"):
        reference_activations(model, IDS, [Tap("final_norm")])


def test_fitting_reads_the_completions_tokens_only(reference):
    seen: list[int] = []
    rollouts = [(IDS[:3], IDS[3:]), (IDS[:1], IDS[1:])]

    first, second = reference.completion_activations(rollouts, "resid_post.1", progress=seen.append)

    whole = reference.activations(IDS, ["resid_post.1"])[Tap("resid_post", 1)]
    assert np.array_equal(first, whole[3:])
    assert np.array_equal(second, whole[1:])
    assert seen == [1, 2]


def test_a_loaded_model_knows_what_a_manifest_says_of_it():
    directory = tiny_model("qwen3")

    loaded = ReferenceModel.load(directory, model_id="probescore/tiny", revision="main")

    assert loaded.reference.id == "probescore/tiny"
    assert loaded.reference.fingerprint == model_fingerprint(directory)
    assert (loaded.reference.hidden_size, loaded.reference.num_hidden_layers) == (HIDDEN_SIZE, LAYERS)
    assert loaded.tokenizer_fingerprint == tokenizer_fingerprint(loaded.tokenizer)
    assert ReferenceModel.load(directory).reference.id == directory.name


def test_a_model_of_the_hub_is_loaded_by_its_id(tmp_path, monkeypatch):
    commit = "0" * 40
    cached = tmp_path / "models--probescore--tiny"
    shutil.copytree(tiny_model("qwen3"), cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    loaded = ReferenceModel.load("probescore/tiny", revision="main")

    assert (loaded.reference.id, loaded.reference.revision) == ("probescore/tiny", commit)
    assert loaded.reference.fingerprint == model_fingerprint(tiny_model("qwen3"))


def test_a_model_of_pickles_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("qwen3"))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")

    with pytest.raises(ModelRefused, match="pickles"):
        ReferenceModel.load(tmp_path)
