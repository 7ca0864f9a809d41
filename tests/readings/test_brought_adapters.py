"""Probes that bring a LoRA adapter: they read the frozen model with it, and everything else stays as it is without them."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import re
import shutil
import weakref
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from parity_models import HIDDEN, LAYERS
from read_twice import BOUND, GOLDEN, GROUPS, ROLLOUTS, TAPS, Served, direction, plain_scores, token_scores
from safetensors.torch import load, save
from written_adapters import Tensors, WrittenAdapter

from probescore import Completion, RolloutGroup
from probescore.types import CompletionStatus
from probescore_probes.exporting import linear_probe
from probescore_probes.importing import AuthorScores, import_probe
from probescore_probes.reference import ReferenceModel
from probescore_probes.writing import write_probe
from probescore_server import Engine
from probescore_server.backbone.base import Backbone
from probescore_server.engine.probe_proving import ProbeProver
from probescore_server.errors import InvalidRequest, ProbeRefused
from probescore_server.files import adapter_path
from probescore_server.probes.format.manifest import AdapterReference
from probescore_server.probes.format.new_version import write_new_version
from probescore_server.probes.format.probe_file import adapter_digest, read_probe_file, write_probe_file
from probescore_server.probes.loading.loader import StackMember
from probescore_server.validation.options import resolve_options

Change = Callable[[Tensors], Tensors]

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1.*": 3}},
    "some blocks": {"layers_to_transform": [1, 2]},
    "rank 80": {"r": 80},
}


def write(folder: Path, model: Path, name: str, tap: str = "middle", adapter: WrittenAdapter | None = None, version: str = "1") -> Path:
    """A linear probe as of ``read_twice``, with or without an adapter of its own."""
    path = folder / f"{name}-{version}.onnx"
    brought = None if adapter is None else adapter.write(folder / f"{name}-{version}")
    probe, reference = linear_probe(direction(tap)), ReferenceModel.load(model)
    write_probe(path, probe, reference, name=name, version=version, taps=[TAPS[tap]], golden=GOLDEN, adapter=brought)
    return path


@pytest.mark.parametrize("path", ["universal", "packed"])
def test_scores_are_those_of_the_model_with_the_adapter(llama: Served, tmp_path: Path, path: str, monkeypatch) -> None:
    adapters = {kind: WrittenAdapter.random(llama.model, seed=seed, **KINDS[kind]) for seed, kind in enumerate(KINDS)}
    own = [write(tmp_path, llama.model, kind.replace(" ", "-"), "last", adapter) for kind, adapter in adapters.items()]
    engine = (llama.engine if path == "universal" else llama.packed_engine)("early", "last")
    alone = engine.score(GROUPS, token_scores="all")
    served, refusals = engine.prepare_probes([read_probe_file(each) for each in [llama.probe("early"), llama.probe("last"), *own]])
    assert not refusals
    engine.adopt_probes(served)
    result = engine.score(GROUPS, token_scores="all")
    for kind, adapter in adapters.items():
        expected = plain_scores(adapter.merged(), ["last"])["last"]
        found = token_scores(result, kind.replace(" ", "-"))
        assert np.abs(found - expected).max() <= BOUND * expected.std()
    for name in ("early", "last"):
        assert np.array_equal(token_scores(result, name), token_scores(alone, name))


@pytest.fixture(scope="module")
def adapter(llama: Served) -> WrittenAdapter:
    return WrittenAdapter.random(llama.model, ["q_proj", "v_proj"], seed=7)


@pytest.fixture(scope="module")
def files(llama: Served, adapter: WrittenAdapter, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two probes of one adapter, one of another, and one of an adapter that changes nothing where it reads."""
    folder = tmp_path_factory.mktemp("brought")
    other = WrittenAdapter.random(llama.model, seed=8)
    later = WrittenAdapter.random(llama.model, seed=9, layers_to_transform=[LAYERS - 1])
    return {
        "own": write(folder, llama.model, "own", "last", adapter),
        "same": write(folder, llama.model, "same", "middle", adapter),
        "other": write(folder, llama.model, "other", "middle", other),
        "unseen": write(folder, llama.model, "unseen", "early", later),
        "middle@2": write(folder, llama.model, "middle", "middle", adapter, version="2"),
    }


