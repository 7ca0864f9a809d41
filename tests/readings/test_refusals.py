"""What would not be computed correctly is refused at load, and the refusal names what."""

from __future__ import annotations

import copy
import json
import re
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from parity_models import LAYERS, write_model
from read_twice import GROUPS, Served
from safetensors.torch import save_file
from written_adapters import PREFIX, Tensors, WrittenAdapter, load

from probescore_server import Engine
from probescore_server.backbone import copying
from probescore_server.engine import loading
from probescore_server.errors import InvalidRequest, ReadingIncomplete, ReadingRefused

Change = Callable[[Tensors], Tensors]

QUERY = f"{PREFIX}model.layers.1.self_attn.q_proj"


def without(*endings: str) -> Change:
    return lambda own: {name: tensor for name, tensor in own.items() if not name.endswith(endings)}


def with_(**further: torch.Tensor) -> Change:
    return lambda own: own | {PREFIX + name.replace("__", "."): tensor for name, tensor in further.items()}


def each(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Change:
    return lambda own: {name: change(name, tensor) for name, tensor in own.items()}


def renamed(old: str, new: str) -> Change:
    return lambda own: {re.sub(old, new, name): tensor for name, tensor in own.items()}


SETTINGS = {
    "another kind of adapter": ({"peft_type": "IA3"}, r"adapter_config.json: peft_type: found 'IA3', expected 'LORA'"),
    "AdaLoRA": ({"peft_type": "ADALORA"}, "peft_type: found 'ADALORA'"),
    "no kind": ({"peft_type": None}, "peft_type: found None"),
    "trained biases": ({"bias": "all"}, "bias: found 'all', expected 'none'"),
    "trained biases of adapted layers": ({"bias": "lora_only"}, "bias: found 'lora_only'"),
    "a bias beside B": ({"lora_bias": True}, "lora_bias: found True"),
    "rows of the embedding": ({"trainable_token_indices": [3, 4]}, r"trainable_token_indices: found \[3, 4\]"),
    "bare parameters": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters: found"),
    "repeated blocks": ({"layer_replication": [[0, 3], [2, 4]]}, "layer_replication: found"),
    "transposed weights": ({"fan_in_fan_out": True}, "fan_in_fan_out: found True"),
    "activated LoRA": ({"alora_invocation_tokens": [7, 8]}, "alora_invocation_tokens: found"),
    "KaSA": ({"kasa_config": {"beta": 1e-4}}, "kasa_config: found"),
    "block-diagonal": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora: found"),
    "routed": ({"arrow_config": {"top_k": 3}}, "arrow_config: found"),
    "sampled": ({"monteclora_config": {"n": 4}}, "monteclora_config: found"),
    "grouped inputs": ({"use_qalora": True}, "use_qalora: found True"),
    "Megatron": ({"megatron_config": {"tp": 2}}, "megatron_config: found"),
    "a setting that nobody knows": ({"use_future": True}, "use_future: found True, expected none: this setting is unknown"),
    "no rank": ({"r": None}, "r: found None, expected a whole number"),
    "a rank of zero": ({"r": 0}, "r: found 0, expected at least 1"),
    "half a rank": ({"r": 7.5}, "r: found 7.5, expected a whole number"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha: found None, expected a number"),
    "an infinite alpha": ({"lora_alpha": float("inf")}, "lora_alpha: found inf"),
    "a rank that is a word": ({"rank_pattern": {"q_proj": "four"}}, "q_proj: found 'four', expected a whole number"),
    "a pattern that is none": ({"alpha_pattern": {"q_proj(": 4}}, "alpha_pattern: found 'q_proj\\(', expected a regular expression"),
    "patterns that disagree": (
        {"alpha_pattern": {"q_proj": 4, "layers.1.*": 5}},
        r"alpha_pattern: several patterns mean .*q_proj, which say 4, 5",
    ),
    "another rank": ({"r": 6}, r"lora_A: found shape \[8, 64\], expected \[6, 64\] of this layer at the rank 6"),
    "another rank by pattern": ({"rank_pattern": {"layers.2.*": 4}}, r"layers.2.*lora_A: found shape \[8, 64\], expected \[4, 64\]"),
    "DoRA without magnitudes": ({"use_dora": True}, "lora_magnitude_vector is missing"),
    "a layer that the settings do not name": ({"target_modules": ["q_proj"]}, "v_proj: adapter_config.json does not name this layer"),
    "a block that the settings do not name": ({"layers_to_transform": [0, 1]}, r"layers.2.*: adapter_config.json does not name this layer"),
    **{
        f"unconverted {kind}": ({"init_lora_weights": kind}, f"init_lora_weights: found '{kind}'.*trained on a changed base")
        for kind in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "something_new")
    },
}


@pytest.fixture(scope="session")
def adapter(llama: Served) -> WrittenAdapter:
    return WrittenAdapter.random(llama.model, ["q_proj", "v_proj"])


def refused(engine: Engine, path: Path, problem: str, error: type[Exception] = ReadingRefused) -> None:
    before = engine.readings()
    with pytest.raises(error, match=f"(?s){problem}") as raised:
        engine.load_reading("policy", path)
    assert engine.readings() == before
    assert str(path.parent) not in str(raised.value)


@pytest.mark.parametrize(("settings", "problem"), SETTINGS.values(), ids=SETTINGS)
def test_settings_that_are_not_computed(engine: Engine, adapter: WrittenAdapter, tmp_path: Path, settings: dict, problem: str) -> None:
    refused(engine, adapter.changed(**settings).write(tmp_path), problem)


def test_settings_of_a_newer_peft_that_are_off_are_no_reason(engine: Engine, adapter: WrittenAdapter, tmp_path: Path) -> None:
    settings = {"use_future": False, "future_config": None, "future_list": [], "init_lora_weights": "gaussian"}
    engine.load_reading("policy", adapter.changed(**settings).write(tmp_path))


TENSORS: dict[str, tuple[Change, str]] = {
    "none at all": (lambda _: {}, "it has no tensors: the base alone would be read"),
    "A without B": (without("layers.1.self_attn.q_proj.lora_B.weight"), "layers.1.self_attn.q_proj: lora_B is missing"),
    "B without A": (without("layers.1.self_attn.q_proj.lora_A.weight"), "layers.1.self_attn.q_proj: lora_A is missing"),
    "a layer of the settings is missing": (
        without("v_proj.lora_A.weight", "v_proj.lora_B.weight"),
        r"no tensors of layers.0.self_attn.v_proj, .* and 1 others, which adapter_config.json names",
    ),
    "a block is missing": (
        lambda own: {name: tensor for name, tensor in own.items() if ".layers.3." not in name},
        "no tensors of layers.3.self_attn.q_proj, layers.3.self_attn.v_proj, which",
    ),
    "names that the model lacks": (renamed("self_attn", "attention"), "the model has no such layer"),
    "a block that the model lacks": (
        with_(**{f"model__layers__{LAYERS}__self_attn__q_proj__lora_{part}__weight": torch.ones(8, 64) for part in "AB"}),
        f"layers.{LAYERS}.self_attn.q_proj.lora_A.weight: the model has no such layer",
    ),
    "an unknown part": (
        with_(model__layers__1__self_attn__q_proj__lora_C__weight=torch.ones(2)),
        "lora_C.weight: the model has no such layer",
    ),
    "a bias beside B": (with_(model__layers__1__self_attn__q_proj__lora_B__bias=torch.ones(64)), "lora_B.bias: a bias beside B"),
    "a trained bias": (with_(model__layers__1__self_attn__q_proj__bias=torch.ones(64)), "q_proj.bias: "),
    "an embedding's adapter": (
        with_(model__embed_tokens__lora_embedding_A=torch.ones(8, 128)),
        "lora_embedding_A: an adapter of an embedding",
    ),
    "a whole projection": (with_(model__layers__1__mlp__up_proj__weight=torch.ones(96, 64)), "up_proj.weight: a whole Linear of a block"),
    "an embedding of more tokens": (
        with_(model__embed_tokens__weight=torch.ones(130, 64)),
        r"embed_tokens.weight: found shape \[130, 64\]",
    ),
    "magnitudes without DoRA": (
        with_(model__layers__1__self_attn__q_proj__lora_magnitude_vector=torch.ones(64)),
        "q_proj: lora_magnitude_vector without use_dora",
    ),
    "an empty tensor": (each(lambda name, tensor: tensor[:0] if name.startswith(f"{QUERY}.lora_A") else tensor), "it is empty"),
    "NaN": (each(lambda name, tensor: tensor.sqrt() if name.startswith(f"{QUERY}.lora_A") else tensor), "not finite"),
    "integers": (each(lambda name, tensor: tensor.to(torch.int8) if name.startswith(f"{QUERY}.lora_A") else tensor), "found dtype I8"),
    "other inputs": (each(lambda name, tensor: tensor[:, :-1].contiguous() if "lora_A" in name else tensor), r"expected \[8, 64\]"),
    "other outputs": (
        each(lambda name, tensor: tensor[:-1].contiguous() if "lora_B" in name else tensor),
        r"lora_B: found shape \[63, 8\]",
    ),
    "two adapters": (
        lambda own: {name.replace(".weight", ".a.weight" if ".0." in name else ".b.weight"): tensor for name, tensor in own.items()},
        "several adapters: a, b",
    ),
    "weights that overflow": (each(lambda _, tensor: tensor * 1e18), "the model cannot be run with these weights|computes other outputs"),
}


@pytest.mark.parametrize(("change", "problem"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_have_no_place(engine: Engine, adapter: WrittenAdapter, tmp_path: Path, change: Change, problem: str) -> None:
    refused(engine, adapter.changed(tensors=change).write(tmp_path), problem)


def test_layers_above_the_taps_are_checked_as_those_below(llama: Served, adapter: WrittenAdapter, tmp_path: Path) -> None:
    engine = llama.engine("early")
    elsewhere = adapter.renamed(lambda name: name.replace("3.self_attn.q_proj", "3.self_attn.r_proj"))
    refused(engine, elsewhere.write(tmp_path / "elsewhere"), "no such layer")
    wider = adapter.changed(tensors=each(lambda name, tensor: tensor.T.contiguous() if ".3." in name else tensor))
    refused(engine, wider.write(tmp_path / "wider"), r"found shape \[64, 8\], expected \[8, 64\]")


def test_layers_that_store_their_weight_transposed(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "gpt2")
    engine = Engine.load(str(model), taps=["resid_post.*"])
    layers = [name for name, module in load(model).named_modules() if name.endswith("c_attn")]
    written = {
        f"{PREFIX}{name}.lora_{part}.weight": torch.ones(shape) for name in layers for part, shape in (("A", (8, 64)), ("B", (192, 8)))
    }
    refused(engine, WrittenAdapter(model, {"target_modules": ["c_attn"]}, written).write(tmp_path / "adapter"), "the layer is a Conv1D")


@pytest.mark.parametrize("form", [{}, {"use_dora": True}], ids=["low rank", "merged"])
def test_a_layer_that_computes_something_else(
    engine: Engine, llama: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: dict
) -> None:
    monkeypatch.setattr(copying, "add_low_rank", lambda *_: None)
    monkeypatch.setattr(copying, "_replace", lambda *_: [])
    adapter = WrittenAdapter.random(llama.model, ["q_proj"], **form)
    refused(engine, adapter.write(tmp_path), "q_proj computes other outputs than its formula: relative error")


def test_a_model_that_cannot_be_copied_is_served_alone(
    llama: Served, adapter: WrittenAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "lock", threading.Lock(), raising=False)
    monkeypatch.setattr(loading, "shared_copy", lambda decoder: copy.deepcopy(decoder.model.lock))
    engine = llama.engine("early")
    engine.score(GROUPS)
    refused(engine, adapter.write(tmp_path), "path: beside this model no other reading is computed")


def test_other_files(engine: Engine, adapter: WrittenAdapter, tmp_path: Path) -> None:
    refused(engine, tmp_path / "nowhere", "'nowhere' is no directory")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("nothing")
    refused(engine, tmp_path / "notes", "has neither adapter_config.json .* nor config.json")
    pickled = adapter.write(tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused(engine, pickled, "adapter_model.bin: may be a pickle and is never opened")
    for number, content in enumerate(["[]", "{", "\x00"]):
        broken = adapter.write(tmp_path / f"broken{number}")
        (broken / "adapter_config.json").write_text(content)
        refused(engine, broken, "adapter_config.json: not (a )?JSON")
    directory = adapter.write(tmp_path / "directory")
    (directory / "adapter_model.safetensors").unlink()
    (directory / "adapter_model.safetensors").mkdir()
    refused(engine, directory, "a directory, not a regular file")


def test_a_header_that_lies(engine: Engine, adapter: WrittenAdapter, tmp_path: Path) -> None:
    weights = adapter.write(tmp_path / "a") / "adapter_model.safetensors"
    whole = weights.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")

    def rewrite(change: Callable[[dict], None]) -> None:
        altered = json.loads(json.dumps(header))
        change(altered)
        written = json.dumps(altered).encode()
        weights.write_bytes(struct.pack("<Q", len(written)) + written + whole[8 + length :])

    rewrite(lambda altered: altered[first].update(shape=[3, 5]))
    refused(engine, weights.parent, r"bytes are not F32 \[3, 5\]")
    rewrite(lambda altered: altered[first].update(data_offsets=[4, 8]))
    refused(engine, weights.parent, "does not begin where the last ended")
    rewrite(lambda altered: altered.update(nothing={"dtype": "F32"}))
    refused(engine, weights.parent, "not one of a safetensors file")
    weights.write_bytes(whole + b"more")
    refused(engine, weights.parent, "4 bytes beyond its last tensor")
    weights.write_bytes(b"\xff" * 64)
    refused(engine, weights.parent, "not a safetensors file")


def test_files_that_are_being_written_are_to_be_tried_again(engine: Engine, adapter: WrittenAdapter, tmp_path: Path) -> None:
    weights = adapter.write(tmp_path / "a") / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:size])
        refused(engine, weights.parent, "adapter_model.safetensors .*it is being written", ReadingIncomplete)
    weights.unlink()
    refused(engine, weights.parent, "adapter_model.safetensors is missing", ReadingIncomplete)
    weights.write_bytes(whole)
    (weights.parent / "adapter_config.json").unlink()
    refused(engine, weights.parent, "neither adapter_config.json nor config.json is there: .* being written", ReadingIncomplete)
    (tmp_path / "empty").mkdir()
    refused(engine, tmp_path / "empty", "being written", ReadingIncomplete)


def test_files_that_change_while_they_are_read(
    engine: Engine, adapter: WrittenAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from probescore_server.readings import version

    directory = adapter.write(tmp_path)

    def saved_again(*arguments: object) -> object:
        found = read(*arguments)
        adapter.changed(tensors=each(lambda _, tensor: 2 * tensor), lora_alpha=16).write(tmp_path)
        return found

    read = version.read_adapter
    monkeypatch.setattr(version, "read_adapter", saved_again)
    refused(engine, directory, "changed while it was read", ReadingIncomplete)


def test_another_tokenizer_beside_the_weights(engine: Engine, llama: Served, adapter: WrittenAdapter, tmp_path: Path) -> None:
    directory = adapter.write(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (directory / file).write_bytes((llama.model / file).read_bytes())
    engine.load_reading("policy", directory)
    (directory / "tokenizer.json").write_text((directory / "tokenizer.json").read_text().replace('"w40"', '"forty"'))
    refused(engine, directory, "tokenizer: found a tokenizer sha256:.*, expected sha256:.*, the frozen model's")


def test_names_and_steps(engine: Engine, adapter: WrittenAdapter, tmp_path: Path) -> None:
    directory = adapter.write(tmp_path)
    for name in ("frozen", "", "a b", "../x", "-x", "x" * 65, 7):
        with pytest.raises(InvalidRequest, match=r"^name: "):
            engine.load_reading(name, directory)  # type: ignore[arg-type]
    for step in (-1, 2.5, True, 1 << 63):
        with pytest.raises(InvalidRequest, match=r"^step: "):
            engine.load_reading("policy", directory, step=step)
    with pytest.raises(ReadingRefused, match=r"expected_id: the files are sha256:.*, and sha256:0 is expected"):
        engine.load_reading("policy", directory, expected_id="sha256:0")
    assert [reading.name for reading in engine.readings()] == ["frozen"]


def test_readings_that_nobody_has_loaded(engine: Engine, adapter: WrittenAdapter, tmp_path: Path) -> None:

    engine.load_reading("policy", adapter.write(tmp_path))
    for readings, problem in (
        (["polcy"], r"readings\[0\]: unknown reading 'polcy'; loaded: frozen, policy"),
        (["frozen", "policy", "frozen"], r"readings\[2\]: frozen appears twice"),
        ("policy", r"readings: 'policy' is not a list of names"),
    ):
        with pytest.raises(InvalidRequest, match=problem):
            engine.score(GROUPS, readings=readings)
    for name in ("frozen", "other"):
        with pytest.raises(InvalidRequest, match=r"name: "):
            engine.unload_reading(name)


def test_patterns_that_rewritten_names_no_longer_match(engine: Engine, adapter: WrittenAdapter, tmp_path: Path) -> None:
    pattern = {"alpha_pattern": {"base.layers.1.self_attn.q_proj": 4}}
    engine.load_reading(
        "policy", adapter.changed(**pattern).write(tmp_path / "as peft writes")
    )  # there the names are those that were trained
    bare = adapter.changed(**pattern).renamed(lambda name: name.removeprefix(f"{PREFIX}model."))
    before = engine.readings()
    with pytest.raises(ReadingRefused, match=r"alpha_pattern: 'base.layers.1.self_attn.q_proj' means no layer"):
        engine.load_reading("policy", bare.write(tmp_path / "rewritten"))
    assert engine.readings() == before


def test_a_large_file_of_settings_is_not_read(engine: Engine, adapter: WrittenAdapter, tmp_path: Path) -> None:
    directory = adapter.write(tmp_path)
    with (directory / "adapter_config.json").open("wb") as file:
        file.truncate(1 << 27)
    refused(engine, directory, "adapter_config.json: 134217728 bytes; at most 67108864 are read")


def test_a_head_that_was_trained_together_with_the_embedding(
    engine: Engine, llama: Served, adapter: WrittenAdapter, tmp_path: Path
) -> None:
    head = load(llama.model).get_output_embeddings().weight.detach()
    both = adapter.changed(
        tensors=lambda own: own | {f"{PREFIX}lm_head.weight": 2 * head}, modules_to_save=["lm_head"], ensure_weight_tying=True
    )
    refused(engine, both.write(tmp_path / "tied"), "lm_head.weight: adapter_config.json ties it to the embedding")
    engine.load_reading("policy", both.changed(ensure_weight_tying=False).write(tmp_path / "apart"))


def test_two_tensors_of_one_part(engine: Engine, adapter: WrittenAdapter, tmp_path: Path) -> None:
    directory = adapter.write(tmp_path)
    twice = adapter.tensors | {f"{QUERY}.lora_A.default.weight".replace("model.layers", "model.model.layers"): torch.ones(8, 64)}
    save_file(twice, directory / "adapter_model.safetensors")
    refused(engine, directory, "two tensors of this part of layers.1.self_attn.q_proj")
