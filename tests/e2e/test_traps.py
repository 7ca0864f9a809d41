"""What went wrong in the systems that we replace is refused here, or impossible: each test is named after the promise it keeps."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from parity_cases import SHIFTS, Author, Probe, Shift, in_deviations, reference_scores
from parity_models import BOS, LAYERS, write_model
from parity_probes import HEADS, LINEAR, POOLED, multi_head
from running_server import START_SECONDS, flags_of, launch
from safetensors.torch import load_file, save_file

from probescore import Completion, RolloutGroup
from probescore.types import CompletionStatus
from probescore_server import Engine
from probescore_server.errors import InvalidRequest, ModelRefused, ProbeRefused, StartupError
from probescore_server.probes.format.manifest import METADATA_KEY

PROBE = Probe(LINEAR, ("resid_post.1",))
PROMPT, ANSWER = [BOS, 17, 42, 9], [33, 90, 71, 78, 60, 12]


@pytest.fixture(scope="module")
def author(tmp_path_factory: pytest.TempPathFactory) -> Author:
    return Author(write_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture
def file(author: Author, tmp_path: Path) -> Path:
    return author.write(tmp_path, PROBE)


@pytest.fixture(scope="module")
def engine(author: Author, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    directory = tmp_path_factory.mktemp("probes")
    return Engine.load(str(author.model), [author.write(directory, PROBE), author.write(directory, Probe(POOLED, PROBE.taps))])


def refusal(model: Path, file: Path) -> ProbeRefused:
    """The refusal of a server that is started with ``file``: it says which file, which field, what it found and what it expected."""
    with pytest.raises(ProbeRefused) as caught:
        Engine.load(str(model), [file])
    refused = caught.value
    assert Path(refused.file).name == file.name
    assert all(part in str(refused) for part in (refused.file, refused.field, refused.found, refused.expected))
    return refused


def forge(file: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change a probe's graph and seal it again, as someone who means it would."""
    model = onnx.load_from_string(file.read_bytes())
    manifest = json.loads(model.metadata_props[0].value)
    del model.metadata_props[:]
    change(model)
    manifest["graph_sha256"] = "sha256:" + hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, json.dumps(manifest)
    file.write_bytes(model.SerializeToString(deterministic=True))


def edit_manifest(file: Path, **fields: Any) -> None:
    """Change a probe's manifest by hand, and nothing else."""
    model = onnx.load_from_string(file.read_bytes())
    entry = model.metadata_props[0]
    entry.value = json.dumps(json.loads(entry.value) | fields)
    file.write_bytes(model.SerializeToString(deterministic=True))


def copy_of(model: Path, directory: Path) -> Path:
    return Path(shutil.copytree(model, directory / "other", ignore=shutil.ignore_patterns("*.onnx")))


# ------------------------------------------------------------------------------------------------------------------ the index trap


@pytest.mark.parametrize(
    ("meant", "written"),
    [
        ("resid_post.1", "resid_post.2"),
        ("resid_post.2", "resid_post.1"),
        ("resid_post.1", "resid_pre.1"),
        (f"resid_post.{LAYERS - 1}", "final_norm"),
        ("final_norm", f"resid_post.{LAYERS - 1}"),
        ("attn_out.2", "attn_out.1"),
        ("attn_out.2", "mlp_out.2"),
    ],
)
def test_a_probe_that_names_another_tap_than_its_author_read_is_refused(author: Author, tmp_path: Path, meant: str, written: str) -> None:
    file = author.write(tmp_path, Probe(LINEAR, (written,)), meant=Probe(LINEAR, (meant,)))
    assert refusal(author.model, file).field.startswith("golden")


@pytest.mark.parametrize("shift", [shift for shift in SHIFTS.values() if not shift.layer], ids=str)
def test_a_probe_whose_author_read_other_positions_or_another_bos_is_refused(author: Author, tmp_path: Path, shift: Shift) -> None:
    assert refusal(author.model, author.write(tmp_path, PROBE, shift=shift)).field.startswith("golden")


def test_a_layer_that_the_model_does_not_have_is_refused(author: Author, tmp_path: Path) -> None:
    file = author.write(tmp_path, PROBE)
    edit_manifest(file, inputs=[{"hook": "resid_post", "layer": LAYERS}])
    assert refusal(author.model, file).field == "inputs"


# ------------------------------------------------------------------------------------------------ another model, another tokenizer


def test_another_revision_of_the_model_is_refused(author: Author, file: Path, tmp_path: Path) -> None:
    tuned = copy_of(author.model, tmp_path)
    weights = load_file(tuned / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] += 1e-3 * torch.randn(weights["model.layers.0.mlp.down_proj.weight"].shape)
    save_file(weights, tuned / "model.safetensors", {"format": "pt"})
    assert refusal(tuned, file).field == "model.fingerprint"


def test_another_tokenizer_is_refused(author: Author, file: Path, tmp_path: Path) -> None:
    other = copy_of(author.model, tmp_path)
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"w90"', '"renamed"'))
    assert refusal(other, file).field == "tokenizer_fingerprint"


