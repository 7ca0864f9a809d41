"""Model fingerprints: the same model in another form keeps its own, another model gets another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from config_sweep import unnoticed_settings
from models import tiny_model
from parity_families import FAMILIES, write_family
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from probescore_probes import model_fingerprint
from probescore_server.backbone.model_loading import load_decoder, resolve_model
from probescore_server.errors import ModelRefused

SWEPT = ["Gemma 3", "Gemma 4", "GPT-OSS", "LFM2", "Falcon-H1", "MiniCPM3"]  # the others: make parity
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
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


# ------------------------------------------------------------------------------------------------- what changes a score, and nothing else

BESIDE = [
    "v_head.summary.weight",
    "v_head.weight",
    "value_head.weight",
    "reward_head.0.weight",
    "score.weight",
    "classifier.dense.weight",
    "qa_outputs.bias",
    "mtp.layers.0.self_attn.q_proj.weight",
    "vision_tower.encoder.layers.0.mlp.fc1.weight",
    "model.visual.blocks.0.attn.qkv.weight",
    "model.vision_model.embeddings.patch_embedding.weight",
    "multi_modal_projector.linear_1.weight",
    "model.audio_tower.conv1.weight",
    "model.image_newline",
]


def deepest_activations(directory: Path) -> torch.Tensor:
    model = AutoModel.from_pretrained(directory).eval()
    with torch.inference_mode():
        activations: torch.Tensor = model(torch.arange(4, 90).unsqueeze(0)).last_hidden_state
    return activations


@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_the_decoder_does_not_matter(model, name):
    before = model_fingerprint(model)
    save_file(tensors_of(model) | {name: torch.ones(3, 5)}, model / "model.safetensors")

    assert model_fingerprint(model) == before


def test_scores_change_exactly_where_the_fingerprint_does(model):
    tensors = tensors_of(model) | {name: torch.ones(3, 5) for name in BESIDE}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    before, activations = model_fingerprint(model), deepest_activations(model)
    for name, tensor in tensors.items():
        save_file(tensors | {name: tensor * 1.5 + 0.1}, model / "model.safetensors", metadata={"format": "pt"})
        changed = not torch.equal(deepest_activations(model), activations)
        assert (model_fingerprint(model) != before) == changed, name
        assert changed == (name.startswith("model.") and name not in BESIDE), name


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "gpt_neox", "gemma3_text", "opt", "bloom"])
@pytest.mark.parametrize("head", ["lm_head.weight", "embed_out.weight"])
def test_a_tied_embedding_counts_wherever_it_is_stored(architecture, head, tmp_path):
    tied = AutoConfig.from_pretrained(tiny_model(architecture), tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(tied).save_pretrained(tmp_path)
    before = model_fingerprint(tmp_path)
    tensors = tensors_of(tmp_path)
    embedding = next(name for name in tensors if name.endswith(EMBEDDINGS))
    tensors[head] = tensors.pop(embedding)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    assert model_fingerprint(tmp_path) == before
    decoder = load_decoder(tmp_path, num_layers=1)
    assert torch.equal(decoder.model.get_input_embeddings().weight, tensors[head])
    tensors[head][5] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert model_fingerprint(tmp_path) != before


def test_a_head_alone_is_no_embedding_where_they_are_two_tensors(model):
    tensors = tensors_of(model)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelRefused, match=r"1 weights are missing from its files: embed_tokens\.weight"):
        load_decoder(model, num_layers=1)


def test_an_adapter_beside_the_base_is_refused_with_what_to_do(model):
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    save_file({"base_model.model.lora_A.weight": torch.ones(2)}, model / "adapter_model.safetensors")

    for refusing in (model_fingerprint, lambda directory: resolve_model(str(directory))):
        with pytest.raises(ModelRefused, match=r"adapter_config\.json .* merge it into the weights .*merge_and_unload.* or remove"):
            refusing(model)


def test_code_that_a_model_brings_counts(model):
    rewrite_config(model, model_type="own", auto_map={"AutoConfig": "own.Config"})
    (model / "own.py").write_text("scale = 1")
    before = model_fingerprint(model)
    (model / "own.py").write_text("scale = 2")
    other_code = model_fingerprint(model)
    (model / "own.py").write_text("scale = 1")
    rewrite_config(model, setting_of_its_own=3)

    assert len({before, other_code, model_fingerprint(model)}) == 3
    rewrite_config(model, setting_of_its_own=None, use_cache=False, hidden_dropout=0.5, eos_token_id=9)
    assert model_fingerprint(model) == before


def test_how_weights_are_quantised_while_loading_counts(model):
    before = model_fingerprint(model)
    rewrite_config(model, quantization_config={"quant_method": "quanto", "weights": "int8"})

    assert model_fingerprint(model) != before


def test_a_config_that_its_architecture_refuses_is_refused(model):
    rewrite_config(model, num_hidden_layers="four")

    with pytest.raises(ModelRefused, match="its config cannot be read"):
        model_fingerprint(model)


@pytest.mark.parametrize("architecture", SWEPT)
def test_every_setting_that_changes_an_activation_changes_the_fingerprint(architecture, tmp_path):
    assert unnoticed_settings(write_family(tmp_path, FAMILIES[architecture])) == {}