@pytest.fixture(scope="module")
def engine(llama: Served, files: dict[str, Path]) -> Engine:
    return Engine.load(str(llama.model), [*map(llama.probe, ("early", "middle", "last")), *files.values()])


def forwards(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The id of what runs, at each forward pass from now on; empty for the frozen model."""
    ran: list[str] = []

    def watch(backbone: Backbone, name: str) -> None:
        forward = backbone.forward
        monkeypatch.setattr(backbone, "forward", lambda *parts, **named: ran.append(name) or forward(*parts, **named))

    watch(engine._backbone, "")
    for version in {id(model): model.version for model in engine._served.adapted.values()}.values():
        watch(version.backbone, version.id)
    return ran


def test_probes_of_one_adapter_share_a_pass_and_plain_ones_pay_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = engine._served.adapted
    assert adapted["own@1"] is adapted["same@1"] is adapted["middle@2"]
    ran = forwards(engine, monkeypatch)
    engine.score(GROUPS, probes=["early", "middle@1"])
    assert ran == [""]
    ran.clear()
    engine.score(GROUPS, probes=["own", "same"])
    assert ran == [adapted["own@1"].version.id]
    ran.clear()
    engine.score(GROUPS, probes=["unseen", "early"])
    assert ran == [""]  # its adapter changes nothing where it reads
    ran.clear()
    engine.score(GROUPS)
    assert sorted(ran) == sorted(["", adapted["own@1"].version.id, adapted["other@1"].version.id])


def test_as_many_passes_are_counted_as_run(
    llama: Served, files: dict[str, Path], adapter: WrittenAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of two adapters that differ in a setting alone; one that changes nothing where it is read may cost less than is counted."""
    louder = write(tmp_path, llama.model, "louder", "last", adapter.changed(lora_alpha=16))
    paths = [*map(llama.probe, ("early", "middle")), *(files[name] for name in ("own", "same", "other", "unseen")), louder]
    engine = Engine.load(str(llama.model), paths)
    ran = forwards(engine, monkeypatch)
    keys = [probe.key for probe in engine.info.probes]
    for asked in (asked for count in (1, 2, 3, len(keys)) for asked in combinations(keys, count)):
        ran.clear()
        engine.score(GROUPS[:1], probes=asked)
        counted = resolve_options(engine.info, probes=asked).passes
        assert len(ran) <= counted if "unseen@1" in asked else len(ran) == counted, asked


def test_plain_probes_and_those_with_an_adapter_are_stacked_apart(engine: Engine) -> None:
    stacks = {key: probe.runs.stack for key, probe in engine._served.loaded.items() if isinstance(probe.runs, StackMember)}
    assert stacks["middle@2"] is stacks["same@1"]
    assert len({id(stacks[key]) for key in ("middle@1", "same@1", "other@1", "own@1", "last@1")}) == 5


def test_every_answer_is_that_of_the_probe_alone(engine: Engine, llama: Served, files: dict[str, Path]) -> None:
    """In any company, under the right name and in the request's order; plain ones to the last bit."""
    groups = [RolloutGroup(prompt, [Completion(ids, follow_ups=[Completion([7, 8]), Completion([9])]) for ids in completions])
              for prompt, completions in ROLLOUTS]  # fmt: skip
    together = engine.score(groups, probes=["same", "middle@1", "own", "middle@2", "early"], token_scores="all")
    assert [probe.key for probe in together.info.probes] == ["same@1", "middle@1", "own@1", "middle@2", "early@1"]
    for key in ("same", "middle@1", "own", "middle@2", "early"):
        alone = engine.score(groups, probes=[key], token_scores="all")
        for group, own in zip(together.groups, alone.groups, strict=True):
            for scored, single in zip(group, own, strict=True):
                assert list(scored.scores) == ["same", "middle@1", "own", "middle@2", "early"]
                for one, other in zip((scored, *scored.follow_ups), (single, *single.follow_ups), strict=True):
                    expected = other.scores[key.split("@")[0]]
                    assert one.status is CompletionStatus.OK
                    for found, wanted in ((one.scores[key].reduced, expected.reduced), (one.scores[key].tokens, expected.tokens)):
                        assert np.allclose(found, wanted, rtol=0, atol=1e-5)
    engine.free_memory()
    together = engine.score(groups, probes=["same", "middle@1", "own", "middle@2", "early"], token_scores="all")
    engine.free_memory()
    plain = engine.score(groups, probes=["middle@1", "early"], token_scores="all")
    assert np.array_equal(token_scores(together, "middle@1"), token_scores(plain, "middle"))
    assert np.array_equal(token_scores(together, "early"), token_scores(plain, "early"))
    assert not np.allclose(together.values("middle@1"), together.values("middle@2"))


def test_other_readings_are_read_with_plain_probes_alone(engine: Engine, llama: Served, tmp_path: Path) -> None:
    """Nothing is computed on top of the policy, and the frozen answers are those without it."""
    policy = WrittenAdapter.random(llama.model, seed=11).write(tmp_path / "policy")
    before = engine.score(GROUPS, token_scores="all")
    loaded = engine.load_reading("policy", policy)
    assert set(loaded.golden_drift) == {"early@1", "middle@1", "last@1"}
    plain = ["early", "last"]  # and not "middle", which is version 2, which brings an adapter
    result = engine.score(GROUPS, probes=plain, token_scores="all", readings=("frozen", "policy"))
    for old, new in zip((one for group in before.groups for one in group), (one for group in result.groups for one in group), strict=True):
        assert all(np.array_equal(new.scores[name].tokens, old.scores[name].tokens) for name in plain)
        assert [*new.on("policy").scores] == [*new.scores] == plain
    alone = engine.score(GROUPS, probes=["early"], token_scores="all", readings=("policy",))
    assert np.array_equal(token_scores(alone, "early", "policy"), token_scores(result, "early", "policy"))
    assert list(result.info.readings) == list(engine.readings())
    for probes in (["own"], ["early", "own"], ["middle"], []):
        with pytest.raises(
            InvalidRequest, match=rf"readings\[1\]: 'policy' is not read with {probes[-1] if probes else ''}.*brings an adapter of its own"
        ):
            engine.score(GROUPS, probes=probes, readings=("frozen", "policy"))
    engine.unload_reading("policy")


def test_memory_comes_and_goes_with_the_probes(llama: Served, files: dict[str, Path]) -> None:
    """Also of one that is refused, and without a garbage collection; what is served is not read again."""
    engine = llama.engine("early", min_layers=LAYERS)
    plain = [llama.probe("early")]

    def serve(paths: Sequence[Path]) -> list[str]:
        served, refusals = engine.prepare_probes([read_probe_file(path) for path in paths])
        engine.adopt_probes(served)
        return [str(refusal) for refusal in refusals]

    gc.collect()
    gc.disable()
    try:
        assert serve([*plain, files["own"]]) == []
        version = engine._served.adapted["own@1"].version
        held = [weakref.ref(tensor) for tensor in version.tensors]
        assert held
        assert {id(tensor) for tensor in version.tensors} <= {id(tensor) for tensor in engine._memory._tensors()}
        assert serve([*plain, files["own"], files["same"]]) == []
        assert engine._served.adapted["same@1"].version is version
        assert serve([*plain, files["same"]]) == []
        assert engine._served.adapted["same@1"].version is version
        engine.score(GROUPS)
        del version
        assert serve(plain) == []
        assert all(tensor() is None for tensor in held)
        assert [*engine._prover.adapted.tensors()] == []
        assert engine._cache._budget._caches == [engine._cache]
    finally:
        gc.enable()


def test_a_call_ends_with_the_adapters_that_it_began_with(llama: Served, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load(str(llama.model), [llama.probe("last"), files["own"]])
    expected = engine.score(GROUPS, probes=["own"]).values("own")
    monkeypatch.setattr("probescore_server.engine.engine.BATCH_TOKENS", 1)  # a batch for each completion
    score_batch, batches = engine._score, iter(range(100))

    def score(*parts: Any) -> Any:
        if next(batches) == 1:
            served, _ = ProbeProver.prepared(engine._prover, [read_probe_file(llama.probe("last"))], engine._served, (), math.inf)
            engine.adopt_probes(served)
        return score_batch(*parts)

    monkeypatch.setattr(engine, "_score", score)
    assert np.allclose(engine.score(GROUPS, probes=["own"]).values("own"), expected, atol=1e-6)
    assert [*engine._prover.adapted.tensors()] == []


# -------------------------------------------------------------------------------------------------------------------------- refusals


def resealed(source: Path, target: Path, *, settings: dict[str, object] | None = None, tensors: Change | None = None) -> Path:
    """A probe file with other settings or tensors of its adapter, sealed anew: as somebody who writes one by hand would."""
    file = read_probe_file(source)
    assert file.adapter is not None
    assert file.manifest.adapter is not None
    content = file.adapter if tensors is None else save(tensors(load(file.adapter)))
    own = {name: value for name, value in (file.manifest.adapter.settings | (settings or {})).items() if value is not None}
    manifest = file.manifest.model_copy(update={"adapter": AdapterReference(sha256=adapter_digest(content), settings=own)})
    write_probe_file(target, onnx.load_model_from_string(file.graph), manifest, adapter=content)
    return target


def copied(source: Path, folder: Path, name: str = "copy.onnx") -> Path:
    shutil.copy(source, folder / name)
    shutil.copy(adapter_path(source), adapter_path(folder / name))
    return folder / name


def tampered(path: Path) -> None:
    content = bytearray(adapter_path(path).read_bytes())
    content[-1] ^= 1
    adapter_path(path).write_bytes(content)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: adapter_path(path).unlink(), "adapter: found no file copy.adapter.safetensors, expected the adapter"),
    "tampered": (tampered, "adapter.sha256: found sha256:.*, the digest of copy.adapter.safetensors, expected sha256:.*"),
    "cut": (lambda path: os.truncate(adapter_path(path), 2000), "adapter.sha256: found"),
    "empty": (lambda path: adapter_path(path).write_bytes(b""), "adapter.sha256: found"),
    "a directory": (
        lambda path: (adapter_path(path).unlink(), adapter_path(path).mkdir()),
        "adapter: found in place of copy.adapter.safetensors a directory, expected a regular file",
    ),
    "a pipe": (
        lambda path: (adapter_path(path).unlink(), os.mkfifo(adapter_path(path))),
        "adapter: found in place of copy.adapter.safetensors a named pipe, expected a regular file",
    ),
}


