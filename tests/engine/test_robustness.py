"""Neighbours, cancellation, numeric faults: what happens to one rollout happens to that rollout only."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from engine_probes import GOLDEN, WEIGHT, Array, Probe, linear, plain, pooled_mean, running_mean
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BOS, HIDDEN_SIZE, tiny_model
from safetensors.torch import load_file, save_file

from probescore.types import Completion, CompletionScores, CompletionStatus, RolloutGroup, ScoreUnit, Tap
from probescore_probes.exporting import linear_probe, onnx_probe
from probescore_probes.reference import ReferenceModel
from probescore_server import Engine
from probescore_server.backbone.universal.rows import MAX_ROW_TOKENS
from probescore_server.probes.scoring.batch_scorer import _without_non_finite
from probescore_server.rollouts import CheckedRollout
from probescore_server.validation.options import resolve_options
from probescore_server.validation.rollouts import resolve_rollouts

PROMPT = [BOS, 40, 41, 42]
BROKEN = 90


@pytest.fixture(scope="module")
def engine(reference: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    directory = tmp_path_factory.mktemp("probes")
    probes = [linear(tap="resid_post.1"), running_mean(sees_prompt=True), pooled_mean()]
    return Engine.load(str(tiny_model()), [probe.write(directory, reference) for probe in probes])


@pytest.fixture(scope="module")
def scale(reference: ReferenceModel) -> float:
    """The standard deviation of scores, the unit of every bound."""
    return float(plain(reference, np.random.default_rng(0).integers(4, 96, 200)).std())


# -------------------------------------------------------------------------------------------------------------------- neighbours

ids = st.lists(st.integers(4, 95), max_size=8)
completions: st.SearchStrategy[Completion] = st.recursive(
    st.builds(Completion, ids),
    lambda inner: st.builds(Completion, ids, follow_ups=st.lists(inner, max_size=2).map(tuple)),
    max_leaves=4,
)
groups = st.lists(st.builds(RolloutGroup, ids, st.lists(completions, min_size=1, max_size=4)), min_size=1, max_size=3)


@settings(max_examples=40)
@given(asked=groups)
def test_scores_in_any_batch_are_those_of_each_sequence_alone(
    engine: Engine, reference: ReferenceModel, scale: float, asked: list[RolloutGroup]
) -> None:
    def check(completion: Completion, scored: CompletionScores, before: list[int]) -> None:
        own = list(completion.tokens)  # type: ignore[arg-type]
        if own:
            each = plain(reference, before, own)
            means = np.cumsum(each) / np.arange(1, len(each) + 1)
            compare(scored, "linear", each[len(before) :])
            compare(scored, "running-mean", means[len(before) :])
            assert abs(scored["pooled-mean"].reduced[0, 0, 0] - each[len(before) :].mean()) <= 1e-4 * scale
        for follow_up, answer in zip(completion.follow_ups, scored.follow_ups, strict=True):
            check(follow_up, answer, before + own)

    def compare(scored: CompletionScores, probe: str, expected: Array) -> None:
        found = scored[probe].tokens
        assert found is not None
        assert np.abs(found[:, 0] - expected).max() <= 1e-4 * scale

    result = engine.score(asked, token_scores=["linear", "running-mean"])
    for group, scores in zip(asked, result.groups, strict=True):
        for completion, scored in zip(group.completions, scores, strict=True):
            check(completion, scored, list(group.prompt))  # type: ignore[arg-type]


def test_requests_with_other_probes_share_a_batch(engine: Engine) -> None:
    rollouts = [
        *checked(engine, [[50, 51]], probes=["linear"]),
        *checked(engine, [[50, 51]], probes=["pooled-mean", "running-mean"], scope="all"),
        *checked(engine, [[52]], probes=["linear"], return_token_ids=True),
    ]
    together = engine.score_rollouts(rollouts)
    for rollout, result in zip(rollouts, together, strict=True):
        (alone,) = engine.score_rollouts([rollout])
        assert result is not None
        assert alone is not None
        assert result.scores.scores.keys() == alone.scores.scores.keys()
        for probe, scores in alone.scores.scores.items():
            np.testing.assert_allclose(result.scores[probe].reduced, scores.reduced, atol=1e-5)


def test_threads_may_share_an_engine(engine: Engine) -> None:
    prompts = [[BOS, 20 + i] for i in range(8)]
    expected = [engine.score([RolloutGroup(prompt, [[50, 51, 52]])]).values("linear")[0] for prompt in prompts]
    found: dict[int, float] = {}

    def score(index: int) -> None:
        found[index] = engine.score([RolloutGroup(prompts[index], [[50, 51, 52]])]).values("linear")[0]

    threads = [threading.Thread(target=score, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_allclose([found[index] for index in range(8)], expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------------ cancellation


def checked(engine: Engine, completions: list[list[int]], prompt: list[int] = PROMPT, **options: object) -> list[CheckedRollout]:
    resolved = resolve_options(engine.info, **options)  # type: ignore[arg-type]
    (rollouts,) = resolve_rollouts([RolloutGroup(prompt, completions)], engine.info, resolved)
    return rollouts


@pytest.fixture
def segments_run(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The segments that reach the model: of each forward, the rows."""
    seen: list[list[list[int]]] = []
    engine._cache.clear()
    run = engine._backbone.read_rows

    def record(token_ids: np.ndarray, *rest: object) -> None:
        seen.append(token_ids.tolist())
        run(token_ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engine._backbone, "read_rows", record)
    return seen


