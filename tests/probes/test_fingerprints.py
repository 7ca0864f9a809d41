"""Model fingerprints: the same model in another form keeps its own, another model gets another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from probescore_server.errors import ModelRefused
from probescore_server.probes import model_fingerprint

ARCHITECTURES = ["qwen3", "gpt2", "gpt_neox", "gemma3_text", "opt"]


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model("qwen3"), tmp_path / "model"))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(directory / "model.safetensors")
    return tensors


def rewrite_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ------------------------------------------------------------------------------------------------------------ the same in another form


def test_it_is_the_same_each_time(model):
    assert model_fingerprint(model) == model_fingerprint(model)
    assert model_fingerprint(model).startswith("sha256:")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shards_do_not_matter(architecture, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_model(architecture)).save_pretrained(tmp_path, max_shard_size="20KB")

    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert model_fingerprint(tmp_path) == model_fingerprint(tiny_model(architecture))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_bare_decoder_is_the_model_without_its_head(architecture, tmp_path):
    AutoModel.from_pretrained(tiny_model(architecture)).save_pretrained(tmp_path)

    assert model_fingerprint(tmp_path) == model_fingerprint(tiny_model(architecture))


def test_the_head_does_not_matter_tied_or_not(model, tmp_path):
    tensors = tensors_of(model)
    assert "lm_head.weight" in tensors
    untied = model_fingerprint(model)

    tensors["lm_head.weight"] += 1
    save_file(tensors, model / "model.safetensors")
    other_head = model_fingerprint(model)
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors")
    rewrite_config(model, tie_word_embeddings=True)

    assert untied == other_head == model_fingerprint(model)


def test_keys_of_the_config_that_change_nothing_do_not_matter(model):
    before = model_fingerprint(model)

    rewrite_config(
        model, use_cache=False, attention_dropout=0.5, eos_token_id=7, transformers_version="4.51.0", dtype="bfloat16", added_in_6=1
    )

    assert model_fingerprint(model) == before


def test_a_config_of_transformers_4_means_the_same(model):
    before = model_fingerprint(model)
    path = model / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = int(config.pop("rope_parameters")["rope_theta"])
    config.pop("layer_types")
    path.write_text(json.dumps(config | {"rope_scaling": None}))

    assert model_fingerprint(model) == before


def test_derived_buffers_of_old_checkpoints_do_not_matter(model):
    before = model_fingerprint(model)
    tensors = tensors_of(model)
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, model / "model.safetensors")

    assert model_fingerprint(model) == before


# ------------------------------------------------------------------------------------------------------------------------ another model


def test_another_seed_is_another_model():
    assert model_fingerprint(tiny_model("qwen3", seed=1)) != model_fingerprint(tiny_model("qwen3"))


def test_another_dtype_is_another_model(model):
    before = model_fingerprint(model)
    save_file({name: tensor.bfloat16() for name, tensor in tensors_of(model).items()}, model / "model.safetensors")

    assert model_fingerprint(model) != before


@pytest.mark.parametrize("change", ["first", "last", "everywhere", "name", "shape", "dtype", "missing", "more"])
def test_one_changed_tensor_is_another_model(model, change):
    before = model_fingerprint(model)
    tensors = tensors_of(model)
    name = "model.layers.2.mlp.up_proj.weight"
    assert tensors[name].nbytes > 64 * 64
    match change:
        case "first":
            tensors[name].view(-1)[0] += 1
        case "last":
            tensors[name].view(-1)[-1] += 1
        case "everywhere":
            tensors[name] *= 1.0001
        case "name":
            tensors["model.layers.2.mlp.up_proj.other"] = tensors.pop(name)
        case "shape":
            tensors[name] = tensors[name].view(-1)
        case "dtype":
            tensors[name] = tensors[name].view(torch.int32)
        case "missing":
            del tensors[name]
        case "more":
            tensors["model.layers.2.mlp.up_proj.bias"] = torch.zeros(3)
    save_file(tensors, model / "model.safetensors")

    assert model_fingerprint(model) != before


def test_every_byte_of_a_small_tensor_counts(model):
    before = model_fingerprint(model)
    tensors = tensors_of(model)
    tensors["model.norm.weight"][17] += 1e-3
    save_file(tensors, model / "model.safetensors")

    assert model_fingerprint(model) != before


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"num_attention_heads": 2},
        {"rms_norm_eps": 1e-5},
        {"hidden_act": "gelu"},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "layer_types": ["sliding_attention"] * 4},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_config_that_computes_something_else_is_another_model(model, change):
    before = model_fingerprint(model)
    rewrite_config(model, **change)

    assert model_fingerprint(model) != before


def test_a_model_with_code_of_its_own_is_fingerprinted_without_running_it(model):
    rewrite_config(model, model_type="own", auto_map={"AutoConfig": "evil.Config"})
    (model / "evil.py").write_text("raise SystemExit('ran')")
    before = model_fingerprint(model)
    rewrite_config(model, intermediate_size=49)

    assert model_fingerprint(model) != before


# --------------------------------------------------------------------------------------------------------------------------- refusals


def test_a_checkpoint_of_pickles_is_refused(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")

    with pytest.raises(ModelRefused, match=r"pytorch_model\.bin, which are pickles.*expected model\.safetensors"):
        model_fingerprint(model)


def test_a_directory_without_weights_is_refused(tmp_path):
    with pytest.raises(ModelRefused, match="found no weights"):
        model_fingerprint(tmp_path)


def test_a_missing_shard_is_refused(tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_model("qwen3")).save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()

    with pytest.raises(ModelRefused, match=rf"the shard {shard.name} .* is missing"):
        model_fingerprint(tmp_path)


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_is_refused(model, index):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(index)

    with pytest.raises(ModelRefused, match=r"index\.json"):
        model_fingerprint(model)


@pytest.mark.parametrize("kept", [0, 4, 100, 10_000])
def test_a_truncated_file_of_weights_is_refused(model, kept):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])

    with pytest.raises(ModelRefused, match="truncated"):
        model_fingerprint(model)


@pytest.mark.parametrize("header", [b"[1]", b'{"x": 1}', b'{"x": {"dtype": "F32"}}', b"not json", b'{"x": {"data_offsets": ["a", 2]}}'])
def test_a_damaged_header_is_refused(model, header):
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)

    with pytest.raises(ModelRefused, match="header"):
        model_fingerprint(model)


def test_a_file_without_tensors_is_refused(model):
    save_file({}, model / "model.safetensors")

    with pytest.raises(ModelRefused, match="no tensors"):
        model_fingerprint(model)


def test_a_missing_config_is_refused(model):
    (model / "config.json").unlink()

    with pytest.raises(ModelRefused, match=r"no config\.json"):
        model_fingerprint(model)
