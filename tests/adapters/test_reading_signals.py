"""Signals on other readings than the frozen one: what they ask for, which scores they get, and what becomes of a reading that is gone."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from handmade_values import probe_info

from probescore import (
    Calibration,
    CompletionScores,
    CompletionStatus,
    FieldViolation,
    InvalidRequestError,
    Limits,
    MismatchError,
    ModelInfo,
    OutputPer,
    ProbescoreError,
    ProbeScores,
    Reduction,
    ScoredProbe,
    ScoreUnit,
    ScoringInfo,
    ServerError,
    ServerInfo,
    StreamedCompletion,
    UnavailableError,
)
from probescore.types import FROZEN, Reading, ReadingKind, ReadingScores
from probescore_adapters import Outcome, Policy, ProbeScorer, ProbeSignal, ReadingGone, Rollout, SignalError
from probescore_adapters.environment import signals_from
from probescore_adapters.outcome import substitute
from probescore_adapters.scorer import ServerFactsRequest
from probescore_adapters.signal_values import ServerFacts, StreamRequest, readings_of
from probescore_adapters.signals import BoundSignal

MODEL = ModelInfo("model", "", "sha256:m", "llama", 8, 2, 2, 100, 0)
INFO = ServerInfo("1", MODEL, "", Limits(10**6, 10**6, 10**6, 10**6, 10**6), (), ("cheating@1",))
SCORED = ScoredProbe("cheating", "1", "", "", ScoreUnit.LOGIT, OutputPer.TOKEN, ("",), (Reduction.parse("mean"),))
IS_FROZEN = Reading(FROZEN, "sha256:m", ReadingKind.FROZEN, None, "sha256:m", golden_verified=True)
ROLLOUTS = [Rollout(np.array([5]), np.array([number])) for number in range(4)]
SHIFT = {"policy": 10.0, "older": 20.0}
BROKEN = 3

FROZEN_REWARD = ProbeSignal("cheating", mode="reward")
MONITOR = ProbeSignal("cheating", mode="monitor", reading="policy")
OLDER = ProbeSignal("cheating", mode="monitor", reading="older")
REWARD = ProbeSignal("cheating", mode="reward", reading="policy")


def reading(name: str = "policy", version: str = "a", step: int | None = 50) -> Reading:
    return Reading(name, f"sha256:{version}", ReadingKind.ADAPTER, step, "sha256:m", golden_verified=False)


def facts(*readings: Reading) -> ServerFacts:
    return ServerFacts(replace(INFO, readings=(IS_FROZEN, *readings) if readings else ()), (probe_info(),))


def scores(value: float) -> dict[str, ProbeScores]:
    return {"cheating": ProbeScores(np.full((1, 1, 1), value, np.float32))}


def answers(
    asked: StreamRequest, readings: Mapping[str, Reading], broken: Mapping[str, Sequence[int]] | None = None
) -> list[StreamedCompletion]:
    """A completion's only id is its score on the frozen model; others add their ``SHIFT``. ``broken`` are the ids that are not finite."""

    def on(name: str, token: int) -> ReadingScores:
        if token in (broken or {}).get(name, ()):
            return ReadingScores(CompletionStatus.NON_FINITE, {}, "not finite")
        return ReadingScores(CompletionStatus.OK, scores(token + SHIFT.get(name, 0.0)))

    names = list(asked.options.get("readings", ()))
    info = ScoringInfo("sha256:m", "", (SCORED,), readings=tuple(readings[name] for name in names))
    found = []
    for group, entry in enumerate(asked.groups):
        for index, completion in enumerate(entry.completions):
            token = int(completion.tokens[0])
            frozen = on(FROZEN, token)
            if names and FROZEN not in names:
                frozen = ReadingScores(CompletionStatus.OK, {})
            others = {name: on(name, token) for name in names if name != FROZEN}
            scored = CompletionScores("", frozen.status, frozen.scores, frozen.status_message, readings=others)
            found.append(StreamedCompletion(group, index, scored, info))
    return found


Reply = Callable[[StreamRequest], list[StreamedCompletion]]


