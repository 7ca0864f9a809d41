"""A checkpoint's reading scores as plain Hugging Face does on it; what it shares with the frozen model stays the frozen model's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from parity_models import ARCHITECTURES, write_model
from read_twice import BOUND, GROUPS, TAPS, Served, both, deviations, plain_scores, token_scores, write_probes
from safetensors.torch import load_file, save_file
from written_adapters import load

from probescore.types import ReadingKind
from probescore_server import Engine
from probescore_server.errors import ReadingIncomplete, ReadingRefused

Change = Callable[[str, torch.Tensor], torch.Tensor]


def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What a training run may have made of a tensor."""
    random = torch.Generator().manual_seed(len(name))
    return tensor + 0.2 * tensor.std() * torch.randn(tensor.shape, generator=random) if tensor.ndim > 1 else tensor * 1.1


def write_checkpoint(directory: Path, model: Path, change: Change = moved, *, only: str = "", **save: object) -> Path:
    """A checkpoint as ``save_pretrained`` writes it, with the model's tokenizer."""
    trained = load(model)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if only in name:
                parameter.copy_(change(name, parameter))
    trained.to(save.pop("dtype", torch.float32)).save_pretrained(directory, **save)
    for file in model.glob("*token*"):
        shutil.copy(file, directory)
    return directory


@pytest.fixture(scope="session")
def checkpoint(llama: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), llama.model)


@pytest.mark.parametrize("in_place", [False, True])
def test_scores_are_those_of_the_checkpoint(engine: Engine, checkpoint: Path, in_place: bool) -> None:
    alone = engine.score(GROUPS, token_scores="all")
    loaded = engine.load_reading("policy", checkpoint, in_place=in_place)
    assert (loaded.reading.kind, loaded.reading.changed_layers, loaded.reading.unseen_tensors) == (ReadingKind.CHECKPOINT, (0, 1, 2, 3), 1)
    assert loaded.reading.model_fingerprint != engine.info.model.fingerprint
    result = both(engine)
    found = deviations(result, plain_scores(load(checkpoint).double()), "policy")
    assert {name: far for name, far in found.items() if not far <= BOUND} == {}
    for name in TAPS:
        np.testing.assert_array_equal(token_scores(result, name), token_scores(alone, name))


@pytest.mark.sweep
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_the_checkpoint_for_each_architecture(tmp_path: Path, architecture: str) -> None:
    model = write_model(tmp_path / "model", architecture)
    engine = Engine.load(str(model), write_probes(tmp_path, model))
    alone = engine.score(GROUPS, token_scores="all")
    trained = write_checkpoint(tmp_path / "checkpoint", model, lambda name, tensor: tensor + 0.1 * (moved(name, tensor) - tensor))
    engine.load_reading("policy", trained)
    result = both(engine)
    found = deviations(result, plain_scores(load(trained).double()), "policy")
    assert {name: far for name, far in found.items() if not far <= BOUND} == {}
    for name in TAPS:
        np.testing.assert_array_equal(token_scores(result, name), token_scores(alone, name))


def test_the_same_weights_are_the_frozen_reading(engine: Engine, llama: Served) -> None:
    loaded = engine.load_reading("policy", llama.model)
    assert (loaded.reading.changed_layers, loaded.reading.golden_verified, loaded.device_bytes) == ((), True, 0)
    assert loaded.reading.model_fingerprint == engine.info.model.fingerprint
    result = both(engine)
    for name in TAPS:
        np.testing.assert_array_equal(token_scores(result, name, "policy"), token_scores(result, name))


def test_only_what_changed_costs_memory(engine: Engine, llama: Served, tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path, llama.model, only="layers.2.mlp.down_proj")
    loaded = engine.load_reading("policy", one)
    assert loaded.reading.changed_layers == (2,)
    assert loaded.device_bytes == 64 * 96 * 4
    found = deviations(both(engine), plain_scores(load(one).double()), "policy")
    assert {name: far for name, far in found.items() if not far <= BOUND} == {}


def test_what_no_probe_sees_costs_no_pass(llama: Served, tmp_path: Path) -> None:
    engine = llama.engine("early", "middle")
    deep = write_checkpoint(
        tmp_path, llama.model, lambda name, tensor: moved(name, tensor) if "layers.3" in name or "lm_head" in name else tensor
    )
    reading = engine.load_reading("policy", deep).reading
    assert (reading.changed_layers, reading.golden_verified) == ((), True)
    assert reading.unseen_tensors == 10  # the last block's and the head
    assert both(engine).info.usage.tokens == engine.score(GROUPS).info.usage.tokens


def test_biases_alone_are_changed(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "qwen2")  # biases beside queries, keys and values, which are prepacked
    engine = Engine.load(str(model), write_probes(tmp_path, model, ["last"]))
    saved = write_checkpoint(tmp_path / "checkpoint", model, lambda _, tensor: tensor + 0.5, only="q_proj.bias")
    engine.load_reading("policy", saved)
    assert deviations(both(engine), plain_scores(load(saved).double(), ["last"]), "policy")["last"] <= BOUND


