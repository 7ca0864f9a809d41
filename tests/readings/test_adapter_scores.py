"""An adapter's reading scores as plain Hugging Face does with the adapter in its weights, the frozen one as if there were none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from parity_models import write_model
from read_twice import BOUND, GROUPS, TAPS, Served, both, deviations, plain_scores, token_scores, write_probes
from written_adapters import PREFIX, WrittenAdapter, load

from probescore import Completion, RolloutGroup
from probescore.types import CompletionStatus, ReadingKind
from probescore_server import Engine
from probescore_server.backbone.low_rank import add_low_rank

FORMS = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 4, "lora_alpha": 16},
    "patterns": {"rank_pattern": {r".*\.1\..*": 2, "down_proj": 3}, "alpha_pattern": {"layers.2.self_attn.*": 4, "down_proj": 32}},
    "some layers": {"layers_to_transform": [1, 2]},
    "high rank": {"r": 70},
    "dora": {"use_dora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2, "query_key_value": 2}},
}
OTHERS = (
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
    "gpt_oss",
)


@pytest.mark.parametrize("form", FORMS)
def test_scores_are_those_of_the_merged_model(engine: Engine, llama: Served, tmp_path: Path, form: str) -> None:
    adapter = WrittenAdapter.random(llama.model, **FORMS[form])
    alone = engine.score(GROUPS, token_scores="all")
    engine.load_reading("policy", adapter.write(tmp_path))
    result = both(engine)
    found = deviations(result, plain_scores(adapter.merged()), "policy")
    assert {name: far for name, far in found.items() if not far <= BOUND} == {}
    for name in TAPS:
        np.testing.assert_array_equal(token_scores(result, name), token_scores(alone, name))


@pytest.mark.sweep
@pytest.mark.parametrize("architecture", OTHERS)
def test_scores_are_those_of_the_merged_model_for_each_architecture(tmp_path: Path, architecture: str) -> None:
    model = write_model(tmp_path / "model", architecture)
    engine = Engine.load(str(model), write_probes(tmp_path, model))
    alone = engine.score(GROUPS, token_scores="all")
    further = {}
    for form, settings in FORMS.items():
        adapter = WrittenAdapter.random(model, size=0.1, **settings)
        engine.load_reading("policy", adapter.write(tmp_path / form.replace(" ", "-")))
        result = both(engine)
        found = deviations(result, plain_scores(adapter.merged()), "policy")
        further |= {(form, name): far for name, far in found.items() if not far <= BOUND}
        for name in TAPS:
            np.testing.assert_array_equal(token_scores(result, name), token_scores(alone, name))
    assert further == {}


def test_a_reading_says_what_it_is(engine: Engine, llama: Served, tmp_path: Path) -> None:
    adapter = WrittenAdapter.random(llama.model, ["v_proj"], layers_to_transform=[1, 3])
    loaded = engine.load_reading("policy", adapter.write(tmp_path), step=50)
    reading = loaded.reading
    assert (reading.name, reading.kind, reading.step, reading.changed_layers) == ("policy", ReadingKind.ADAPTER, 50, (1, 3))
    assert (reading.golden_verified, reading.unseen_tensors) == (False, 0)
    assert loaded.golden_drift["early@1"] < 1e-3 < loaded.golden_drift["middle@1"]
    assert 0 < loaded.device_bytes < 20_000
    frozen = engine.readings()[0]
    assert (frozen.name, frozen.id, frozen.golden_verified) == ("frozen", engine.info.model.fingerprint, True)
    assert engine.readings() == (frozen, reading)
    assert both(engine).info.readings == (frozen, reading)


def test_an_untrained_adapter_reads_bit_by_bit_as_the_frozen_model(engine: Engine, llama: Served, tmp_path: Path) -> None:
    trained = WrittenAdapter.random(llama.model)
    untrained = trained.changed(tensors=lambda own: {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in own.items()})
    reading = engine.load_reading("policy", untrained.write(tmp_path)).reading
    assert (reading.changed_layers, reading.golden_verified) == ((), True)
    result = both(engine)
    for name in TAPS:
        np.testing.assert_array_equal(token_scores(result, name, "policy"), token_scores(result, name))
    assert result.info.usage.tokens == engine.score(GROUPS).info.usage.tokens  # one pass has answered both


def test_what_no_probe_sees_costs_no_pass(llama: Served, tmp_path: Path) -> None:
    engine = llama.engine("early", "middle")
    deep = WrittenAdapter.random(llama.model, layers_to_transform=[3])
    reading = engine.load_reading("policy", deep.write(tmp_path / "deep")).reading
    assert (reading.changed_layers, reading.golden_verified, reading.unseen_tensors) == ((), True, len(deep.tensors))
    alone = engine.score(GROUPS).info.usage
    assert both(engine).info.usage.tokens == alone.tokens
    # a probe that reads before the first changed block is answered from the frozen pass, one behind it is not
    engine.load_reading("policy", WrittenAdapter.random(llama.model, layers_to_transform=[2]).write(tmp_path / "middle"))
    assert engine.score(GROUPS, probes=["early"], readings=("frozen", "policy")).info.usage.tokens == alone.tokens
    assert engine.score(GROUPS, probes=["middle"], readings=("frozen", "policy")).info.usage.tokens == 2 * alone.tokens


NAMES = {
    "the adapter's own name": lambda name: name.replace(".weight", ".default.weight").replace("vector", "vector.default"),
    "FSDP": lambda name: "_fsdp_wrapped_module." + name.replace("layers.", "layers._fsdp_wrapped_module.", 1),
    "a wrapper of several encoders": lambda name: name.replace("model.model.", "model.model.language_model."),
    "bare": lambda name: name.removeprefix(f"{PREFIX}model."),
    "without PEFT's prefix": lambda name: name.removeprefix(PREFIX),
}


def test_names_lead_to_the_same_layers(engine: Engine, llama: Served, tmp_path: Path) -> None:
    adapter = WrittenAdapter.random(llama.model, **FORMS["patterns"], use_dora=True)
    engine.load_reading("policy", adapter.write(tmp_path / "plain"))
    for written, rename in NAMES.items():
        engine.load_reading(written.replace(" ", "-").replace("'", ""), adapter.renamed(rename).write(tmp_path / written))
    result = both(engine, *(reading.name for reading in engine.readings()[1:]))
    assert len(result.info.readings) == 2 + len(NAMES)
    for reading in result.info.readings[2:]:
        for name in TAPS:
            np.testing.assert_array_equal(token_scores(result, name, "policy"), token_scores(result, name, reading.name))


def test_embeddings_and_norms_that_were_trained_whole_are_read(engine: Engine, llama: Served, tmp_path: Path) -> None:
    base = load(llama.model)
    whole = {
        name: base.get_parameter(name).detach() * 1.25
        for name in ("model.embed_tokens.weight", "model.layers.1.input_layernorm.weight", "model.norm.weight", "lm_head.weight")
    }
    adapter = WrittenAdapter.random(llama.model, ["o_proj"], modules_to_save=["embed_tokens", "input_layernorm", "norm", "lm_head"])
    adapter = adapter.changed(tensors=lambda own: own | {PREFIX + name: tensor for name, tensor in whole.items()})
    reading = engine.load_reading("policy", adapter.write(tmp_path)).reading
    assert (reading.changed_layers, reading.unseen_tensors) == ((0, 1, 2, 3), 1)
    found = deviations(both(engine), plain_scores(adapter.merged()), "policy")
    assert {name: far for name, far in found.items() if not far <= BOUND} == {}


def test_a_trained_embedding_alone_is_read(engine: Engine, llama: Served, tmp_path: Path) -> None:
    adapter = WrittenAdapter.random(llama.model, ["o_proj"])
    embedding = load(llama.model).get_input_embeddings().weight.detach() * 1.5
    alone = adapter.changed(
        tensors=lambda own: (
            {name: tensor * ("lora_B" not in name) for name, tensor in own.items()} | {f"{PREFIX}model.embed_tokens.weight": embedding}
        )
    )
    reading = engine.load_reading("policy", alone.write(tmp_path)).reading
    assert (reading.changed_layers, reading.golden_verified) == ((), False)
    found = deviations(both(engine), plain_scores(alone.merged()), "policy")
    assert {name: far for name, far in found.items() if not far <= BOUND} == {}


def test_a_trained_final_norm_moves_only_what_reads_it(engine: Engine, llama: Served, tmp_path: Path) -> None:
    adapter = WrittenAdapter.random(llama.model, ["o_proj"])
    norm = load(llama.model).get_parameter("model.norm.weight").detach() * 1.5
    alone = adapter.changed(
        tensors=lambda own: {name: tensor * ("lora_B" not in name) for name, tensor in own.items()} | {f"{PREFIX}model.norm.weight": norm}
    )
    engine.load_reading("policy", alone.write(tmp_path))
    found = deviations(both(engine), plain_scores(alone.merged()), "policy")
    assert {name: far for name, far in found.items() if not far <= BOUND} == {}
    tokens = engine.score(GROUPS).info.usage.tokens
    assert engine.score(GROUPS, probes=["last"], readings=("frozen", "policy")).info.usage.tokens == tokens
    assert engine.score(GROUPS, probes=["normed"], readings=("frozen", "policy")).info.usage.tokens == 2 * tokens


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_coarse_model_moves_as_the_policy_does(llama: Served, tmp_path: Path, dtype: str) -> None:
    adapter = WrittenAdapter.random(llama.model, size=0.3)
    coarse = llama.engine("middle", "last", dtype=dtype)
    coarse.load_reading("policy", adapter.write(tmp_path))
    result = both(coarse)
    exact = {"policy": plain_scores(adapter.merged()), "frozen": plain_scores(load(llama.model).double())}
    for name in ("middle", "last"):
        errors = {
            reading: np.sqrt(np.mean((token_scores(result, name, reading) - exact[reading][name]) ** 2)) / exact[reading][name].std()
            for reading in exact
        }
        assert errors["policy"] <= 2 * errors["frozen"] <= 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_update_of_a_coarse_layer_is_rounded_once(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(256, 256, bias=False, dtype=dtype).requires_grad_(False)
    rows = torch.randn((1, 512, 256), generator=random).to(dtype)
    down, up = (torch.randn(shape, generator=random).mul(0.02).to(dtype) for shape in ((8, 256), (256, 8)))
    exact = rows.double() @ (layer.weight.double() + up.double() @ down.double()).T
    rounded_twice = layer(rows) + rows @ down.T @ up.T
    add_low_rank(layer, down, up)
    assert (layer(rows).double() - exact).norm() < 0.85 * (rounded_twice.double() - exact).norm()


def test_only_the_policy_can_be_asked_for(engine: Engine, llama: Served, tmp_path: Path) -> None:
    engine.load_reading("policy", WrittenAdapter.random(llama.model).write(tmp_path))
    result = engine.score(GROUPS, readings=["policy"])
    scored = result.groups[0][0]
    assert (scored.status, dict(scored.scores)) == (CompletionStatus.OK, {})
    np.testing.assert_array_equal(result.values("last", reading="policy"), both(engine).values("last", reading="policy"))
    with pytest.raises(KeyError, match="no reading 'frozen' in this answer; it has 'policy'"):
        result.values("last")
    with pytest.raises(KeyError, match="no reading 'policy' in this answer; it has 'frozen'"):
        engine.score(GROUPS).values("last", reading="policy")


def test_a_request_without_readings_is_answered_as_before(engine: Engine, llama: Served, tmp_path: Path) -> None:
    before = engine.score(GROUPS, token_scores="all")
    engine.load_reading("policy", WrittenAdapter.random(llama.model).write(tmp_path))
    after = engine.score(GROUPS, token_scores="all")
    assert (after.info.readings, dict(after.groups[0][0].readings)) == ((), {})
    for name in TAPS:
        np.testing.assert_array_equal(token_scores(after, name), token_scores(before, name))


def test_follow_ups_are_read_too(engine: Engine, llama: Served, tmp_path: Path) -> None:
    engine.load_reading("policy", WrittenAdapter.random(llama.model).write(tmp_path))
    nested = RolloutGroup([1, 5, 9], [Completion([7, 8, 30], follow_ups=(Completion([40, 41], follow_ups=(Completion([50]),)),))])
    scored = engine.score([nested], readings=("frozen", "policy")).groups[0][0]
    straight = engine.score([RolloutGroup([1, 5, 9, 7, 8, 30, 40, 41], [[50]])], readings=("frozen", "policy")).groups[0][0]
    deepest = scored.follow_ups[0].follow_ups[0]
    for reading in ("frozen", "policy"):
        assert deepest.on(reading)["last"].value == pytest.approx(straight.on(reading)["last"].value, abs=1e-4)
    assert abs(deepest["last"].value - deepest.on("policy")["last"].value) > 1e-2