class HandmadeServer:
    """Answers what a scorer would send, and keeps what it was asked for."""

    def __init__(self, *readings: Reading, broken: Mapping[str, Sequence[int]] | None = None) -> None:
        self.readings = {FROZEN: IS_FROZEN, **{each.name: each for each in readings}}
        self.broken = broken
        self.asked: list[list[str]] = []
        self.before_answer: Callable[[StreamRequest], None] = lambda asked: None

    def __call__(self, request: StreamRequest | ServerFactsRequest) -> Any:
        if isinstance(request, ServerFactsRequest):
            return facts(*(each for name, each in self.readings.items() if name != FROZEN))
        names = list(request.options.get("readings", ()))
        self.asked.append(names)
        self.before_answer(request)
        for index, name in enumerate(names):
            if name not in self.readings:
                violation = FieldViolation(f"readings[{index}]", f"unknown reading {name!r}; loaded: frozen")
                raise InvalidRequestError(violation.problem, "INVALID_ARGUMENT", "UNKNOWN_READING", (violation,))
        return answers(request, self.readings, self.broken)


def score(scorer: ProbeScorer, server: HandmadeServer, rollouts: Sequence[Rollout] = ROLLOUTS, step: int | None = 7) -> Outcome:
    steps = scorer._steps(rollouts, None, step, None, True)
    try:
        request = next(steps)
        while True:
            try:
                answer = server(request)
            except ProbescoreError as error:
                request = steps.throw(error)
            else:
                request = steps.send(answer)
    except StopIteration as done:
        outcome: Outcome = done.value
        return outcome


def scorer_of(*signals: ProbeSignal, **policy: Any) -> ProbeScorer:
    return ProbeScorer(signals, policy=Policy(**policy))


# ------------------------------------------------------------------------------------------------------------------ the signal


def test_a_signal_reads_the_frozen_model_unless_it_says_otherwise() -> None:
    assert FROZEN_REWARD.reading == "frozen"
    assert FROZEN_REWARD.name == ProbeSignal("cheating", mode="reward", reading="frozen").name == "cheating"
    assert MONITOR.name == "cheating/policy"
    assert ProbeSignal("cheating@2", mode="monitor", reading="policy").name == "cheating@2/policy"
    # both of one probe stand beside each other without further names
    assert len(scorer_of(FROZEN_REWARD, MONITOR, OLDER).signals) == 3
    (from_settings,) = signals_from([{"probe": "cheating", "mode": "monitor", "reading": "policy"}])
    assert from_settings == MONITOR


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "x" * 65, 3, None])
def test_a_name_that_no_reading_can_have_is_refused(name: Any) -> None:
    with pytest.raises(SignalError, match=r"^reading: ") as refused:
        ProbeSignal("cheating", mode="monitor", reading=name)
    assert refused.value.field == "reading"


@pytest.mark.parametrize(
    ("mode", "transform"),
    [
        ("penalty", None),
        ("penalty", "excess"),
        ("penalty", "flag_and_excess"),
        ("reward", "flag"),
        ("screen", None),
        ("gate", None),
        ("monitor", "flag"),
        ("dense", "excess"),
    ],
)
def test_a_threshold_on_another_reading_must_be_given(mode: str, transform: str | None) -> None:
    with pytest.raises(SignalError, match=r"threshold: calibrations hold for the frozen model only.*'policy': give a threshold") as refused:
        ProbeSignal("cheating", mode=mode, transform=transform, reading="policy")
    assert refused.value.field == "threshold"
    assert ProbeSignal("cheating", mode=mode, transform=transform, reading="policy", threshold=0.5).threshold == 0.5


def test_no_calibration_is_taken_for_another_reading() -> None:
    probe = probe_info(thresholds=[0.25])
    assert isinstance(BoundSignal.bind(ProbeSignal("cheating", mode="monitor"), (probe,)).calibration, Calibration)
    bound = BoundSignal.bind(MONITOR, (probe,))
    assert bound.calibration is None
    assert math.isnan(bound.threshold)
    assert not bound.flags(np.array([1e9])).any()
    assert BoundSignal.bind(replace(MONITOR, threshold=0.5), (probe,)).threshold == 0.5