FORMS = {
    "shards": {"max_shard_size": "40KB"},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("form", FORMS)
def test_other_ways_to_save(engine: Engine, llama: Served, tmp_path: Path, form: str) -> None:
    saved = write_checkpoint(tmp_path, llama.model, **FORMS[form])
    engine.load_reading("policy", saved)
    found = deviations(both(engine), plain_scores(load(saved).double()), "policy")
    assert {name: far for name, far in found.items() if not far <= BOUND} == {}


def test_names_that_fsdp_has_wrapped(engine: Engine, checkpoint: Path, tmp_path: Path) -> None:
    wrapped = shutil.copytree(checkpoint, tmp_path / "wrapped")
    tensors = load_file(wrapped / "model.safetensors")
    save_file({f"_fsdp_wrapped_module.{name}": tensor for name, tensor in tensors.items()}, wrapped / "model.safetensors")
    engine.load_reading("policy", checkpoint)
    engine.load_reading("wrapped", wrapped)
    result = both(engine, "policy", "wrapped")
    for name in TAPS:
        np.testing.assert_array_equal(token_scores(result, name, "policy"), token_scores(result, name, "wrapped"))


def test_a_tied_embedding_under_the_heads_name(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "qwen2", tie_word_embeddings=True)
    engine = Engine.load(str(model), write_probes(tmp_path, model, ["early"]))
    saved = write_checkpoint(tmp_path / "checkpoint", model)
    tensors = load_file(saved / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    engine.load_reading("policy", saved)
    assert deviations(both(engine), plain_scores(load(saved).double(), ["early"]), "policy")["early"] <= BOUND


def test_loading_leaves_torchs_default_dtype_alone(llama: Served, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # it is that of all threads: a batch that runs meanwhile would allocate in it
    engine = llama.engine("early", dtype="bfloat16")
    seen = set()
    change = torch.set_default_dtype
    monkeypatch.setattr(torch, "set_default_dtype", lambda dtype: seen.add(dtype) or change(dtype))
    engine.load_reading("policy", checkpoint)
    assert seen <= {torch.float32}


# ------------------------------------------------------------------------------------------------------------------- refusals


def refused(engine: Engine, path: Path, problem: str, error: type[Exception] = ReadingRefused) -> None:
    with pytest.raises(error, match=f"(?s){problem}") as raised:
        engine.load_reading("policy", path)
    assert [reading.name for reading in engine.readings()] == ["frozen"]
    assert str(path.parent) not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"model_type": "qwen3"}, "config.json: model_type: found 'qwen3', expected 'llama', as the frozen model has it"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "config.json: rope_parameters: found .*500000"),
        ({"num_hidden_layers": 5}, "config.json: num_hidden_layers: found 5"),
        ({"rms_norm_eps": 1e-3}, "config.json: rms_norm_eps: found 0.001"),
    ],
)
def test_another_config(engine: Engine, checkpoint: Path, tmp_path: Path, settings: dict, problem: str) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    written = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(written | settings))
    refused(engine, other, problem)


def test_other_weights(engine: Engine, checkpoint: Path, tmp_path: Path) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    weights = other / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.2.mlp.down_proj.weight"

    def rewrite(change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        own = dict(tensors)
        change(own)
        save_file(own, weights, metadata={"format": "pt"})

    rewrite(lambda own: own.pop(name))
    refused(engine, other, "1 weights are missing from its files: .*layers.2.mlp.down_proj.weight")
    rewrite(lambda own: own.update({name: own[name][:-1].contiguous()}))
    refused(engine, other, rf"model.safetensors: {name}: found shape \[63, 96\], expected \[64, 96\]")
    rewrite(lambda own: own.update({name: own[name] * float("inf")}))
    refused(engine, other, f"{name}: it has numbers that are not finite")
    rewrite(dict.clear)
    refused(engine, other, "it has no tensors of the decoder")
    weights.rename(other / "pytorch_model.bin")
    refused(engine, other, "pytorch_model.bin: may be a pickle and is never opened")


def test_another_tokenizer(engine: Engine, checkpoint: Path, tmp_path: Path) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"w40"', '"forty"'))
    refused(engine, other, "tokenizer: found a tokenizer")


def test_a_checkpoint_that_is_being_written_is_to_be_tried_again(engine: Engine, llama: Served, checkpoint: Path, tmp_path: Path) -> None:
    torn = shutil.copytree(checkpoint, tmp_path / "torn")
    whole = (torn / "model.safetensors").read_bytes()
    for size in (0, 50, len(whole) // 2, len(whole) - 1):
        (torn / "model.safetensors").write_bytes(whole[:size])
        refused(engine, torn, "model.safetensors .*being written", ReadingIncomplete)
    (torn / "model.safetensors").unlink()
    refused(engine, torn, "being written", ReadingIncomplete)
    shards = write_checkpoint(tmp_path / "shards", llama.model, max_shard_size="40KB")
    index = shards / "model.safetensors.index.json"
    sorted(shards.glob("model-*.safetensors"))[1].unlink()
    refused(engine, shards, "model-00002-of-.* is missing", ReadingIncomplete)
    index.write_text(index.read_text()[:100])
    refused(engine, shards, "index.json has no weight_map", ReadingIncomplete)
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    refused(engine, shards, "a shard's name is no name of a file")