def test_cancelled_rollout_is_not_computed_and_its_neighbours_are(engine: Engine, segments_run: list[list[list[int]]]) -> None:
    rollouts = checked(engine, [[50], [51], [52]])
    results = engine.score_rollouts(rollouts, is_cancelled=lambda index: index == 1)
    assert [result is None for result in results] == [False, True, False]
    assert segments_run == [[PROMPT], [[50], [52]]]


def test_shared_work_goes_on_while_anyone_wants_it(engine: Engine, segments_run: list[list[list[int]]]) -> None:
    results = engine.score_rollouts(checked(engine, [[50], [50]]), is_cancelled=lambda index: index == 0)
    assert [result is None for result in results] == [True, False]
    assert segments_run == [[PROMPT], [[50]]]


def test_cancellation_takes_effect_between_segments(engine: Engine, segments_run: list[list[list[int]]]) -> None:
    # given a batch whose caller gives up while its second segment runs, each too long to be run with others
    long = [[token] * (MAX_ROW_TOKENS + 1) for token in (50, 51, 52)]
    results = engine.score_rollouts(checked(engine, long), is_cancelled=lambda _: len(segments_run) >= 2)
    # then nothing more is computed, and what was is not answered
    assert segments_run == [[PROMPT], [long[0]]]
    assert results[1] is None
    assert results[2] is None


def test_everything_cancelled_computes_nothing(engine: Engine, segments_run: list[list[list[int]]]) -> None:
    assert engine.score_rollouts(checked(engine, [[50], [51]]), is_cancelled=lambda _: True) == [None, None]
    assert segments_run == []


# -------------------------------------------------------------------------------------------------------------- read-only arrays


def test_ids_as_they_come_off_the_wire_cause_no_warning(engine: Engine, recwarn: pytest.WarningsRecorder) -> None:
    # given ids that are views of a message's bytes, and a torch that warns every time and not only the first
    prompt, completion = (np.frombuffer(np.array(ids, np.int32).tobytes(), np.int32) for ids in (PROMPT, [50, 51]))
    torch.set_warn_always(True)
    try:
        engine.score([RolloutGroup(prompt, [completion])])
    finally:
        torch.set_warn_always(False)
    assert [str(warning.message) for warning in recwarn] == []


# ---------------------------------------------------------------------------------------------------------------- numeric faults


