"""What a server never loads: each file is wrong in one place, and the refusal names that place, what is there and what should be."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from crafted import FINGERPRINT, HIDDEN, TOKENIZER, changed, craft, fields, linear_graph, written_manifest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from probescore_server.errors import ProbeRefused
from probescore_server.probes.format.manifest import METADATA_KEY
from probescore_server.probes.format.probe_file import parse_probe_file, read_probe_file


def refusal(path) -> ProbeRefused:
    with pytest.raises(ProbeRefused) as caught:
        read_probe_file(path)
    assert caught.value.file == str(path)
    return caught.value


def test_a_file_that_is_right_is_read(tmp_path):
    probe = read_probe_file(craft(tmp_path / "right.onnx"))

    assert probe.manifest.key == "cheating@1"
    assert not onnx.load_from_string(probe.graph).metadata_props


# ---------------------------------------------------------------------------------------------------------------- not a file of ours


def test_a_missing_file_is_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "absent.onnx").found


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.onnx").write_bytes(b"")
    assert refusal(tmp_path / "empty.onnx").found == "an empty file"


def test_a_file_over_the_size_limit_is_refused_before_it_is_read(tmp_path):
    path = craft(tmp_path / "large.onnx")
    size = path.stat().st_size

    assert read_probe_file(path, max_bytes=size)
    with pytest.raises(ProbeRefused, match=f"file size: found {size} bytes, expected at most {size - 1}"):
        read_probe_file(path, max_bytes=size - 1)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_renamed_to_onnx_is_called_a_pickle_and_not_opened(tmp_path, protocol):
    path = tmp_path / "renamed.onnx"
    path.write_bytes(pickle.dumps({"weight": [1.0]}, protocol=protocol))

    assert "pickle" in refusal(path).found


def test_a_torch_file_renamed_to_onnx_is_called_what_it_is(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "renamed.onnx")

    assert "torch.save" in refusal(tmp_path / "renamed.onnx").found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, data):
    whole = craft(tmp_path / "whole.onnx").read_bytes()
    length = data.draw(st.integers(0, len(whole) - 1))

    with pytest.raises(ProbeRefused):
        parse_probe_file(whole[:length], "truncated.onnx")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(data=st.data())
def test_a_flipped_byte_is_refused_or_changes_nothing(tmp_path, data):
    whole = craft(tmp_path / "whole.onnx").read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[position] ^= data.draw(st.integers(1, 255))

    try:
        probe = parse_probe_file(bytes(flipped), "flipped.onnx")
    except ProbeRefused:
        return
    assert probe == parse_probe_file(whole, "flipped.onnx")


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_refusal(noise):
    with pytest.raises(ProbeRefused):
        parse_probe_file(noise, "noise.onnx")


# -------------------------------------------------------------------------------------------------------------------------- the graph


def _set(model: onnx.ModelProto, **values: int) -> None:
    for name, value in values.items():
        setattr(model, name, value)


def _set_operator(model: onnx.ModelProto, operator: str) -> None:
    model.graph.node[0].op_type = operator


def _external(model: onnx.ModelProto) -> None:
    weight = model.graph.initializer[0]
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weights.bin")
    weight.ClearField("raw_data")


def _custom_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "com.example"


def _custom_operator_in_a_branch(model: onnx.ModelProto) -> None:
    output = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    inside = helper.make_graph([helper.make_node("Evil", ["resid_post.1"], ["x"], domain="com.example")], "branch", [], output)
    model.graph.node[0].CopyFrom(helper.make_node("If", ["always"], ["x"], then_branch=inside, else_branch=inside))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))


def _local_function(model: onnx.ModelProto) -> None:
    body = [helper.make_node("Relu", ["a"], ["b"])]
    model.functions.append(helper.make_function("local", "Relu2", ["a"], ["b"], body, [helper.make_opsetid("", 18)]))


def _random(model: onnx.ModelProto) -> None:
    model.graph.node[0].CopyFrom(helper.make_node("RandomNormalLike", ["resid_post.1"], ["x"]))


def _random_in_a_loop(model: onnx.ModelProto) -> None:
    body = helper.make_graph(
        [helper.make_node("RandomNormalLike", ["so_far"], ["next"]), helper.make_node("Identity", ["go"], ["go_on"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("so_far", TensorProto.FLOAT, None),
        ],
        [helper.make_tensor_value_info("go_on", TensorProto.BOOL, []), helper.make_tensor_value_info("next", TensorProto.FLOAT, None)],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(2), "times"))
    model.graph.node[0].CopyFrom(helper.make_node("Loop", ["times", "", "resid_post.1"], ["x"], body=body))


def _dropout(*inputs: str, given: bool | None = None, computed: bool = False) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        nodes = [helper.make_node("Dropout", ["resid_post.1", *inputs], ["x"]), model.graph.node[1]]
        if given is not None:
            model.graph.initializer.append(numpy_helper.from_array(np.array(given), "training"))
        if computed:
            nodes.insert(0, helper.make_node("ReduceMax", ["resid_post.1"], ["largest"], keepdims=0))
            nodes.insert(1, helper.make_node("Cast", ["largest"], ["training"], to=TensorProto.BOOL))
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        model.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "ratio"))

    return change


def _normalised(*outputs: str, version: int = 18, **attributes: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = version
        names = ["resid_post.1", *["ones"] * 4]
        model.graph.node[0].CopyFrom(helper.make_node("BatchNormalization", names, ["x", *outputs], **attributes))
        model.graph.initializer.append(numpy_helper.from_array(np.ones(HIDDEN, np.float32), "ones"))

    return change


def _weights(value: float) -> np.ndarray:
    weight = np.ones((1, HIDDEN), np.float32)
    weight[0, 3] = value
    return weight


def _nan_in_a_constant_node(model: onnx.ModelProto) -> None:
    nodes = [helper.make_node("Constant", [], ["bias"], value_floats=[float("nan")])]
    nodes += [model.graph.node[0], helper.make_node("Gemm", ["x", "weight", "bias"], ["scores"], transB=1)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _undefined_name(model: onnx.ModelProto) -> None:
    model.graph.node[1].input[0] = "y"


def _nan_in_a_sparse_constant(model: onnx.ModelProto) -> None:
    values = numpy_helper.from_array(np.array([np.nan], np.float32), "sparse")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([[0, 0]]), "where"), [1, HIDDEN])
    model.graph.node.insert(0, helper.make_node("Constant", [], ["low"], sparse_value=sparse))
    model.graph.node[1].input.append("low")


def _nan_in_the_weight_of_a_branch(model: onnx.ModelProto) -> None:
    output = [helper.make_tensor_value_info("b", TensorProto.FLOAT, [1, HIDDEN])]
    weight = numpy_helper.from_array(np.full((1, HIDDEN), np.nan, np.float32), "inner")
    inside = helper.make_graph([helper.make_node("Identity", ["inner"], ["b"])], "branch", [], output, [weight])
    model.graph.node.insert(0, helper.make_node("If", ["always"], ["branch"], then_branch=inside, else_branch=inside))
    model.graph.node[1].input.append("branch")
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))


def _nan_in_half_precision(model: onnx.ModelProto) -> None:
    half = helper.make_tensor("half", TensorProto.BFLOAT16, [1, HIDDEN], np.full(HIDDEN, np.nan, np.float32))
    model.graph.initializer.append(half)
    model.graph.node.insert(0, helper.make_node("Cast", ["half"], ["low"], to=TensorProto.FLOAT))
    model.graph.node[1].input.append("low")


def _float64(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    weight = numpy_helper.to_array(model.graph.initializer[0])
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight.astype(np.float64), "weight"))


def _extra_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", HIDDEN]))


def _fixed_tokens(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 5


def _unknown_width(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "width"


def _rank_three(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim.add(dim_value=1)


def _without_shape(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.ClearField("shape")


def _a_sequence(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_sequence_value_info("more", TensorProto.FLOAT, None))


def _optional_input(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, HIDDEN), np.float32), "resid_post.1"))


def _unknown_dtype(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.elem_type = 99


GRAPHS: dict[str, tuple[Callable[[onnx.ModelProto], object], str, str]] = {
    "no operators": (lambda m: m.graph.ClearField("node"), "graph", "no operators"),
    "external data": (_external, "graph", "external data for tensor 'weight'"),
    "custom operator": (_custom_operator, "graph", "operator 'Sum' of domain 'com.example'"),
    "custom operator in a branch": (_custom_operator_in_a_branch, "graph", "operator 'Evil' of domain 'com.example'"),
    "custom domain": (lambda m: m.opset_import.append(helper.make_opsetid("com.example", 1)), "graph opset_import", "'com.example'"),
    "opset too new": (lambda m: _set(m.opset_import[0], version=27), "graph opset_import", "ai.onnx 27"),
    "opset too old": (lambda m: _set(m.opset_import[0], version=5), "graph opset_import", "ai.onnx 5"),
    "format too new": (lambda m: _set(m, ir_version=14), "graph ir_version", "14"),
    "local function": (_local_function, "graph functions", "local.Relu2"),
    "training graph": (lambda m: m.training_info.add(), "graph training_info", "training graphs"),
    "random operator": (_random, "graph", "random operator 'RandomNormalLike'"),
    "random operator in a loop": (_random_in_a_loop, "graph", "random operator 'RandomNormalLike'"),
    "dropout in training mode": (_dropout("ratio", "training", given=True), "graph", "operator 'Dropout' in training mode"),
    "dropout that may train": (_dropout("", "training", computed=True), "graph", "operator 'Dropout' in training mode"),
    "batch statistics": (_normalised("mean", "variance", training_mode=1), "graph", "operator 'BatchNormalization' in training mode"),
    "batch statistics as they were": (_normalised("m", "v", version=9), "graph", "operator 'BatchNormalization' in training mode"),
    "operator over text": (lambda m: _set_operator(m, "StringNormalizer"), "graph", "operator 'StringNormalizer'"),
    "operator over what may be absent": (lambda m: _set_operator(m, "OptionalGetElement"), "graph", "operator 'OptionalGetElement'"),
    "operator of nobody": (lambda m: _set_operator(m, "Summ"), "graph", "operator 'Summ'"),
    "undefined name": (_undefined_name, "graph", "invalid ONNX"),
    "NaN in a constant": (_nan_in_a_constant_node, "graph weight 'Constant.value_floats'", "1 NaN"),
    "NaN in a sparse constant": (_nan_in_a_sparse_constant, "graph weight 'sparse'", "1 NaN"),
    "NaN in the weight of a branch": (_nan_in_the_weight_of_a_branch, "graph weight 'inner'", "8 NaN"),
    "NaN in half precision": (_nan_in_half_precision, "graph weight 'half'", "8 NaN"),
    "extra output": (_extra_output, "graph outputs", "'scores', 'x'"),
    "fixed number of tokens": (_fixed_tokens, "graph input 'resid_post.1'", "float (5, 8)"),
    "unknown width": (_unknown_width, "graph input 'resid_post.1'", "float (n, width)"),
    "input without shape": (_without_shape, "graph input 'resid_post.1'", "float without a shape"),
    "a sequence as input": (_a_sequence, "graph inputs", "'resid_post.1', 'more'"),
    "optional input": (_optional_input, "graph input 'resid_post.1'", "an initializer"),
    "float64 graph": (_float64, "graph input 'resid_post.1'", "double (n, 8)"),
    "output of rank three": (_rank_three, "graph output 'scores'", "float (n, 1, 1)"),
    "output of no dtype": (_unknown_dtype, "graph output 'scores'", "type 99 (n, 1)"),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_a_graph_is_refused_for(case, tmp_path):
    change, field, found = GRAPHS[case]

    refused = refusal(craft(tmp_path / "graph.onnx", changed(change)))

    assert refused.field == field
    assert found in refused.found


@pytest.mark.parametrize("change", [_dropout(), _dropout("ratio"), _dropout("ratio", "training", given=False), _normalised()])
def test_operators_that_could_train_and_do_not_are_read(tmp_path, change):
    assert read_probe_file(craft(tmp_path / "graph.onnx", changed(change)))


@pytest.mark.parametrize(("value", "found"), [(np.nan, "1 NaN"), (np.inf, "1 infinite"), (-np.inf, "1 infinite")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value, found):
    refused = refusal(craft(tmp_path / "weights.onnx", linear_graph(weight=_weights(value))))

    assert refused.field == "graph weight 'weight'"
    assert found in refused.found


def test_minus_infinity_as_a_constant_of_an_attention_mask_is_no_weight(tmp_path):
    model = linear_graph()
    model.graph.node.insert(0, helper.make_node("Constant", [], ["low"], value_float=float("-inf")))
    model.graph.node[1].CopyFrom(helper.make_node("Max", ["resid_post.1", "low"], ["x"]))

    assert read_probe_file(craft(tmp_path / "mask.onnx", model))


def test_inputs_in_another_order_than_the_manifest_are_refused(tmp_path):
    two = fields(inputs=[{"hook": "resid_post", "layer": 1}, {"hook": "final_norm"}])
    assert read_probe_file(craft(tmp_path / "right.onnx", linear_graph(("resid_post.1", "final_norm")), two))

    refused = refusal(craft(tmp_path / "swapped.onnx", linear_graph(("final_norm", "resid_post.1")), two))

    assert (refused.field, refused.found) == ("graph inputs", "'final_norm', 'resid_post.1'")


def test_a_graph_of_another_width_than_the_manifest_is_refused(tmp_path):
    wider = fields(model=fields()["model"] | {"hidden_size": HIDDEN + 1})

    refused = refusal(craft(tmp_path / "wider.onnx", None, wider))

    assert (refused.field, refused.found, refused.expected) == ("graph input 'resid_post.1'", "float (n, 8)", "float (tokens, 9)")


def test_a_graph_without_the_cu_seqlens_that_its_manifest_promises_is_refused(tmp_path):
    causal = fields(context={"kind": "causal"}, cu_seqlens=True, positions=True)

    refused = refusal(craft(tmp_path / "causal.onnx", None, causal))

    assert refused.expected == "'resid_post.1', 'cu_seqlens', 'positions', in this order"


# ----------------------------------------------------------------------------------------------------------------------- the manifest


def test_an_onnx_file_without_a_manifest_is_refused(tmp_path):
    onnx.save(linear_graph(), tmp_path / "bare.onnx")

    assert refusal(tmp_path / "bare.onnx").found == f"0 entries '{METADATA_KEY}' in metadata_props"


def test_a_manifest_that_is_not_json_is_refused(tmp_path):
    model = linear_graph()
    model.metadata_props.add(key=METADATA_KEY, value="{")
    onnx.save(model, tmp_path / "json.onnx")

    assert refusal(tmp_path / "json.onnx").field == "manifest"


def test_a_manifest_that_is_not_utf8_is_refused(tmp_path):
    path = craft(tmp_path / "bytes.onnx", None, fields(description="description"))
    path.write_bytes(path.read_bytes().replace(b'description"', b'descriptio\xff"'))

    assert refusal(path).field in ("manifest", "file")  # protobuf's implementations differ in when they look


def _without(name: str) -> dict:
    content = fields()
    del content[name]
    return content


def _golden(scores: list) -> dict:
    return {"cases": [{"prompt_ids": [], "completion_ids": list(range(len(scores))), "scores": scores}]}


MANIFESTS: dict[str, tuple[dict, str, str, str]] = {
    "no name": (_without("name"), "name", "nothing", "a value"),
    "a name with a slash": (fields(name="a/b"), "name", '"a/b"', "pattern"),
    "an unknown field": (fields(threshold=0.5), "threshold", "0.5", "no such field"),
    "a future schema": (fields(schema_version=2), "schema_version", "2", "1"),
    "a number as text": (fields(model=fields()["model"] | {"hidden_size": "8"}), "model.hidden_size", '"8"', "valid integer"),
    "an unknown hook": (fields(inputs=[{"hook": "resid_mid", "layer": 1}]), "inputs[0].hook", '"resid_mid"', "'resid_pre'"),
    "a hook without layer": (fields(inputs=[{"hook": "resid_post"}]), "inputs[0]", '{"hook": "resid_post"}', "a layer for hook resid_post"),
    "a layer beyond the model": (
        fields(inputs=[{"hook": "resid_post", "layer": 4}]),
        "inputs",
        '"layer": 4',
        "layers below model.num_hidden_layers 4",
    ),
    "a tap twice": (fields(inputs=[{"hook": "final_norm"}] * 2), "inputs", "final_norm", "each tap once"),
    "duplicate labels": (fields(output={"unit": "logit", "labels": ["a", "a"]}), "output.labels", '["a", "a"]', "labels that differ"),
    "an unknown reduction": (fields(reduction="median"), "reduction", '"median"', "unknown reduction"),
    "no reduction": (fields(reduction=None), "reduction", "null", "one for a probe that scores tokens"),
    "a unit from nowhere": (fields(reduce_on="value"), "reduce_on", '"value"', "what can be computed from output.unit logit"),
    "pointwise and sees the prompt": (fields(context={"sees_prompt": True}), "context", '{"sees_prompt": true}', "pointwise"),
    "causal without cu_seqlens": (fields(context={"kind": "causal"}), "cu_seqlens", "null", "true unless"),
    "a window that is not causal": (fields(context={"window": 3}), "context.window", "3", "null unless"),
    "pools but scores tokens": (fields(context={"kind": "rollout"}, cu_seqlens=True), "output.per", "null", "rollout"),
    "NaN among golden scores": (fields(golden=_golden([[1.0], [float("nan")]])), "golden.cases[0].scores[1][0]", "NaN", "finite"),
    "too few golden rows": (
        fields(golden={"cases": [{"prompt_ids": [], "completion_ids": [1, 2], "scores": [[1.0]]}]}),
        "golden.cases[0].scores",
        "[[1.0]]",
        "2 rows of 1 numbers",
    ),
    "negative ids": (
        fields(golden={"cases": [{"prompt_ids": [-1], "completion_ids": [1], "scores": [[1.0]]}]}),
        "golden.cases[0].prompt_ids[0]",
        "-1",
        "greater than or equal to 0",
    ),
    "a tolerance that checks nothing": (
        fields(golden=_golden([[1.0], [2.0]]) | {"tolerance": {"float32": 100.0}}),
        "golden.tolerance.float32",
        "100.0",
        "less than or equal",
    ),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_is_refused_for(case, tmp_path):
    content, field, found, expected = MANIFESTS[case]

    refused = refusal(craft(tmp_path / "manifest.onnx", None, content))

    assert refused.field == field
    assert found in refused.found
    assert expected in refused.expected


def test_one_score_has_no_spread_to_compare_with(tmp_path):
    assert refusal(craft(tmp_path / "one.onnx", None, fields(golden=_golden([[1.0]])))).field == "golden.cases"


@pytest.mark.parametrize("spread", [0.0, 1e-7])
def test_constant_golden_scores_check_nothing_and_are_refused(tmp_path, spread):
    refused = refusal(craft(tmp_path / "constant.onnx", None, fields(golden=_golden([[1.0], [1.0 + spread]]))))

    assert (refused.field, refused.found) == ("golden.cases", "constant scores for label 'cheating'")


# ------------------------------------------------------------------------------------------------------------------------- the digests


def test_a_weight_changed_after_writing_is_refused(tmp_path):
    original = craft(tmp_path / "original.onnx")

    refused = refusal(craft(tmp_path / "changed.onnx", linear_graph(weight=_weights(2)), written_manifest(original), keep_digests=True))

    assert refused.field == "graph_sha256"


@pytest.mark.parametrize("change", [{"description": "better"}, {"name": "lying"}, {"expects_bos": True}, {"author": "someone else"}])
def test_a_manifest_changed_after_writing_is_refused(tmp_path, change):
    original = craft(tmp_path / "original.onnx")

    refused = refusal(craft(tmp_path / "changed.onnx", None, written_manifest(original) | change, keep_digests=True))

    assert refused.field == "manifest_sha256"


def test_a_new_calibration_changes_only_the_digest_of_the_manifest(tmp_path):
    record = {
        "threshold": 1.0,
        "false_positive_rate": 0.05,
        "false_positive_rate_low": 0.01,
        "false_positive_rate_high": 0.1,
        "negatives": 100,
        "dataset": "held out",
        "reduction": "mean",
    }
    before = read_probe_file(craft(tmp_path / "before.onnx")).manifest
    after = read_probe_file(craft(tmp_path / "after.onnx", None, fields(calibrations=[record]))).manifest

    assert before.graph_sha256 == after.graph_sha256
    assert before.manifest_sha256 != after.manifest_sha256


def test_digests_of_other_forms_are_refused(tmp_path):
    written = written_manifest(craft(tmp_path / "original.onnx")) | {
        "graph_sha256": FINGERPRINT.upper(),
        "tokenizer_fingerprint": TOKENIZER,
    }

    assert refusal(craft(tmp_path / "upper.onnx", None, written, keep_digests=True)).field == "graph_sha256"
