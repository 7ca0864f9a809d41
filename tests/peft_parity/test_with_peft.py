"""Adapters that PEFT itself makes, trains and saves score as PEFT itself computes them; and ours are written as PEFT writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity_models import write_model
from peft import LoraConfig, PeftModel, get_peft_model
from read_twice import BOUND, GOLDEN, GROUPS, TAPS, deviations, direction, plain_scores, token_scores, write_probes
from written_adapters import CONFIG, WrittenAdapter, load

from probescore_probes.exporting import linear_probe
from probescore_probes.reference import ReferenceModel
from probescore_probes.writing import write_probe
from probescore_server import Engine
from probescore_server.errors import ReadingRefused

ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma3_text",
    "gemma2",
    "gpt_neox",
    "olmo2",
    "phi3",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
)

FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 4, "lora_alpha": 16},
    "patterns": {"rank_pattern": {r".*\.1\..*": 2}, "alpha_pattern": {r".*\.2\..*": 4}},
    "some layers": {"layers_to_transform": [1, 2]},
    "dora": {"use_dora": True},
    "whole modules": {"modules_to_save": ["norm", "input_layernorm", "embed_tokens", "embed_in", "final_layer_norm"]},
}


def trained(model: Path, **settings: Any) -> PeftModel:
    """A model of PEFT's whose adapter has been moved, as training does."""
    base = load(model)
    layers = sorted({name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)})
    left_out = {"lm_head", "embed_out"}
    if any(name.endswith(".experts") for name, _ in base.named_modules()):
        left_out |= {"gate_proj", "up_proj", "down_proj"}  # of these PEFT makes adapters of the experts' bare parameters
    targets = [name for name in layers if name not in left_out]
    settings = {"target_modules": targets, "task_type": "CAUSAL_LM"} | settings
    torch.manual_seed(0)  # some initialisations are random
    policy = get_peft_model(base, LoraConfig(**settings)).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                moved = 0.1 if "lora_B" in name else 0.02
                parameter.add_(moved * torch.randn(parameter.shape, generator=random))
    return policy


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Engine]:
    model = write_model(tmp_path_factory.mktemp(request.param), request.param)
    return model, Engine.load(str(model), write_probes(tmp_path_factory.mktemp("probes"), model))


@pytest.mark.parametrize("form", FORMS)
def test_scores_are_those_of_peft(served: tuple[Path, Engine], tmp_path: Path, form: str) -> None:
    model, engine = served
    policy = trained(model, **FORMS[form])
    policy.save_pretrained(tmp_path)
    alone = engine.score(GROUPS, token_scores="all")
    engine.load_reading("policy", tmp_path)
    result = engine.score(GROUPS, token_scores="all", readings=("frozen", "policy"))
    found = deviations(result, plain_scores(policy), "policy")
    print(form, {name: f"{far:.1e}" for name, far in found.items()})
    assert {name: far for name, far in found.items() if not far <= BOUND} == {}
    for name in TAPS:
        np.testing.assert_array_equal(token_scores(result, name), token_scores(alone, name))
        assert np.abs(token_scores(result, name, "policy") - token_scores(result, name)).max() > 0 or name == "early"


