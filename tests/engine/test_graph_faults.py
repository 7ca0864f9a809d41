"""A graph that fails on some rollouts, or gives them more or fewer scores than are due, costs these their scores and nobody else."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from engine_probes import WEIGHT, Probe, linear, pooled_mean
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BOS, HIDDEN_SIZE, tiny_model

from probescore.types import CompletionStatus, RolloutGroup, ScoreUnit, Tap
from probescore_probes.exporting import onnx_probe
from probescore_server import Engine
from probescore_server.backbone.base import Activations
from probescore_server.backbone.forest import Forest, ProbeReads
from probescore_server.probes.format.graph import GraphFailed
from probescore_server.probes.loading.onnx_session import ProbeSession
from probescore_server.probes.scoring.batch_scorer import BatchScorer
from probescore_server.probes.scoring.cancellation import WantedRollouts
from probescore_server.validation.options import resolve_options
from probescore_server.validation.rollouts import resolve_rollouts

TAP = Tap("resid_post", 1)
HUGE = 1e6
"""Activations that no probe was tried with: each of the graphs misbehaves for a token whose first number is above 1e5."""

COLUMN = """one = Constant<value_ints = [1]>() zero = Constant<value_ints = [0]>() first = Slice(x, zero, one, one)
    flat = Squeeze(first, one) limit = Constant<value_float = 1e5>() huge = Greater(flat, limit) plain = Not(huge)"""
TOKENS = {
    "fewer": f"{COLUMN} scores = Compress<axis = 0>(y, plain)",
    "more": f"{COLUMN} more = Compress<axis = 0>(y, huge) scores = Concat<axis = 0>(y, more)",
    "fails": f"""{COLUMN} number = Cast<to = 7>(huge) hundred = Constant<value_int = 100>() place = Mul(number, hundred)
        table = Constant<value = float[1, 1] {{0.0}}>() nothing = Gather<axis = 0>(table, place) scores = Add(y, nothing)""",
}


def graph(body: str, *, pools: bool = False) -> onnx.ModelProto:
    inputs = f"float[tokens, {HIDDEN_SIZE}] x" + (", int64[bounds] cu_seqlens" if pools else "")
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 18]> probe ({inputs}) => (float[rows, 1] scores) {{ y = MatMul(x, W) {body} }}'
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(WEIGHT, "W"))
    model.graph.input[0].name = str(TAP)
    for node in model.graph.node:
        node.input[:] = [str(TAP) if name == "x" else name for name in node.input]
    return model


def faulty(kind: str) -> Probe:
    return Probe(kind, onnx_probe(graph(TOKENS[kind]), lambda inputs: inputs[str(TAP)] @ WEIGHT, unit=ScoreUnit.VALUE))


def pooled(kind: str) -> Probe:
    """A pooling probe that drops the score of a rollout with a huge token, or gives it twice."""
    whole = onnx.load_from_string(pooled_mean().function.export(None).SerializeToString())  # type: ignore[arg-type]
    text = f"""{COLUMN} numbers = Cast<to = 1>(huge) huge_ = Unsqueeze(numbers, one) large = CumSum(huge_, axis)
        larger = Concat<axis = 0>(nothing, large) large_until = Gather<axis = 0>(larger, ends)
        large_before = Gather<axis = 0>(larger, starts)
        difference = Sub(large_until, large_before)
        half = Constant<value_float = 0.5>() any_ = Greater(difference, half) any = Squeeze(any_, one)
        none = Not(any)"""
    text += {
        "fewer": " scores = Compress<axis = 0>(means, none)",
        "more": " again = Compress<axis = 0>(means, any) scores = Concat<axis = 0>(means, again)",
    }[kind]
    whole.graph.node[-1].output[0] = "means"
    whole.graph.node.extend(node for node in graph(text, pools=True).graph.node if node.op_type != "MatMul")
    probe = pooled_mean(f"pooled-{kind}")
    return Probe(probe.name, onnx_probe(whole, probe.function.score, unit=ScoreUnit.VALUE), fields=probe.fields)


@pytest.fixture(scope="module")
def engine(reference: object, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    directory = tmp_path_factory.mktemp("probes")
    probes = [linear(), *map(faulty, TOKENS), pooled("fewer"), pooled("more")]
    return Engine.load(str(tiny_model()), [probe.write(directory, reference) for probe in probes])  # type: ignore[arg-type]


PROBES = [*TOKENS, "pooled-fewer", "pooled-more"]


@settings(max_examples=25)
@given(data=st.data())
@pytest.mark.parametrize("probe", PROBES)
def test_a_graph_that_misbehaves_for_some_rollouts_has_no_scores_for_these_and_right_ones_for_all_others(
    engine: Engine, probe: str, data: st.DataObject
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=12))
    huge = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    groups = [RolloutGroup([BOS], [[4 + index, *range(20, 19 + length)] for index, length in enumerate(lengths)])]
    (rollouts,) = resolve_rollouts(groups, engine.info, resolve_options(engine.info, probes=[probe, "linear"]))
    forest = Forest.build(rollouts, {key: ProbeReads() for key in engine._served.loaded})
    activations = Activations.empty(forest, [TAP], HIDDEN_SIZE, torch.device("cpu"))
    rows = activations.rows[TAP].normal_(generator=torch.Generator().manual_seed(0))
    of_rollout = []
    for placement, is_huge, length in zip(forest.placements, huge, lengths, strict=True):
        start = activations.starts[placement.chain[-1]]
        if is_huge:
            rows[start + data.draw(st.integers(0, length - 1)), 0] = HUGE
        of_rollout.append(rows[start : start + length].numpy() @ WEIGHT)

    scorer = BatchScorer(
        engine.info, engine._served.loaded, np.zeros(0, np.int32), rollouts, forest, activations, WantedRollouts(lambda _: False)
    )
    found = scorer.score(range(len(rollouts)))

    for index, is_huge in enumerate(huge):
        scored = found[index]
        assert (scored.status is CompletionStatus.OK) != is_huge
        if is_huge:
            assert scored.status_message.startswith(f"probe {probe}@1 cannot score this: ")
            assert scorer.refused_by[index] == f"{probe}@1"
        else:
            assert scored[probe].value == pytest.approx(of_rollout[index].mean(), abs=1e-4)


def test_shortage_of_memory_is_no_fault_of_a_graph(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    session = engine._served.loaded["fails@1"].runs
    assert isinstance(session, ProbeSession)
    rows = {TAP: torch.full((2, HIDDEN_SIZE), HUGE)}
    with pytest.raises(GraphFailed):
        session.run(rows, None, None)

    # given an allocation that fails, which cannot be had on purpose
    def run(*_: object) -> None:
        raise RuntimeError("Error in execution: Failed to allocate memory for requested buffer of size 9")

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", run)
    with pytest.raises(RuntimeError, match="allocate"):
        session.run(rows, None, None)
