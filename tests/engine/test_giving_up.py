"""What nobody waits for any more is not computed to its end: graphs, reductions, tokens as text."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from models import BOS, tiny_model
from slow_probe import ENDLESS, SLOW, write_slow_probe

from probescore.reductions import Reduction
from probescore.types import Completion, RolloutGroup, Span
from probescore_server import Engine
from probescore_server.probes.scoring import onnx_scores
from probescore_server.probes.scoring.cancellation import ComputationCancelled, GraphCanceller, WantedRollouts
from probescore_server.rollouts import CheckedRollout, RolloutResult
from probescore_server.validation.options import resolve_options
from probescore_server.validation.rollouts import resolve_rollouts

SECONDS = 30.0


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.load(str(tiny_model()), [write_slow_probe(tmp_path_factory.mktemp("slow") / "slow.onnx")])


def rollouts(engine: Engine, *completions: list[int] | Completion, **options: object) -> list[CheckedRollout]:
    resolved = resolve_options(engine.info, **options)  # type: ignore[arg-type]
    return resolve_rollouts([RolloutGroup([BOS, 5], list(completions))], engine.info, resolved)[0]


def scored_in_time(engine: Engine, batch: list[CheckedRollout], is_cancelled: Callable[[int], bool]) -> list[RolloutResult | None]:
    """The results, from a thread of its own: without the mend it would compute for hours."""
    results: list[RolloutResult | None] = []
    thread = threading.Thread(target=lambda: results.extend(engine.score_rollouts(batch, is_cancelled=is_cancelled)), daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive(), "it computes on"
    return results


def value(result: RolloutResult | None) -> float:
    assert result is not None
    return result.scores["slow"].value


def test_a_graph_that_nobody_waits_for_ends_and_the_engine_goes_on(engine: Engine) -> None:
    began = threading.Event()
    timer = threading.Timer(0.5, began.set)
    timer.start()
    assert scored_in_time(engine, rollouts(engine, [50, ENDLESS, 51]), lambda _: began.is_set()) == [None]
    (alone,) = rollouts(engine, [50, 51])
    assert np.isfinite(value(engine.score_rollouts([alone])[0]))


def ends_as_graphs_do(options: ort.RunOptions, left: set[int]) -> None:
    time.sleep(0.1)
    assert not options.terminate
    left.add(1)
    end = time.monotonic() + 10
    while not options.terminate and time.monotonic() < end:
        time.sleep(0.01)
    raise RuntimeError("exiting due to terminate flag")


def test_a_graph_is_told_to_end_once_nobody_waits_for_it() -> None:
    left = {0}
    with GraphCanceller(WantedRollouts(left.__contains__)) as watch, pytest.raises(ComputationCancelled), watch.over({0, 1}) as options:
        ends_as_graphs_do(options, left)


def test_what_nobody_waits_for_is_not_begun_and_a_fault_stays_a_fault() -> None:
    with GraphCanceller(WantedRollouts(lambda index: index == 0)) as watch:
        with pytest.raises(ComputationCancelled), watch.over({0}):
            raise AssertionError
        with pytest.raises(ZeroDivisionError), watch.over({0, 1}):
            raise ZeroDivisionError


def test_a_graph_that_somebody_waits_for_goes_on(engine: Engine) -> None:
    batch = rollouts(engine, [50, SLOW], [50, SLOW, 52])
    expected = value(engine.score_rollouts(batch[1:])[0])
    given_up, wanted = scored_in_time(engine, batch, lambda index: index == 0)
    assert given_up is None
    assert value(wanted) == pytest.approx(expected, abs=1e-6)


def test_a_neighbour_of_what_is_given_up_is_scored_as_if_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_scores, "MAX_ROWS_PER_CALL", 2)  # a call of the graph for each
    batch = rollouts(engine, [50, ENDLESS], [51, 52], [53, ENDLESS])
    expected = value(engine.score_rollouts(batch[1:2])[0])
    end = time.monotonic() + 0.5
    first, second, third = scored_in_time(engine, batch, lambda index: index != 1 and time.monotonic() > end)
    assert (first, third) == (None, None)
    assert value(second) == pytest.approx(expected, abs=1e-6)


def test_reductions_that_nobody_waits_for_end() -> None:
    asked: list[int] = []

    def is_cancelled(index: int) -> bool:
        asked.append(index)
        return len(asked) > 5

    wanted = WantedRollouts(is_cancelled)
    tokens, selections = np.zeros((3, 2), np.float32), np.ones((100, 3), np.bool_)
    with pytest.raises(ComputationCancelled):
        onnx_scores.reduce_selections(tokens, selections, [Reduction.parse("mean")], lambda: wanted.check(7))
    assert asked == [7] * 6


@pytest.mark.parametrize("probe", ["linear", "graph"])
def test_a_cancel_between_reductions_leaves_that_rollout_out(probe: str, engine: Engine, tmp_path: Path) -> None:
    if probe == "linear":
        from engine_probes import linear

        from probescore_probes.reference import ReferenceModel

        engine = Engine.load(str(tiny_model()), [linear().write(tmp_path, ReferenceModel.load(tiny_model()))])
    spans = tuple(Span(f"s{index}", 0, 2) for index in range(50))
    batch = rollouts(engine, Completion([50, 51], spans=spans), Completion([52, 53], spans=spans))
    asked = {0: 0, 1: 0}

    def is_cancelled(index: int) -> bool:
        asked[index] += 1
        return index == 0 and asked[0] > 20

    first, second = engine.score_rollouts(batch, is_cancelled=is_cancelled)
    assert first is None
    assert asked[0] == 21
    assert second is not None
    assert next(iter(second.scores.scores.values())).reduced.shape == (51, 1, 1)