@pytest.mark.parametrize("fault", FILES)
def test_another_file_than_the_probes_own_is_refused(files: dict[str, Path], tmp_path: Path, fault: str) -> None:
    path = copied(files["own"], tmp_path)
    spoil, problem = FILES[fault]
    spoil(path)
    with pytest.raises(ProbeRefused, match=f"{path}: {problem}"):
        read_probe_file(path)


def test_another_probes_adapter_and_one_beside_a_plain_probe_are_refused(files: dict[str, Path], llama: Served, tmp_path: Path) -> None:
    path = copied(files["own"], tmp_path)
    shutil.copy(adapter_path(files["other"]), adapter_path(path))
    with pytest.raises(ProbeRefused, match=r"adapter.sha256: found"):
        read_probe_file(path)
    shutil.copy(llama.probe("early"), path)
    with pytest.raises(ProbeRefused, match=r"adapter: found copy.adapter.safetensors beside a probe that brings no adapter"):
        read_probe_file(path)


CONTENT: dict[str, tuple[dict[str, Any], str]] = {
    "another rank": ({"settings": {"r": 6}}, r"copy.adapter.safetensors: .*lora_A: found shape \[8, 64\], expected \[6, 64\]"),
    "unconverted": ({"settings": {"init_lora_weights": "pissa"}}, "adapter.settings.init_lora_weights: found 'pissa'.*changed base"),
    "another kind": ({"settings": {"peft_type": "IA3"}}, "adapter.settings.peft_type: found 'IA3', expected 'LORA'"),
    "no kind": ({"settings": {"peft_type": None}}, "adapter.settings.peft_type: found None"),
    "a bias": ({"settings": {"bias": "all"}}, "adapter.settings.bias: found 'all'"),
    "unknown": ({"settings": {"use_future": True}}, "adapter.settings.use_future: found True"),
    "no alpha": ({"settings": {"lora_alpha": None}}, "adapter.settings.lora_alpha: found None"),
    "no tensors": ({"tensors": lambda _: {}}, "copy.adapter.safetensors: it has no tensors"),
    "half a pair": (
        {"tensors": lambda own: {name: each for name, each in own.items() if "layers.1.self_attn.q_proj.lora_B" not in name}},
        "copy.adapter.safetensors: .*lora_B is missing",
    ),
    "a layer that is not there": (
        {"tensors": lambda own: {name.replace("layers.3", "layers.9"): each for name, each in own.items()}},
        "copy.adapter.safetensors: .*layers.9.*the model has no such layer",
    ),
    "not finite": (
        {"tensors": lambda own: own | {name: each * float("nan") for name, each in list(own.items())[:1]}},
        "numbers that are not finite",
    ),
    "other numbers": ({"tensors": lambda own: {name: 1.01 * each for name, each in own.items()}}, "golden"),
    "another scale": ({"settings": {"lora_alpha": 9}}, "golden"),
    "another kind of scale": ({"settings": {"use_rslora": True}}, "golden"),
}


