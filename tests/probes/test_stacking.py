"""Networks in a stack score as each of them alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probescore_server.probes.stacking.expressions import Apply, Constant, Expression, Input
from probescore_server.probes.stacking.layered_network import Layer
from probescore_server.probes.stacking.stack import Layers, stack_networks

WIDTH, FEATURES = 6, 10
CPU = torch.device("cpu")
ROWS = np.random.default_rng(0).standard_normal((9, WIDTH)).astype(np.float32)

RELU = Apply("Relu", (Input(),))
JUMP_RELU = Apply("Where", (Apply("Greater", (Input(), Constant(0))), Input(), Constant(1)))
TOP_K = Apply("Where", (Apply("TopK", (Input(),), 3), RELU, Constant(0)))


def plainly(activation: Expression, layer: Layer, values: np.ndarray) -> np.ndarray:
    """The four activations of these tests, in numpy."""
    if activation == RELU:
        return np.maximum(values, 0)
    if activation == JUMP_RELU:
        return np.where(values > layer.constants[0], values, 0)
    if activation == TOP_K:
        largest = np.argsort(-values, axis=1, kind="stable")[:, :3]
        kept = np.zeros_like(values)
        np.put_along_axis(kept, largest, np.take_along_axis(values, largest, 1), 1)
        return np.maximum(kept, 0)
    return values


def alone(layers: Layers) -> np.ndarray:
    values = ROWS.astype(np.float64)
    for layer in layers:
        values = plainly(layer.activation, layer, values @ layer.weight.T.astype(np.float64) + layer.bias)
    return values


def layer(seed: int, inputs: int, outputs: int, activation: Expression = Input(), sparsity: float = 0.0) -> Layer:  # noqa: B008
    random = np.random.default_rng(seed)
    weight = random.standard_normal((outputs, inputs)) * (random.random((outputs, inputs)) >= sparsity)
    constants = {JUMP_RELU: (random.random(outputs), np.zeros(outputs)), TOP_K: (np.zeros(outputs),)}.get(activation, ())
    return Layer(
        weight.astype(np.float32),
        random.standard_normal(outputs).astype(np.float32),
        activation,
        tuple(constant.astype(np.float32) for constant in constants),
    )


def scores(networks: list[Layers], selection: list[int] | None = None) -> np.ndarray:
    stack = stack_networks(networks, CPU)
    stack = stack if selection is None else stack.select(selection)
    into = torch.empty((len(ROWS), sum(stack.labels)))
    stack.score(torch.from_numpy(ROWS), into)
    return into.numpy()


ENCODERS = [layer(seed, WIDTH, FEATURES, activation) for seed, activation in enumerate((RELU, JUMP_RELU, TOP_K))]
seeds, labels = st.integers(0, 999), st.integers(1, 3)
linear = st.builds(lambda seed, out: (layer(seed, WIDTH, out),), seeds, labels)
mlp = st.builds(
    lambda seed, hidden, out: (layer(seed, WIDTH, hidden, RELU), layer(seed + 1, hidden, out)), seeds, st.sampled_from((4, 5)), labels
)
deep = st.builds(lambda seed: (layer(seed, WIDTH, 4, RELU), layer(seed + 1, 4, 4, RELU), layer(seed + 2, 4, 1)), seeds)
features = st.builds(
    lambda encoder, seed, out, sparsity: (encoder, layer(seed, FEATURES, out, sparsity=sparsity)),
    st.sampled_from(ENCODERS),
    seeds,
    labels,
    st.sampled_from((0.0, 0.5, 0.9, 1.0)),
)
raw_features = st.builds(lambda seed: (layer(seed, WIDTH, 3, JUMP_RELU),), seeds)
networks = st.lists(st.one_of(linear, mlp, deep, features, raw_features), min_size=1, max_size=8)


@given(networks=networks, data=st.data())
def test_any_selection_of_networks_scores_as_each_alone(networks: list[Layers], data: st.DataObject) -> None:
    selection = data.draw(st.lists(st.sampled_from(range(len(networks))), min_size=1, unique=True))
    expected = np.concatenate([alone(networks[number]) for number in selection], axis=1)
    np.testing.assert_allclose(scores(networks, selection), expected, rtol=0, atol=1e-5 * (1 + expected.std()))


@settings(max_examples=20)
@given(networks=networks)
def test_long_inputs_are_scored_in_pieces(networks: list[Layers]) -> None:
    whole = scores(networks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("probescore_server.probes.stacking.stack.MAX_INNER_NUMBERS", 1)
        np.testing.assert_allclose(scores(networks), whole, rtol=0, atol=1e-5 * (1 + whole.std()))


@pytest.mark.parametrize("encoder", ENCODERS, ids=["relu", "jump-relu", "top-k"])
def test_networks_that_begin_with_the_same_layer_hold_it_once(encoder: Layer) -> None:
    networks = [(encoder, layer(seed, FEATURES, 1)) for seed in range(20)]
    numbers = sum(tensor.numel() for tensor in stack_networks(networks, CPU).tensors())
    assert numbers == encoder.weight.size + FEATURES * (1 + len(encoder.constants)) + 20 * (FEATURES + 1)


def test_features_that_no_later_layer_reads_are_not_computed() -> None:
    first, second = ENCODERS[1], layer(0, FEATURES, 1)
    second.weight[:, 2:] = 0
    numbers = sum(tensor.numel() for tensor in stack_networks([(first, second)], CPU).tensors())
    assert numbers == 2 * (WIDTH + 1 + 2) + 2 + 1
    np.testing.assert_allclose(scores([(first, second)]), alone((first, second)), atol=1e-5)


def test_of_equal_numbers_the_first_are_the_largest() -> None:
    equal = Layer(np.ones((4, WIDTH), np.float32), np.full(4, 50, np.float32), TOP_K, (np.zeros(4, np.float32),))
    kept = scores([(equal,)])
    assert (kept > 0).tolist() == [[True, True, True, False]] * len(ROWS)


@pytest.mark.parametrize("chosen", ["high", "medium"])
def test_products_are_precise_whatever_the_process_has_chosen(chosen: str) -> None:
    before = torch.get_float32_matmul_precision()
    expected = scores([(layer(0, WIDTH, 3),)])
    torch.set_float32_matmul_precision(chosen)
    try:
        np.testing.assert_array_equal(scores([(layer(0, WIDTH, 3),)]), expected)
        assert torch.get_float32_matmul_precision() == chosen
    finally:
        torch.set_float32_matmul_precision(before)
