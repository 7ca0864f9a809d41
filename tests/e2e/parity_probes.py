"""Probes of every kind, each written twice: as the graph that a server runs over packed rows, and as plain numpy over one rollout.

The two share their weights and nothing else; the plain one loops where the graph masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from parity_models import HIDDEN

from probescore.types import OutputPer
from probescore_server.probes.format.manifest import Context

Array = NDArray[np.floating[Any]]
Weights = dict[str, NDArray[np.float32]]
Plain = Callable[[Weights, list[Array], NDArray[np.int64]], Array]


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of probe.

    Attributes:
        body: ONNX text over inputs ``x0``, ``x1``, … ``(tokens, hidden)``, the weights, and ``cu_seqlens`` / ``positions`` where used.
        plain: the same for one rollout: its rows at each tap, ``(T, hidden)`` each, and their positions ``(T,)``.
        compared: how many of the labels are compared; those after them are thresholded and follow from the ones before.
    """

    name: str
    weights: Weights
    body: str
    plain: Plain
    labels: int = 1
    taps: int = 1
    context: Context = field(default_factory=Context)
    positions: bool = False
    compared: int | None = None

    @property
    def per(self) -> OutputPer:
        return OutputPer.ROLLOUT if self.context.kind == "rollout" else OutputPer.TOKEN

    def graph(self, taps: Sequence[str]) -> onnx.ModelProto:
        """The graph that reads ``taps``."""
        inputs = [f"float[tokens, {HIDDEN}] x{i}" for i in range(len(taps))]
        inputs += ["int64[bounds] cu_seqlens"] if self.context.kind != "pointwise" else []
        inputs += ["int64[tokens] positions"] if self.positions else []
        prelude = "" if self.context.kind == "pointwise" else _SEGMENTS
        rows = "rollouts" if self.per is OutputPer.ROLLOUT else "tokens"
        model = onnx.parser.parse_model(
            f'<ir_version: 9, opset_import: ["" : 18]> probe ({", ".join(inputs)}) => (float[{rows}, {self.labels}] scores) '
            f"{{ {prelude} {self.body} }}"
        )
        model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in self.weights.items())
        for i, tap in enumerate(taps):
            model.graph.input[i].name = tap
            for node in model.graph.node:
                node.input[:] = [tap if name == f"x{i}" else name for name in node.input]
        return model


# Which sequence each row belongs to (from 1), how far apart two rows are, and whether the first may look at the second.
_SEGMENTS = """
    zero = Constant<value_int = 0>() one = Constant<value_int = 1>()
    axis0 = Constant<value_ints = [0]>() axis1 = Constant<value_ints = [1]>()
    shape = Shape(x0) length = Gather<axis = 0>(shape, zero) row = Range(zero, length, one)
    row_ = Unsqueeze(row, axis1) _row = Unsqueeze(row, axis0) _bounds = Unsqueeze(cu_seqlens, axis0)
    begun = LessOrEqual(_bounds, row_) begun_int = Cast<to = 7>(begun) segment = ReduceSum<keepdims = 0>(begun_int, axis1)
    segment_ = Unsqueeze(segment, axis1) _segment = Unsqueeze(segment, axis0)
    same = Equal(segment_, _segment) behind = Sub(row_, _row) not_ahead = GreaterOrEqual(behind, zero) looks = And(same, not_ahead)
"""


def _random(seed: int, **shapes: tuple[int, ...]) -> Weights:
    random = np.random.default_rng(seed)
    return {name: (random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32) for name, shape in shapes.items()}


def _softmax(x: Array) -> Array:
    weights = np.exp(x - x.max())
    return np.asarray(weights / weights.sum())


def _linear(w: Weights, x: list[Array], positions: NDArray[np.int64]) -> Array:
    return x[0] @ w["W"] + w["b"]


LINEAR = Kind("linear", _random(1, W=(HIDDEN, 1), b=(1,)), "scores = Gemm(x0, W, b)", _linear)


def _mlp(w: Weights, x: list[Array], positions: NDArray[np.int64]) -> Array:
    return np.tanh(x[0] @ w["W1"] + w["b1"]) @ w["W2"] + w["b2"]


MLP = Kind(
    "mlp",
    _random(2, W1=(HIDDEN, 24), b1=(24,), W2=(24, 2), b2=(2,)),
    "h = Gemm(x0, W1, b1) a = Tanh(h) scores = Gemm(a, W2, b2)",
    _mlp,
    labels=2,
)