@pytest.mark.parametrize("fault", CONTENT)
def test_an_adapter_that_would_be_computed_otherwise_is_refused_when_it_is_loaded(
    engine: Engine, files: dict[str, Path], tmp_path: Path, fault: str
) -> None:
    changes, problem = CONTENT[fault]
    path = resealed(files["own"], tmp_path / "copy.onnx", **changes)
    file = read_probe_file(path)
    served, refusals = engine.prepare_probes([dataclasses.replace(file, manifest=file.manifest.model_copy(update={"version": "9"}))])
    (refusal,) = refusals
    assert refusal.file == str(path)
    assert refusal.field.startswith(("adapter", "golden"))
    assert re.search(problem, f"{refusal.field}: {refusal.found}", re.DOTALL), str(refusal)
    assert not served.adapted


def test_golden_scores_of_the_model_as_it_is_do_not_prove_a_probe_with_an_adapter(
    llama: Served, files: dict[str, Path], tmp_path: Path
) -> None:
    plain, own = read_probe_file(llama.probe("last")), read_probe_file(files["own"])
    manifest = plain.manifest.model_copy(update={"adapter": own.manifest.adapter})
    write_probe_file(tmp_path / "probe.onnx", onnx.load_model_from_string(plain.graph), manifest, adapter=own.adapter)
    with pytest.raises(ProbeRefused, match="golden"):
        Engine.load(str(llama.model), [tmp_path / "probe.onnx"])


