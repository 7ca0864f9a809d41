"""Whatever number stands in a manifest: the file is refused by the number's field, or it checks as strictly as before."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from crafted import Fields, craft, fields
from onnx import TensorProto, helper, numpy_helper

from probescore.types import CompletionScores, CompletionStatus, ProbeScores
from probescore.wire.server_info import probes_to_proto
from probescore_server.errors import ProbeRefused
from probescore_server.probes.format.manifest import METADATA_KEY, Manifest, manifest_digest
from probescore_server.probes.format.probe_file import ProbeFile, graph_digest, read_probe_file
from probescore_server.probes.loading.compatibility import probe_info
from probescore_server.probes.loading.deviations import largest_deviation
from probescore_server.probes.loading.golden_check import check_golden

SEAL = "sha256:" + "0" * 64

Path_ = tuple[str | int, ...]

DIGITS = "1" + "0" * 5000
EXTREMES = (
    "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e308", "-1e308", "1e300", "1e39", "-1e39", "1e38", "-1e38", "3.5e38",
    "9223372036854775808", "9223372036854775807", "4294967296", "2147483648", "2147483647", "-1", "0", "-0.0", "5e-324", "1e-310", "1e-45",
    "0.5", "1.5", "1e0", DIGITS, "-" + DIGITS, DIGITS + ".0", '"1"', '"Infinity"', "true", "null", "[1]", "{}", "[" * 5000 + "]" * 5000,
    '"\\ud800"',
)  # fmt: skip


def everything() -> Fields:
    """A manifest that uses every field that holds a number."""
    calibration = {
        "threshold": 1.5,
        "false_positive_rate": 0.05,
        "false_positive_rate_low": 0.01,
        "false_positive_rate_high": 0.1,
        "negatives": 100,
        "dataset": "held out",
        "reduction": "mean",
        "conditions": {
            "groups": 50,
            "dtype": "bfloat16",
            "shortest_prompt": 0,
            "longest_prompt": 30,
            "shortest_completion": 5,
            "longest_completion": 9,
            "prompt_forms": ["chat"],
            "prompt_shapes": ["bos template"],
            "generation_prompt_ids": [7, 8],
        },
    }
    evaluation = {"metric": "AUROC", "value": 0.9, "low": 0.8, "high": 0.95, "dataset": "held out", "positives": 10, "negatives": 20}
    golden = {
        "cases": [
            {"prompt_ids": [1, 5], "completion_ids": [6, 7], "scores": [[0.5], [-1.25], [2.0]]},
            {"prompt_ids": [1], "completion_ids": [9], "scores": [[0.25], [3.0], [-2.0]]},
        ],
        "tolerance": {"float32": 1e-4, "bfloat16": 0.25, "float16": 0.05},
        "neighbours": [
            {
                "inputs": [{"hook": "resid_post", "layer": 1}],
                "tokens": 1,
                "differences": [[[0.5], [0.25], [-0.5]], [[1.0], [-1.0], [0.5]]],
            }
        ],
        "left_out": [{"inputs": [{"hook": "resid_post", "layer": 2}], "tokens": 0, "reason": "not_finite"}],
    }
    return fields(
        schema_version=1,
        context={"kind": "causal", "window": 4, "sees_prompt": True},
        cu_seqlens=True,
        follow_up={"token_ids": [7, 8, 9], "text": "honest?"},
        calibrations=[calibration],
        evaluations=[evaluation],
        exclude_special_tokens=True,
        special_token_ids=[0, 2],
        golden=golden,
    )


def numbers(content: object, path: Path_ = ()) -> Iterator[Path_]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from numbers(value, (*path, key))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from numbers(value, (*path, index))
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield path


def replaced(content: Any, path: Path_, value: object) -> Any:
    if not path:
        return value
    copy = list(content) if isinstance(content, list) else dict(content)
    copy[path[0]] = replaced(content[path[0]], path[1:], value)
    return copy


def named(path: Path_) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def in_schema(schema: dict[str, Any], definitions: dict[str, Any], path: Path_ = ()) -> Iterator[Path_]:
    """Where the published schema has numbers; an array's items have index 0."""
    if "$ref" in schema:
        yield from in_schema(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions, path)
    if schema.get("type") in ("number", "integer"):
        yield path
    for key, part in schema.get("properties", {}).items():
        yield from in_schema(part, definitions, (*path, key))
    if "items" in schema:
        yield from in_schema(schema["items"], definitions, (*path, 0))
    for part in schema.get("anyOf", []):
        yield from in_schema(part, definitions, path)


PLACES = sorted({tuple(0 if isinstance(part, int) else part for part in path) for path in numbers(everything())}, key=str)


def read_with(number: str, path: Path_, directory: Path) -> ProbeFile | ProbeRefused:
    """The file whose manifest has ``number``, as JSON, at ``path``: read, or refused."""
    model, file = causal_graph(), directory / "probe.onnx"
    digests = {"graph_sha256": graph_digest(model.SerializeToString(deterministic=True)), "manifest_sha256": SEAL}
    written = json.dumps(replaced(everything() | digests, path, "(here)")).replace('"(here)"', number)
    with contextlib.suppress(ValueError):  # an invalid manifest is refused before its digest is looked at
        written = written.replace(SEAL, manifest_digest(Manifest.model_validate_json(written)))
    model.metadata_props.add(key=METADATA_KEY, value=written)
    file.write_bytes(model.SerializeToString(deterministic=True))
    try:
        return read_probe_file(file)
    except ProbeRefused as refusal:
        return refusal