def _multi_tap(w: Weights, x: list[Array], positions: NDArray[np.int64]) -> Array:
    return 1 / (1 + np.exp(-(x[0] @ w["U"]))) + 1 / (1 + np.exp(-(x[1] @ w["V"])))


MULTI_TAP = Kind(
    "multi-tap",
    _random(3, U=(HIDDEN, 1), V=(HIDDEN, 1)),
    "a = MatMul(x0, U) b = MatMul(x1, V) p = Sigmoid(a) q = Sigmoid(b) scores = Add(p, q)",
    _multi_tap,
    taps=2,
)

FEATURES, TOP_K, THRESHOLD = 8, 3, 0.2


def _sparse(w: Weights, x: list[Array], select: Callable[[Array], NDArray[np.bool_]]) -> Array:
    pre = x[0] @ w["W"] + w["b"]
    return np.concatenate([pre, np.where(select(pre), pre, 0) @ w["D"]], axis=1)


def above_threshold(pre: Array) -> NDArray[np.bool_]:
    return pre > THRESHOLD


def among_top_k(pre: Array) -> NDArray[np.bool_]:
    return pre >= np.sort(pre, axis=1)[:, -TOP_K, None]


# The labels are the features' pre-activations, and a readout of the features that are left after the threshold.
JUMP_RELU = Kind(
    "sae-jumprelu",
    _random(4, W=(HIDDEN, FEATURES), b=(FEATURES,), D=(FEATURES, 1)),
    f"""pre = Gemm(x0, W, b) threshold = Constant<value_float = {THRESHOLD}>() off = Constant<value_float = 0.0>()
        fires = Greater(pre, threshold) features = Where(fires, pre, off)
        read = MatMul(features, D) scores = Concat<axis = 1>(pre, read)""",
    lambda w, x, positions: _sparse(w, x, above_threshold),
    labels=FEATURES + 1,
    compared=FEATURES,
)
TOP_K_SAE = Kind(
    "sae-topk",
    _random(5, W=(HIDDEN, FEATURES), b=(FEATURES,), D=(FEATURES, 1)),
    f"""pre = Gemm(x0, W, b) k = Constant<value_ints = [{TOP_K}]>() zero = Constant<value_float = 0.0>() off = Mul(pre, zero)
        largest, where = TopK<axis = 1>(pre, k) features = ScatterElements<axis = 1>(off, where, largest)
        read = MatMul(features, D) scores = Concat<axis = 1>(pre, read)""",
    lambda w, x, positions: _sparse(w, x, among_top_k),
    labels=FEATURES + 1,
    compared=FEATURES,
)

ATTENTION_WINDOW, WIDTH = 5, 16


def _windowed(w: Weights, x: list[Array], positions: NDArray[np.int64]) -> Array:
    queries, keys, values = (x[0] @ w[name] for name in ("Q", "K", "V"))
    scores = []
    for i in range(len(queries)):
        seen = slice(max(0, i - ATTENTION_WINDOW + 1), i + 1)
        scores.append(_softmax(keys[seen] @ queries[i] / 4) @ values[seen])
    return np.array(scores)


WINDOWED = Kind(
    "windowed-attention",
    _random(6, Q=(HIDDEN, WIDTH), K=(HIDDEN, WIDTH), V=(HIDDEN, 1)),
    f"""window = Constant<value_int = {ATTENTION_WINDOW}>() in_window = Less(behind, window) seen = And(looks, in_window)
        q = MatMul(x0, Q) k = MatMul(x0, K) v = MatMul(x0, V) kt = Transpose<perm = [1, 0]>(k) qk = MatMul(q, kt)
        scale = Constant<value_float = 0.25>() logits = Mul(qk, scale) never = Constant<value_float = -1e30>()
        masked = Where(seen, logits, never) p = Softmax<axis = 1>(masked) scores = MatMul(p, v)""",
    _windowed,
    context=Context(kind="causal", window=ATTENTION_WINDOW, sees_prompt=True),
)

DECAY = 0.7


def _smoothed(w: Weights, x: list[Array], positions: NDArray[np.int64]) -> Array:
    scores = x[0] @ w["W"]
    for i in range(1, len(scores)):
        scores[i] = DECAY * scores[i - 1] + (1 - DECAY) * scores[i]
    return scores