def test_a_model_of_another_width_is_refused(file: Path, tmp_path: Path) -> None:
    narrow = write_model(tmp_path / "narrow", "llama", hidden_size=48)
    assert refusal(narrow, file).field == "model.hidden_size"


def test_an_accepted_mismatch_is_told_in_every_answer(author: Author, file: Path, tmp_path: Path) -> None:
    other = copy_of(author.model, tmp_path)
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"w90"', '"renamed"'))
    lenient = Engine.load(str(other), [file], accept_mismatch=[PROBE.name])
    scored = lenient.score([RolloutGroup(PROMPT, [ANSWER])]).info.probes[0]
    assert scored.accepted_mismatches == ("tokenizer_fingerprint",)


# --------------------------------------------------------------------------------------------------------- what a file must not be


def test_a_truncated_file_is_refused(author: Author, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])
    refusal(author.model, file)


def test_a_pickle_called_onnx_is_never_opened(author: Author, tmp_path: Path) -> None:
    opened = tmp_path / "opened"
    file = tmp_path / "probe.onnx"

    class Trap:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
            return Path.touch, (opened,)

    file.write_bytes(pickle.dumps(Trap()))
    assert "pickle" in refusal(author.model, file).found
    torch.save(Trap(), file)
    assert "torch" in refusal(author.model, file).found
    assert not opened.exists()


def test_weights_outside_the_file_are_refused(author: Author, file: Path) -> None:
    def move_out(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        onnx.external_data_helper.set_external_data(tensor, "weights.bin")
        (file.parent / "weights.bin").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL

    forge(file, move_out)
    assert "external data" in refusal(author.model, file).found


def test_an_operator_of_our_own_is_refused(author: Author, file: Path) -> None:
    def customise(model: onnx.ModelProto) -> None:
        model.graph.node[0].domain = "com.example"
        model.opset_import.add(domain="com.example", version=1)

    forge(file, customise)
    assert "com.example" in refusal(author.model, file).found


def test_a_nan_among_the_weights_is_refused(author: Author, file: Path) -> None:
    def spoil(model: onnx.ModelProto) -> None:
        weights = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
        weights[0] = np.nan
        model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, model.graph.initializer[0].name))

    forge(file, spoil)
    refused = refusal(author.model, file)
    assert "graph weight" in refused.field
    assert "NaN" in refused.found


def test_weights_in_a_pickle_are_never_opened(author: Author, file: Path, tmp_path: Path) -> None:
    old = copy_of(author.model, tmp_path)
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    with pytest.raises(ModelRefused, match=r"pytorch_model\.bin"):
        Engine.load(str(old), [file])


def test_code_that_comes_with_a_model_is_not_run_unless_allowed(author: Author, file: Path, tmp_path: Path) -> None:
    model, ran = copy_of(author.model, tmp_path), tmp_path / "ran"
    (model / "configuration_own.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelRefused):
        Engine.load(str(model), [file])
    assert not ran.exists()


# ------------------------------------------------------------------------------------- files that load and would give wrong scores


def test_other_weights_than_those_of_the_golden_vectors_are_refused(author: Author, file: Path) -> None:
    def nudge(model: onnx.ModelProto) -> None:
        weights = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
        weights[3] += 0.01
        model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, model.graph.initializer[0].name))

    forge(file, nudge)
    assert refusal(author.model, file).field.startswith("golden")