def causal_graph() -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["resid_post.1", "weight"], ["scores"], transB=1)],
        "probe",
        [
            helper.make_tensor_value_info("resid_post.1", TensorProto.FLOAT, ["n", 8]),
            helper.make_tensor_value_info("cu_seqlens", TensorProto.INT64, ["s"]),
        ],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(np.linspace(-1, 1, 8, dtype=np.float32).reshape(1, 8), "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def answers(manifest: Manifest, rows: np.ndarray) -> list[CompletionScores]:
    """What an engine would say of the golden rollouts, had it computed these rows."""
    scores, start = [], 0
    for case in manifest.golden.cases:
        tokens = rows[start : start + len(case.scores)].astype(np.float32)
        start += len(case.scores)
        answer = ProbeScores(np.empty((1, 0, 1), np.float32), tokens)
        scores.append(CompletionScores(id="", status=CompletionStatus.OK, scores={manifest.name: answer}))
    return scores


def test_the_manifest_of_these_tests_has_every_number_that_the_schema_has() -> None:
    schema = Manifest.model_json_schema()
    found = {path for path in in_schema(schema, schema["$defs"]) if path not in (("schema_version",),)}
    assert found == {path for path in PLACES if path != ("schema_version",)}


def test_it_is_valid_as_it_is(tmp_path: Path) -> None:
    assert isinstance(read_with("1.5", ("calibrations", 0, "threshold"), tmp_path), ProbeFile)


@pytest.mark.parametrize("path", PLACES, ids=named)
def test_an_extreme_number_is_refused_by_its_field_or_hides_no_wrong_score(path: Path_, tmp_path: Path) -> None:
    for number in EXTREMES:
        read = read_with(number, path, tmp_path)
        if isinstance(read, ProbeRefused):
            owners = ("manifest", named(path), *(named(path[:end]) for end in range(1, len(path))))
            if path[-1] in ("layer", "hidden_size"):
                owners += ("graph input",)  # another one, which the graph does not have
            assert read.field.startswith(owners), (number[:40], str(read)[:300])
            assert len(str(read)) < 1000
            continue
        probes_to_proto([probe_info(read.manifest, ())])  # whatever is served can be told
        for wrong in (np.array([[7.0], [-3.0], [0.1], [5.0], [-4.0], [1.0]]), np.zeros((6, 1)), np.full((6, 1), 3e38)):
            for dtype in ("float32", "bfloat16", "float16"):
                assert check_golden(read, answers(read.manifest, wrong), dtype) is not None, (number[:40], dtype)


@pytest.mark.parametrize("boolean", ["true", "false"])
@pytest.mark.parametrize("path", PLACES, ids=named)
def test_a_boolean_is_no_number(path: Path_, boolean: str, tmp_path: Path) -> None:
    read = read_with(boolean, path, tmp_path)
    assert isinstance(read, ProbeRefused)
    assert read.field == named(path)
    assert read.found == boolean


@pytest.mark.parametrize(
    "written", ["topk_mean(1e400)", "topk_mean(1e300)", "window_max_mean(9e18)", "fraction_above(1e39)", "softmax_mean(1e39)"]
)
def test_the_parameter_of_a_reduction_is_a_number_too(written: str, tmp_path: Path) -> None:
    with pytest.raises(ProbeRefused) as refused:
        read_probe_file(craft(tmp_path / "probe.onnx", None, fields(reduction=written)))
    assert refused.value.field == "reduction"


@pytest.mark.parametrize("huge", [1e38, -1e38, 3e38, 1e30])
def test_no_golden_scores_however_large_make_others_pass(huge: float, tmp_path: Path) -> None:
    """Alternating signs have the largest spread there is: then every difference is one standard deviation."""
    scores = [[huge], [-huge], [huge], [-huge]]
    written = fields(
        golden={
            "cases": [{"prompt_ids": [], "completion_ids": [1, 2, 3, 4], "scores": scores}],
            "tolerance": {"float32": 0.1, "bfloat16": 0.5, "float16": 0.5},
        }
    )
    probe = read_probe_file(craft(tmp_path / "probe.onnx", None, written))
    for dtype in ("float32", "bfloat16", "float16"):
        assert check_golden(probe, answers(probe.manifest, np.zeros((4, 1))), dtype) is not None


@pytest.mark.parametrize("scale", [np.inf, np.nan, 0.0, -1.0, 5e-324])
def test_a_scale_that_is_none_makes_no_comparison_true(scale: float) -> None:
    assert largest_deviation(np.array([[1.0]]), np.array([[2.0]]), np.array([scale])) == np.inf


@pytest.mark.parametrize("found", [np.inf, -np.inf, np.nan])
def test_scores_that_are_not_finite_deviate_without_bound(found: float) -> None:
    assert largest_deviation(np.array([[found], [1.0]]), np.array([[2.0], [1.0]]), np.array([1.0])) == np.inf
    assert largest_deviation(np.array([[2.0], [1.0]]), np.array([[found], [1.0]]), np.array([1.0])) == np.inf


@pytest.mark.parametrize("number", ["1e308", "3.5e38", "-1e39"])
@pytest.mark.parametrize(
    "path", [("golden", "cases", 0, "scores", 0, 0), ("calibrations", 0, "threshold"), ("evaluations", 0, "value")], ids=named
)
def test_what_float32_cannot_hold_is_refused(path: Path_, number: str, tmp_path: Path) -> None:
    read = read_with(number, path, tmp_path)
    assert isinstance(read, ProbeRefused)
    assert read.field == named(path)
