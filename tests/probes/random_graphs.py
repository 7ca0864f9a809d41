"""Random probe graphs, honest and not, with the manifests that they might come with.

A graph is a chain of steps over features ``(tokens, WIDTH)``. Some keep to what the manifest says, some do for few rows, small numbers or
short sequences only, some never.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from numpy.typing import NDArray

WIDTH = 8
TAP = "resid_post.1"

ROW_BY_ROW = ("matrix", "tanh", "relu", "sigmoid", "normalise", "softmax", "largest", "clip", "norm", "square")
OF_SEQUENCE = ("causal mean", "window mean", "window attention", "place in sequence")
POSITIONED = ("positions", "table of positions")
NEEDS_SEQUENCES = ("fixed sequences", "search in fixed steps", "mean of the sequence", "longest only")
DISHONEST = (
    "mean of the batch", "neighbour", "neighbour if large", "sum so far", "beyond a row", "drop if large", "if many rows",
    "softmax over rows", "first row", "rows backwards", "number of rows", "twice if large", "if content", *NEEDS_SEQUENCES,
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One step; ``size`` says how large what it is about is: a window, a number of rows, a threshold."""

    kind: str
    size: int
    seed: int


@dataclass(frozen=True)
class Recipe:
    """A graph and its manifest."""

    context: str
    window: int | None
    positions: bool
    pooling: str
    steps: tuple[Step, ...]

    @property
    def contextual(self) -> bool:
        return self.context != "pointwise"

    @property
    def manifest(self) -> dict[str, Any]:
        pools = self.context == "rollout"
        return {
            "inputs": [{"hook": "resid_post", "layer": 1}],
            "context": {"kind": self.context, "window": self.window},
            "cu_seqlens": self.contextual,
            "positions": self.positions,
            "output": {"unit": "value", "labels": ["score"], "per": "rollout" if pools else "token"},
            "reduce_on": "value",
            "reduction": None if pools else "mean",
        }


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    context = draw(st.sampled_from(("pointwise", "causal", "causal", "rollout")))
    window = draw(st.sampled_from((None, 1, 3, 7, 40, 300))) if context == "causal" else None
    positions = draw(st.booleans())
    honest = [*ROW_BY_ROW, *(POSITIONED if positions else ())]
    if context != "pointwise":
        honest += OF_SEQUENCE * 2
    kinds = draw(st.lists(st.sampled_from(honest), max_size=4))
    if draw(st.sampled_from((True, False, False))):
        kinds.insert(draw(st.integers(0, len(kinds))), draw(st.sampled_from(DISHONEST)))
    sizes = st.sampled_from((1, 2, 3, 5, 7, 17, 40, 90, 300, 2000))
    steps = []
    for kind in kinds:
        size = draw(sizes)
        # mostly as wide as the manifest says, and then only once: two windows see further than one
        if kind in OF_SEQUENCE and window is not None and draw(st.integers(0, 4)):
            size = window if not any(step.kind in OF_SEQUENCE for step in steps) else 1
        steps.append(Step(kind, size, draw(st.integers(0, 2**16))))
    pooling = draw(st.sampled_from(("mean", "mean", "attention", "mean of all", "few sequences"))) if context == "rollout" else ""
    return Recipe(context, window, positions, pooling, tuple(steps))