@pytest.fixture(scope="module")
def broken_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that gives NaN from the token ``BROKEN`` on."""
    directory = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(tiny_model(), directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][BROKEN] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_nan_in_the_model_fails_one_completion_and_names_probe_and_tap(broken_model: Path, tmp_path: Path) -> None:
    reference = ReferenceModel.load(broken_model)
    probes = [linear(), running_mean(), pooled_mean()]
    engine = Engine.load(str(broken_model), [probe.write(tmp_path, reference) for probe in probes])
    follow_up = Completion([60, BROKEN, 61])
    asked = [[50, 51], [52, BROKEN, 53], Completion([54, 55], follow_ups=(follow_up,)), [56]]
    scored = engine.score([RolloutGroup(PROMPT, asked), RolloutGroup([BOS, BROKEN], [[50]]), RolloutGroup([BOS], [[57]])])
    statuses = [each.status for group in scored.groups for each in group]
    ok, bad = CompletionStatus.OK, CompletionStatus.NON_FINITE
    assert statuses == [ok, bad, ok, ok, bad, ok]
    assert scored.groups[0][1].scores == {}
    assert scored.groups[0][1].status_message == "the model gives NaN or an infinity at resid_post.1, which probe linear@1 reads"
    assert scored.groups[0][2].follow_ups[0].status is bad
    for completion, each in (([50, 51], scored.groups[0][0]), ([54, 55], scored.groups[0][2]), ([56], scored.groups[0][3])):
        expected = plain(reference, PROMPT, completion)[4:]
        for probe in ("linear", "pooled-mean"):
            assert each[probe].value == pytest.approx(expected.mean(), abs=1e-5)
    with pytest.raises(KeyError, match="no scores: the model gives NaN"):
        scored.groups[0][1]["linear"]
    assert np.isnan(scored.values("linear")[1])


def test_nan_in_a_rollout_does_not_reach_what_begins_as_it_does(broken_model: Path, tmp_path: Path) -> None:
    reference = ReferenceModel.load(broken_model)
    engine = Engine.load(str(broken_model), [linear().write(tmp_path, reference)])
    for completions in ([[52, BROKEN, 53]], [[52, BROKEN, 53], [53], [54, 55]]):
        for prompt in (PROMPT, [*PROMPT, 60]):
            engine.score([RolloutGroup(prompt, completions)])
            engine.score([RolloutGroup([*prompt, *completions[0]], [[56]]), RolloutGroup([*prompt, 57], [completions[0]])])
            whole = engine.score([RolloutGroup(prompt, [[50]]), RolloutGroup([*prompt, 52], [[53]]), RolloutGroup([*prompt, 57], [[53]])])
            assert [each.status for group in whole.groups for each in group] == [CompletionStatus.OK] * 3
            assert whole.values("linear")[1] == pytest.approx(plain(reference, [*prompt, 52], [53])[-1], abs=1e-5)


@pytest.mark.parametrize("probe", ["running-mean", "pooled-mean"])
def test_nan_in_the_model_fails_what_a_graph_of_its_own_reads(broken_model: Path, tmp_path: Path, probe: str) -> None:
    reference = ReferenceModel.load(broken_model)
    engine = Engine.load(str(broken_model), [each.write(tmp_path, reference) for each in (running_mean(), pooled_mean())])
    scored = engine.score([RolloutGroup(PROMPT, [[50, 51], [52, BROKEN]])], probes=[probe]).groups[0]
    assert [each.status for each in scored] == [CompletionStatus.OK, CompletionStatus.NON_FINITE]
    assert scored[1].status_message == f"the model gives NaN or an infinity at resid_post.1, which probe {probe}@1 reads"


def test_a_refused_rollout_names_the_probe_whether_it_or_a_follow_up_of_it_is_broken(broken_model: Path, tmp_path: Path) -> None:
    engine = Engine.load(str(broken_model), [linear().write(tmp_path, ReferenceModel.load(broken_model))])
    completions = [Completion([50, 51]), Completion([52, BROKEN]), Completion([53], follow_ups=(Completion([BROKEN]),))]
    options = resolve_options(engine.info)
    (rollouts,) = resolve_rollouts([RolloutGroup(PROMPT, completions)], engine.info, options)
    assert [result.refused_by for result in engine.score_rollouts(rollouts) if result] == ["", "linear@1", "linear@1"]


def test_graphs_are_never_given_a_row_that_is_not_finite() -> None:
    # some operators turn NaN into a number, which no check of the scores would notice
    rows = torch.tensor([[1.0, 2.0], [float("nan"), 3.0], [4.0, float("-inf")], [5.0, 6.0]])
    cleaned, finite = _without_non_finite({Tap("final_norm"): rows})
    assert cleaned[Tap("final_norm")].tolist() == [[1, 2], [0, 0], [0, 0], [5, 6]]
    assert finite[Tap("final_norm")].tolist() == [True, False, False, True]


def square_root_mean(reference: ReferenceModel) -> tuple[Probe, float]:
    """A pooling probe that gives NaN for whatever scores below the golden rollouts, and mixes sequences by arithmetic."""
    floor = min(plain(reference, prompt, completion)[len(prompt) :].min() for prompt, completion in GOLDEN) - 1e-3
    signature = f"(float[tokens, {HIDDEN_SIZE}] x, int64[bounds] cu_seqlens) => (float[rollouts, 1] scores)"
    text = f"""<ir_version: 9, opset_import: ["" : 18]> probe {signature} {{
        axis = Constant<value_int = 0>() floor = Constant<value_float = {floor}>() nothing = Constant<value = float[1, 1] {{0.0}}>()
        from_first = Constant<value_ints = [0]>() from_second = Constant<value_ints = [1]>() axis1 = Constant<value_ints = [1]>()
        minus_one = Constant<value_ints = [-1]>() end = Constant<value_ints = [9223372036854775807]>()
        y = MatMul(x, W) above = Sub(y, floor) root = Sqrt(above)
        summed = CumSum(root, axis) sums = Concat<axis = 0>(nothing, summed)
        starts = Slice(cu_seqlens, from_first, minus_one) ends = Slice(cu_seqlens, from_second, end)
        until = Gather<axis = 0>(sums, ends) before = Gather<axis = 0>(sums, starts) sum = Sub(until, before)
        tokens = Sub(ends, starts) tokens_float = Cast<to = 1>(tokens) tokens_ = Unsqueeze(tokens_float, axis1)
        scores = Div(sum, tokens_)
    }}"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(WEIGHT, "W"))
    model.graph.input[0].name = "resid_post.1"
    model.graph.node[[node.op_type for node in model.graph.node].index("MatMul")].input[0] = "resid_post.1"

    def score(inputs: dict[str, Array]) -> Array:
        return np.sqrt(inputs["resid_post.1"] @ WEIGHT - floor).mean(axis=0, keepdims=True)

    return Probe("root", onnx_probe(model, score, unit=ScoreUnit.VALUE), fields=pooled_mean().fields), floor