def test_attention_with_a_wrong_number_of_heads_is_refused_although_it_loads(author: Author, tmp_path: Path) -> None:
    right, wrong = multi_head(HEADS), multi_head(HEADS // 2)
    Engine.load(str(author.model), [author.write(tmp_path, Probe(right, PROBE.taps))])
    assert {name: w.shape for name, w in right.weights.items()} == {name: w.shape for name, w in wrong.weights.items()}
    file = author.write(tmp_path, Probe(wrong, PROBE.taps), meant=Probe(right, PROBE.taps))
    assert refusal(author.model, file).field.startswith("golden")


def test_an_edited_manifest_is_refused(author: Author, file: Path) -> None:
    edit_manifest(file, reduction="max")
    assert refusal(author.model, file).field == "manifest_sha256"


def test_two_probes_of_one_name_and_version_are_refused(author: Author, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(StartupError, match=f"{PROBE.name}@1"):
        Engine.load(str(author.model), [file, author.write(other, PROBE, description="another")])


# ---------------------------------------------------------------------------------------------------------- through `probescore serve`


@pytest.mark.parametrize("trap", ["other weights", "other scores"])
def test_a_server_does_not_start_with_a_probe_that_it_refuses(author: Author, tmp_path: Path, trap: str) -> None:
    if trap == "other weights":
        model, field = write_model(tmp_path / "model", "llama", seed=1), "model.fingerprint"
        file = author.write(tmp_path, PROBE)
    else:
        model, field = author.model, "golden"
        file = author.write(tmp_path, PROBE, shift=Shift(layer=1))
    server = launch(
        ["--model", str(model), *flags_of({"probes": file, "port": 0, "metrics_port": 0, "devices": "cpu", "log_format": "json"})]
    )
    assert server.process.wait(START_SECONDS) == 1
    said = server.events()[-1]["event"]
    assert file.name in said
    assert f"{field}: found " in said
    assert "expected " in said
    assert "serving" not in [event["event"] for event in server.events()]


# ------------------------------------------------------------------------------------------------------- what travels with a probe


def test_layers_reduction_and_token_filter_travel_with_the_probe(author: Author, tmp_path: Path) -> None:
    file = author.write(tmp_path, PROBE, reduction="topk_mean(2)", exclude_special_tokens=True)
    engine = Engine.load(str(author.model), [file])
    (info,) = engine.info.probes
    assert [str(tap) for tap in info.taps] == ["resid_post.1"]
    answer = [33, 2, 90, BOS, 71]  # EOS and BOS are special
    scored = engine.score([RolloutGroup(PROMPT, [answer])], token_scores="all")
    (scores,) = (completion[PROBE.name] for completion in scored.groups[0])
    kept = np.sort(np.asarray(scores.tokens)[[0, 2, 4], 0])
    assert scores.value == pytest.approx(kept[-2:].mean(), rel=1e-5)
    assert [str(reduction) for reduction in scored.info.probes[0].reductions] == ["topk_mean(2)"]


# ------------------------------------------------------------------------------------------------------------- scores as promised


def test_ids_that_decode_and_encode_to_others_are_scored_as_they_came(author: Author, engine: Engine) -> None:
    sampled = [4, 5, 33]  # "a", "b", where the tokenizer would say "ab"
    assert list(engine.encode_completion("".join(engine.decode_tokens(sampled[:2])))) == [6]
    (completion,) = engine.score([RolloutGroup(PROMPT, [sampled])], token_scores="all", return_token_ids=True).groups[0]
    assert np.array_equal(np.asarray(completion.completion_ids), sampled)
    assert np.array_equal(np.asarray(completion.prompt_ids), PROMPT)
    assert in_deviations(np.asarray(completion[PROBE.name].tokens), reference_scores(author.reference, PROBE, PROMPT, sampled)) <= 1e-4


@pytest.mark.parametrize("probe", [PROBE.name, Probe(POOLED, PROBE.taps).name])
@pytest.mark.parametrize("completion", [Completion([]), Completion(ANSWER, mask=[0] * len(ANSWER))], ids=["no tokens", "all masked"])
def test_what_was_not_selected_is_absent_and_never_zero(engine: Engine, probe: str, completion: Completion) -> None:
    result = engine.score([RolloutGroup(PROMPT, [completion, ANSWER])])
    absent, present = result.groups[0]
    assert absent[probe].value is None
    assert np.isnan(absent[probe].reduced).all()
    assert np.isfinite(present[probe].reduced).all()
    assert list(np.isnan(result.values(probe))) == [True, False]


def test_a_mask_of_another_length_is_refused_rather_than_aligned(engine: Engine) -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine.score([RolloutGroup(PROMPT, [ANSWER, Completion(ANSWER, mask=[1] * (len(ANSWER) - 1))])])
    assert caught.value.field == "groups[0].completions[1].mask"


@pytest.mark.parametrize(("expects_bos", "golden_prompt", "prompt"), [(True, PROMPT, PROMPT[1:]), (False, PROMPT[1:], PROMPT)])
def test_a_prompt_without_the_bos_that_the_probe_expects_is_refused(
    author: Author, tmp_path: Path, expects_bos: bool, golden_prompt: list[int], prompt: list[int]
) -> None:
    golden = author.golden(PROBE, [(golden_prompt, ANSWER)])
    engine = Engine.load(str(author.model), [author.write(tmp_path, PROBE, expects_bos=expects_bos, golden=golden)])
    with pytest.raises(InvalidRequest) as caught:
        engine.score([RolloutGroup(golden_prompt, [ANSWER]), RolloutGroup(prompt, [ANSWER])])
    assert caught.value.field == "groups[1].prompt"


def test_a_nan_marks_its_completion_and_no_other(author: Author, tmp_path: Path) -> None:
    poison = 99
    broken = copy_of(author.model, tmp_path)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][poison] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    engine = Engine.load(str(broken), [Author(broken).write(tmp_path, PROBE)])
    result = engine.score([RolloutGroup(PROMPT, [ANSWER, [*ANSWER[:2], poison, *ANSWER[2:]], ANSWER[:3]])])
    assert [completion.status for completion in result.groups[0]] == [
        CompletionStatus.OK,
        CompletionStatus.NON_FINITE,
        CompletionStatus.OK,
    ]
    assert list(np.isnan(result.values(PROBE.name))) == [False, True, False]
    with pytest.raises(KeyError):
        result.groups[0][1][PROBE.name]
