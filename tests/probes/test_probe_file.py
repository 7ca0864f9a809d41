"""Probe files: what is written is what is read, and what a model must be for one to run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from crafted import FINGERPRINT, HIDDEN, LAYERS, TOKENIZER, craft, fields, linear_graph, written_manifest
from hypothesis import given
from hypothesis import strategies as st

from probescore.types import Hook, OutputPer, ScoreUnit, Tap
from probescore_server.errors import ProbeRefused
from probescore_server.probes.format.manifest import Golden, Manifest, TapInput, manifest_digest, manifest_schema
from probescore_server.probes.format.probe_file import UNSEALED, check_against_model, read_probe_file, write_probe_file

SCHEMA = jsonschema.Draft202012Validator(json.loads(manifest_schema()))
MODEL = {"fingerprint": FINGERPRINT, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "tokenizer_fingerprint": TOKENIZER}


def draft(**changes) -> Manifest:
    unsealed = {"graph_sha256": UNSEALED, "manifest_sha256": UNSEALED}
    return Manifest.model_validate_json(json.dumps(fields(**changes) | unsealed))


# ----------------------------------------------------------------------------------------------------------------------------- writing


def test_what_is_written_is_what_is_read(tmp_path):
    written = write_probe_file(tmp_path / "probe.onnx", linear_graph(), draft(description="Täuschung"))

    assert read_probe_file(tmp_path / "probe.onnx") == written
    assert written.manifest.description == "Täuschung"


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for name in ("one.onnx", "two.onnx"):
        write_probe_file(tmp_path / name, linear_graph(), draft())

    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_what_a_reader_would_refuse_is_not_written_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "probe.onnx"
    write_probe_file(path, linear_graph(), draft())
    before = path.read_bytes()

    with pytest.raises(ProbeRefused):
        write_probe_file(path, linear_graph(("final_norm",)), draft())

    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_exceeds_the_size_limit_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("probescore_server.probes.format.probe_file.MAX_FILE_BYTES", 100)

    with pytest.raises(ProbeRefused, match=r"file size: found .* expected at most 100"):
        write_probe_file(tmp_path / "probe.onnx", linear_graph(), draft())


def test_the_graph_of_the_caller_is_left_alone(tmp_path):
    graph = linear_graph()
    graph.metadata_props.add(key="mine", value="1")

    written = write_probe_file(tmp_path / "probe.onnx", graph, draft())

    assert [entry.key for entry in graph.metadata_props] == ["mine"]
    assert b"mine" not in written.graph


# --------------------------------------------------------------------------------------------------------------------------- the model


def test_the_model_of_the_manifest_has_no_mismatch(tmp_path):
    assert check_against_model(read_probe_file(craft(tmp_path / "probe.onnx")), **MODEL) == []


@pytest.mark.parametrize(
    ("change", "field", "expected"),
    [
        ({"fingerprint": "sha256:" + "c" * 64}, "model.fingerprint", "sha256:" + "c" * 64),
        ({"tokenizer_fingerprint": "sha256:" + "c" * 64}, "tokenizer_fingerprint", "sha256:" + "c" * 64),
        ({"tokenizer_fingerprint": ""}, "tokenizer_fingerprint", "a tokenizer, and the model has none"),
        ({"hidden_size": 16}, "model.hidden_size", "16"),
        ({"num_hidden_layers": 5}, "model.num_hidden_layers", "5"),
    ],
)
def test_another_model_is_a_mismatch_of_the_field(tmp_path, change, field, expected):
    probe = read_probe_file(craft(tmp_path / "probe.onnx"))

    (mismatch,) = check_against_model(probe, **(MODEL | change))

    assert (mismatch.file, mismatch.field, mismatch.expected) == (probe.file, field, expected)


def test_a_layer_beyond_the_models_blocks_is_a_mismatch_of_its_own(tmp_path):
    probe = read_probe_file(craft(tmp_path / "probe.onnx"))

    fields_at_fault = [mismatch.field for mismatch in check_against_model(probe, **(MODEL | {"num_hidden_layers": 1}))]

    assert fields_at_fault == ["model.num_hidden_layers", "inputs[0].layer"]


# ------------------------------------------------------------------------------------------------------------------------ the manifest

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
taps = st.builds(
    lambda hook, layer: {"hook": hook.value, "layer": layer if hook.has_layer else None},
    st.sampled_from(list(Hook)),
    st.integers(0, LAYERS - 1),
)


@st.composite
def manifests(draw) -> Manifest:
    labels = draw(st.lists(text, min_size=1, max_size=3, unique=True))
    kind = draw(st.sampled_from(["pointwise", "causal", "rollout"]))
    follow_up = draw(st.none() | st.fixed_dictionaries({"token_ids": st.lists(st.integers(0, 100), min_size=1, max_size=4), "text": text}))
    cases = []
    for completion in draw(st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=4), min_size=1, max_size=3)):
        rows = 1 if kind == "rollout" else len(follow_up["token_ids"] if follow_up else completion)
        row = st.lists(finite, min_size=len(labels), max_size=len(labels))
        scores = draw(st.lists(row, min_size=rows, max_size=rows))
        cases.append({"prompt_ids": draw(st.lists(st.integers(0, 100), max_size=3)), "completion_ids": completion, "scores": scores})
    return draft(
        description=draw(text),
        expects_bos=draw(st.none() | st.booleans()),
        inputs=draw(st.lists(taps, min_size=1, max_size=3, unique_by=str)),
        cu_seqlens=kind != "pointwise",
        positions=draw(st.booleans()),
        context={"kind": kind, "sees_prompt": kind != "pointwise" and draw(st.booleans())},
        output={"unit": "logit", "per": "rollout" if kind == "rollout" else "token", "labels": labels},
        reduce_on=draw(st.sampled_from(["logit", "probability"])),
        reduction=None if kind == "rollout" else draw(st.sampled_from(["mean", "topk_mean(4)", "ema_max(0.25)"])),
        follow_up=follow_up,
        golden={"cases": cases},
    )


@given(manifests())
def test_a_manifest_survives_its_json_with_its_digest(manifest):
    read = Manifest.model_validate_json(manifest.model_dump_json())

    assert read == manifest
    assert manifest_digest(read) == manifest_digest(manifest)


@given(manifests())
def test_every_manifest_fits_the_published_schema(manifest):
    SCHEMA.validate(json.loads(manifest.model_dump_json()))


@given(manifests(), text)
def test_the_digest_covers_what_a_person_may_edit(manifest, description):
    edited = manifest.model_copy(update={"description": description})

    assert (manifest_digest(edited) == manifest_digest(manifest)) == (description == manifest.description)


def test_the_digest_does_not_depend_on_how_the_json_is_written(tmp_path):
    content = written_manifest(craft(tmp_path / "probe.onnx"))
    rewritten = json.dumps(dict(reversed(content.items())), indent=3)

    assert manifest_digest(Manifest.model_validate_json(rewritten)) == content["manifest_sha256"]


def test_the_schema_in_docs_is_fresh():
    published = Path(__file__).parents[2] / "docs/reference/probe-manifest.schema.json"

    assert published.read_text(encoding="utf-8") == manifest_schema(), "write it again with make schema"


def test_the_scale_of_the_tolerance_is_over_all_golden_rows():
    golden = Golden.model_validate_json(
        '{"cases": [{"prompt_ids": [], "completion_ids": [1, 2], "scores": [[0.0, 1.0], [2.0, 1.0]]},'
        ' {"prompt_ids": [], "completion_ids": [1], "scores": [[4.0, 7.0]]}]}'
    )

    assert golden.score_rows.shape == (3, 2)
    assert np.allclose(golden.score_rows.std(axis=0), [math.sqrt(8 / 3), math.sqrt(8)])


@given(taps)
def test_a_tap_is_read_as_it_is_written(entry):
    tap = Tap(entry["hook"], entry["layer"])

    assert TapInput.parse(str(tap)).tap == tap


@pytest.mark.parametrize("written", ["resid_post", "final_norm.1", "resid_mid.2", "resid_post.-1", "resid_post.x", "resid_post.", ""])
def test_what_is_no_tap_is_not_read_as_one(written):
    with pytest.raises(ValueError, match=r"hook|tap"):
        TapInput.parse(written)


def test_what_a_manifest_says_can_be_asked():
    manifest = draft(inputs=[{"hook": "final_norm"}, {"hook": "attn_out", "layer": 2}])

    assert manifest.key == "cheating@1"
    assert manifest.taps == (Tap("final_norm"), Tap("attn_out", 2))
    assert (manifest.output.unit, manifest.output.per) == (ScoreUnit.LOGIT, OutputPer.TOKEN)