def test_nan_in_a_probe_fails_one_completion_even_where_the_graph_mixes_sequences(
    load: Callable[..., Engine], reference: ReferenceModel
) -> None:
    probe, floor = square_root_mean(reference)
    engine = load(probe)
    candidates = [[token] for token in range(4, 90)]
    above = [plain(reference, PROMPT, candidate)[-1] > floor for candidate in candidates]
    assert 0 < sum(above) < len(above)
    scored = engine.score([RolloutGroup(PROMPT, candidates)]).groups[0]
    assert [each.status is CompletionStatus.OK for each in scored] == above
    assert scored[above.index(False)].status_message == "probe root@1 gives NaN or an infinity"


# ------------------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize(("dtype", "within"), [("float16", 0.05), ("bfloat16", 0.25)])
def test_half_precision_scores_close_to_float32(
    load: Callable[..., Engine], reference: ReferenceModel, scale: float, dtype: str, within: float
) -> None:
    engine = load(linear(), running_mean(), pooled_mean(), dtype=dtype)
    assert engine.info.dtype == dtype
    found = engine.score([RolloutGroup(PROMPT, [[50, 51, 52, 53]])], token_scores=["linear"]).groups[0][0]["linear"].tokens
    assert found is not None
    assert found.dtype == np.float32
    difference = np.abs(found[:, 0] - plain(reference, PROMPT, [50, 51, 52, 53])[4:])
    assert 0 < difference.max() < within * scale


# ------------------------------------------------------------------------------------------------------------- beyond float32


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("largest", [1e35, 1e36], ids=["stacked", "session"])
def test_a_reduction_beyond_float32_fails_its_completion_and_no_other(reference: ReferenceModel, tmp_path: Path, largest: float) -> None:
    weight = largest * np.random.default_rng(0).standard_normal(HIDDEN_SIZE)
    huge = Probe("huge", linear_probe(weight, 100 * largest, unit=ScoreUnit.VALUE))
    engine = Engine.load(str(tiny_model()), [probe.write(tmp_path, reference) for probe in (huge, linear())])
    groups = [RolloutGroup(PROMPT, [[50, 51], [50] * 100])]
    assert [each.status for each in engine.score(groups, reductions=["mean"]).groups[0]] == [CompletionStatus.OK] * 2
    short, long = engine.score(groups, reductions=["mean", "sum"]).groups[0]
    assert (short.status, long.status) == (CompletionStatus.OK, CompletionStatus.NON_FINITE)
    assert long.status_message == "a reduction of the scores of probe huge@1 is beyond float32"
    assert engine.score(groups, probes=["linear"], reductions=["sum"]).groups[0][1].status is CompletionStatus.OK
