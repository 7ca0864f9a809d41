"""A graph is a network of layers only where that is certain; then its layers score as the graph does."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch_probes
from hypothesis import given, settings
from hypothesis import strategies as st
from models import HIDDEN_SIZE
from sklearn.linear_model import Lasso, LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from probescore.types import ScoreUnit, Tap
from probescore_probes.exporting import linear_probe, sklearn_probe, torch_probe
from probescore_server.probes.format.graph import GraphSignature
from probescore_server.probes.stacking.graph_reader import read_network
from probescore_server.probes.stacking.stack import stack_networks

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.standard_normal((20, HIDDEN_SIZE)).astype(np.float32)
FEATURES = 12

WEIGHTS = {
    "mean": RANDOM.standard_normal(HIDDEN_SIZE),
    "std": RANDOM.random(HIDDEN_SIZE) + 0.5,
    "W": RANDOM.standard_normal((HIDDEN_SIZE, FEATURES)) / 4,
    "b": RANDOM.standard_normal(FEATURES),
    "row": RANDOM.standard_normal((1, FEATURES)),
    "threshold": RANDOM.random(FEATURES),
    "D": RANDOM.standard_normal((FEATURES, 2)),
    "column": RANDOM.standard_normal((FEATURES, 1)),
    "pair": RANDOM.standard_normal(2),
    "off": np.zeros(()),
    "half": np.array(0.5),
    "vector": RANDOM.standard_normal(FEATURES),
    "S": RANDOM.standard_normal((FEATURES, FEATURES)) / 4,
}


def graph(body: str) -> tuple[onnx.ModelProto, GraphSignature]:
    """A graph over ``x`` in ONNX text; its labels are what it says."""
    labels = 2 if "[2]" in body else 1
    text = f'<ir_version: 9, opset_import: ["" : 18]> probe (float[tokens, {HIDDEN_SIZE}] x) => (float[tokens, {labels}] scores) '
    model = onnx.parser.parse_model(text + "{" + body.replace("[2]", "") + "}")
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in WEIGHTS.items() if name in used
    )
    onnx.checker.check_model(model, full_check=True)
    return model, GraphSignature((Tap("final_norm"),), HIDDEN_SIZE, labels)


def renamed(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    model.graph.input[0].name = name
    for node in model.graph.node:
        node.input[:] = [name if each == "x" else each for each in node.input]
    return model


def assert_layers_score_as_the_graph(model: onnx.ModelProto, signature: GraphSignature) -> None:
    model = renamed(model, str(signature.taps[0]))
    model.ir_version = 9
    network = read_network(model, signature)
    assert network is not None
    scores = torch.empty((len(ROWS), signature.labels))
    stack_networks([network.layers], torch.device("cpu")).score(torch.from_numpy(ROWS), scores)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {str(signature.taps[0]): ROWS})
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5 * expected.std())


# ------------------------------------------------------------------------------------------------------------------------- read

CONSTANTS = """one = Constant<value_ints = [1]>() zero = Constant<value_ints = [0]>() k = Constant<value_ints = [4]>()
    two = Constant<value_ints = [-1, 3]>() second = Constant<value_ints = [1]>() third = Constant<value_int = 2>()
    places = Constant<value = int64[2, 1] {5, 0}>()
    as_column = Constant<value_ints = [-1, 1]>() end = Constant<value_ints = [9223372036854775807]>() """

READ = {
    "neurons": "y = Mul(x, mean) two = Constant<value_ints = [7, 1]>() scores = Gather<axis = 1>(y, two) [2]",
    "matrix-and-bias": "y = MatMul(x, W) z = Add(y, b) scores = MatMul(z, D) [2]",
    "a-constant-before-and-after-a-selection": """y = MatMul(x, W) a = Relu(y) c = Add(a, b)
        order = Constant<value_ints = [3, 1, 0, 2, 5, 4, 11, 6, 7, 8, 9, 10]>()
        g = Gather<axis = 1>(c, order) h = Add(g, b) scores = MatMul(h, D) [2]""",
    "scaled-product": "y = Gemm<alpha = 0.5, beta = 2.0>(x, W, b) scores = MatMul(y, D) [2]",
    "standardised": "c = Sub(x, mean) s = Div(c, std) y = Gemm(s, W, row) scores = MatMul(y, D) [2]",
    "bias-first": "y = MatMul(x, W) z = Add(row, y) n = Neg(z) r = Sub(half, n) scores = MatMul(r, D) [2]",
    "relu": "y = MatMul(x, W) z = Add(y, b) a = Relu(z) scores = MatMul(a, D) [2]",
    "two-hidden-layers": "y = MatMul(x, W) a = Tanh(y) h = MatMul(a, D) g = Sigmoid(h) scores = Mul(g, pair) [2]",
    "silu": "y = Gemm(x, W, b) s = Sigmoid(y) a = Mul(y, s) scores = MatMul(a, D) [2]",
    "jump-relu": "y = Gemm(x, W, b) on = Greater(y, threshold) a = Where(on, y, off) scores = MatMul(a, D) [2]",
    "jump-relu-product": "y = Gemm(x, W, b) on = LessOrEqual(threshold, y) f = Cast<to = 1>(on) a = Mul(f, y) scores = MatMul(a, D) [2]",
    "selected-features": CONSTANTS + "y = MatMul(x, W) z = Add(y, b) a = Relu(z) scores = Gather<axis = 1>(a, two) [2]",
    "feature-without-axis": CONSTANTS + "y = MatMul(x, W) a = Relu(y) f = Gather<axis = 1>(a, third) scores = Unsqueeze(f, one)",
    "features-of-a-transpose": CONSTANTS
    + "y = MatMul(x, W) a = Tanh(y) t = Transpose(a) g = GatherND(t, places) scores = Transpose<perm = [1, 0]>(g) [2]",
    "rows-of-a-transpose": CONSTANTS + "y = MatMul(x, W) t = Transpose(y) g = Gather(t, second) scores = Transpose(g)",
    "slice": CONSTANTS + "y = MatMul(x, W) a = Relu(y) f = Slice(a, k, end, one, k) scores = Identity(f) [2]",
    "column-as-vector": CONSTANTS + "y = MatMul(x, W) v = MatMul(y, vector) s = Sigmoid(v) scores = Reshape(s, as_column)",
    "squeezed": CONSTANTS + "y = Gemm(x, W, b) v = MatMul(y, column) q = Squeeze(v, one) h = Mul(q, half) scores = Unsqueeze(h, one)",
    "other-class": CONSTANTS
    + """y = MatMul(x, W) v = MatMul(y, column) p = Sigmoid(v) q = Sub(half, p) both = Concat<axis = 1>(q, p)
        scores = Gather<axis = 1>(both, second)""",
    "top-k": CONSTANTS
    + """y = Gemm(x, W, b) best, where = TopK(y, k) r = Relu(best) s = Shape(y) nothing = Expand(off, s)
        a = ScatterElements<axis = 1>(nothing, where, r) scores = MatMul(a, D) [2]""",
    "top-k-of-relu": CONSTANTS
    + """y = Gemm(x, W, b) r = Relu(y) best, where = TopK<axis = 1>(r, k) h = Mul(best, half) nothing = Mul(y, off)
        a = ScatterElements<axis = -1>(nothing, where, h) scores = Gather<axis = 1>(a, second)""",
    "top-k-among-filled-zeros": CONSTANTS
    + """y = Gemm(x, W, b) best, where = TopK(y, k) s = Shape(y) nothing = ConstantOfShape(s)
        a = ScatterElements<axis = 1>(nothing, where, best) scores = MatMul(a, D) [2]""",
}


@pytest.mark.parametrize("name", READ)
def test_layers_score_as_the_graph_does(name: str) -> None:
    assert_layers_score_as_the_graph(*graph(READ[name]))


MODULES = {
    "mlp": (torch_probes.Mlp(), 2),
    "jump-relu": (torch_probes.JumpReluFeatures(), 2),
    "top-k": (torch_probes.TopKFeature(), 1),
    **{
        type(activation).__name__: (torch.nn.Sequential(torch.nn.Linear(HIDDEN_SIZE, 8), activation, torch.nn.Linear(8, 1)), 1)
        for activation in (
            torch.nn.ReLU(),
            torch.nn.SiLU(),
            torch.nn.GELU("tanh"),
            torch.nn.LeakyReLU(),
            torch.nn.ELU(),
            torch.nn.Softplus(),
        )
    },
}


@pytest.mark.parametrize("name", MODULES)
def test_what_torch_exports_is_read(name: str) -> None:
    module, labels = MODULES[name]
    signature = GraphSignature((Tap("resid_post", 1),), HIDDEN_SIZE, labels)
    assert_layers_score_as_the_graph(torch_probe(module, unit=ScoreUnit.VALUE).export(signature), signature)


FLAGS = (ROWS[:, 0] > 0).astype(int)
ESTIMATORS = {
    "logistic-regression": LogisticRegression(),
    "standardised": make_pipeline(StandardScaler(), LogisticRegression()),
    "probabilities": make_pipeline(MinMaxScaler(), LogisticRegression()),
    "regression": make_pipeline(StandardScaler(), Lasso(0.01)),
    "perceptron": MLPClassifier((8,), max_iter=5),
}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.filterwarnings("ignore")
def test_what_scikit_learn_is_converted_to_is_read(name: str) -> None:
    signature = GraphSignature((Tap("resid_post", 1),), HIDDEN_SIZE, 1)
    assert_layers_score_as_the_graph(sklearn_probe(ESTIMATORS[name].fit(ROWS, FLAGS)).export(signature), signature)


def test_a_graph_says_how_it_standardises_its_rows() -> None:
    network = read_network(renamed(graph(READ["standardised"])[0], "final_norm"), graph(READ["standardised"])[1])
    assert network is not None
    np.testing.assert_allclose(network.centre, WEIGHTS["mean"], rtol=1e-5)
    np.testing.assert_allclose(network.spread, WEIGHTS["std"], rtol=1e-5)


# -------------------------------------------------------------------------------------------------------------------- not certain

UNKNOWN = {
    "an-operator-that-mixes-columns": "y = MatMul(x, W) a = Softmax(y) scores = MatMul(a, D) [2]",
    "a-norm": "y = LayerNormalization(x, mean) h = MatMul(y, W) scores = MatMul(h, D) [2]",
    "an-activation-before-the-first-matrix": "a = Tanh(x) y = MatMul(a, W) scores = MatMul(y, D) [2]",
    "a-product-of-two-maps": "y = MatMul(x, W) u = MatMul(y, D) v = MatMul(y, D) scores = Mul(u, v) [2]",
    "a-sum-with-an-earlier-layer": "y = MatMul(x, W) a = Relu(y) u = MatMul(a, D) v = MatMul(y, D) scores = Add(u, v) [2]",
    "rows-that-are-joined": "y = MatMul(x, W) a = MatMul(y, D) scores = Concat<axis = 0>(a, a) [2]",
    "a-constant-that-widens": "y = MatMul(x, W) v = MatMul(y, column) scores = Add(v, pair) [2]",
    "double-precision": "d = Cast<to = 11>(x) f = Cast<to = 1>(d) y = MatMul(f, W) scores = MatMul(y, D) [2]",
    "the-smallest-instead-of-the-largest": CONSTANTS
    + """y = MatMul(x, W) best, where = TopK<largest = 0>(y, k) nothing = Mul(y, off)
        a = ScatterElements<axis = 1>(nothing, where, best) scores = MatMul(a, D) [2]""",
    "the-largest-of-each-column": CONSTANTS
    + """y = MatMul(x, W) best, where = TopK<axis = 0>(y, k) nothing = Mul(y, off)
        a = ScatterElements<axis = 0>(nothing, where, best) scores = MatMul(a, D) [2]""",
    "largest-among-other-numbers": CONSTANTS
    + """y = MatMul(x, W) best, where = TopK(y, k) a = ScatterElements<axis = 1>(y, where, best) scores = MatMul(a, D) [2]""",
    "largest-that-are-added": CONSTANTS
    + """y = MatMul(x, W) best, where = TopK(y, k) nothing = Mul(y, off)
        a = ScatterElements<axis = 1, reduction = "add">(nothing, where, best) scores = MatMul(a, D) [2]""",
    "places-of-other-numbers": CONSTANTS
    + """y = MatMul(x, W) n = Neg(y) best, mine = TopK(y, k) others, where = TopK(n, k) nothing = Mul(y, off)
        a = ScatterElements<axis = 1>(nothing, where, best) scores = MatMul(a, D) [2]""",
    "sorted-numbers-with-a-constant-each": """k = Constant<value_ints = [12]>() y = MatMul(x, W) best, where = TopK(y, k)
        nothing = Mul(y, off) shifted = Add(best, b) a = ScatterElements<axis = 1>(nothing, where, shifted) scores = MatMul(a, D) [2]""",
    "sorted-numbers-as-features": """k = Constant<value_ints = [12]>() y = MatMul(x, W) best, where = TopK(y, k)
        scores = MatMul(best, D) [2]""",
    "features-of-both-values": CONSTANTS
    + """y = MatMul(x, W) a = Relu(y) both = Concat<axis = 1>(y, a) each = Constant<value_ints = [0, 12]>()
        scores = Gather<axis = 1>(both, each) [2]""",
    "a-reversed-slice": CONSTANTS
    + """y = MatMul(x, W) back = Constant<value_ints = [-1]>() first = Constant<value_ints = [1]>() last = Constant<value_ints = [-1]>()
        until = Constant<value_ints = [-3]>() scores = Slice(y, last, until, one, back) [2]""",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_graphs_that_are_not_certainly_layers_stay_graphs(name: str) -> None:
    model, signature = graph(UNKNOWN[name])
    assert read_network(renamed(model, "final_norm"), signature) is None


@pytest.mark.parametrize("changes", [{"taps": (Tap("final_norm"), Tap("resid_pre", 1))}, {"positions": True}, {"cu_seqlens": True}])
def test_graphs_that_read_more_than_one_row_of_one_tap_stay_graphs(changes: dict[str, object]) -> None:
    signature = GraphSignature(**({"taps": (Tap("final_norm"),), "hidden_size": HIDDEN_SIZE, "labels": 1} | changes))  # type: ignore[arg-type]
    plain = GraphSignature((Tap("final_norm"),), HIDDEN_SIZE, 1)
    assert read_network(linear_probe(np.ones(HIDDEN_SIZE)).export(plain), signature) is None


STEPS = (
    "{} = Relu({})", "{} = Tanh({})", "{} = Neg({})", "{} = Identity({})", "{} = Add({}, b)", "{} = Sub(half, {})",
    "{} = Mul({}, threshold)", "{} = Div({}, threshold)", "{} = LeakyRelu<alpha = 0.2>({})", "{} = Mul({}, {})", "{} = Where(on, {}, off)",
    "{} = MatMul({}, S)", "{} = Transpose({})", "{} = Gather<axis = 1>({}, order)", "{} = Add({}, y)", "{} = Softmax({})",
)  # fmt: skip


@settings(max_examples=200)
@given(steps=st.lists(st.sampled_from(STEPS), max_size=6))
def test_whatever_is_read_scores_as_the_graph_does(steps: list[str]) -> None:
    body, latest = "order = Constant<value_ints = [3, 1, 0, 2, 5, 4, 11, 6, 7, 8, 9, 10]>() y = MatMul(x, W) on = Greater(y, half) ", "y"
    for number, step in enumerate(steps):
        body += step.format(f"v{number}", *[latest] * 2) + " "
        latest = f"v{number}"
    try:
        model, signature = graph(f"{body} scores = MatMul({latest}, D) [2]")
    except onnx.shape_inference.InferenceError:
        return  # a transposed value where its shape does not fit
    if read_network(renamed(model, "final_norm"), signature) is not None:
        assert_layers_score_as_the_graph(model, signature)
