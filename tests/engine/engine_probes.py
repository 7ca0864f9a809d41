"""Small probes of every context, each as an ONNX graph and as plain numpy, and what they score without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from models import HIDDEN_SIZE
from numpy.typing import NDArray

from probescore.types import ScoreUnit
from probescore_probes.exporting import ProbeFunction, linear_probe, onnx_probe
from probescore_probes.reference import ReferenceModel
from probescore_probes.writing import write_probe
from probescore_server.probes.format.manifest import Context

Array = NDArray[np.float64]

WEIGHT = np.random.default_rng(7).standard_normal((HIDDEN_SIZE, 1)).astype(np.float32) / np.float32(HIDDEN_SIZE**0.5)
POSITION_STEP = 0.05
GOLDEN = (([1, 20, 33, 47], [9, 60, 2]), ([1, 5], [70, 12, 31, 44]))


@dataclass(frozen=True)
class Probe:
    """A probe to write: where it reads, what it computes, and the manifest's other fields."""

    name: str
    function: ProbeFunction
    taps: tuple[str, ...] = ("resid_post.1",)
    fields: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path, reference: ReferenceModel, **fields: Any) -> Path:
        settings = {"name": self.name, "version": "1", "taps": self.taps, "golden": GOLDEN} | self.fields | fields
        path = directory / f"{settings['name']}-{settings['version']}.onnx"
        write_probe(path, self.function, reference, **settings)
        return path


def linear(name: str = "linear", tap: str = "resid_post.1", *, unit: ScoreUnit = ScoreUnit.LOGIT, **fields: Any) -> Probe:
    """``score = activation · WEIGHT``."""
    return Probe(name, linear_probe(WEIGHT[:, 0], unit=unit), (tap,), fields)


def running_mean(name: str = "running-mean", *, sees_prompt: bool = False, **fields: Any) -> Probe:
    """Causal: the mean of ``activation · WEIGHT`` over the token and those before it."""
    context = Context(kind="causal", sees_prompt=sees_prompt)
    body = """
        one = Constant<value_int = 1>() zero = Constant<value_int = 0>()
        axis0 = Constant<value_ints = [0]>() axis1 = Constant<value_ints = [1]>()
        shape = Shape(y) length = Gather<axis = 0>(shape, zero) row = Range(zero, length, one)
        row_ = Unsqueeze(row, axis1) _bounds = Unsqueeze(cu_seqlens, axis0) begun = LessOrEqual(_bounds, row_)
        begun_int = Cast<to = 7>(begun) number = ReduceSum<keepdims = 0>(begun_int, axis1) sequence = Sub(number, one)
        first = Gather<axis = 0>(cu_seqlens, sequence) before = Gather<axis = 0>(sums, first) after = Add(row, one)
        until = Gather<axis = 0>(sums, after) sum = Sub(until, before) tokens = Sub(after, first)
        tokens_float = Cast<to = 1>(tokens) tokens_ = Unsqueeze(tokens_float, axis1) scores = Div(sum, tokens_)
    """

    def score(inputs: dict[str, Array]) -> Array:
        y = next(iter(inputs.values())) @ WEIGHT
        return y.cumsum(axis=0) / np.arange(1, len(y) + 1)[:, None]

    return Probe(name, onnx_probe(_graph(body, "tokens"), score, unit=ScoreUnit.VALUE), fields={"context": context} | fields)


def pooled_mean(name: str = "pooled-mean", *, sees_prompt: bool = False, unit: ScoreUnit = ScoreUnit.VALUE, **fields: Any) -> Probe:
    """Pools by itself: the mean of ``activation · WEIGHT`` over what it is given."""
    context = Context(kind="rollout", sees_prompt=sees_prompt)
    body = """
        from_first = Constant<value_ints = [0]>() from_second = Constant<value_ints = [1]>() axis1 = Constant<value_ints = [1]>()
        minus_one = Constant<value_ints = [-1]>() end = Constant<value_ints = [9223372036854775807]>()
        starts = Slice(cu_seqlens, from_first, minus_one) ends = Slice(cu_seqlens, from_second, end)
        before = Gather<axis = 0>(sums, starts) until = Gather<axis = 0>(sums, ends) sum = Sub(until, before)
        tokens = Sub(ends, starts) tokens_float = Cast<to = 1>(tokens) tokens_ = Unsqueeze(tokens_float, axis1) scores = Div(sum, tokens_)
    """

    def score(inputs: dict[str, Array]) -> Array:
        return (next(iter(inputs.values())) @ WEIGHT).mean(axis=0, keepdims=True)

    return Probe(name, onnx_probe(_graph(body, "rollouts"), score, unit=unit), fields={"context": context} | fields)


def positioned(name: str = "positioned", **fields: Any) -> Probe:
    """``score = activation · WEIGHT + POSITION_STEP · position``, the position in the whole rollout."""
    body = f"""
        step = Constant<value_float = {POSITION_STEP}>() axis1 = Constant<value_ints = [1]>() place = Cast<to = 1>(positions)
        place_ = Unsqueeze(place, axis1) moved = Mul(place_, step) scores = Add(y, moved)
    """

    def score(inputs: dict[str, Array]) -> Array:
        rows, positions = inputs.values()
        return rows @ WEIGHT + POSITION_STEP * positions[:, None]

    return Probe(name, onnx_probe(_graph(body, "tokens"), score, unit=ScoreUnit.VALUE), fields={"positions": True} | fields)


def _graph(body: str, rows: str) -> onnx.ModelProto:
    inputs = [f"float[tokens, {HIDDEN_SIZE}] x"]
    sums = ""
    if "cu_seqlens" in body:
        inputs.append("int64[bounds] cu_seqlens")
        sums = "axis = Constant<value_int = 0>() c = CumSum(y, axis) nothing = Constant<value = float[1, 1] {0.0}>() "
        sums += "sums = Concat<axis = 0>(nothing, c)"
    if "positions" in body:
        inputs.append("int64[tokens] positions")
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 18]> probe ({", ".join(inputs)}) => (float[{rows}, 1] scores) '
        f"{{ y = MatMul(x, W) {sums} {body} }}"
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(WEIGHT, "W"))
    model.graph.input[0].name = "resid_post.1"
    for node in model.graph.node:
        node.input[:] = ["resid_post.1" if name == "x" else name for name in node.input]
    return model


def plain(reference: ReferenceModel, *ids: Sequence[int], tap: str = "resid_post.1") -> Array:
    """``activation · WEIGHT`` of each token of one sequence, from plain Hugging Face; ``(T,)``."""
    sequence = np.concatenate([np.asarray(part, np.int64) for part in ids])
    activations = next(iter(reference.activations(sequence, [tap]).values()))
    scores: Array = (activations.astype(np.float64) @ WEIGHT.astype(np.float64))[:, 0]
    return scores
