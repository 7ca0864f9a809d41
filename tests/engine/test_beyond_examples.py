"""Graphs that are right for every golden rollout and wrong beyond: neither written nor served; and what is documented is right."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from engine_probes import GOLDEN, WEIGHT, Probe, running_mean
from models import BOS, HIDDEN_SIZE, tiny_model
from torch import Tensor, nn

from probescore.types import RolloutGroup, ScoreUnit
from probescore_probes.exporting import onnx_probe, torch_probe
from probescore_probes.reference import ReferenceModel
from probescore_server import Engine
from probescore_server.errors import ProbeRefused
from probescore_server.probes.format.manifest import Context
from probescore_server.probes.loading.context_check import LONGEST_SHARE, QUADRATIC_CALL, SEQUENCES
from probescore_server.probes.scoring import onnx_scores

ROOT = Path(__file__).resolve().parents[2]
THREE = (*GOLDEN, ([1, 8], [30, 40, 50]))
RANDOM = np.random.default_rng(0)


def documented(name: str) -> nn.Module:
    """A module as ``docs/how-to/write-a-probe-over-tokens.md`` shows it."""
    page = (ROOT / "docs/how-to/write-a-probe-over-tokens.md").read_text()
    (code,) = re.findall(rf"```python\n(class {name}.*?)\n\n\nwrite_probe", page, re.DOTALL)
    namespace = {"torch": torch}
    exec(code, namespace)  # noqa: S102
    torch.manual_seed(0)
    module: nn.Module = namespace[name](HIDDEN_SIZE)  # type: ignore[operator]
    return module


class Bucketed(nn.Module):
    """Which sequence a row belongs to is searched for; the export has as many steps of the search as its example needs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN_SIZE, 1)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        row = torch.arange(x.shape[0])
        sequence = torch.bucketize(row, cu_seqlens[1:], right=True)
        seen = (sequence[:, None] == sequence[None]) & (row[:, None] >= row[None])
        return (seen / seen.sum(-1, keepdim=True)) @ self.linear(x)


def mean_of_the_batch() -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 18]> probe (float[n, {HIDDEN_SIZE}] x) => (float[n, 1] scores) '
        "{ y = MatMul(x, W) axis = Constant<value_ints = [0]>() m = ReduceMean(y, axis) scores = Sub(y, m) }"
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(WEIGHT, "W"))
    model.graph.input[0].name = model.graph.node[0].input[0] = "resid_post.1"
    return model


def centred(inputs: dict[str, np.ndarray]) -> np.ndarray:
    scores = inputs["resid_post.1"] @ WEIGHT
    return scores - scores.mean(axis=0)


BEYOND = {
    "a search of the export's size": lambda: Probe(
        "bucketed", torch_probe(Bucketed(), unit=ScoreUnit.VALUE), fields={"context": Context(kind="causal"), "golden": THREE}
    ),
    "a batch mean with one golden rollout": lambda: Probe(
        "centred", onnx_probe(mean_of_the_batch(), centred, unit=ScoreUnit.VALUE), fields={"golden": GOLDEN[:1]}
    ),
}


