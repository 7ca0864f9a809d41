"""What an author hands over wrong is refused in words: the argument, its value, what to give instead; what is right works in any form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from models import BOS, HIDDEN_SIZE, LAYERS, VOCAB_SIZE, tiny_model
from onnx import helper
from refusals import check_in_words, generator
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from transformers import AutoConfig, AutoModelForCausalLM

from probescore.reductions import Reduction
from probescore.types import ScoreUnit, Tap
from probescore_audit import calibrate, evaluate_auroc
from probescore_probes import (
    CalibrationRecord,
    Context,
    Evaluation,
    FollowUp,
    ReferenceModel,
    Tolerance,
    Training,
    linear_probe,
    onnx_probe,
    read_probe_file,
    reference_activations,
    sklearn_probe,
    torch_probe,
    write_probe,
)
from probescore_server.errors import ModelRefused, ProbeRefused

TAP = "resid_post.1"
WEIGHT = np.random.default_rng(3).standard_normal(HIDDEN_SIZE)
IDS = [1, 17, 9, 44, 31]


@pytest.fixture
def write(reference, rollouts, tmp_path):
    def write(**changes):
        said = {"path": tmp_path / "probe.onnx", "probe": linear_probe(WEIGHT), "reference": reference}
        said |= {"name": "probe", "version": "1", "taps": [TAP], "golden": rollouts[:2]} | changes
        try:
            return write_probe(**said)
        finally:
            assert not [path.name for path in tmp_path.glob(".*")]

    return write


# ------------------------------------------------------------------------------------------------------------------------ write_probe

NOT_TEXT = (None, 1, b"a", ["a"], np.array(["a"]))
NOT_A_FLAG = (None, 1, "yes", [True], 0.0)
GOOD_ROLLOUT = (IDS[:2], IDS[2:])
NOT_IDS: dict[str, Any] = {
    "None": None,
    "text": "hello",
    "bytes": b"hi",
    "a number": 5,
    "texts": ["a", "b"],
    "floats": [1.0, 2.0],
    "a float array": np.ones(3),
    "bools": [True, False],
    "negative": [1, -1],
    "beyond": [1, VOCAB_SIZE],
    "far beyond": [2**63],
    "beyond any": [10**30],
    "two sequences": [[1, 2], [3, 4]],
    "ragged": [[1, 2], [3]],
    "batch": np.ones((1, 3), int),
    "a tensor batch": torch.ones(1, 3, dtype=torch.long),
    "a float tensor": torch.ones(3),
    "bfloat16": torch.ones(3, dtype=torch.bfloat16),
    "objects": np.array([1, "a", None], object),
    "an encoding": {"input_ids": [1, 2]},
    "a set": {1, 2},
    "NaN": [1, float("nan")],
    "a generator": generator([1, 2]),
    "a scalar array": np.int64(3),
    "None among them": [1, None, 2],
    "complex": [1j, 2],
    "with gradients": torch.ones(3, requires_grad=True),
}

WRONG: dict[str, dict[str, list[Any]]] = {
    "path": {"path": [None, 1, "", b"probe.onnx", "/no/such/folder/probe.onnx", ["a"], "/proc", "/"]},
    "probe": {
        "probe": [
            None,
            WEIGHT,
            torch.zeros(3),
            torch.nn.Linear(HIDDEN_SIZE, 1),
            LogisticRegression(),
            lambda inputs: 0,
            "probe.onnx",
            linear_probe,
            linear_probe(np.ones(HIDDEN_SIZE + 1)),
            linear_probe(np.ones(2 * HIDDEN_SIZE)),
            torch_probe(torch.nn.Linear(HIDDEN_SIZE + 1, 1), unit=ScoreUnit.VALUE),
            replace(linear_probe(WEIGHT), score=lambda inputs: 1 / 0),
            replace(linear_probe(WEIGHT), score=lambda inputs: None),
            replace(linear_probe(WEIGHT), score=lambda inputs: "high"),
            replace(linear_probe(WEIGHT), score=lambda inputs: np.full(len(inputs[TAP]), np.nan)),
            replace(linear_probe(WEIGHT), score=lambda inputs: [None] * len(inputs[TAP])),
        ]
    },
    "gave scores": {
        "probe": [
            replace(linear_probe(WEIGHT), score=lambda inputs: np.ones(1)),
            replace(linear_probe(WEIGHT), score=lambda inputs: np.ones((2, 2, 2))),
        ]
    },
    "labels": {
        "labels": [None, "cheating", [], (), ["a", "b"], [1], [None], ["a", "a"], {"a": 1}, 3, [["a"]]],
        "probe": [
            linear_probe(np.ones((2, HIDDEN_SIZE))),
            replace(linear_probe(WEIGHT), columns=None, score=lambda inputs: np.ones((len(inputs[TAP]), 3))),
        ],
    },
    "reference": {"reference": [None, "Qwen/Qwen3-4B", Path("x"), ReferenceModel, torch.nn.Linear(1, 1)]},
    "name": {"name": [*NOT_TEXT, "", "Cheating", "my probe", "a/b", "ü", "-a", "a" * 65, "a\n", "@"]},
    "version": {"version": [*NOT_TEXT, "", "1 0", "v/1", "-1", "1" * 33, "1\n", 1.0, (1, 0)]},
    "taps": {
        "taps": [
            None,
            TAP,
            Tap("resid_post", 1),
            [],
            (),
            3,
            {TAP: 1},
            [TAP, TAP],
            [TAP, Tap("resid_post", 1)],
            [None],
            [1],
            ["resid_post"],
            ["resid_post.x"],
            ["resid_post."],
            ["resid_post.1.2"],
            ["resid_mid.1"],
            ["resid_post.-1"],
            [f"resid_post.{LAYERS}"],
            ["final_norm.1"],
            [""],
            [Tap("resid_post")],
            [Tap("final_norm", 1)],
            [Tap("resid_post", -1)],
            [Tap("resid_post", 99)],
            [Tap("resid_post", "1")],
            [Tap("resid_post", 1.0)],
            [Tap("resid_post", True)],
            [Tap(None, 1)],
            [["resid_post", 1]],
            ["layers.1"],
        ]
    },
    "golden": {
        "golden": [
            None,
            [],
            (),
            "text",
            3,
            {"a": 1},
            GOOD_ROLLOUT,
            [IDS],
            [None],
            ["ab"],
            [(IDS,)],
            [(IDS, IDS, IDS)],
            [GOOD_ROLLOUT, None],
            [GOOD_ROLLOUT, (IDS, [])],
            [("a prompt", "an answer")],
            [{"prompt_ids": IDS, "completion_ids": IDS}],
            *[[GOOD_ROLLOUT, (IDS, ids)] for ids in NOT_IDS.values()],
            *[[GOOD_ROLLOUT, (ids, IDS)] for key, ids in NOT_IDS.items() if key != "a generator"],
        ]
    },
    "context": {"context": [None, "causal", {"kind": "causal"}, Context, 3]},
    "positions": {"positions": NOT_A_FLAG},
    "exclude_special_tokens": {"exclude_special_tokens": NOT_A_FLAG},
    "expects_bos": {"expects_bos": NOT_A_FLAG[1:]},
    "reduce_on": {"reduce_on": [1, "logits", "", ["logit"], ScoreUnit, "value"]},
    "reduction": {
        "reduction": [
            1,
            "median",
            "",
            "topk_mean",
            "topk_mean(0)",
            "topk_mean(x)",
            "ema_max(2)",
            "mean(3)",
            ["mean"],
            "fraction_above(nan)",
        ]
    },
    "follow_up": {"follow_up": ["why?", [4, 5], {"token_ids": [4]}, FollowUp, FollowUp(token_ids=(4, VOCAB_SIZE)), 3]},
    "calibrations": {
        "calibrations": [
            None,
            "x",
            3,
            {},
            {"threshold": 1},
            [None],
            [0.5],
            CalibrationRecord(
                threshold=1.0, false_positive_rate=0.1, false_positive_rate_low=0.0, false_positive_rate_high=0.2, negatives=10, dataset="d"
            ),
            [
                CalibrationRecord(
                    threshold=1.0,
                    false_positive_rate=0.1,
                    false_positive_rate_low=0.0,
                    false_positive_rate_high=0.2,
                    negatives=10,
                    dataset="d",
                    label="lying",
                )
            ],
        ]
    },
    "evaluations": {"evaluations": [None, "x", 3, {}, [None], [0.9], Evaluation(metric="auroc", value=0.9, dataset="d")]},
    "training": {"training": ["sgd", {"method": "x"}, Training, 1]},
    "tolerance": {"tolerance": [1e-3, "low", {"float32": 1e-3}, Tolerance]},
    "description": {"description": NOT_TEXT},
    "author": {"author": NOT_TEXT},
    "license": {"license": NOT_TEXT},
}


@pytest.mark.parametrize(
    ("argument", "changed", "value"),
    [
        pytest.param(argument, changed, value, id=f"{argument}-{changed}-{index}")
        for argument, changes in WRONG.items()
        for changed, values in changes.items()
        for index, value in enumerate(values)
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_writing_refuses_a_wrong_argument_in_words_and_writes_nothing(write, tmp_path, argument, changed, value):
    with pytest.raises((ValueError, TypeError, ProbeRefused)) as refused:
        write(**{changed: value})

    check_in_words(refused.value, argument)
    assert not (tmp_path / "probe.onnx").exists()


def test_estimates_travel_in_the_manifest_as_they_were_computed(write):
    scores = np.random.default_rng(0).standard_normal(100)
    threshold = calibrate(scores, false_positive_rate=0.05, dataset="honest", reduction="topk_mean(4)", label="score")
    auroc = evaluate_auroc(scores + 1, scores, dataset="held out", dataset_sha256="sha256:" + "0" * 64)

    manifest = write(calibrations=[threshold], evaluations=[auroc]).manifest

    assert [record.model_dump(exclude_none=True) for record in manifest.calibrations] == [asdict(threshold)]
    assert [record.model_dump() for record in manifest.evaluations] == [{"metric": "auroc"} | asdict(auroc)]


def test_records_of_another_probe_file_are_taken_beside_estimates_and_from_whatever_is_gone_through(write, tmp_path):
    threshold = calibrate(range(100), false_positive_rate=0.05, dataset="honest")
    auroc = evaluate_auroc([2.0, 1.0], [1.0, 0.0], dataset="held out")
    first = write(calibrations=[threshold], evaluations=[auroc]).manifest

    second = write(
        path=tmp_path / "second.onnx",
        version="2",
        calibrations=generator([*first.calibrations, threshold]),
        evaluations=generator([auroc, *first.evaluations, Evaluation(metric="recall", value=0.5, dataset="held out")]),
    ).manifest

    assert second.calibrations == first.calibrations * 2
    assert [record.metric for record in second.evaluations] == ["auroc", "auroc", "recall"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("threshold", float("nan")), ("false_positive_rate", 2.0), ("negatives", 0), ("reduction", "topk_mean(3000000000)")],
)
def test_an_estimate_that_a_manifest_cannot_hold_is_refused_by_its_place_and_field(write, field, value):
    threshold = calibrate(range(100), false_positive_rate=0.05, dataset="honest")
    with pytest.raises(ValueError, match=rf"^calibrations\[1\]: CalibrationRecord: {field}: found .*, expected ") as refused:
        write(calibrations=[threshold, replace(threshold, **{field: value})])
    check_in_words(refused.value, field)


def test_a_name_in_upper_case_is_answered_with_the_one_to_use(write):
    with pytest.raises(ValueError, match=r"^name: 'Cheating'; give .*, such as 'cheating'$"):
        write(name="Cheating")


def test_a_path_that_is_a_directory_or_cannot_be_written_is_named(write, tmp_path):
    with pytest.raises(ValueError, match=rf"^path: '{tmp_path}' is a directory; give the path of the file"):
        write(path=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is no directory; make it first"):
        write(path=tmp_path / "file" / "probe.onnx")
    for name in (f"{'long' * 80}.onnx", "a\0.onnx"):
        with pytest.raises(ValueError, match=r"^path: .*; give a plain"):
            write(path=tmp_path / name)


def test_labels_that_name_other_classes_than_the_columns_are_about_are_refused(write, reference, rollouts):
    rows = np.concatenate(reference.completion_activations(rollouts[:6], TAP))
    two = LogisticRegression().fit(rows, np.array(["honest", "lying"])[(rows[:, 0] > 0).astype(int)])
    with pytest.raises(ValueError, match=r"labels\[0\]: 'honest' is another class than that of this column, 'lying'"):
        write(probe=sklearn_probe(two), labels=["honest"])
    three = LogisticRegression().fit(rows, np.array(["a", "b", "c"])[np.digitize(rows[:, 0], [-0.5, 0.5])])
    with pytest.raises(ValueError, match=r"labels\[0\]: 'b' is another class .* give labels=\['a', 'b', 'c'\]"):
        write(probe=sklearn_probe(three), labels=["b", "a", "c"])
    with pytest.raises(ValueError, match=r"labels: 1 name \('score'\), and the probe gives 3 scores"):
        write(probe=sklearn_probe(three))

    assert write(probe=sklearn_probe(two), labels=["lying"]).manifest.output.labels == ("lying",)


def test_a_model_of_half_precision_makes_no_golden_vectors(write):
    with pytest.raises(ValueError, match=r"^reference: loaded in bfloat16, .* dtype=torch.float32"):
        write(reference=ReferenceModel.load(tiny_model("qwen3"), dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "change",
    [
        {"reduction": "mean", "context": Context(kind="rollout")},
        {"reduce_on": "probability", "probe": linear_probe(WEIGHT, unit=ScoreUnit.VALUE)},
    ],
)
def test_arguments_that_contradict_each_other_are_refused(write, change):
    with pytest.raises(ValueError, match=rf"^{next(iter(change))}: ") as refused:
        write(**change)
    check_in_words(refused.value, next(iter(change)))


def test_a_module_that_cannot_be_exported_is_refused_in_words(write):
    class Branching(torch.nn.Module):
        def forward(self, x):
            return x[:, :1] if x.sum() > 0 else x[:, 1:2]

    with pytest.raises(ValueError, match=r"^module: Branching cannot be exported to ONNX") as refused:
        write(probe=torch_probe(Branching(), unit=ScoreUnit.VALUE))
    check_in_words(refused.value, "module")


RIGHT: dict[str, dict[str, Any]] = {
    "text for a path": {},
    "tensors of ids": {"golden": [(torch.tensor(IDS), torch.tensor(IDS))]},
    "small integers of numpy": {"golden": [(np.array(IDS, np.uint8), np.array(IDS, np.int16))]},
    "tuples, and a list of lists": {"golden": [[tuple(IDS), IDS]]},
    "objects that are integers": {"golden": [(np.array(IDS, object), [np.int32(i) for i in IDS])]},
    "tensors one by one": {"golden": [(list(torch.tensor(IDS)), IDS)]},
    "ranges": {"golden": [(range(4, 8), range(8, 14))]},
    "no prompt": {"golden": [([], IDS)]},
    "a tensor without a prompt": {"golden": [(torch.tensor([], dtype=torch.long), IDS), (np.array([]), IDS)]},
    "rollouts one after another": {"golden": generator([GOOD_ROLLOUT, GOOD_ROLLOUT])},
    "a tuple of taps": {"taps": (Tap("resid_post", np.int64(1)),)},
    "flags of numpy": {"positions": np.False_, "exclude_special_tokens": np.True_, "expects_bos": np.True_},
    "units and reductions as text": {"reduce_on": "probability", "reduction": Reduction.parse("topk_mean(2)")},
    "labels of an array": {"labels": np.array(["cheating"])},
    "parts with numbers of numpy": {"follow_up": FollowUp(token_ids=np.array([4, 5])), "tolerance": Tolerance(float32=np.float64(1e-3))},
    "code that gives a tensor": {
        "probe": replace(linear_probe(WEIGHT), score=lambda inputs: torch.from_numpy(inputs[TAP]).double() @ torch.from_numpy(WEIGHT))
    },
}


@pytest.mark.parametrize("form", RIGHT)
def test_what_is_right_is_taken_in_any_form(write, tmp_path, form):
    probe = write(path=str(tmp_path / "probe.onnx"), **RIGHT[form])

    assert read_probe_file(tmp_path / "probe.onnx").manifest == probe.manifest


# ------------------------------------------------------------------------------------------------------------------- probes by their makers

NOT_NUMBERS: list[Any] = [
    None,
    "0.5",
    b"1",
    ["a"],
    [1, "a"],
    [1, None],
    {},
    {"w": 1},
    {1.0},
    [[1, 2], [3]],
    [[1], 2],
    [],
    [[]],
    np.array([]),
    [float("nan")],
    [1, float("inf")],
    [-np.inf],
    [1e39],
    np.array([1j]),
    np.array([True]),
    np.array([{}], object),
    np.ones((1, 2, 3)),
    generator([1.0]),
    torch.tensor([float("nan")]),
    np.array(["2020"], "datetime64"),
    object(),
]


@pytest.mark.parametrize("index", range(len(NOT_NUMBERS)))
def test_weights_that_are_none_are_refused_in_words(index):
    with pytest.raises((ValueError, TypeError)) as refused:
        linear_probe(NOT_NUMBERS[index])
    check_in_words(refused.value, "weight")
    with pytest.raises((ValueError, TypeError)) as refused:
        linear_probe(WEIGHT, NOT_NUMBERS[index])
    check_in_words(refused.value, "bias")


@pytest.mark.parametrize("bias", [[1, 2, 3], [[1, 2]], np.ones((2, 2))])
def test_a_bias_of_another_shape_is_refused_in_words(bias):
    with pytest.raises(ValueError, match=r"^bias: shape") as refused:
        linear_probe(np.ones((2, HIDDEN_SIZE)), bias)
    check_in_words(refused.value, "bias")


WEIGHTS = [
    WEIGHT.tolist(),
    tuple(WEIGHT),
    [WEIGHT.tolist()],
    WEIGHT[None].astype(np.float16),
    torch.tensor(WEIGHT, requires_grad=True),
    torch.tensor(WEIGHT, dtype=torch.bfloat16),
    torch.nn.Linear(HIDDEN_SIZE, 1).weight,
    [torch.tensor(value) for value in WEIGHT],
    np.array(WEIGHT.tolist(), object),
    np.arange(1, HIDDEN_SIZE + 1),
    np.asfortranarray(WEIGHT[None]),
]


@pytest.mark.parametrize("weight", WEIGHTS, ids=range(len(WEIGHTS)))
def test_weights_are_taken_from_whatever_holds_them(write, weight):
    for bias in (0, 0.5, np.float32(1), [1.0], torch.tensor([2.0], requires_grad=True)):
        probe = linear_probe(weight, bias)
    assert write(probe=probe).manifest.output.unit is ScoreUnit.LOGIT


MAKERS: dict[str, tuple[Callable[[Any], object], str, list[Any]]] = {
    "unit of a linear probe": (lambda value: linear_probe(WEIGHT, unit=value), "unit", [None, 1, "logits", ScoreUnit, ["logit"]]),
    "unit of a module": (lambda value: torch_probe(torch.nn.Linear(1, 1), unit=value), "unit", [None, 1, "logits"]),
    "unit of a graph": (lambda value: onnx_probe(onnx.ModelProto(), len, unit=value), "unit", [None, 1, "logits"]),
    "module": (
        lambda value: torch_probe(value, unit="value"),
        "module",
        [None, 1, torch.nn.Linear, WEIGHT, lambda x: x, "module.pt", torch.zeros(3), LogisticRegression()],
    ),
    "estimator": (
        sklearn_probe,
        "estimator",
        [None, 1, LogisticRegression, LogisticRegression(), WEIGHT, "model.joblib", torch.nn.Linear(1, 1)],
    ),
    "graph": (
        lambda value: onnx_probe(value, len, unit="value"),
        "graph",
        [None, 1, b"graph", "/no/such.onnx", "/", __file__, "", WEIGHT, torch.nn.Linear(1, 1)],
    ),
    "score": (lambda value: onnx_probe(onnx.ModelProto(), value, unit="value"), "score", [None, 1, "f", WEIGHT, [len]]),
}


@pytest.mark.parametrize(("maker", "index"), [(maker, index) for maker, (_, _, values) in MAKERS.items() for index in range(len(values))])
def test_what_probes_are_made_of_is_refused_in_words(maker, index):
    make, argument, values = MAKERS[maker]
    with pytest.raises((ValueError, TypeError)) as refused:
        make(values[index])
    check_in_words(refused.value, argument)


def test_a_module_with_a_weight_that_is_not_finite_is_refused():
    module = torch.nn.Linear(HIDDEN_SIZE, 1)
    module.weight.data[0, 3] = float("nan")
    with pytest.raises(ValueError, match=r"^module: its weight 'weight' has NaN or infinite numbers; fit it again"):
        torch_probe(module, unit="value")


def test_a_graph_that_no_server_could_run_is_refused_when_it_is_written(write):
    empty = helper.make_model(helper.make_graph([], "empty", [], []))
    with pytest.raises(ProbeRefused) as refused:
        write(probe=onnx_probe(empty, lambda inputs: inputs[TAP][:, 0], unit="value"))
    check_in_words(refused.value, "graph")


PARTS: dict[str, Callable[[], object]] = {
    "kind": lambda: Context(kind="causl"),
    "window": lambda: Context(kind="causal", window=0),
    "without a name": lambda: Context("causal"),
    "token_ids": lambda: FollowUp(token_ids=[]),
    "token_ids[1]": lambda: FollowUp(token_ids=[1, -1]),
    "text": lambda: FollowUp(token_ids=[1], text=3),
    "float32": lambda: Tolerance(float32=0.0),
    "bfloat16": lambda: Tolerance(bfloat16=float("nan")),
    "float64": lambda: Tolerance(float64=1e-3),
    "method": lambda: Training(method=3),
    "dataset_sha256": lambda: Training(dataset_sha256="abc"),
    "threshold": lambda: CalibrationRecord(
        threshold=float("inf"),
        false_positive_rate=0.1,
        false_positive_rate_low=0.0,
        false_positive_rate_high=0.2,
        negatives=10,
        dataset="d",
    ),
    "false_positive_rate": lambda: CalibrationRecord(threshold=1.0, negatives=10, dataset="d"),
    "value": lambda: Evaluation(metric="auroc", value="high", dataset="d"),
}


@pytest.mark.parametrize("field", PARTS)
def test_parts_of_a_manifest_are_refused_in_words_as_they_are_made(field):
    with pytest.raises((ValueError, TypeError)) as refused:
        PARTS[field]()
    check_in_words(refused.value, field)


# --------------------------------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("kind", [key for key in NOT_IDS if key != "a generator"])
def test_ids_that_are_none_are_refused_in_words(reference, kind):
    for read in (
        lambda: reference.activations(NOT_IDS[kind], [TAP]),
        lambda: reference_activations(reference.model, NOT_IDS[kind], [Tap("resid_post", 1)]),
    ):
        with pytest.raises((ValueError, TypeError)) as refused:
            read()
        check_in_words(refused.value, "token_ids")
    with pytest.raises((ValueError, TypeError)) as refused:
        reference.completion_activations([GOOD_ROLLOUT, (IDS, NOT_IDS[kind])], TAP)
    check_in_words(refused.value, "rollouts[1] completion_ids")


def test_rollouts_are_all_read_before_the_first_is_computed(reference):
    done: list[int] = []
    with pytest.raises(ValueError, match=r"^rollouts\[1\] completion_ids: no ids"):
        reference.completion_activations([GOOD_ROLLOUT, (IDS, [])], TAP, progress=done.append)
    assert done == []


@pytest.mark.parametrize("progress", [3, "yes", True])
def test_progress_that_is_no_function_is_refused_in_words(reference, progress):
    with pytest.raises(TypeError) as refused:
        reference.completion_activations([GOOD_ROLLOUT], TAP, progress=progress)
    check_in_words(refused.value, "progress")


@pytest.mark.parametrize("model", [None, "Qwen/Qwen3-4B", torch.nn.Linear(1, 1)], ids=repr)
def test_what_is_no_model_is_refused_in_words(reference, model):
    with pytest.raises(TypeError) as refused:
        reference_activations(model, IDS, [Tap("resid_post", 1)])
    check_in_words(refused.value, "model")


def test_no_ids_are_refused(reference):
    with pytest.raises(ValueError, match=r"^token_ids: no ids; give at least one"):
        reference.activations([], [TAP])


@pytest.mark.parametrize("taps", WRONG["taps"]["taps"][:6] + WRONG["taps"]["taps"][9:], ids=repr)
def test_taps_that_are_none_are_refused_in_words(reference, taps):
    with pytest.raises((ValueError, TypeError)) as refused:
        reference.activations(IDS, taps)
    check_in_words(refused.value, "taps")


@pytest.mark.parametrize("tap", [None, [TAP], 3, "resid_post", "resid_mid.1", "resid_post.99", Tap("resid_post")], ids=repr)
def test_a_tap_that_is_none_is_refused_in_words(reference, tap):
    with pytest.raises((ValueError, TypeError)) as refused:
        reference.completion_activations([GOOD_ROLLOUT], tap)
    check_in_words(refused.value, "tap")


@pytest.mark.parametrize("rollouts", [None, "text", 3, {"a": 1}, GOOD_ROLLOUT, [IDS], [None], ["ab"], [(IDS,)]], ids=repr)
def test_rollouts_that_are_none_are_refused_in_words(reference, rollouts):
    with pytest.raises((ValueError, TypeError)) as refused:
        reference.completion_activations(rollouts, TAP)
    check_in_words(refused.value, "rollouts")


@pytest.mark.parametrize(
    "ids",
    [tuple(IDS), np.array(IDS, np.int32), torch.tensor(IDS), torch.tensor(IDS, dtype=torch.int16), np.array(IDS, object), range(1, 6)],
    ids=repr,
)
def test_ids_are_taken_in_any_form(reference, ids):
    expected = reference.activations([int(i) for i in ids], [TAP])[Tap("resid_post", 1)]

    assert np.array_equal(reference.activations(ids, (TAP,))[Tap("resid_post", 1)], expected)


def test_a_rollout_longer_than_the_model_can_read_is_refused_with_its_limit():
    model = AutoModelForCausalLM.from_pretrained(tiny_model("gpt2"))
    with pytest.raises(ValueError, match=r"cannot read 600 ids .*max_position_embeddings = 512; give shorter") as refused:
        reference_activations(model, [5] * 600, [Tap("resid_post", 1)])
    check_in_words(refused.value, "token_ids")


# ------------------------------------------------------------------------------------------------------------------- loading a model


def damaged(tmp_path: Path, architecture: str = "llama") -> Path:
    return Path(shutil.copytree(tiny_model(architecture), tmp_path / "model"))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def change_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({key: value for key, value in (config | changes).items() if value is not None}))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


Q_PROJ = "model.layers.2.self_attn.q_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a weight is missing": (
        lambda d: change_weights(d, lambda w: w.pop(Q_PROJ)),
        r"1 weights of .* missing .*layers\.2\.self_attn\.q_proj\.weight; download or save",
    ),
    "the embedding is missing": (
        lambda d: change_weights(d, lambda w: w.pop("model.embed_tokens.weight")),
        "missing from its files.*embed_tokens",
    ),
    "the last norm is missing": (
        lambda d: change_weights(d, lambda w: w.pop("model.norm.weight")),
        r"missing from its files.*norm\.weight",
    ),
    "a block is missing": (
        lambda d: change_weights(d, lambda w: [w.pop(key) for key in list(w) if ".layers.3." in key]),
        r"9 weights of .* missing .* and 4 more",
    ),
    "the config has more blocks": (lambda d: change_config(d, num_hidden_layers=6), "18 weights of .* are missing"),
    "a shape differs": (lambda d: change_weights(d, lambda w: w.update({Q_PROJ: torch.zeros(16, 32)})), "other shapes"),
    "the config has another width": (lambda d: change_config(d, intermediate_size=64), "other shapes"),
    "other names": (
        lambda d: change_weights(d, lambda w: [w.update({f"policy.{key}": w.pop(key)}) for key in list(w)]),
        "are missing from its files",
    ),
    "an adapter lies beside it": (lambda d: (d / "adapter_config.json").write_text("{}"), "holds an adapter .*merge"),
    "an adapter lies in it": (
        lambda d: change_weights(d, lambda w: w.update({Q_PROJ.replace("weight", "lora_A.weight"): torch.zeros(2, 32)})),
        "adapter beside its weights",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "a config that is no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "a config that says nothing": (lambda d: (d / "config.json").write_text("{}"), "model_type is none"),
    "a config of nothing known": (lambda d: change_config(d, model_type="hal9000"), "model_type is 'hal9000'.*install a newer one"),
    "code of its own": (lambda d: change_config(d, model_type="hal9000", auto_map={"AutoConfig": "hal.Config"}), "trust_remote_code=True"),
    "an encoder with a decoder": (
        lambda d: (d / "config.json").write_text(AutoConfig.for_model("t5").to_json_string()),
        "encoder with a decoder",
    ),
    "a model of pictures": (lambda d: (d / "config.json").write_text(AutoConfig.for_model("resnet").to_json_string()), "only decoders"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no .*safetensors"),
    "half a file of weights": (lambda d: cut(d / "model.safetensors", 9000), "cannot be loaded.*damaged"),
    "weights that are none": (lambda d: (d / "model.safetensors").write_bytes(b"not weights at all"), "cannot be loaded.*damaged"),
    "no tokenizer": (lambda d: [path.unlink() for path in d.glob("tokenizer*")], "no tokenizer"),
    "a tokenizer that is none": (lambda d: (d / "tokenizer.json").write_text("{}"), "no tokenizer"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_model_that_is_not_whole_is_refused_in_words(tmp_path, kind):
    directory = damaged(tmp_path)
    damage, reason = DAMAGE[kind]
    damage(directory)
    with pytest.raises(ModelRefused, match=reason) as refused:
        ReferenceModel.load(directory)
    check_in_words(refused.value, "model: ")


def test_weights_that_no_activation_depends_on_may_be_missing_or_too_many(tmp_path):
    """The head of a bare decoder; a value head."""
    directory = damaged(tmp_path)
    expected = ReferenceModel.load(directory).activations(IDS, [TAP])[Tap("resid_post", 1)]
    change_config(directory, tie_word_embeddings=False)
    change_weights(directory, lambda w: (w.pop("lm_head.weight", None), w.update({"v_head.summary.weight": torch.zeros(1, HIDDEN_SIZE)})))

    assert np.array_equal(ReferenceModel.load(directory).activations(IDS, [TAP])[Tap("resid_post", 1)], expected)


LOADING: dict[str, list[Any]] = {
    "model": [None, 3, b"x", ["x"], "", "/no/such/model", "./nothing", "a/b/c", "nobody/nothing-of-this-name", "not an id!", __file__],
    "revision": [None, 3, b"x", "r" * 129],
    "trust_remote_code": [None, 1, "yes"],
    "model_id": [None, 3, "m" * 257],
    "dtype": [None, 3, "float8", torch.int64, "int32", np.float32, torch.bool],
    "device": ["tpu:99", "nonsense", "cuda:77", 3.5, None],
}


@pytest.mark.parametrize(("argument", "index"), [(argument, index) for argument, values in LOADING.items() for index in range(len(values))])
def test_loading_refuses_a_wrong_argument_in_words(argument, index, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said: dict[str, Any] = {"model": tiny_model("llama")} | {argument: LOADING[argument][index]}
    with pytest.raises((ModelRefused, TypeError, ValueError)) as refused:
        ReferenceModel.load(said.pop("model"), **said)
    check_in_words(refused.value, argument)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", torch.float64])
def test_a_model_is_loaded_in_a_named_dtype_from_text_or_path(dtype):
    loaded = ReferenceModel.load(str(tiny_model("llama")), dtype=dtype, device=torch.device("cpu"))

    assert str(loaded.model.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")
    assert loaded.tokenizer.bos_token_id == BOS