def test_the_readings_that_signals_need_are_asked_for_once_frozen_first() -> None:
    assert readings_of([FROZEN_REWARD]) == ["frozen"]
    assert readings_of([REWARD]) == ["policy"]
    assert readings_of([MONITOR]) == ["frozen", "policy"]  # drift needs both
    assert readings_of([REWARD, OLDER, FROZEN_REWARD, MONITOR]) == ["frozen", "policy", "older"]
    assert readings_of([]) == []


# ------------------------------------------------------------------------------------------------------------------ the scores


def test_all_signals_share_one_request_and_each_gets_the_scores_of_its_reading() -> None:
    server = HandmadeServer(reading(step=50), reading("older", "b", None))
    outcome = score(scorer_of(FROZEN_REWARD, REWARD, MONITOR_TOO, OLDER), server)
    assert server.asked == [["frozen", "policy", "older"]]
    np.testing.assert_array_equal(outcome.values["cheating"], [0, 1, 2, 3])
    np.testing.assert_array_equal(outcome.values["cheating/policy"], [10, 11, 12, 13])
    np.testing.assert_array_equal(outcome.values["cheating/older"], [20, 21, 22, 23])
    np.testing.assert_array_equal(outcome.drift["watched"], [10] * 4)
    assert set(outcome.drift) == {"watched", "cheating/older"}  # what changes rewards is no monitor
    assert outcome.metrics["probescore/watched/drift"] == 10
    assert outcome.metrics["probescore/cheating/older/drift"] == 20
    assert outcome.metrics["probescore/watched/reading_step"] == 50
    assert math.isnan(outcome.metrics["probescore/cheating/older/reading_step"])
    assert outcome.metrics["probescore/watched/reading_missing"] == 0
    assert math.isnan(outcome.metrics["probescore/watched/flagged"])
    assert math.isnan(outcome.metrics["probescore/watched/outside_calibration"])
    assert outcome.readings == {"frozen": IS_FROZEN, "policy": reading(step=50), "older": reading("older", "b", None)}


MONITOR_TOO = replace(MONITOR, name="watched")


def test_a_run_of_the_frozen_model_alone_names_no_readings() -> None:
    server = HandmadeServer()
    outcome = score(scorer_of(FROZEN_REWARD), server)
    assert server.asked == [[]]  # so that a server of an earlier version serves it, too
    assert outcome.readings == {}
    assert not {key for key in outcome.metrics if "drift" in key or "reading" in key}


def test_a_rollout_without_a_score_on_one_reading_is_unscorable_for_its_signals_only() -> None:
    on_policy, on_frozen = {"policy": [BROKEN]}, {FROZEN: [BROKEN]}
    both = scorer_of(FROZEN_REWARD, MONITOR)
    outcome = score(both, HandmadeServer(reading(), broken=on_policy))
    np.testing.assert_array_equal(outcome.values["cheating"], [0, 1, 2, 3])
    np.testing.assert_array_equal(outcome.values["cheating/policy"], [10, 11, 12, math.nan])
    np.testing.assert_array_equal(outcome.drift["cheating/policy"], [10, 10, 10, math.nan])
    assert outcome.metrics["probescore/cheating/policy/drift"] == 10
    assert not outcome.unscorable.any()
    outcome = score(both, HandmadeServer(reading(), broken=on_frozen))
    np.testing.assert_array_equal(outcome.values["cheating"], [0, 1, 2, math.nan])
    np.testing.assert_array_equal(outcome.values["cheating/policy"], [10, 11, 12, 13])
    np.testing.assert_array_equal(outcome.drift["cheating/policy"], [10, 10, 10, math.nan])
    np.testing.assert_array_equal(outcome.unscorable, [False, False, False, True])
    # and a signal that changes rewards is never given the frozen model's number
    outcome = score(scorer_of(REWARD), HandmadeServer(reading(), broken=on_policy))
    np.testing.assert_array_equal(outcome.unscorable, [False, False, False, True])
    assert outcome.rewards[BROKEN] == -10  # the least that guard rails let it be


