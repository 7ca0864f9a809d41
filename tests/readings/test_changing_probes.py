"""Probes are added and taken away while readings are loaded: readings are scored with, and described for, the probes that are served."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from parity_models import HIDDEN, LAYERS
from read_twice import BOUND, GOLDEN, GROUPS, ROLLOUTS, Array, Served, both, deviations, plain_scores, token_scores
from test_checkpoints import write_checkpoint
from transformers import PreTrainedModel
from written_adapters import WrittenAdapter

from probescore.types import Pool, ScoreResult
from probescore_probes.exporting import linear_probe
from probescore_probes.reference import ReferenceModel
from probescore_probes.writing import write_probe
from probescore_server import Engine
from probescore_server.errors import InvalidRequest
from probescore_server.probes.format.probe_file import read_probe_file
from probescore_server.rollouts import ResolvedOptions

PARTS = {"attention": ("attn_out.2", "self_attn"), "mlp": ("mlp_out.1", "mlp")}
"""Of probes that read a part of a block: their tap, and the part's name in a llama."""


def serve(engine: Engine, paths: Sequence[Path]) -> None:
    served, refusals = engine.prepare_probes([read_probe_file(path) for path in paths])
    assert not refusals
    engine.adopt_probes(served)


def weights(seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(HIDDEN) / HIDDEN**0.5


def write(folder: Path, llama: Served, name: str, tap: str, seed: int, version: str = "1") -> Path:
    path = folder / f"{name}-{version}.onnx"
    function, reference = linear_probe(weights(seed).astype(np.float32)), ReferenceModel.load(llama.model)
    write_probe(path, function, reference, name=name, version=version, taps=[tap], golden=GOLDEN)
    return path


@torch.no_grad()
def plain_scores_of_part(model: PreTrainedModel, tap: str, part: str, seed: int) -> Array:
    """What a probe of a part of a block says by plain Hugging Face."""
    seen: list[torch.Tensor] = []
    module = model.get_submodule(f"model.layers.{tap.rpartition('.')[2]}.{part}")
    hook = module.register_forward_hook(lambda _module, _args, output: seen.append(output if torch.is_tensor(output) else output[0]))
    scores = []
    for prompt, completions in ROLLOUTS:
        for completion in completions:
            model(torch.tensor([[*prompt, *completion]]), use_cache=False)
            scores.append(seen.pop()[0, -len(completion) :].double().numpy() @ weights(seed).astype(np.float32).astype(np.float64))
    hook.remove()
    return np.concatenate(scores)


@pytest.mark.parametrize("path", ["universal", "packed"])
def test_readings_are_scored_with_probes_that_came_later(llama: Served, tmp_path: Path, path: str) -> None:
    """At every hook, also where nobody has read before; readings from before the change and after it."""
    adapters = {name: WrittenAdapter.random(llama.model, seed=seed) for seed, name in enumerate(["before", "after"])}
    engine = (llama.engine if path == "universal" else llama.packed_engine)("early", min_layers=LAYERS)
    engine.load_reading("before", adapters["before"].write(tmp_path / "before"))
    both(engine, "before")
    later = [write(tmp_path, llama, name, tap, seed) for seed, (name, (tap, _)) in enumerate(PARTS.items())]
    serve(engine, [*map(llama.probe, ("middle", "last", "normed")), *later])
    engine.load_reading("after", adapters["after"].write(tmp_path / "after"))
    result = both(engine, "before", "after")
    for reading, adapter in adapters.items():
        merged = adapter.merged()
        expected = plain_scores(merged, ["middle", "last", "normed"])
        expected |= {name: plain_scores_of_part(merged, *PARTS[name], seed) for seed, name in enumerate(PARTS)}
        found = deviations(result, expected, reading)
        assert {name: far for name, far in found.items() if not far <= BOUND} == {}
    with pytest.raises(KeyError, match="no probe 'early' in this answer"):
        token_scores(result, "early", "before")


def test_what_a_reading_changes_is_said_of_the_probes_that_are_served(llama: Served, tmp_path: Path) -> None:
    engine = llama.engine("early", min_layers=LAYERS)
    adapter = WrittenAdapter.random(llama.model, layers_to_transform=[2]).write(tmp_path)
    tokens = engine.score(GROUPS).info.usage.tokens
    loaded = engine.load_reading("policy", adapter, step=7)
    assert (loaded.reading.golden_verified, loaded.reading.changed_layers, loaded.reading.unseen_tensors) == (True, (), 0)
    assert loaded.golden_drift == {"early@1": pytest.approx(0, abs=1e-3)}
    assert both(engine).info.usage.tokens == tokens

    serve(engine, [llama.probe("early"), llama.probe("last")])
    reading = engine.readings()[1]
    assert (reading.id, reading.step, reading.golden_verified, reading.changed_layers) == (loaded.reading.id, 7, False, (2,))
    for probes, passes in ((["early"], 1), (["last"], 2), ([], 2)):
        result = engine.score(GROUPS, probes=probes, readings=("frozen", "policy"))
        assert (result.info.usage.tokens, result.info.readings[1]) == (passes * tokens, reading)
    again = engine.load_reading("policy", adapter, step=7)
    assert (again.reading, again.replaced) == (reading, reading)
    assert set(again.golden_drift) == {"early@1", "last@1"}
    assert again.golden_drift["early@1"] < 1e-3 < again.golden_drift["last@1"]

    serve(engine, [llama.probe("early")])
    assert engine.readings()[1] == loaded.reading
    assert both(engine).info.usage.tokens == tokens
    serve(engine, [])
    assert engine.readings()[1] == loaded.reading
    assert engine.unload_reading("policy") == loaded.reading


def test_a_norm_that_no_probe_read_is_changed_for_one_that_comes(llama: Served, tmp_path: Path) -> None:
    engine = llama.engine("last")
    changed = write_checkpoint(tmp_path, llama.model, lambda _, tensor: tensor * 1.5, only="model.norm.")
    assert engine.load_reading("policy", changed).reading.golden_verified
    serve(engine, [llama.probe("last"), llama.probe("normed")])
    assert not engine.readings()[1].golden_verified
    result = both(engine)
    np.testing.assert_allclose(token_scores(result, "last", "policy"), token_scores(result, "last"), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(token_scores(result, "normed", "policy"), 1.5 * token_scores(result, "normed"), rtol=1e-4, atol=1e-5)


def test_a_call_ends_with_the_probes_that_it_began_with_on_every_reading(
    llama: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llama.engine("middle", "last")
    engine.load_reading("policy", WrittenAdapter.random(llama.model).write(tmp_path / "adapter"))
    before = both(engine)
    served, _ = engine.prepare_probes([read_probe_file(write(tmp_path, llama, "middle", "resid_post.1", 5, version="2"))])
    monkeypatch.setattr("probescore_server.engine.engine.BATCH_TOKENS", 1)  # a batch for each completion
    adopting = threading.Thread(target=engine.adopt_probes, args=[served])
    version = engine._readings.version(engine.readings()[1].id)
    forward = version.backbone.forward

    def adopt_after_this(*args, **keywords):
        if not adopting.ident:
            adopting.start()
            while not engine._running._waiting:
                pass
        return forward(*args, **keywords)

    monkeypatch.setattr(version.backbone, "forward", adopt_after_this)
    result = both(engine)
    adopting.join()
    assert [probe.key for probe in engine.info.probes] == ["middle@2"]
    assert result.info.probes == before.info.probes
    assert result.info.readings == before.info.readings
    for name in ("middle", "last"):
        for reading in ("frozen", "policy"):
            expected = token_scores(before, name, reading)
            np.testing.assert_allclose(token_scores(result, name, reading), expected, rtol=0, atol=BOUND * expected.std())
    after = both(engine)
    assert [(probe.name, probe.version) for probe in after.info.probes] == [("middle", "2")]
    assert np.abs(token_scores(after, "middle", "policy") - token_scores(before, "middle", "policy")).max() > 0.1


def test_answers_while_probes_and_readings_change_are_of_one_set_and_one_version(llama: Served, tmp_path: Path) -> None:
    sets = {version: [write(tmp_path, llama, "middle", "mlp_out.2", int(version), version)] for version in ("1", "2")}
    sets["2"].append(llama.probe("last"))
    adapters = [WrittenAdapter.random(llama.model, ["q_proj", "down_proj"], seed=seed).write(tmp_path / str(seed)) for seed in range(2)]
    engine = Engine.load(str(llama.model), sets["1"], min_layers=LAYERS)
    expected: dict[tuple[str, str], Array] = {}
    for version, files in sets.items():
        serve(engine, files)
        for adapter in adapters:
            reading = engine.load_reading("policy", adapter).reading
            result = both(engine)
            expected[version, reading.id] = token_scores(result, "middle", "policy")
            expected[version, "frozen"] = token_scores(result, "middle")
    results: list[ScoreResult] = []
    failures: list[BaseException] = []
    over = threading.Event()

    def score() -> None:
        while not over.is_set():
            try:
                results.append(both(engine))
            except BaseException as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=score) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(8):
        serve(engine, sets["12"[number % 2]])
        engine.load_reading("policy", adapters[number // 2 % 2], in_place=number == 5)
    over.set()
    for thread in threads:
        thread.join()
    assert not failures
    seen = {(result.info.probes[-1].version, result.info.readings[1].id) for result in results}
    assert len(seen) > 2
    for result in results:
        version = {probe.name: probe.version for probe in result.info.probes}["middle"]
        assert len(result.info.probes) == len(sets[version])
        for reading, known in (("frozen", "frozen"), ("policy", result.info.readings[1].id)):
            own = expected[version, known]
            np.testing.assert_allclose(token_scores(result, "middle", reading), own, rtol=0, atol=BOUND * own.std())
    assert len(engine._readings._held) == 1


def test_loading_again_what_runs_waits_its_turn(engine: Engine, llama: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # two passes of one decoder at a time would read one another's activations
    adapter = WrittenAdapter.random(llama.model, ["q_proj"]).write(tmp_path)
    version = engine._readings.version(engine.load_reading("policy", adapter).reading.id)
    forward, alone = version.backbone.forward, []
    monkeypatch.setattr(
        version.backbone, "forward", lambda *args, **keywords: alone.append(engine._running._held) or forward(*args, **keywords)
    )
    engine.load_reading("other", adapter)
    assert alone
    assert all(alone)


@pytest.mark.parametrize("form", [{}, {"use_dora": True}])
def test_memory_is_freed_though_probes_have_changed(llama: Served, tmp_path: Path, form: dict[str, object]) -> None:
    engine = llama.engine("early", min_layers=LAYERS)
    engine.load_reading("policy", WrittenAdapter.random(llama.model, **form).write(tmp_path / "adapter"))
    both(engine)
    serve(engine, [llama.probe("last"), *(write(tmp_path, llama, name, tap, 3) for name, (tap, _) in PARTS.items())])
    both(engine)
    own = [weakref.ref(tensor) for tensor in engine._readings.tensors()]
    probes = [weakref.ref(probe) for probe in engine._served.loaded.values()]
    serve(engine, [llama.probe("last")])
    gc.collect()
    assert sum(probe() is not None for probe in probes) == 1  # a reading that is loaded keeps no probe
    assert own
    assert all(tensor() is not None for tensor in own)
    both(engine)
    engine.unload_reading("policy")
    assert all(tensor() is None for tensor in own)  # without a garbage collection


def test_activations_are_read_of_one_reading_at_a_time(engine: Engine, llama: Served, tmp_path: Path) -> None:
    engine.load_reading("policy", WrittenAdapter.random(llama.model).write(tmp_path))
    reads = engine.resolve_reads("resid_post.2", Pool.MEAN)
    with engine._readings.pinned(["frozen", "policy"], ()) as pinned, pytest.raises(InvalidRequest) as refused:
        engine.check_rollouts(GROUPS, ResolvedOptions(probes=(), activations=reads, readings=pinned.wanted))
    assert refused.value.field == "readings"
    assert "activations are read of one at a time" in refused.value.problem
