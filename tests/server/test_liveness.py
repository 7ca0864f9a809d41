"""When a worker counts as stuck, on a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probescore_server.activity import Activity, ActivityStep, TextBeingTokenised
from probescore_server.workers.liveness import BOOT_SECONDS, TEXT_BYTES_PER_SECOND, LivenessWatch, WorkerTimeLimits

PATIENCE = WorkerTimeLimits(silent_seconds=10, start_seconds=1000, step_seconds=20, step_seconds_per_1000_tokens=100, chat_seconds=5)
IDLE = TextBeingTokenised()


def ready_watch(now: float = 0.0) -> LivenessWatch:
    watch = LivenessWatch(PATIENCE, now)
    watch.ready()
    watch.heard(now)
    return watch


def lively_until(watch: LivenessWatch, now: float) -> None:
    """It says that it is there, and nothing else."""
    watch.heard(now)
    assert watch.loss(now) is None


@pytest.mark.parametrize("computes", [False, True])
@pytest.mark.parametrize("tokenises", [False, True])
def test_silence_is_noticed_in_every_state(computes: bool, tokenises: bool) -> None:
    watch = ready_watch()
    if computes:
        watch.asked(1, 1e9, 0.0)
    if tokenises:
        watch.tokenises([TextBeingTokenised(1, 1, 10**9)], 0.0)
    assert watch.loss(10.0) is None
    assert watch.loss(10.1).reason == "silent"
    watch.heard(10.2)
    assert watch.loss(20.2) is None


def test_a_process_has_a_minute_for_its_first_word_and_then_no_longer_than_any_other() -> None:
    watch = LivenessWatch(PATIENCE, 100.0)
    watch.heard(float("-inf"))
    assert watch.loss(100.0 + BOOT_SECONDS) is None
    assert watch.loss(100.1 + BOOT_SECONDS).reason == "silent"
    watch.heard(105.0)
    assert watch.loss(115.1).reason == "silent"


def test_one_that_loads_for_ever_is_given_up_however_lively() -> None:
    watch = LivenessWatch(PATIENCE, 0.0)
    lively_until(watch, 1000.0)
    watch.heard(1000.1)
    assert watch.loss(1000.1).reason == "start"
    watch.ready()
    assert watch.loss(1000.2) is None


def test_a_batch_that_takes_no_step_is_given_up_after_what_its_tokens_allow() -> None:
    watch = ready_watch()
    watch.asked(7, PATIENCE.for_tokens(3000), 0.0)
    lively_until(watch, 320.0)
    watch.heard(320.1)
    loss = watch.loss(320.1)
    assert (loss.reason, loss.order) == ("overdue", 7)


@given(st.lists(st.floats(0, 19.99), min_size=1, max_size=60))
def test_a_batch_that_is_merely_long_is_left_alone(steps: list[float]) -> None:
    watch, activity, now = ready_watch(), Activity(), 0.0
    watch.asked(1, PATIENCE.for_tokens(10), now)
    activity.begin_order(1, 10)
    for seconds in steps:
        activity.begin("the model", 0)
        watch.heard(now)
        watch.at(activity.step, now)
        now += seconds
        watch.heard(now)
        watch.at(activity.step, now)  # the same: no progress
        assert watch.loss(now) is None
    watch.heard(now + 20.1)
    assert watch.loss(now + 20.1).reason == "overdue"


def test_one_that_was_stopped_is_silent_and_not_overdue() -> None:
    watch = ready_watch()
    watch.asked(1, 2.0, 0.0)
    assert watch.loss(10.0) is None
    assert watch.loss(10.1).reason == "silent"


def test_a_step_counts_its_own_tokens_and_only_for_the_batch_that_it_is_of() -> None:
    watch = ready_watch()
    watch.asked(1, PATIENCE.for_tokens(100_000), 0.0)
    watch.at(ActivityStep(1, order=1, name="probe p@1", tokens=1000), 5.0)
    lively_until(watch, 125.0)
    watch.heard(125.1)
    assert watch.loss(125.1).reason == "overdue"
    # one of a batch before says nothing of this one
    other = ready_watch()
    other.asked(2, PATIENCE.for_tokens(0), 0.0)
    other.at(ActivityStep(9, order=1, name="reductions", tokens=10**6), 19.0)
    other.heard(20.1)
    assert other.loss(20.1).order == 2


def test_what_waits_behind_something_else_has_its_own_time() -> None:
    watch = ready_watch()
    for number in (1, 2, 3):
        watch.asked(number, 20, 0.0)
    for number in (1, 2, 3):
        lively_until(watch, 20.0 * number)
        watch.answered(number, 20.0 * number)
    watch.heard(1000.0)
    assert watch.loss(1000.0) is None  # nothing is asked of it
    watch.asked(4, 20, 1000.0)
    lively_until(watch, 1020.0)


def test_texts_that_do_not_come_back_are_noticed_while_batches_do() -> None:
    watch = ready_watch()
    watch.tokenises([TextBeingTokenised(1, 1)], 0.0)
    for number in range(2, 6):
        watch.asked(number, 20, 6.0 * number)
        watch.answered(number, 6.0 * number + 5)
    watch.heard(35.0)
    loss = watch.loss(35.0)
    assert (loss.reason, loss.order) == ("overdue", 1)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 300_000), st.booleans()), min_size=1, max_size=60))
def test_texts_that_take_turns_are_not_held_against_each_other(texts: list[tuple[int, int, bool]]) -> None:
    """Given texts of three requests that each take what they may, then it may take as long as all of them, and no longer."""
    watch, now = ready_watch(), 0.0
    for number, (order, size, is_chat) in enumerate(texts, 1):
        in_hand = [TextBeingTokenised(number, order, size, is_chat), IDLE]
        seconds = PATIENCE.step_seconds + size / TEXT_BYTES_PER_SECOND + 5 * is_chat
        for share in (0, 0.5, 0.999):
            watch.tokenises(in_hand, now + share * seconds)
            lively_until(watch, now + share * seconds)
        now += seconds
    watch.tokenises(in_hand, now + 0.1)
    watch.heard(now + 0.1)
    loss = watch.loss(now + 0.1)
    assert (loss.reason, loss.order) == ("overdue", order)


@pytest.mark.parametrize("stuck", [0, 1])
def test_a_lane_that_is_stuck_is_noticed_whatever_the_other_does(stuck: int) -> None:
    watch, now = ready_watch(), 0.0
    while watch.loss(now) is None:
        assert now <= 40
        texts = [TextBeingTokenised(int(now) + 10, 2 + int(now), 10), TextBeingTokenised(int(now) + 10, 0)]
        texts[stuck] = TextBeingTokenised(1, 1, 10_000)
        watch.tokenises(texts, now)
        now += 1
        watch.heard(now)
    assert watch.loss(now).order == 1
    assert now > PATIENCE.step_seconds


def test_a_text_may_wait_for_that_of_the_other_lane_and_an_idle_lane_for_ever() -> None:
    watch = ready_watch()
    watch.tokenises([TextBeingTokenised(1, 1, 10), TextBeingTokenised(1, 2, 300_000)], 0.0)
    lively_until(watch, 49.0)
    watch.tokenises([TextBeingTokenised(1), TextBeingTokenised(1)], 49.0)
    lively_until(watch, 1e6)


@given(st.floats(0, 1e6))
def test_time_in_which_nobody_watched_does_not_count(away: float) -> None:
    watch = LivenessWatch(PATIENCE, 0.0)
    watch.heard(0.0)
    watch.asked(1, 20, 0.0)
    watch.tokenises([TextBeingTokenised(1, 2)], 0.0)
    watch.excuse(away)
    assert watch.loss(away) is None
    watch.heard(away + 1)
    assert watch.loss(away + 1) is None
    assert watch.loss(away + 12).reason == "silent"
