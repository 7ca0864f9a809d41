"""Which probes run in stacks; that none does whose stack would not score as its graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from crafted import HIDDEN, craft, fields
from structlog.testing import capture_logs

from probescore_server.probes.format.probe_file import read_probe_file
from probescore_server.probes.loading.loader import LoadedProbe, StackMember, load_probes
from probescore_server.probes.loading.onnx_session import ProbeSession
from probescore_server.probes.stacking import stack

CPU = torch.device("cpu")
RANDOM = np.random.default_rng(0)
LINEAR = "scores = MatMul(x, w)"
MLP = "h = MatMul(x, W) a = Tanh(h) scores = MatMul(a, v)"
MIXING = "h = MatMul(x, W) a = Softmax(h) scores = MatMul(a, v)"


def load(directory: Path, *probes: tuple[str, str], **weights: np.ndarray) -> dict[str, LoadedProbe]:
    """Probes of a name and a graph over ``x`` each, loaded on the CPU; they have weights of their own, and those given."""
    paths = []
    for name, body in probes:
        model = onnx.parser.parse_model(
            f'<ir_version: 9, opset_import: ["" : 18]> probe (float[n, {HIDDEN}] x) => (float[n, 1] scores) {{ {body} }}'
        )
        own = {
            "w": RANDOM.standard_normal((HIDDEN, 1)),
            "W": RANDOM.standard_normal((HIDDEN, 4)),
            "v": RANDOM.standard_normal((4, 1)),
        } | weights
        model.graph.initializer.extend(
            onnx.numpy_helper.from_array(array.astype(np.float32), key)
            for key, array in own.items()
            if key in body.replace(",", " ").replace(")", " ").split()
        )
        model.graph.input[0].name = "resid_post.1"
        for node in model.graph.node:
            node.input[:] = ["resid_post.1" if each == "x" else each for each in node.input]
        paths.append(craft(directory / f"{name}.onnx", model, fields(name=name)))
    return load_probes([read_probe_file(path) for path in paths], CPU)


def test_linear_probes_and_perceptrons_of_a_tap_are_one_stack_and_other_graphs_have_sessions(tmp_path: Path) -> None:
    loaded = load(tmp_path, ("a", LINEAR), ("b", MIXING), ("c", MLP), ("d", LINEAR))
    assert list(loaded) == ["a@1", "b@1", "c@1", "d@1"]
    assert isinstance(loaded["b@1"].runs, ProbeSession)
    members = [run for key in ("a@1", "c@1", "d@1") if isinstance(run := loaded[key].runs, StackMember)]
    assert [member.number for member in members] == [0, 1, 2]
    assert len({id(member.stack) for member in members}) == 1


def test_probe_that_a_stack_would_score_otherwise_keeps_its_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # given an activation that torch would compute in another way
    monkeypatch.setitem(stack._TORCH, "Tanh", lambda x: torch.tanh(x) + 1e-3 * x)
    with capture_logs() as logs:
        loaded = load(tmp_path, ("a", LINEAR), ("b", MLP), ("c", LINEAR))
    assert isinstance(loaded["b@1"].runs, ProbeSession)
    assert [(log["log_level"], log["probe"]) for log in logs] == [("warning", "b@1")]
    # then the others are stacked without it
    runs = [loaded[key].runs for key in ("a@1", "c@1")]
    assert [run.number for run in runs if isinstance(run, StackMember)] == [0, 1]


@pytest.mark.parametrize(("mean", "run"), [(100.0, StackMember), (1e6, ProbeSession)])
def test_standardisation_is_taken_into_the_weights_only_where_no_digits_are_lost(tmp_path: Path, mean: float, run: type) -> None:
    body = "c = Sub(x, mean) s = Div(c, std) scores = MatMul(s, w)"
    loaded = load(tmp_path, ("a", body), mean=np.full(HIDDEN, mean), std=np.full(HIDDEN, 30.0))
    assert isinstance(loaded["a@1"].runs, run)


def test_a_probe_whose_scores_overflow_on_plain_rows_keeps_its_session(tmp_path: Path) -> None:
    loaded = load(tmp_path, ("a", "y = MatMul(x, w) scores = Exp(y)"), w=np.full((HIDDEN, 1), 30.0))
    assert isinstance(loaded["a@1"].runs, ProbeSession)


def test_a_large_bias_costs_no_stack(tmp_path: Path) -> None:
    # its scores have few digits after the point in either way
    loaded = load(tmp_path, ("a", "y = MatMul(x, w) scores = Add(y, b)"), b=np.array([2000.0]))
    assert isinstance(loaded["a@1"].runs, StackMember)


def test_no_probes_load(tmp_path: Path) -> None:
    assert load(tmp_path) == {}