@pytest.mark.parametrize("form", FORMS)
def test_probes_that_bring_an_adapter_score_as_peft(served: tuple[Path, Engine], tmp_path: Path, form: str) -> None:
    """Written by formulas that are not the engine's, and proven with them when they are loaded."""
    model, _ = served
    policy = trained(model, **FORMS[form])
    policy.save_pretrained(tmp_path / "adapter")
    adapted = ReferenceModel.load(model).adapted(tmp_path / "adapter")
    told = {"version": "1", "taps": [TAPS["last"]], "golden": GOLDEN}
    write_probe(tmp_path / "own.onnx", linear_probe(direction("last")), adapted, name="own", **told)
    result = Engine.load(str(model), [tmp_path / "own.onnx"]).score(GROUPS, token_scores="all")
    expected = plain_scores(policy)["last"]
    far = float(np.abs(token_scores(result, "own") - expected).max() / expected.std())
    print(form, f"{far:.1e}")
    assert far <= BOUND


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def engine(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.load(str(llama), write_probes(tmp_path_factory.mktemp("probes"), llama))


def test_our_adapters_are_written_as_peft_writes_them(llama: Path, tmp_path: Path) -> None:
    for form, settings in FORMS.items():
        if "modules_to_save" in settings:
            continue
        directory = tmp_path / form
        trained(llama, **settings).save_pretrained(directory)
        written = (directory / "adapter_config.json").read_text()
        ours = WrittenAdapter.random(llama, **settings).changed(target_modules=json.loads(written)["target_modules"])
        ours.write(tmp_path / "ours")
        assert (tmp_path / "ours" / "adapter_config.json").read_text() == written
        names = [header(each / "adapter_model.safetensors") for each in (directory, tmp_path / "ours")]
        assert names[0] == names[1]
    assert set(json.loads(written)) == set(CONFIG)


def header(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def test_a_fresh_adapter_of_peft_reads_as_the_frozen_model(engine: Engine, llama: Path, tmp_path: Path) -> None:
    get_peft_model(load(llama), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    reading = engine.load_reading("policy", tmp_path).reading
    assert (reading.changed_layers, reading.golden_verified) == ((), True)
    result = engine.score(GROUPS, token_scores="all", readings=("frozen", "policy"))
    for name in TAPS:
        np.testing.assert_array_equal(token_scores(result, name, "policy"), token_scores(result, name))


@pytest.mark.parametrize("initialised", ["pissa", "pissa_niter_4", "olora"])
def test_what_trained_on_a_changed_base_is_read_converted_only(engine: Engine, llama: Path, tmp_path: Path, initialised: str) -> None:
    policy = trained(llama, init_lora_weights=initialised, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(0)
    first = get_peft_model(
        load(llama), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=initialised, task_type="CAUSAL_LM")
    )
    first.peft_config["default"].init_lora_weights = True
    first.save_pretrained(tmp_path / "first")
    policy.save_pretrained(tmp_path / "unconverted")
    with pytest.raises(ReadingRefused, match=f"init_lora_weights: found '{initialised}'"):
        engine.load_reading("policy", tmp_path / "unconverted")
    expected = plain_scores(policy)
    policy.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    engine.load_reading("policy", tmp_path / "converted")
    result = engine.score(GROUPS, token_scores="all", readings=("policy",))
    found = deviations(result, expected, "policy")
    assert {name: far for name, far in found.items() if not far <= 10 * BOUND} == {}  # the conversion is float32's


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "biases": ({"bias": "all"}, "bias: found 'all'"),
    "a bias beside B": ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias: found True"),
    "rows of the embedding": ({"trainable_token_indices": [3]}, "trainable_token_indices: found"),
    "an embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens.lora_embedding_A: an adapter of an embedding"),
    "bare parameters": ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, "target_parameters: found"),
    "repeated blocks": ({"layer_replication": [[0, 3], [2, 4]]}, "layer_replication: found"),
    "activated LoRA": ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens: found"),
}


@pytest.mark.parametrize(("settings", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_peft_can_and_we_cannot_is_refused(
    engine: Engine, llama: Path, tmp_path: Path, settings: dict[str, Any], problem: str
) -> None:
    trained(llama, **settings).save_pretrained(tmp_path)
    with pytest.raises(ReadingRefused, match=problem):
        engine.load_reading("policy", tmp_path)


def test_a_head_beside_the_layers_is_not_seen(engine: Engine, llama: Path, tmp_path: Path) -> None:
    policy = trained(llama, target_modules=["q_proj", "lm_head"])
    policy.save_pretrained(tmp_path)
    reading = engine.load_reading("policy", tmp_path).reading
    assert reading.unseen_tensors == 3  # PEFT adds the base's own
    found = deviations(engine.score(GROUPS, token_scores="all", readings=["policy"]), plain_scores(policy), "policy")
    assert {name: far for name, far in found.items() if not far <= BOUND} == {}