# --------------------------------------------------------------------------------------------------------------------------- writing


def test_what_cannot_be_served_is_not_written(llama: Served, adapter: WrittenAdapter, tmp_path: Path) -> None:
    reference = ReferenceModel.load(llama.model)

    def refused(brought: object, problem: str, kind: type[Exception] = ValueError, model: ReferenceModel = reference) -> None:
        told = {"name": "own", "version": "1", "taps": ["resid_post.1"], "golden": GOLDEN}
        with pytest.raises(kind, match=problem):
            write_probe(tmp_path / "own.onnx", linear_probe(direction("last")), model, adapter=brought, **told)
        assert not [*tmp_path.glob("own*")]

    refused(3, "adapter: an int .*give the directory", TypeError)
    refused(tmp_path / "nowhere", "adapter: adapter_config.json is not there")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    refused(tmp_path, "adapter: adapter_model.bin may be a pickle")
    refused(adapter.changed(init_lora_weights="pissa").write(tmp_path / "pissa"), "init_lora_weights: found 'pissa'")
    refused(adapter.changed(r=6).write(tmp_path / "rank"), r"found shape \[8, 64\], expected \[6, 64\]")
    refused(adapter.changed(tensors=lambda _: {}).write(tmp_path / "empty"), "it has no tensors")
    refused(adapter.write(tmp_path / "whole"), "has one in its weights already", model=reference.adapted(tmp_path / "whole"))
    (adapter.write(tmp_path / "cut") / "adapter_model.safetensors").write_bytes(b"1234567890")
    refused(tmp_path / "cut", "adapter_model.safetensors is damaged")