@pytest.mark.parametrize("kind", BEYOND)
def test_a_graph_that_is_right_for_its_golden_rollouts_only_is_neither_written_nor_served(
    reference: ReferenceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    probe = BEYOND[kind]()
    with pytest.raises(ProbeRefused, match="do not depend on its neighbours"):
        probe.write(tmp_path, reference)
    # whoever else writes such a file
    monkeypatch.setattr("probescore_probes.writing.check_graph_computes", lambda *_: None)
    path = probe.write(tmp_path, reference)
    with pytest.raises(ProbeRefused, match="do not depend on its neighbours"):
        Engine.load(str(tiny_model()), [path])
    with pytest.raises(ProbeRefused, match="do not depend on its neighbours"):
        Engine.load(str(tiny_model()), [path], accept_mismatch=[probe.name])


@pytest.mark.parametrize(
    ("name", "context"), [("WindowedAttention", Context(kind="causal", window=10)), ("AttentionPooling", Context(kind="rollout"))]
)
def test_what_is_documented_scores_any_number_of_sequences_as_the_module_does(
    reference: ReferenceModel, tmp_path: Path, name: str, context: Context
) -> None:
    module = documented(name)
    path = Probe("documented", torch_probe(module, unit=ScoreUnit.VALUE), fields={"context": context}).write(tmp_path, reference)
    engine = Engine.load(str(tiny_model()), [path])
    lengths = [1, 2, 3, 17, 40, 400, *RANDOM.integers(1, 20, 60)]
    completions = [RANDOM.integers(4, 96, length).tolist() for length in lengths]
    found = engine.score([RolloutGroup([BOS], completions)], token_scores="all" if context.kind == "causal" else ())
    for completion, scored in zip(completions, found.groups[0], strict=True):
        activations = next(iter(reference.activations(np.array([BOS, *completion]), ["resid_post.1"]).values()))[1:]
        with torch.inference_mode():
            expected = module(torch.from_numpy(activations), torch.tensor([0, len(completion)])).reshape(-1)
        answer = scored["documented"]
        np.testing.assert_allclose((answer.reduced[0] if answer.tokens is None else answer.tokens)[:, 0], expected, atol=1e-4)


def test_a_sequence_longer_than_a_call_is_scored_in_pieces_that_each_see_their_window(
    load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(
        Probe(
            "documented",
            torch_probe(documented("WindowedAttention"), unit=ScoreUnit.VALUE),
            fields={"context": Context(kind="causal", window=10)},
        )
    )
    completions = [RANDOM.integers(4, 96, length).tolist() for length in (1, 29, 30, 31, 51, 52, 53, 200)]
    whole = engine.score([RolloutGroup([BOS], completions)], token_scores="all")
    calls: list[int] = []
    session = engine._served.loaded["documented@1"].runs
    run = session.run  # type: ignore[union-attr]
    monkeypatch.setattr(session, "run", lambda rows, *rest: (calls.append(len(next(iter(rows.values())))), run(rows, *rest))[1])
    monkeypatch.setattr("probescore_server.probes.scoring.onnx_scores.MAX_ROWS_PER_CALL", 30)
    pieces = engine.score([RolloutGroup([BOS], completions)], token_scores="all")
    assert max(calls) == 30
    for one, other in zip(whole.groups[0], pieces.groups[0], strict=True):
        np.testing.assert_allclose(one["documented"].tokens, other["documented"].tokens, atol=1e-5)  # type: ignore[arg-type]


def test_no_call_is_larger_than_what_the_graph_was_tried_with(load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(running_mean())
    completions = [RANDOM.integers(4, 96, length).tolist() for length in (*[60] * 40, *[2] * 200)]
    probe = engine._served.loaded["running-mean@1"]
    calls: list[tuple[int, int]] = []
    run = probe.runs.run  # type: ignore[union-attr]

    def record(rows: dict[object, Tensor], cu_seqlens: np.ndarray, *rest: object) -> np.ndarray:
        calls.append((len(next(iter(rows.values()))), len(cu_seqlens) - 1))
        return run(rows, cu_seqlens, *rest)  # type: ignore[return-value]

    monkeypatch.setattr(probe.runs, "run", record)
    assert engine.score([RolloutGroup([BOS], completions)]).groups[0]
    assert probe.rows_per_call == QUADRATIC_CALL
    assert max(rows for rows, _ in calls) <= QUADRATIC_CALL
    assert max(sequences for _, sequences in calls) <= SEQUENCES


@pytest.mark.parametrize("place", [0, 3, 8])
def test_a_sequence_longer_than_any_that_was_tried_in_company_makes_a_call_by_itself(place: int) -> None:
    short = [np.arange(3)] * 8
    sequences = [*short[:place], np.arange(QUADRATIC_CALL // LONGEST_SHARE + 1), *short[place:]]
    batches = list(onnx_scores._batches(sequences, QUADRATIC_CALL))
    assert [len(sequence) for batch in batches for sequence in batch] == [len(sequence) for sequence in sequences]
    assert all(len(batch) == 1 or max(map(len, batch)) <= QUADRATIC_CALL // LONGEST_SHARE for batch in batches)


@pytest.mark.parametrize(("shift", "rows"), [(0, 1024), (4, 256), (30, 1)])
def test_a_graph_whose_rounding_grows_with_the_rows_of_a_call_is_given_fewer(
    reference: ReferenceModel, tmp_path: Path, shift: int, rows: int
) -> None:
    # its sums run over all rows of a call, so that scores far from 0 lose digits in long ones
    shifted = running_mean()
    graph = shifted.function.export(None)  # type: ignore[arg-type]
    graph.graph.node[0].output[0] = "product"
    graph.graph.node.insert(1, onnx.helper.make_node("Add", ["product", "far"], ["y"]))
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array([[shift]], np.float32), "far"))
    function = onnx_probe(graph, lambda inputs: shifted.function.score(inputs) + shift, unit=ScoreUnit.VALUE)
    engine = Engine.load(str(tiny_model()), [Probe("shifted", function, fields=shifted.fields).write(tmp_path, reference)])
    assert engine._served.loaded["shifted@1"].rows_per_call == rows
