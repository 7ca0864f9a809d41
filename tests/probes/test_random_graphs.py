"""Whatever graph is written and loaded: a rollout's scores are the same alone, packed, permuted and far behind others."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import numpy as np
import onnx
import pytest
import torch
from crafted import craft, fields
from hypothesis import HealthCheck, Phase, given, settings
from numpy.typing import NDArray
from random_graphs import DISHONEST, NEEDS_SEQUENCES, OF_SEQUENCE, POSITIONED, ROW_BY_ROW, TAP, WIDTH, Recipe, Step, graph_of, recipes

from probescore.types import Completion, CompletionStatus, ModelInfo, OutputPer, RolloutGroup, ScoreUnit, Tap
from probescore_probes.exporting import ProbeFunction
from probescore_probes.golden import GoldenRollout, check_graph_computes
from probescore_server.backbone.base import Activations
from probescore_server.backbone.forest import Forest, ProbeReads
from probescore_server.errors import ProbeRefused
from probescore_server.probes.format.graph import CU_SEQLENS, POSITIONS, GraphFailed, GraphInputs
from probescore_server.probes.format.manifest import GoldenCase, Manifest
from probescore_server.probes.format.probe_file import ProbeFile, read_probe_file
from probescore_server.probes.loading.compatibility import probe_info
from probescore_server.probes.loading.loader import LoadedProbe, limited_to_tried_calls, load_probes, needs_trial
from probescore_server.probes.loading.onnx_session import ProbeSession
from probescore_server.probes.scoring.batch_scorer import BatchScorer
from probescore_server.probes.scoring.cancellation import WantedRollouts
from probescore_server.rollouts import EngineInfo
from probescore_server.validation.options import resolve_options
from probescore_server.validation.rollouts import resolve_rollouts

CPU = torch.device("cpu")
AT = Tap("resid_post", 1)
GOLDEN_LENGTHS = (6, 9)
CENTRE = np.random.default_rng(1).standard_normal(WIDTH)

# Ten times what a trial lets pass: other rows than the trial's may be a little further off.
WITHIN = 1e-3


def rows_like_golden(length: int, seed: int, scale: float = 1.0) -> NDArray[np.float32]:
    return (CENTRE + scale * np.random.default_rng(seed).standard_normal((length, WIDTH))).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------------- written, loaded


@dataclass(frozen=True)
class Probe:
    """A probe file whose golden scores are right, with all that it is written from.

    That its scores are right is not the question here: the author's code is the graph, given one sequence.
    """

    file: ProbeFile
    author: ProbeFunction
    rollouts: list[GoldenRollout]

    def write(self) -> None:
        """All that is checked when it is written; raises ``ProbeRefused``."""
        check_graph_computes(onnx.load_from_string(self.file.graph), self.file.manifest, self.author, self.rollouts, self.file.file)

    def load(self) -> LoadedProbe:
        """All that is checked when it is loaded, beside golden scores; raises ``ProbeRefused``."""
        probe = load_probes([self.file], CPU)[self.file.manifest.key]
        if not needs_trial(self.file, probe):
            return probe
        return limited_to_tried_calls(self.file, probe, {AT: np.concatenate([rollout.inputs[TAP] for rollout in self.rollouts])})


def probe_of(recipe: Recipe, directory: Path, golden_lengths: Sequence[int] = GOLDEN_LENGTHS) -> Probe:
    """Raises ``ProbeRefused`` for a graph that gives no scores for its golden rollouts."""
    model, said = graph_of(recipe), recipe.manifest
    golden = [golden_inputs(recipe, rows_like_golden(length, length)) for length in golden_lengths]
    due = [1 if recipe.context == "rollout" else length for length in golden_lengths]
    blank = [
        {"prompt_ids": [1], "completion_ids": [4] * length, "scores": [[float(i)] for i in range(rows)]}
        for length, rows in zip(golden_lengths, due, strict=True)
    ]
    blank[0]["scores"][0] = [-1.0]
    said["model"] = fields()["model"] | {"hidden_size": WIDTH}
    session = ProbeSession(read_probe_file(craft(directory / "blank.onnx", model, fields(**said, golden={"cases": blank}))), CPU)
    author = ProbeFunction(lambda inputs: run(session, inputs), lambda _: model, ScoreUnit.VALUE)
    try:
        scores = [author.score(inputs).astype(np.float64) for inputs in golden]
    except GraphFailed as failed:
        raise ProbeRefused("random.onnx", "graph", str(failed), "scores") from None
    if not all(np.isfinite(each).all() for each in scores):
        raise ProbeRefused("random.onnx", "golden", "NaN", "scores")
    for case, each in zip(blank, scores, strict=True):
        case["scores"] = each.tolist()
    file = read_probe_file(craft(directory / "random.onnx", model, fields(**said, golden={"cases": blank})))
    cases = [GoldenCase.model_validate_json(json.dumps(case)) for case in blank]
    return Probe(file, author, [GoldenRollout(*each, {}) for each in zip(cases, golden, scores, strict=True)])


def golden_inputs(recipe: Recipe, rows: NDArray[np.float32]) -> GraphInputs:
    inputs: dict[str, NDArray[np.float32] | NDArray[np.int64]] = {TAP: rows}
    if recipe.contextual:
        inputs[CU_SEQLENS] = np.array([0, len(rows)], np.int64)
    if recipe.positions:
        inputs[POSITIONS] = np.arange(1, 1 + len(rows))
    return inputs


def run(session: ProbeSession, inputs: GraphInputs) -> NDArray[np.float32]:
    return session.run({AT: torch.from_numpy(inputs[TAP])}, inputs.get(CU_SEQLENS), inputs.get(POSITIONS))


# --------------------------------------------------------------------------------------------------------------------------- served


def served(file: ProbeFile, probe: LoadedProbe, rollouts: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32] | None]:
    """The scores of rollouts that have these activations, of one batch; ``None`` where there are none."""
    manifest: Manifest = file.manifest
    model = ModelInfo("tiny", "", manifest.model.fingerprint, "", WIDTH, 4, 4, 100_000, 0)
    info = EngineInfo(model, "", None, (probe_info(manifest, ()),), "cpu", "float32", "", expects_bos={manifest.key: None})
    # ids name the rollout, so that no two are one
    names = [int(abs(rows[0, 0]) * 1e4) % 50_000 for rows in rollouts]
    groups = [RolloutGroup([7], [Completion([50_000 + name, *range(len(rows) - 1)])]) for name, rows in zip(names, rollouts, strict=True)]
    wanted = () if manifest.output.per is OutputPer.ROLLOUT else "all"
    resolved = [each for (each,) in resolve_rollouts(groups, info, resolve_options(info, token_scores=wanted))]
    forest = Forest.build(resolved, {manifest.key: ProbeReads()})
    activations = Activations.empty(forest, [AT], WIDTH, CPU)
    for placement, rows in zip(forest.placements, rollouts, strict=True):
        start = activations.starts[placement.chain[-1]]
        activations.rows[AT][start : start + len(rows)] = torch.from_numpy(rows)
    everyone = WantedRollouts(lambda _: False)
    scorer = BatchScorer(info, {manifest.key: probe}, np.zeros(0, np.int32), resolved, forest, activations, everyone)
    found = scorer.score(range(len(resolved)))
    return [
        None if scored.status is not CompletionStatus.OK else scored["cheating"].reduced[0] if wanted == () else scored["cheating"].tokens
        for scored in (found[index] for index in range(len(resolved)))
    ]


def check(recipe: Recipe, directory: Path, seen: Counter[str]) -> None:
    try:
        written = probe_of(recipe, directory)
        written.write()
        probe = written.load()
    except ProbeRefused as refused:
        seen["refused"] += 1
        seen[f"refused: {refused.expected}"] += 1
        return
    file = written.file
    seen["accepted"] += 1
    seen["accepted, in a stack"] += not isinstance(probe.runs, ProbeSession)
    seen["accepted, proved"] += isinstance(probe.runs, ProbeSession) and not needs_trial(file, probe)
    random = np.random.default_rng(7)
    lengths = [1, 2, 2, 3, 5, 8, 13, 40, 90, 200, 1500, *random.integers(1, 30, 60)]
    rollouts = [rows_like_golden(int(n), 100 + i, (0.3, 1.0, 3.0)[i % 3]) for i, n in enumerate(lengths)]
    alone = [served(file, probe, [rows])[0] for rows in rollouts]
    known = [scores for scores, n in zip(alone, lengths, strict=True) if scores is not None]
    unit = np.concatenate(known).astype(np.float64).std(axis=0) if known else np.ones(1)
    others = [rows_like_golden(400, 1000 + i, 2.0) for i in range(26)]
    orders = {
        "packed": np.arange(len(rollouts)),
        "permuted": random.permutation(len(rollouts)),
        "backwards": np.arange(len(rollouts))[::-1],
    }
    batches = [(name, [], order) for name, order in orders.items()] + [("far behind", others, orders["packed"][:20])]
    for name, before, order in batches:
        together = served(file, probe, [*before, *(rollouts[index] for index in order)])[len(before) :]
        for index, found in zip(order, together, strict=True):
            expected = alone[index]
            if found is None or expected is None:
                assert (found is None) == (expected is None), (name, recipe)
                continue
            wrong = np.abs(found.astype(np.float64) - expected) > WITHIN * unit + 4e-7 * np.abs(expected)
            seen["wrong"] += bool(wrong.any())
            assert not wrong.any(), (name, recipe)


@settings(max_examples=20, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@hypothesis.seed(1)
@given(recipe=recipes())
def test_whatever_graph_is_accepted_scores_a_rollout_alike_in_any_company(recipe: Recipe, tmp_path: Path) -> None:
    check(recipe, tmp_path, Counter())


@pytest.mark.sweep
@pytest.mark.timeout(7200)
def test_five_hundred_accepted_graphs_score_a_rollout_alike_in_any_company(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: Counter[str] = Counter()
    for seed in range(100):

        @settings(max_examples=100, suppress_health_check=list(HealthCheck), phases=[Phase.generate], database=None)
        @hypothesis.seed(seed)
        @given(recipe=recipes())
        def sweep(recipe: Recipe) -> None:
            check(recipe, tmp_path, seen)

        sweep()
        with capsys.disabled():
            print(f"\n{dict(seen)}", flush=True)
        if seen["accepted"] >= 500:
            break
    assert seen["accepted"] >= 500
    assert seen["wrong"] == 0


# ----------------------------------------------------------------------------------------------------------------------- one by one


def recipe(
    *kinds: str, size: int = 3, context: str = "", window: int | None = None, pooling: str = "mean", positions: bool = False
) -> Recipe:
    contextual = any(kind in (*OF_SEQUENCE, *NEEDS_SEQUENCES) for kind in kinds)
    context = context or ("causal" if contextual else "pointwise")
    steps = tuple(Step(kind, size, index) for index, kind in enumerate(kinds))
    return Recipe(context, window, positions or any(kind in POSITIONED for kind in kinds), pooling if context == "rollout" else "", steps)


WRONG = {
    **{kind: recipe("matrix", kind) for kind in DISHONEST},
    **{f"beyond row {row}": recipe("beyond a row", size=row) for row in (100, 300, 3000, 10_000)},
    **{f"{kind}, by chance only": recipe(kind, size=40) for kind in DISHONEST if "large" in kind or "content" in kind},
    "more than 900 rows": recipe("if many rows", size=900),
    "more than 5000 rows": recipe("if many rows", size=5000),
    "five sequences": recipe("fixed sequences", size=5),
    "fifty sequences": recipe("fixed sequences", size=50),
    "a search for 15 sequences": recipe("search in fixed steps", size=15),
    "pooled over the call": recipe("tanh", context="rollout", pooling="mean of all"),
    "pooled for few": recipe("tanh", context="rollout", pooling="few sequences"),
    "reads a neighbour, then pools": recipe("neighbour", context="rollout"),
    "a window longer than promised": recipe("window mean", size=4, window=3),
    "a window longer than any golden rollout": recipe("window attention", size=40, window=30),
    "a window longer than most sequences": recipe("window mean", size=300, window=299),
    "a window of windows": recipe("window mean", "window mean", size=3, window=3),
    "counts from the start": recipe("place in sequence", size=40, window=20),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_graph_whose_scores_depend_on_more_than_its_manifest_says_is_neither_written_nor_loaded(kind: str, tmp_path: Path) -> None:
    try:
        probe = probe_of(
            WRONG[kind], tmp_path, (6,) if kind == "mean of the batch" and WRONG[kind].context != "rollout" else GOLDEN_LENGTHS
        )
    except ProbeRefused:
        return
    with pytest.raises(ProbeRefused, match=r"depend|one row of scores|a row of scores for each"):
        probe.write()
    with pytest.raises(ProbeRefused, match=r"depend|one row of scores|a row of scores for each"):
        probe.load()


RIGHT = {
    **{kind: recipe("matrix", kind, size=40) for kind in (*ROW_BY_ROW, *POSITIONED)},
    **{kind: recipe(kind, "matrix", "tanh", window=None) for kind in OF_SEQUENCE},
    "as wide as promised": recipe("tanh", "window mean", "matrix", size=7, window=7),
    "narrower than promised": recipe("window attention", size=5, window=7),
    "a window longer than any golden rollout": recipe("window mean", size=40, window=40),
    "pooled by attention": recipe("tanh", context="rollout", pooling="attention"),
    "pooled mean": recipe("tanh", "causal mean", context="rollout"),
    "told its positions": recipe("positions", "causal mean"),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_a_graph_that_keeps_to_its_manifest_is_written_loaded_and_scores_alike_in_any_company(kind: str, tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    check(RIGHT[kind], tmp_path, seen)
    assert seen["accepted"] == 1