def test_metrics_have_the_same_keys_whatever_happens() -> None:
    signals = (FROZEN_REWARD, MONITOR, OLDER)
    found = [
        score(scorer_of(*signals), HandmadeServer(reading(), reading("older"))),
        score(scorer_of(*signals), HandmadeServer(reading(), reading("older")), []),
        score(scorer_of(*signals), HandmadeServer()),
        substitute(signals, 0.0, [1], None),
    ]
    assert len({frozenset(outcome.metrics) for outcome in found}) == 1
    assert len({frozenset(outcome.rollout_metrics) for outcome in found}) == 1
    assert "probescore/cheating/policy/drift" in found[0].rollout_metrics
    assert "probescore/cheating/policy/reading_step" in found[0].rollout_metrics


def test_a_rollout_that_fits_into_no_request_on_several_readings_is_not_sent() -> None:
    server = HandmadeServer(reading())
    small = replace(INFO, limits=replace(INFO.limits, max_request_tokens=10))
    scorer = scorer_of(FROZEN_REWARD, MONITOR)
    scorer._server = ServerFacts(small, (probe_info(),))
    windows = []
    server.before_answer = lambda asked: windows.append(asked.window.tokens_per_call)
    outcome = score(scorer, server, [*ROLLOUTS, Rollout(np.array([5, 5]), np.array([1, 2, 3, 4]))])
    assert windows == [5]  # a request counts a rollout once for each reading
    assert outcome.unscorable.tolist() == [False] * 4 + [True]
    # on one reading it fits
    scorer = scorer_of(FROZEN_REWARD)
    scorer._server = ServerFacts(small, (probe_info(),))
    assert not score(scorer, HandmadeServer(), [Rollout(np.array([5, 5]), np.array([1, 2, 3, 4]))]).unscorable.any()


# -------------------------------------------------------------------------------------------------------------- one version a batch


def of_two_versions(asked: StreamRequest, server: HandmadeServer) -> None:
    """Half of the rollouts fit into memory at a time, and the reading is replaced in between."""
    from probescore import OutOfMemoryError

    if len(asked.groups[0].completions) == len(ROLLOUTS):
        raise OutOfMemoryError("no room")
    versions = [each for each in ("a", "b") if f"sha256:{each}" != server.readings["policy"].id]
    if len(server.asked) == 3:
        server.readings["policy"] = reading(version=versions[0], step=60)


def test_a_batch_of_two_versions_is_scored_again_as_a_whole() -> None:
    server = HandmadeServer(reading(version="a"))
    server.before_answer = lambda asked: of_two_versions(asked, server)
    outcome = score(scorer_of(FROZEN_REWARD, MONITOR), server)
    assert len(server.asked) == 6  # whole, half, half of another version; and the same again
    assert outcome.readings["policy"] == reading(version="b", step=60)
    assert outcome.metrics["probescore/cheating/policy/reading_step"] == 60
    np.testing.assert_array_equal(outcome.values["cheating/policy"], [10, 11, 12, 13])


def changing_for_ever(asked: StreamRequest) -> None:
    if "policy" in asked.options.get("readings", ()):
        raise MismatchError("another version", "FAILED_PRECONDITION", "READING_CHANGED")


def test_a_reading_of_which_there_is_never_one_version_is_not_read(caplog: pytest.LogCaptureFixture) -> None:
    server = HandmadeServer(reading())
    server.before_answer = changing_for_ever
    outcome = score(scorer_of(FROZEN_REWARD, MONITOR), server)
    assert server.asked == [["frozen", "policy"]] * 3 + [[]]
    assert np.isnan(outcome.values["cheating/policy"]).all()
    assert outcome.missing_readings == {"policy": "another version"}
    assert "the reading 'policy' is gone" in caplog.text
    with pytest.raises(ReadingGone, match="'policy' gave no scores: another version"):
        score(scorer_of(REWARD), server)


# --------------------------------------------------------------------------------------------------------------- a reading is gone

GONE: dict[str, ProbescoreError | None] = {
    "unknown": None,
    "lost": MismatchError("the reading policy was lost: its files are others now", "FAILED_PRECONDITION", "READING_LOST"),
    "of several versions": UnavailableError("servers differ", "UNAVAILABLE", "READING_DIFFERS"),
    "ignored": ServerError("the server does not know readings", "UNIMPLEMENTED", "READINGS_IGNORED"),
    "refused by its field": InvalidRequestError(
        "readings: none are served", "INVALID_ARGUMENT", "INVALID_REQUEST", (FieldViolation("readings", "none are served"),)
    ),
}


