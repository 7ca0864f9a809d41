"""Models that read pictures too: the reference loads them whole and reads their text decoder, and the engine serves the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import HIDDEN_SIZE, LAYERS
from transformers import AutoModelForImageTextToText
from vision_language_models import IMAGE, WRAPPERS, tiny_wrapper

from probescore.types import RolloutGroup, Tap
from probescore_probes import ReferenceModel, linear_probe, write_probe
from probescore_server.engine.engine import Engine
from probescore_server.errors import ModelRefused

IDS = [1, 17, 9, 44, 31, 8, 23]
OTHERS = [([1, 6, 70, 12], [15, 33, 8, 41, 77]), ([1, 6, 70, 12], [9, 5]), ([1, 60], [50, 51, 52])]
HOOKS = ("resid_pre", "attn_out", "mlp_out", "resid_post")


@pytest.mark.parametrize("architecture", WRAPPERS)
def test_the_taps_of_a_wrapper_are_those_of_its_text_decoder(architecture):
    model = AutoModelForImageTextToText.from_pretrained(tiny_wrapper(architecture)).eval()
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor([IDS]), output_hidden_states=True, use_cache=False).hidden_states

    loaded = ReferenceModel.load(tiny_wrapper(architecture))
    read = loaded.activations(IDS, [*(Tap(hook, layer) for hook in HOOKS for layer in range(LAYERS)), "final_norm"])

    assert (loaded.reference.hidden_size, loaded.reference.num_hidden_layers) == (HIDDEN_SIZE, LAYERS)
    assert np.allclose(read[Tap("final_norm")], hidden[-1][0], atol=1e-5)
    for layer in range(LAYERS):
        entering, attention, mlp, leaving = (read[Tap(hook, layer)] for hook in HOOKS)
        assert np.allclose(entering, hidden[layer][0], atol=1e-5)
        assert np.abs(entering + attention + mlp - leaving).max() < 1e-4 * np.abs(leaving).max()


# PaliGemma's text sees what comes after it, so that the engine refuses it.
@pytest.mark.parametrize("architecture", [name for name in WRAPPERS if name != "paligemma"])
def test_the_engine_scores_text_as_the_reference_does(architecture, tmp_path):
    directory = tiny_wrapper(architecture)
    reference = ReferenceModel.load(directory)
    taps = ["resid_pre.1", "attn_out.2", "mlp_out.1", "resid_post.3", "final_norm"]
    weight = np.random.default_rng(0).standard_normal(len(taps) * HIDDEN_SIZE)
    write_probe(tmp_path / "p.onnx", linear_probe(weight), reference, name="p", version="1", taps=taps, golden=[(IDS[:3], IDS[3:])])

    engine = Engine.load(str(directory), [tmp_path / "p.onnx"])
    result = engine.score(
        [RolloutGroup(OTHERS[0][0], [OTHERS[0][1], OTHERS[1][1]]), RolloutGroup(OTHERS[2][0], [OTHERS[2][1]])], token_scores="all"
    )

    found = [scored["p"].tokens[:, 0] for group in result.groups for scored in group]
    expected = []
    for prompt, completion in OTHERS:
        read = reference.activations(prompt + completion, taps)
        expected.append(np.concatenate(list(read.values()), axis=1)[len(prompt) :] @ weight)
    assert [len(scores) for scores in found] == [len(scores) for scores in expected]
    difference = np.abs(np.concatenate(found) - np.concatenate(expected)).max()
    assert difference <= 1e-4 * np.concatenate(expected).std()


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "llava"])
def test_ids_that_stand_for_pictures_are_refused(architecture):
    reference = ReferenceModel.load(tiny_wrapper(architecture))
    with pytest.raises(ValueError, match=r"^token_ids: id 90 at index 1 stands for image input, which is not read; give rollouts of text"):
        reference.activations([1, IMAGE, 5], ["resid_post.1"])
    with pytest.raises(ValueError, match=r"^golden\[0\] completion_ids: id 90 at index 0 stands for image input"):
        write_probe(
            "p.onnx",
            linear_probe(np.ones(HIDDEN_SIZE)),
            reference,
            name="p",
            version="1",
            taps=["resid_post.1"],
            golden=[([1], [IMAGE, 3])],
        )


def test_a_wrapper_whose_text_lacks_weights_is_refused(tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(tiny_wrapper("llava"))
    weights = {key: value for key, value in model.state_dict().items() if "layers.2.mlp" not in key}
    model.save_pretrained(tmp_path, state_dict=weights)
    for file in tiny_wrapper("llava").glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelRefused, match=r"3 weights of .* are missing from its files.*layers\.2\.mlp"):
        ReferenceModel.load(tmp_path)