def test_a_reference_with_an_adapter_writes_it_and_leaves_the_model_as_it_was(
    llama: Served, adapter: WrittenAdapter, files: dict[str, Path], tmp_path: Path
) -> None:
    reference = ReferenceModel.load(llama.model)
    ids = [*GOLDEN[0][0], *GOLDEN[0][1]]
    before = reference.activations(ids, ["final_norm"])
    adapted = reference.adapted(adapter.write(tmp_path / "adapter"))
    assert all(np.array_equal(rows, before[tap]) for tap, rows in reference.activations(ids, ["final_norm"]).items())
    told = {"name": "own", "version": "1", "taps": [TAPS["last"]], "golden": GOLDEN}
    written = write_probe(tmp_path / "own.onnx", linear_probe(direction("last")), adapted, **told)
    assert written.manifest == read_probe_file(files["own"]).manifest
    assert adapter_path(tmp_path / "own.onnx").read_bytes() == adapter_path(files["own"]).read_bytes()
    assert str(llama.model) not in written.manifest.model_dump_json()  # PEFT writes the path of the base


def test_a_file_without_an_adapter_takes_the_place_of_one_with(llama: Served, files: dict[str, Path], tmp_path: Path) -> None:
    path = copied(files["own"], tmp_path)
    write_new_version(path, read_probe_file(path), version="2")
    assert read_probe_file(path).adapter == adapter_path(files["own"]).read_bytes()
    write_new_version(path, read_probe_file(llama.probe("early")), version="2")
    assert read_probe_file(path).adapter is None
    assert not adapter_path(path).exists()


# ------------------------------------------------------------------------------------------------------------------------- importing


def obalcells(folder: Path, adapter: WrittenAdapter) -> Path:
    """A hallucination probe with its LoRA adapter, as obalcells/hallucination_probes saves it."""
    adapter.write(folder)
    head = {"weight": torch.from_numpy(direction("last"))[None], "bias": torch.tensor([0.25])}
    torch.save(head, folder / "probe_head.bin")
    config = {"target_layer_name": "LlamaDecoderLayer", "layer_idx": LAYERS - 1, "hidden_size": HIDDEN}
    (folder / "probe_config.json").write_text(json.dumps(config))
    return folder


def test_a_hallucination_probe_is_imported_with_its_adapter(llama: Served, adapter: WrittenAdapter, tmp_path: Path) -> None:
    reference = ReferenceModel.load(llama.model)
    told = {"name": "hallucination", "version": "1", "golden": GOLDEN}
    made = import_probe(obalcells(tmp_path / "theirs", adapter), reference, output=tmp_path / "made.onnx", **told)
    assert any("LoRA adapter that it brings" in note for note in made.notes)
    result = Engine.load(str(llama.model), [tmp_path / "made.onnx"]).score(GROUPS, token_scores="all")
    expected = 1 / (1 + np.exp(-(plain_scores(adapter.merged(), ["last"])["last"] + 0.25)))
    assert np.abs(token_scores(result, "hallucination") - expected).max() <= BOUND * expected.std()
    # the author's scores are compared with it, too
    prompt, completions = ROLLOUTS[0]
    of_first = [AuthorScores(prompt, completions[1], token_scores=expected[1:18])]
    agreed = import_probe(tmp_path / "theirs", reference, output=tmp_path / "agreed.onnx", author_scores=of_first, **told)
    assert agreed.agrees
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "theirs" / name).unlink()
        with pytest.raises(ValueError, match=f"adapter: {name} is not there|differ|author"):
            import_probe(tmp_path / "theirs", reference, output=tmp_path / "no.onnx", author_scores=of_first, **told)
        adapter.write(tmp_path / "theirs")
    assert not (tmp_path / "no.onnx").exists()