SMOOTHED = Kind(
    "ema",
    _random(7, W=(HIDDEN, 1)),
    f"""s = MatMul(x0, W) decay = Constant<value_float = {DECAY}>() fresh = Constant<value_float = {1 - DECAY}>()
        unit = Constant<value_float = 1.0>() off = Constant<value_float = 0.0>()
        first = Equal(_bounds, row_) first_int = Cast<to = 7>(first) firsts = ReduceSum<keepdims = 0>(first_int, axis1)
        is_first = Greater(firsts, zero) gain = Where(is_first, unit, fresh)
        age = Max(behind, zero) age_float = Cast<to = 1>(age) power = Pow(decay, age_float) weight = Mul(power, gain)
        kept = Where(looks, weight, off) scores = MatMul(kept, s)""",
    _smoothed,
    context=Context(kind="causal"),
)


def _pooled(w: Weights, x: list[Array], positions: NDArray[np.int64]) -> Array:
    attention = _softmax((x[0] @ w["Q"])[:, 0] + w["slope"][0] * positions)
    return (attention @ (x[0] @ w["V"]) + w["b"])[None, :]


_POOLED_BODY = """count = Shape(cu_seqlens) counted = Squeeze(count, axis0) rollout = Range(one, counted, one)
    rollout_ = Unsqueeze(rollout, axis1) mine = Equal(rollout_, _segment)
    q = MatMul(x0, Q) late = Cast<to = 1>(positions) late_ = Unsqueeze(late, axis1) bias = Mul(late_, slope) looked = Add(q, bias)
    flat = Transpose<perm = [1, 0]>(looked) never = Constant<value_float = -1e30>()
    masked = Where(mine, flat, never) p = Softmax<axis = 1>(masked) v = MatMul(x0, V) pooled = MatMul(p, v) scores = Add(pooled, b)"""
_POOLED_WEIGHTS = _random(8, Q=(HIDDEN, 1), V=(HIDDEN, 2), b=(2,)) | {"slope": np.array([0.05], np.float32)}

POOLED = Kind("attention-pooling", _POOLED_WEIGHTS, _POOLED_BODY, _pooled, labels=2, context=Context(kind="rollout"), positions=True)
POOLED_WITH_PROMPT = Kind(
    "attention-pooling-with-prompt",
    _POOLED_WEIGHTS,
    _POOLED_BODY,
    _pooled,
    labels=2,
    context=Context(kind="rollout", sees_prompt=True),
    positions=True,
)

HEADS = 4


def multi_head(heads: int) -> Kind:
    """Attention pooling with several heads. Its weights have the same shapes whatever their number, so that any number loads."""
    width = WIDTH // heads

    def plain(w: Weights, x: list[Array], positions: NDArray[np.int64]) -> Array:
        keys, values = x[0] @ w["K"], x[0] @ w["V"]
        heads_of = [slice(h * width, (h + 1) * width) for h in range(heads)]
        pooled = [_softmax(keys[:, head] @ w["query"][head]) @ values[:, head] for head in heads_of]
        return (np.concatenate(pooled) @ w["O"])[None, :]

    body = f"""count = Shape(cu_seqlens) counted = Squeeze(count, axis0) rollout = Range(one, counted, one)
        rollout_ = Unsqueeze(rollout, axis1) mine = Equal(rollout_, _segment) axis2 = Constant<value_ints = [2]>()
        by_head = Constant<value_ints = [0, {heads}, {width}]>() together = Constant<value_ints = [0, {WIDTH}]>()
        k = MatMul(x0, K) kq = Mul(k, query) kqh = Reshape(kq, by_head) logits = ReduceSum<keepdims = 0>(kqh, axis2)
        logits_t = Transpose<perm = [1, 0]>(logits) logits_h = Unsqueeze(logits_t, axis1) never = Constant<value_float = -1e30>()
        masked = Where(mine, logits_h, never) p = Softmax<axis = 2>(masked)
        v = MatMul(x0, V) vh = Reshape(v, by_head) vht = Transpose<perm = [1, 0, 2]>(vh) pooled = MatMul(p, vht)
        pooled_t = Transpose<perm = [1, 0, 2]>(pooled) flat = Reshape(pooled_t, together) scores = MatMul(flat, O)"""
    weights = _random(9, K=(HIDDEN, WIDTH), V=(HIDDEN, WIDTH), O=(WIDTH, 1)) | {"query": 2 * _random(10, query=(1, WIDTH))["query"][0]}
    return Kind(f"{heads}-heads", weights, body, plain, context=Context(kind="rollout"))


KINDS = (LINEAR, MLP, MULTI_TAP, JUMP_RELU, TOP_K_SAE, WINDOWED, SMOOTHED, POOLED, POOLED_WITH_PROMPT)