@dataclass
class _Text:
    """A graph in the making, in ONNX's own notation."""

    recipe: Recipe
    lines: list[str] = field(default_factory=list)
    weights: dict[str, NDArray[Any]] = field(default_factory=dict)
    names: int = 0

    def constant(self, value: Any, dtype: type = np.float32) -> str:
        name = self._name("w")
        self.weights[name] = np.asarray(value, dtype)
        return name

    def ints(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def add(self, operator: str, *inputs: str, **attributes: int | str) -> str:
        name = self._name("v")
        given = f"<{', '.join(f'{key} = {value}' for key, value in attributes.items())}>" if attributes else ""
        self.lines.append(f"{name} = {operator}{given}({', '.join(inputs)})")
        return name

    def _name(self, letter: str) -> str:
        self.names += 1
        return f"{letter}{self.names}"

    # ------------------------------------------------------------------------------------------------------------------- pieces

    def count(self) -> str:
        return self.add("Gather", self.add("Shape", "x"), self.constant(0, np.int64), axis=0)

    def row(self) -> str:
        return self.add("Range", self.constant(0, np.int64), self.count(), self.constant(1, np.int64))

    def floats(self, value: str) -> str:
        return self.add("Cast", value, to=1)

    def column(self, value: str) -> str:
        return self.add("Unsqueeze", value, self.ints(1))

    def line(self, value: str) -> str:
        return self.add("Unsqueeze", value, self.ints(0))

    def starts(self) -> str:
        return self.add("Slice", "cu_seqlens", self.ints(0), self.ints(-1), self.ints(0))

    def ends(self) -> str:
        return self.add("Slice", "cu_seqlens", self.ints(1), self.ints(2**62), self.ints(0))

    def sequence(self) -> str:
        """Of each row, the number of its sequence."""
        begun = self.add("GreaterOrEqual", self.column(self.row()), self.line(self.ends()))
        return self.add("ReduceSum", self.add("Cast", begun, to=7), self.ints(1), keepdims=0)

    def seen(self, window: int | None, sequence: str | None = None) -> str:
        """``(tokens, tokens)``, which rows each sees."""
        sequence, row = sequence or self.sequence(), self.row()
        back = self.add("Sub", self.column(row), self.line(row))
        seen = self.add(
            "And",
            self.add("Equal", self.column(sequence), self.line(sequence)),
            self.add("GreaterOrEqual", back, self.constant(0, np.int64)),
        )
        return seen if window is None else self.add("And", seen, self.add("Less", back, self.constant(window, np.int64)))

    def mean(self, seen: str, h: str) -> str:
        weight = self.floats(seen)
        return self.add("Div", self.add("MatMul", weight, h), self.add("ReduceSum", weight, self.ints(1), keepdims=1))

    def masked_softmax(self, logits: str, seen: str) -> str:
        return self.add("Softmax", self.add("Where", seen, logits, self.constant(-np.inf)), axis=1)

    def whether(self, condition: str, then: str, otherwise: str) -> str:
        """An ``If`` over a scalar condition."""
        name = self._name("v")
        shape = f"float[n, {WIDTH}]"
        branches = [
            f"{key} = {key} () => ({shape} {name}{key}) {{ {name}{key} = Identity({value}) }}"
            for key, value in (("then_branch", then), ("else_branch", otherwise))
        ]
        self.lines.append(f"{name} = If<{', '.join(branches)}>({condition})")
        return name


def _weights(step: Step, *shape: int) -> NDArray[np.float64]:
    return np.random.default_rng(step.seed).standard_normal(shape) / np.sqrt(shape[0])


def _step(t: _Text, step: Step, h: str) -> str:
    size, contextual = step.size, t.recipe.contextual
    axis0, axis1 = t.ints(0), t.ints(1)
    match step.kind:
        case "matrix":
            return t.add("Add", t.add("MatMul", h, t.constant(_weights(step, WIDTH, WIDTH))), t.constant(_weights(step, WIDTH)))
        case "tanh" | "relu" | "sigmoid":
            return t.add(step.kind.capitalize(), h)
        case "normalise":
            return t.add("LayerNormalization", h, t.constant(np.ones(WIDTH)), axis=-1)
        case "softmax":
            return t.add("Softmax", h, axis=1)
        case "largest":
            t.lines.append(f"top{t.names}, where{t.names} = TopK<axis = 1>({h}, {axis0[:0] + t.ints(3)})")
            top = t.lines[-1].split(",")[0]
            last = t.add("Slice", top, t.ints(2), t.ints(3), axis1)
            return t.add("Where", t.add("GreaterOrEqual", h, last), h, t.constant(0.0))
        case "clip":
            return t.add("Clip", h, t.constant(-1.5), t.constant(1.5))
        case "norm":
            return t.add("Add", h, t.add("ReduceL2", h, axis1, keepdims=1))
        case "square":
            return t.add("Mul", h, h)
        case "positions":
            return t.add("Add", h, t.column(t.add("Mul", t.floats("positions"), t.constant(0.01))))
        case "table of positions":
            return t.add("Add", h, t.add("Gather", t.constant(_weights(step, max(size, 40), WIDTH)), "positions", axis=0))
        case "causal mean":
            return t.add("Add", h, t.mean(t.seen(t.recipe.window), h))
        case "window mean":
            return t.add("Add", h, t.mean(t.seen(size), h))
        case "window attention":
            query = t.add("MatMul", h, t.constant(_weights(step, WIDTH, 4)))
            logits = t.add("MatMul", query, t.add("Transpose", query))
            return t.add("MatMul", t.masked_softmax(logits, t.seen(size)), h)
        case "place in sequence":
            place = t.add("Sub", t.row(), t.add("Gather", t.starts(), t.sequence(), axis=0))
            return t.add("Add", h, t.column(t.add("Min", t.floats(place), t.constant(size - 1.0))))
    # ---- what is not honest
    first = t.add("Slice", h, t.ints(0), axis1, axis1)
    large = t.add("Greater", first, t.constant(1.0 + size / 10))
    match step.kind:
        case "mean of the batch":
            return t.add("Sub", h, t.add("ReduceMean", h, axis0, keepdims=1))
        case "neighbour" | "neighbour if large":
            last, rest = t.add("Slice", h, t.ints(-1), t.ints(2**62), axis0), t.add("Slice", h, axis0, t.ints(-1), axis0)
            rolled = t.add("Concat", last, rest, axis=0)
            if step.kind == "neighbour":
                return t.add("Add", h, rolled)
            return t.add("Where", t.add("Greater", rolled, t.constant(1.0 + size / 10)), rolled, h)
        case "sum so far":
            return t.add("CumSum", h, t.constant(0, np.int64))
        case "beyond a row":
            beyond = t.floats(t.add("Greater", t.row(), t.constant(size, np.int64)))
            return t.add("Add", h, t.column(beyond))
        case "drop if large":
            return t.add("Compress", h, t.add("Squeeze", t.add("Not", large), axis1), axis=0)
        case "twice if large":
            return t.add("Concat", h, t.add("Compress", h, t.add("Squeeze", large, axis1), axis=0), axis=0)
        case "if many rows":
            return t.whether(t.add("Greater", t.count(), t.constant(size, np.int64)), t.add("Neg", h), h)
        case "if content":
            largest = t.add("ReduceMax", first, keepdims=0)
            return t.whether(t.add("Greater", largest, t.constant(1.0 + size / 10)), t.add("Neg", h), h)
        case "softmax over rows":
            return t.add("Softmax", h, axis=0)
        case "first row":
            return t.add("Add", h, t.add("Gather", h, axis0, axis=0))
        case "rows backwards":
            return t.add("Slice", h, t.ints(-1), t.ints(-(2**62)), axis0, t.ints(-1))
        case "number of rows":
            return t.add("Add", h, t.add("Log", t.floats(t.count())))
    if not contextual:
        return t.add("Tanh", h)
    match step.kind:
        case "fixed sequences":
            ends = t.add("Slice", "cu_seqlens", axis1, t.ints(1 + size), axis0)
            begun = t.add("GreaterOrEqual", t.column(t.row()), t.line(ends))
            return t.mean(t.seen(t.recipe.window, t.add("ReduceSum", t.add("Cast", begun, to=7), axis1, keepdims=0)), h)
        case "search in fixed steps":
            low, high = t.add("Mul", t.row(), t.constant(0, np.int64)), t.add("Sub", t.add("Shape", "cu_seqlens"), axis1)
            for _ in range(size.bit_length()):
                middle = t.add("Div", t.add("Add", low, high), t.constant(2, np.int64))
                right = t.add("GreaterOrEqual", t.row(), t.add("Gather", "cu_seqlens", middle, axis=0))
                low, high = t.add("Where", right, middle, low), t.add("Where", right, high, middle)
            return t.mean(t.seen(t.recipe.window, low), h)
        case "mean of the sequence":
            sequence = t.sequence()
            return t.add("Sub", h, t.mean(t.add("Equal", t.column(sequence), t.line(sequence)), h))
        case "longest only":
            longest = t.add("ReduceMax", t.add("Sub", t.ends(), t.starts()), keepdims=0)
            return t.add("Div", h, t.floats(longest))
    raise ValueError(step.kind)


def _pool(t: _Text, h: str) -> str:
    starts, ends, row = t.starts(), t.ends(), t.line(t.row())
    if t.recipe.pooling == "few sequences":
        starts = t.add(
            "Concat",
            t.add("Slice", starts, t.ints(0), t.ints(3), t.ints(0)),
            t.add("Slice", "cu_seqlens", t.ints(2), t.ints(-2), t.ints(0)),
            axis=0,
        )
        starts = t.add("Slice", starts, t.ints(0), t.add("Shape", ends), t.ints(0))
    member = t.add("And", t.add("GreaterOrEqual", row, t.column(starts)), t.add("Less", row, t.column(ends)))
    if t.recipe.pooling == "attention":
        first = t.add("Transpose", t.add("Slice", h, t.ints(0), t.ints(1), t.ints(1)))
        return t.add("MatMul", t.masked_softmax(first, member), h)
    if t.recipe.pooling == "mean of all":
        return t.add("Div", t.add("MatMul", t.floats(member), h), t.floats(t.count()))
    return t.mean(member, h)


def graph_of(recipe: Recipe) -> onnx.ModelProto:
    """The graph of a recipe."""
    t = _Text(recipe)
    h = t.add("Identity", "x")
    for step in recipe.steps:
        h = _step(t, step, h)
    if recipe.context == "rollout":
        h = _pool(t, h)
    t.lines.append(f"scores = MatMul({h}, {t.constant(_weights(Step('', 0, 1), WIDTH, 1))})")
    inputs = [
        f"float[tokens, {WIDTH}] x",
        *["int64[bounds] cu_seqlens"] * recipe.contextual,
        *["int64[tokens] positions"] * recipe.positions,
    ]
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 18]> probe ({", ".join(inputs)}) => (float[rows, 1] scores) {{ {" ".join(t.lines)} }}'
    )
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in t.weights.items())
    model.graph.input[0].name = TAP
    _rename(model.graph.node)
    return model


def _rename(nodes: Sequence[onnx.NodeProto]) -> None:
    for node in nodes:
        node.input[:] = [TAP if name == "x" else name for name in node.input]
