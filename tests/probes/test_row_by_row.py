"""Which graphs certainly compute row by row, and that none is taken for one that does not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from crafted import HIDDEN
from hypothesis import HealthCheck, given, settings
from models import HIDDEN_SIZE
from random_graphs import DISHONEST, NEEDS_SEQUENCES, POSITIONED, ROW_BY_ROW, TAP, Recipe, Step, graph_of, recipes
from sklearn.ensemble import GradientBoostingRegressor, RandomForestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from torch_probes import Decaying, TopKFeature, TwoTaps, WindowedAttention

from probescore.types import OutputPer, ScoreUnit, Tap
from probescore_probes.exporting import sklearn_probe, torch_probe
from probescore_server.probes.format.graph import GraphSignature, check_graph, check_signature
from probescore_server.probes.loading.row_by_row import is_row_by_row

RANDOM = np.random.default_rng(0)
SIGNATURE = GraphSignature((Tap("resid_post", 1),), HIDDEN, 1)
WEIGHTS = {
    "w": RANDOM.standard_normal((HIDDEN, 1)), "W": RANDOM.standard_normal((HIDDEN, 4)), "v": RANDOM.standard_normal((4, 1)),
    "V": RANDOM.standard_normal((1, HIDDEN)), "ones": np.ones(HIDDEN), "T": RANDOM.standard_normal((9, 4)),
}  # fmt: skip
INTS = {
    "zero": 0, "one": 1, "a0": [0], "a1": [1], "a_1": [-1], "k": [3], "two_by_four": [0, 2, 4], "rows_first": [-1, 2, 4],
    "as_rows": [-1, 8],
    "split": [3, 5], "end": [2**62], "as_columns": [-1, 4], "by_four": [-1, 4, 4], "perm": [3, 1, 2],
}  # fmt: skip


def proved(body: str, *, positions: bool = False) -> bool:
    inputs = f"float[n, {HIDDEN}] x" + (", int64[n] positions" if positions else "")
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> probe ({inputs}) => (float[n, 1] scores) {{ {body} }}')
    words = set(body.replace(",", " ").replace(")", " ").replace("(", " ").split())
    arrays = {name: np.asarray(array, np.float32) for name, array in WEIGHTS.items()} | {
        name: np.array(number) for name, number in INTS.items()
    }
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items() if name in words)
    model.graph.input[0].name = TAP
    for node in model.graph.node:
        node.input[:] = [TAP if name == "x" else name for name in node.input]
    signature = GraphSignature(SIGNATURE.taps, HIDDEN, 1, positions=positions)
    check_signature(model, signature, "probe.onnx")
    check_graph(model, "probe.onnx")
    return is_row_by_row(model, signature)


PROVED = {
    "a plain network": "h = MatMul(x, W) a = Tanh(h) scores = MatMul(a, v)",
    "softmax over features": "h = MatMul(x, W) a = Softmax<axis = 1>(h) scores = MatMul(a, v)",
    "layer norm": "h = LayerNormalization(x, ones) scores = MatMul(h, w)",
    "norm of each row": "scores = ReduceL2(x, a1)",
    "mean of each row, put back": "m = ReduceMean<keepdims = 0>(x, a1) scores = Unsqueeze(m, a1)",
    "turned over and back": "t = Transpose<perm = [1, 0]>(x) m = ReduceSum(t, a0) scores = Transpose(m)",
    "heads": "h = Reshape(x, two_by_four) m = ReduceMax<keepdims = 0>(h, a_1) scores = ReduceSum(m, a1)",
    "heads, counted": "h = Reshape(x, rows_first) m = ReduceMax<keepdims = 0>(h, a_1) scores = ReduceSum(m, a1)",
    "attention within a row": """h = Reshape(x, two_by_four) t = Transpose<perm = [0, 2, 1]>(h) s = MatMul(h, t) p = Softmax(s)
        o = MatMul(p, h) f = Flatten(o) scores = MatMul(f, w)""",
    "largest features": "top, at = TopK<axis = 1>(x, k) scores = ReduceSum(top, a1)",
    "features put among zeros": """s = Shape(x) z = ConstantOfShape(s) top, at = TopK<axis = 1>(x, k)
        f = ScatterElements<axis = 1>(z, at, top) r = LayerNormalization(f, ones) scores = MatMul(r, w)""",
    "chosen columns": "c = Gather<axis = 1>(x, perm) n = ReduceL2(c, a1) scores = Sqrt(n)",
    "halves": "a, b = Split<axis = 1>(x, split) m = ReduceMax(a, a1) n = ReduceMin(b, a1) scores = Sub(m, n)",
    "side by side": "y = Neg(x) c = Concat<axis = 1>(x, y) scores = ReduceLogSumExp(c, a1)",
    "einsum": 'scores = Einsum<equation = "nd,dk->nk">(x, w)',
    "squares by einsum": 'q = Einsum<equation = "nd,nd->n">(x, x) scores = Unsqueeze(q, a1)',
    "a constant expanded over the rows": """first = Slice(V, a0, a1, a1) s = Shape<start = 0, end = 1>(x) c = Concat<axis = 0>(s, a1)
        b = Expand(first, c) y = ReduceL1(x, a1) scores = Add(y, b)""",
    "sums along a row": "c = CumSum(x, one) scores = ReduceMax(c, a1)",
}  # fmt: skip

NOT_PROVED = {
    "mean of all rows": "m = ReduceMean(x, a0) y = Sub(x, m) scores = MatMul(y, w)",
    "mean of everything": "m = ReduceMean(x) y = Sub(x, m) scores = MatMul(y, w)",
    "softmax over rows": "p = Softmax<axis = 0>(x) scores = MatMul(p, w)",
    "sums along the rows": "c = CumSum(x, zero) scores = MatMul(c, w)",
    "first row": "f = Gather<axis = 0>(x, a0) y = Add(x, f) scores = MatMul(y, w)",
    "rows against rows": "t = Transpose(x) s = MatMul(x, t) p = Softmax(s) y = MatMul(p, x) scores = MatMul(y, w)",
    "rows against rows by einsum": 'y = Einsum<equation = "nd,md,mk->nk">(x, x, x) scores = MatMul(y, w)',
    "the row is summed over": 't = Einsum<equation = "nd->d">(x) u = Unsqueeze(t, a0) y = Add(x, u) scores = MatMul(y, w)',
    "where a row stands": """s = Shape(x) n = Gather<axis = 0>(s, zero) r = Range(zero, n, one) f = Cast<to = 1>(r) u = Unsqueeze(f, a1)
        y = MatMul(x, w) scores = Add(y, u)""",
    "how many rows there are": "s = Shape(x) n = Gather<axis = 0>(s, zero) f = Cast<to = 1>(n) y = MatMul(x, w) scores = Add(y, f)",
    "how many numbers there are": "n = Size(x) f = Cast<to = 1>(n) y = MatMul(x, w) scores = Add(y, f)",
    "turned over": "t = Transpose(x) f = Reshape(t, as_rows) scores = MatMul(f, w)",
    "a norm over all rows": "y = LpNormalization<axis = 0>(x) scores = MatMul(y, w)",
    "norm of each column": "t = Transpose(x) n = LpNormalization(t) u = Transpose(n) scores = MatMul(u, w)",
    "rows dropped": "c = Slice(x, a0, a1, a1) f = Squeeze(c, a1) b = Cast<to = 9>(f) y = Compress<axis = 0>(x, b) scores = MatMul(y, w)",
    "sorted rows": "y = MatMul(x, w) s = Shape<start = 0, end = 1>(x) scores, at = TopK<axis = 0>(y, s)",
    "rows backwards": "low = Neg(end) r = Slice(x, a_1, low, a0, a_1) scores = MatMul(r, w)",
    "a row taken for two": "r = Reshape(x, as_columns) m = ReduceMax(r) y = MatMul(x, w) scores = Add(y, m)",
    "rows grouped": """r = Reshape(x, by_four) q = ReduceMax<keepdims = 0>(r, a1) y = MatMul(q, v) m = ReduceMax(y) z = MatMul(x, w)
        scores = Add(z, m)""",
}  # fmt: skip


@pytest.mark.parametrize("kind", PROVED)
def test_operators_within_a_row_prove_it(kind: str) -> None:
    assert proved(PROVED[kind])


@pytest.mark.parametrize("kind", NOT_PROVED)
def test_operators_across_rows_prove_nothing(kind: str) -> None:
    assert not proved(NOT_PROVED[kind])


def test_positions_are_each_tokens_own() -> None:
    assert proved("e = Gather<axis = 0>(T, positions) h = MatMul(x, W) y = Add(h, e) scores = MatMul(y, v)", positions=True)
    assert not proved(
        "c = CumSum(positions, zero) e = Gather<axis = 0>(T, c) h = MatMul(x, W) y = Add(h, e) scores = MatMul(y, v)", positions=True
    )


@pytest.mark.parametrize("kind", [*ROW_BY_ROW, *DISHONEST])
def test_steps_of_random_graphs_are_proved_if_they_are_honest(kind: str) -> None:
    context = "causal" if kind in NEEDS_SEQUENCES else "pointwise"
    recipe = Recipe(context, None, False, "", (Step(kind, 3, 0), Step("softmax", 0, 0)))
    signature = GraphSignature(SIGNATURE.taps, HIDDEN, 1, cu_seqlens=recipe.contextual)
    assert is_row_by_row(graph_of(recipe), signature) == (kind in ROW_BY_ROW)


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(recipe=recipes())
def test_no_random_graph_is_proved_with_a_step_that_is_not_row_by_row(recipe: Recipe) -> None:
    signature = GraphSignature(
        (Tap("resid_post", 1),),
        8,
        1,
        recipe.contextual,
        recipe.positions,
        OutputPer.ROLLOUT if recipe.context == "rollout" else OutputPer.TOKEN,
    )
    if is_row_by_row(graph_of(recipe), signature):
        without = () if recipe.contextual else NEEDS_SEQUENCES  # such a step is another then
        assert {step.kind for step in recipe.steps} <= {*ROW_BY_ROW, *POSITIONED, *without}


@pytest.mark.parametrize(
    ("module", "signature"),
    [
        (TopKFeature, GraphSignature(SIGNATURE.taps, HIDDEN_SIZE, 1)),
        (Decaying, GraphSignature(SIGNATURE.taps, HIDDEN_SIZE, 1, positions=True)),
        (WindowedAttention, GraphSignature(SIGNATURE.taps, HIDDEN_SIZE, 1, cu_seqlens=True)),
    ],
)
def test_what_torch_exports_is_proved_if_it_sees_one_token(module: type[torch.nn.Module], signature: GraphSignature) -> None:
    exported = torch_probe(module(), unit=ScoreUnit.VALUE).export(signature)
    assert is_row_by_row(exported, signature) != signature.cu_seqlens


def test_several_taps_are_proved() -> None:
    signature = GraphSignature((Tap("resid_pre", 1), Tap("final_norm")), HIDDEN_SIZE, 1)
    assert is_row_by_row(torch_probe(TwoTaps(), unit=ScoreUnit.VALUE).export(signature), signature)


@pytest.mark.parametrize(
    "estimator",
    [RandomForestClassifier(3, max_depth=2), make_pipeline(StandardScaler(), Normalizer(), RandomForestClassifier(3, max_depth=2)),
     GradientBoostingRegressor(n_estimators=3)],
    ids=lambda estimator: type(estimator).__name__,
)  # fmt: skip
def test_what_scikit_learn_exports_is_proved(estimator: object) -> None:
    x = RANDOM.standard_normal((60, HIDDEN))
    estimator.fit(x, x[:, 0] > 0)  # type: ignore[attr-defined]
    assert is_row_by_row(sklearn_probe(estimator).export(SIGNATURE), SIGNATURE)  # type: ignore[arg-type]