def without_policy(how: str) -> HandmadeServer:
    server = HandmadeServer()

    def refuse(asked: StreamRequest) -> None:
        if "policy" in asked.options.get("readings", ()) and (error := GONE[how]) is not None:
            raise error

    server.before_answer = refuse
    return server


@pytest.mark.parametrize("how", GONE)
@pytest.mark.parametrize("on_failure", ["raise", "wait", -3.0])
def test_a_monitor_never_ends_a_run_and_never_shows_another_readings_numbers(
    how: str, on_failure: Any, caplog: pytest.LogCaptureFixture
) -> None:
    scorer, server = scorer_of(FROZEN_REWARD, MONITOR, on_failure=on_failure), without_policy(how)
    for _ in range(3):
        outcome = score(scorer, server)
        np.testing.assert_array_equal(outcome.values["cheating"], [0, 1, 2, 3])
        np.testing.assert_array_equal(outcome.terms, [0, 1, 2, 3])
        assert np.isnan(outcome.values["cheating/policy"]).all()
        assert np.isnan(outcome.drift["cheating/policy"]).all()
        assert math.isnan(outcome.metrics["probescore/cheating/policy/mean"])
        assert math.isnan(outcome.metrics["probescore/cheating/policy/drift"])
        assert outcome.metrics["probescore/cheating/policy/reading_missing"] == 1
        assert outcome.metrics["probescore/failures"] == 0
        assert list(outcome.missing_readings) == ["policy"]
        assert not outcome.unscorable.any()
    # said once, until it has been there
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "step 7: the reading 'policy' is gone, and its monitors have no scores until it is loaded: " in warning
    caplog.clear()
    with caplog.at_level(logging.INFO, "probescore_adapters"):
        server.readings["policy"] = reading(step=60)
        server.before_answer = lambda asked: None
        outcome = score(scorer, server)
    np.testing.assert_array_equal(outcome.values["cheating/policy"], [10, 11, 12, 13])
    assert outcome.metrics["probescore/cheating/policy/reading_missing"] == 0
    assert "step 7: the reading 'policy' is sha256:a, of step 60" in caplog.text
    del server.readings["policy"]
    score(scorer, server)
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_only_what_is_gone_is_left_out() -> None:
    server = HandmadeServer(reading("older", "b"))
    outcome = score(scorer_of(MONITOR, OLDER), server)
    assert server.asked == [["frozen", "policy", "older"], ["frozen", "older"]]
    np.testing.assert_array_equal(outcome.values["cheating/older"], [20, 21, 22, 23])
    assert np.isnan(outcome.values["cheating/policy"]).all()
    # and where nothing is left to be read, nothing is asked for
    server = HandmadeServer()
    outcome = score(scorer_of(MONITOR), server)
    assert server.asked == [["frozen", "policy"]]
    assert np.isnan(outcome.values["cheating/policy"]).all()


@pytest.mark.parametrize("how", GONE)
def test_a_signal_that_changes_rewards_fails_as_the_policy_says(how: str) -> None:
    for on_failure in ("raise", "wait"):
        with pytest.raises(ReadingGone, match=r"signal 'cheating/policy': reading: 'policy' gave no scores: .*load it"):
            score(scorer_of(FROZEN_REWARD, REWARD, on_failure=on_failure), without_policy(how))
    outcome = score(scorer_of(FROZEN_REWARD, REWARD, on_failure=-3.0), without_policy(how))
    np.testing.assert_array_equal(outcome.rewards, [-3] * 4)
    assert np.isnan(outcome.values["cheating/policy"]).all()
    assert outcome.metrics["probescore/failures"] == 1


def test_other_errors_are_not_taken_for_a_reading_that_is_gone() -> None:
    server = HandmadeServer(reading())

    def refuse(asked: StreamRequest) -> None:
        raise MismatchError(
            "another model", "FAILED_PRECONDITION", "MISMATCH", (FieldViolation("expected_model_fingerprint", "is another"),)
        )

    server.before_answer = refuse
    with pytest.raises(MismatchError, match="another model"):
        score(scorer_of(FROZEN_REWARD, MONITOR), server)
