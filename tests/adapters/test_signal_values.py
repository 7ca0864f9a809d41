"""What becomes of a batch of which the server refuses a part, without a server: ``score_batch`` says what it would ask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from handmade_values import probe_info

from probescore import (
    CompletionScores,
    CompletionStatus,
    FieldViolation,
    Limits,
    ModelInfo,
    OutputPer,
    ProbeScores,
    Reduction,
    ScoredProbe,
    ScoreUnit,
    ScoringInfo,
    ServerError,
    ServerInfo,
    StreamedCompletion,
)
from probescore_adapters import ProbeSignal, Rollout, SignalError
from probescore_adapters.signal_values import BatchSignals, ServerFacts, StreamRequest, score_batch
from probescore_adapters.signals import BoundSignal

SIGNAL = BoundSignal.bind(ProbeSignal("cheating", mode="reward"), (probe_info(),))
MODEL = ModelInfo("model", "", "sha256:m", "llama", 8, 2, 2, 100, 0)
SERVER = ServerFacts(ServerInfo("1", MODEL, "", Limits(10**6, 10**6, 10**6, 10**6, 10**6), (), ("cheating@1",)), (probe_info(),))
SCORED = ScoredProbe("cheating", "1", "", "", ScoreUnit.LOGIT, OutputPer.TOKEN, ("",), (Reduction.parse("mean"),))
ROLLOUTS = [Rollout(np.array([5]), np.array([number])) for number in range(4)]


def answers(asked: StreamRequest) -> list[StreamedCompletion]:
    """What each completion's only id is, as its score."""
    info = ScoringInfo("sha256:m", "", (SCORED,))
    return [
        StreamedCompletion(
            group,
            index,
            CompletionScores("", CompletionStatus.OK, {"cheating": ProbeScores(np.full((1, 1, 1), completion.tokens[0], np.float32))}),
            info,
        )
        for group, entry in enumerate(asked.groups)
        for index, completion in enumerate(entry.completions)
    ]


def lost(reason: str) -> ServerError:
    violations = (FieldViolation("groups[0].completions[1]", "a worker was lost with it twice"),)
    return ServerError("lost", "INTERNAL", reason, violations)


def test_rollout_with_which_a_worker_was_lost_twice_is_unscorable_and_the_rest_is_scored() -> None:
    steps = score_batch(ROLLOUTS, [SIGNAL], SERVER, {})
    next(steps)
    asked = steps.throw(lost("WORKER_LOST_TWICE"))
    with pytest.raises(StopIteration) as done:
        steps.send(answers(asked))
    batch: BatchSignals = done.value.value
    np.testing.assert_array_equal(batch.signals[0].values, [0, np.nan, 2, 3])
    assert batch.problems == {1: "a worker was lost with it twice"}


def test_other_failures_of_a_server_are_nobodys_fault() -> None:
    steps = score_batch(ROLLOUTS, [SIGNAL], SERVER, {})
    next(steps)
    with pytest.raises(ServerError):
        steps.throw(lost("INTERNAL"))


def test_what_the_client_knows_to_be_unscorable_is_not_sent_and_says_why() -> None:
    broken = [Rollout(np.array([5]), np.array([100])), Rollout(np.array([-1]), np.array([1])), Rollout(np.array([5]), np.zeros(10**6, int))]
    steps = score_batch([ROLLOUTS[0], *broken, ROLLOUTS[1], Rollout("a", "b", problem="known")], [SIGNAL], SERVER, {})
    asked = next(steps)
    assert [completion.tokens.tolist() for group in asked.groups for completion in group.completions] == [[0], [1]]
    with pytest.raises(StopIteration) as done:
        steps.send(answers(asked))
    assert done.value.value.problems == {
        1: "id 100 at index 0 is not in the vocabulary, [0, 100)",
        2: "id -1 at index 0 is not in the vocabulary, [0, 100)",
        3: "1000001 tokens; the limit is 1000000, the server's max_rollout_tokens: send a shorter one, since nothing is cut",
        5: "known",
    }


# ---------------------------------------------------------------------------------------------------------------------- reports


def agreement(report: Any) -> BoundSignal:
    return BoundSignal.bind(ProbeSignal("cheating", mode="agreement", threshold=1.0, report=report), SERVER.probes)


def reports_of(report: Any, rollouts: list[Rollout]) -> list[float]:
    steps = score_batch(rollouts, [agreement(report)], SERVER, {})
    try:
        steps.send(answers(next(steps)))
    except StopIteration as done:
        return done.value.signals[0].reports.tolist()
    raise AssertionError("a second request")


def test_each_rollout_is_asked_for_its_report_by_its_own_ids() -> None:
    said = reports_of(lambda ids: {0: True, 1: np.False_, 2: None, 3: False}[int(ids[0])], ROLLOUTS)
    assert said[:2] + said[3:] == [1.0, 0.0, 0.0]
    assert np.isnan(said[2])


@pytest.mark.parametrize("gives", [1, 0.5, "yes", np.zeros(2)], ids=str)
def test_a_report_that_is_neither_yes_nor_no_is_refused(gives: Any) -> None:
    with pytest.raises(SignalError, match="report: expected True, False or None"):
        reports_of(lambda ids: gives, ROLLOUTS)


def test_a_report_that_fails_or_has_no_ids_is_named() -> None:
    with pytest.raises(SignalError, match="report: it failed: index 9 is out of bounds"):
        reports_of(lambda ids: ids[9], ROLLOUTS)
    with pytest.raises(SignalError, match="report: a function of completion_ids needs ids"):
        Rollout(np.array([5]), "copied").reported(bool, "cheating")
