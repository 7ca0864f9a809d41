"""What an engine takes and what it refuses, before the first request."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from engine_probes import GOLDEN, linear, plain, pooled_mean
from models import BOS, HIDDEN_SIZE, LAYERS, MAX_POSITIONS, VOCAB_SIZE, tiny_model
from safetensors.torch import load_file, save_file

from probescore.types import RolloutGroup, Tap
from probescore_probes.reference import ReferenceModel
from probescore_server import Engine
from probescore_server.backbone.model_loading import load_decoder
from probescore_server.backbone.taps import layers_needed
from probescore_server.errors import InvalidRequest, ModelRefused, ProbeRefused
from probescore_server.probes.format.manifest import FollowUp, Tolerance
from probescore_server.probes.format.probe_file import read_probe_file, write_probe_file

Load = Callable[..., Engine]


def copy_of(model: Path, directory: Path) -> Path:
    return Path(shutil.copytree(model, directory / "copy"))


def edit_config(model: Path, **settings: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


# ------------------------------------------------------------------------------------------------------------------ what is loaded


def test_info_says_what_is_loaded(load: Load, reference: ReferenceModel) -> None:
    info = load(linear(description="it"), pooled_mean(expects_bos=True), dtype="bfloat16").info
    assert info.model.id == tiny_model().name
    assert info.model.fingerprint == reference.reference.fingerprint
    assert info.tokenizer_fingerprint == reference.tokenizer_fingerprint
    assert (info.model.model_type, info.model.hidden_size, info.model.vocab_size) == ("llama", HIDDEN_SIZE, VOCAB_SIZE)
    assert (info.model.num_hidden_layers, info.model.num_loaded_layers, info.model.max_position_embeddings) == (LAYERS, 2, MAX_POSITIONS)
    assert (info.device, info.dtype, info.execution_path, info.bos_token_id) == ("cpu", "bfloat16", "universal", BOS)
    assert [probe.name for probe in info.probes] == ["linear", "pooled-mean"]
    assert info.probes[0].taps == (Tap("resid_post", 1),)
    assert (info.probes[0].description, str(info.probes[0].default_reduction), info.probes[1].default_reduction) == ("it", "mean", None)
    assert info.expects_bos == {"linear@1": None, "pooled-mean@1": True}
    assert "golden" not in json.loads(info.probes[0].manifest_json)
    assert json.loads(info.probes[0].manifest_json)["name"] == "linear"


@pytest.mark.parametrize(
    ("taps", "layers"),
    [
        ([], 1),
        ([Tap("resid_pre", 0)], 1),
        ([Tap("resid_pre", 3)], 3),
        ([Tap("resid_post", 3)], 4),
        ([Tap("attn_out", 2)], 3),
        ([Tap("mlp_out", 2), Tap("resid_post", 0)], 3),
        ([Tap("final_norm")], 10),
    ],
)
def test_only_the_blocks_that_some_probe_needs_are_loaded(taps: list[Tap], layers: int) -> None:
    assert layers_needed(taps, 10) == layers


def test_neither_head_nor_later_blocks_are_in_memory() -> None:
    decoder = load_decoder(tiny_model(), num_layers=2)
    names = [name for name, _ in decoder.model.named_parameters()]
    assert not any("lm_head" in name or name.startswith(("layers.2", "layers.3")) for name in names)
    assert len(decoder.blocks) == 2


def test_engine_without_probes_tokenises_and_scores_nothing() -> None:
    engine = Engine.load(str(tiny_model()))
    assert engine.encode_completion("w7 w8").tolist() == [7, 8]
    with pytest.raises(InvalidRequest, match="no probe is loaded"):
        engine.score([RolloutGroup([1], [[2]])])


def test_load_reports_each_step(load: Load) -> None:
    steps: list[str] = []
    load(linear(), report=steps.append)
    assert steps == [
        "reading 1 probe files",
        "computing the model's fingerprint",
        "loading 2 of 4 blocks in float32",
        "testing the forward pass",
        "universal execution path: the packed path does not run on cpu",
        "recomputing golden scores",
        "ready",
    ]


# ------------------------------------------------------------------------------------------------------------------ models refused


def test_missing_directory_is_refused_without_asking_the_hub() -> None:
    with pytest.raises(ModelRefused, match="not a directory with a model"):
        Engine.load("/nowhere/at/all")


@pytest.mark.parametrize("model", ["no such name!", "someone/not-in-the-cache"])
def test_model_that_the_hub_does_not_give_is_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelRefused, match=model):
        Engine.load(model)


def test_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=r"no config\.json"):
        Engine.load(str(tmp_path))


def test_revision_of_a_directory_is_refused() -> None:
    with pytest.raises(ModelRefused, match=r"a revision .* belongs to a model on the hub"):
        Engine.load(str(tiny_model()), revision="main")


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(ModelRefused, match="'int4' is none of float32, bfloat16, float16"):
        Engine.load(str(tiny_model()), dtype="int4")


def test_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelRefused, match="device 'cuda:99'"):
        Engine.load(str(tiny_model()), device="cuda:99")


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    model = copy_of(tiny_model(), tmp_path)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelRefused, match=r"no safetensors weights; pytorch_model\.bin may be pickles and are never opened"):
        Engine.load(str(model))


def test_missing_weights_are_refused_and_not_made_up(tmp_path: Path) -> None:
    model = copy_of(tiny_model(), tmp_path)
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelRefused, match=r"1 weights are missing .*layers\.0\.mlp\.up_proj\.weight"):
        Engine.load(str(model))


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    model = copy_of(tiny_model(), tmp_path)
    edit_config(model, intermediate_size=64)
    with pytest.raises(ModelRefused, match="cannot be loaded"):
        Engine.load(str(model))


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    model = copy_of(tiny_model(), tmp_path)
    edit_config(model, model_type="hopeful")
    with pytest.raises(ModelRefused, match="its config cannot be read"):
        Engine.load(str(model))


def test_code_that_a_model_brings_is_not_run_unless_allowed(tmp_path: Path) -> None:
    model = copy_of(tiny_model(), tmp_path)
    edit_config(model, model_type="hopeful", auto_map={"AutoConfig": "configuration.Hopeful", "AutoModel": "modeling.Hopeful"})
    (model / "configuration.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelRefused):
        Engine.load(str(model))
    assert not (tmp_path / "ran").exists()


def test_encoder_with_decoder_is_refused(tmp_path: Path) -> None:
    model = copy_of(tiny_model(), tmp_path)
    (model / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 32, "num_layers": 2, "vocab_size": VOCAB_SIZE}))
    with pytest.raises(ModelRefused, match="an encoder with a decoder"):
        Engine.load(str(model))


def test_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    model = copy_of(tiny_model(), tmp_path)
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelRefused, match="its tokenizer cannot be read"):
        Engine.load(str(model))


def test_nan_weights_are_refused_by_the_self_test(tmp_path: Path) -> None:
    model = copy_of(tiny_model(), tmp_path)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelRefused, match="self-test"):
        Engine.load(str(model))


# ------------------------------------------------------------------------------------------------------------------ probes refused


def refused(field: str, saying: str, model: Path, *files: Path, **options: Any) -> None:
    with pytest.raises(ProbeRefused, match=saying) as caught:
        Engine.load(str(model), files, **options)
    assert caught.value.field == field
    assert Path(caught.value.file).name in {file.name for file in files}


def rewrite(path: Path, **fields: Any) -> Path:
    """The same probe with other fields of its manifest, sealed again by someone who means it."""
    probe = read_probe_file(path)
    write_probe_file(path, onnx.load_from_string(probe.graph), probe.manifest.model_copy(update=fields))
    return path


def test_probe_of_another_model_is_refused(reference: ReferenceModel, tmp_path: Path) -> None:
    refused("model.fingerprint", "found sha256:", tiny_model(seed=1), linear().write(tmp_path, reference))


def test_refusal_of_another_model_says_whose_is_whose_and_what_to_do(reference: ReferenceModel, tmp_path: Path) -> None:
    file, served = linear().write(tmp_path, reference), tiny_model(seed=1)
    made_for = read_probe_file(file).manifest.model
    with pytest.raises(ProbeRefused) as caught:
        Engine.load(str(served), [file])
    assert caught.value.found == f"{made_for.fingerprint} ({made_for.id}, which linear@1 was made for)"
    assert caught.value.expected.startswith(f"{ReferenceModel.load(served).reference.fingerprint} ({served.name}, which is served): serve ")
    assert "write the probe anew" in caught.value.expected
    assert "--accept-mismatch linear" in caught.value.expected


def test_probe_read_one_layer_off_misses_its_golden_scores(reference: ReferenceModel, tmp_path: Path) -> None:
    shifted = linear("linear", tap="resid_post.2").write(tmp_path, reference, version="2")
    right = read_probe_file(linear().write(tmp_path, reference)).manifest
    rewrite(shifted, golden=right.golden)
    refused("golden", r"differ by up to .* × their standard deviation when recomputed in float32", tiny_model(), shifted)


def test_golden_scores_are_held_to_the_tolerance_of_the_dtype(reference: ReferenceModel, tmp_path: Path) -> None:
    file = linear().write(tmp_path, reference, tolerance=Tolerance(bfloat16=1e-6))
    Engine.load(str(tiny_model()), [file])
    refused("golden", r"recomputed in bfloat16, expected at most 1e-06", tiny_model(), file, dtype="bfloat16")


def test_golden_rollouts_beyond_the_vocabulary_are_refused(reference: ReferenceModel, tmp_path: Path) -> None:
    file = linear().write(tmp_path, reference)
    golden = read_probe_file(file).manifest.golden
    rewrite(file, golden=golden.model_copy(update={"cases": (golden.cases[0].model_copy(update={"prompt_ids": (500,)}), golden.cases[1])}))
    refused("golden.cases[0].prompt.ids", "id 500 at index 0", tiny_model(), file)


def test_golden_rollouts_that_contradict_expects_bos_are_refused(reference: ReferenceModel, tmp_path: Path) -> None:
    refused("golden.cases[0].prompt", "must not start with BOS", tiny_model(), linear(expects_bos=False).write(tmp_path, reference))


def test_golden_rollouts_that_overflow_in_the_dtype_are_refused(tmp_path: Path) -> None:
    model = copy_of(tiny_model(), tmp_path)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][90] *= 1e6
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    file = linear(golden=[GOLDEN[0], ([BOS, 5], [90, 6])]).write(tmp_path, ReferenceModel.load(model))
    Engine.load(str(model), [file])
    refused("golden.cases[1].scores", "NaN or an infinity at resid_post.1", model, file, dtype="float16")


def test_follow_up_beyond_the_vocabulary_is_refused(reference: ReferenceModel, tmp_path: Path) -> None:
    file = linear(follow_up=FollowUp(token_ids=(5, 6, 7))).write(tmp_path, reference)
    rewrite(file, follow_up=FollowUp(token_ids=(5, 6, VOCAB_SIZE)))
    refused("follow_up.token_ids", "found 96", tiny_model(), file)


def test_probe_that_expects_bos_of_a_tokenizer_without_one_is_refused(tmp_path: Path) -> None:
    model = copy_of(tiny_model(), tmp_path)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in settings.items() if key != "bos_token"}))
    reference = ReferenceModel.load(model)
    refused("expects_bos", "no BOS", model, linear(expects_bos=True).write(tmp_path, reference))


def test_one_version_with_two_contents_is_refused_and_the_same_twice_is_one(reference: ReferenceModel, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first, other = linear().write(tmp_path, reference), linear(description="changed").write(tmp_path / "other", reference)
    refused("version", "linear@1 with other content", tiny_model(), first, other)
    assert len(Engine.load(str(tiny_model()), [first, first]).info.probes) == 1


def test_model_without_a_tokenizer_serves_ids_if_the_operator_accepts(reference: ReferenceModel, tmp_path: Path) -> None:
    model = copy_of(tiny_model(), tmp_path)
    for file in [*model.glob("tokenizer*"), *model.glob("*.jinja")]:
        file.unlink()
    file = linear().write(tmp_path, reference)
    refused("tokenizer_fingerprint", "no", model, file)
    engine = Engine.load(str(model), [file], accept_mismatch=["linear@1"])
    assert (engine.info.tokenizer_fingerprint, engine.info.bos_token_id) == ("", None)
    assert engine.score([RolloutGroup([1, 5], [[6]])]).info.probes[0].accepted_mismatches == ("tokenizer_fingerprint",)
    with pytest.raises(InvalidRequest, match=r"groups\[0\]\.completions\[0\]: the model came without a tokenizer"):
        engine.score([RolloutGroup([1], ["w5"])])
    assert engine.decode_tokens([5]) == ["⟨5⟩"]


# ------------------------------------------------------------------------------------------------------------- the escape hatch


def test_accepted_mismatches_are_served_and_said_in_every_answer(reference: ReferenceModel, tmp_path: Path) -> None:
    other = tiny_model(seed=1)
    engine = Engine.load(str(other), [linear().write(tmp_path, reference)], accept_mismatch=["linear"])
    result = engine.score([RolloutGroup(GOLDEN[0][0], [GOLDEN[0][1]])])
    assert engine.info.probes[0].accepted_mismatches == result.info.probes[0].accepted_mismatches == ("model.fingerprint", "golden")
    expected = plain(ReferenceModel.load(other), *GOLDEN[0])[4:].mean()
    np.testing.assert_allclose(result.values("linear"), [expected], atol=1e-5)


def test_probe_of_another_width_cannot_be_accepted(reference: ReferenceModel, tmp_path: Path) -> None:
    model = copy_of(tiny_model(), tmp_path)
    wider = replace(reference, reference=reference.reference.model_copy(update={"num_hidden_layers": 2}))
    edit_config(model, num_hidden_layers=1)
    file = linear().write(tmp_path, wider)
    refused("inputs[0].layer", "found 1, expected below 1", model, file, accept_mismatch=["linear"])


def test_accepting_a_probe_that_is_not_there_is_a_mistake(reference: ReferenceModel, tmp_path: Path) -> None:
    with pytest.raises(ProbeRefused, match="accept_mismatch: found no such probe, expected one of linear, linear@1"):
        Engine.load(str(tiny_model()), [linear().write(tmp_path, reference)], accept_mismatch=["lineal"])
