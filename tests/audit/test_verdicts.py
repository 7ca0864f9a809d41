"""What is said of a probe after training, against simulated runs of which it is known what happened."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.audit_study import SCENARIOS
from benchmarks.simulated_runs import Change, Labeller, simulate_reference, simulate_run
from probescore_audit import AlarmBounds, RunLabels, Verdict, alarm_bounds, audit_run, judge, labelled_window

RUNS = 8


def judgement(change, seed, labeller=Labeller()):  # noqa: B008
    rng = np.random.default_rng([seed, 5])
    reference = simulate_reference(rng)
    return judge(labelled_window(*simulate_run([change] * 10, 32, rng, labeller), 0, 9), reference, seed=seed)


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_verdict_is_wrong(name):
    change, right, not_wrong = SCENARIOS[name]
    given = [judgement(change, seed).verdict for seed in range(RUNS)]
    assert set(given) <= right | not_wrong | {Verdict.CANNOT_TELL}


@pytest.mark.parametrize(
    "name", ["honest fall, 9% to 0.4%", "behaviour rises to 40%", "evasion, behaviour at 50%", "evasion, behaviour at 9%", "false alarms"]
)
def test_clear_cases_are_decided(name):
    change, right, _ = SCENARIOS[name]
    assert sum(judgement(change, seed).verdict in right for seed in range(RUNS)) >= RUNS - 1


def test_a_labeller_who_errs_makes_evasion_out_of_nothing_unless_positives_are_judged_twice():
    once, twice = ([judgement(Change(), seed, Labeller(0.96, twice=twice)).verdict for seed in range(RUNS)] for twice in (False, True))
    wrong = {Verdict.EVADED, Verdict.PROBE_WEAKER, Verdict.MIXED}
    assert sum(verdict in wrong for verdict in once) >= RUNS / 2
    assert sum(verdict in wrong for verdict in twice) == 0


def test_that_a_probe_is_weaker_never_rests_on_one_label_or_two():
    """With nearly all of the behaviour gone, few unflagged positives halve the recall that is seen; one or two labels may be wrong."""
    weaker = {Verdict.EVADED, Verdict.MIXED, Verdict.DILUTED, Verdict.THRESHOLD_MOVED, Verdict.PROBE_WEAKER}
    given = []
    for seed in range(40):
        rng = np.random.default_rng([seed, 11])
        reference = simulate_reference(rng)
        run, labels = simulate_run([Change(positive_rate=0.006)] * 10, 32, rng)
        unseen = np.flatnonzero(~run.flagged[labels.rollout] & labels.floor)
        said = labels.positive & run.flagged[labels.rollout]
        said[rng.choice(unseen, 1 + seed % 2, replace=False)] = True
        window = labelled_window(run, RunLabels(labels.rollout, said, labels.inclusion, labels.floor), 0, 9)
        given.append(judge(window, reference, seed=seed).verdict)
    assert not weaker & set(given)


def test_the_sentence_has_the_numbers():
    found = judgement(Change(positive_rate=0.5, hidden=0.9), 0)
    assert found.verdict is Verdict.EVADED
    assert f"{100 * found.recall.value:.2g}%" in found.sentence


def test_who_cannot_tell_says_how_many_labels_would_help():
    rng = np.random.default_rng(0)
    reference = simulate_reference(rng)
    found = judge(labelled_window(*simulate_run([Change()] * 2, 16, rng), 0, 1), reference)
    assert found.verdict is Verdict.CANNOT_TELL
    assert found.more_labels is None or found.more_labels >= 32
    assert "more labels" in found.sentence


def test_a_run_is_audited_from_its_first_window_to_its_last():
    rng = np.random.default_rng(3)
    changes = [Change()] * 20 + [Change(positive_rate=0.5, hidden=0.95)] * 20
    run, labels = simulate_run(changes, 32, rng)
    found = audit_run(run, labels, simulate_reference(rng), planned_steps=40)
    assert [window.last_step + 1 for window in found.windows[:-1]] == [window.first_step for window in found.windows[1:]]
    assert found.windows[-1].last_step == 39
    assert found.final is not None
    assert found.final.verdict is Verdict.EVADED
    assert found.windows[0].judgement.verdict is not Verdict.EVADED
    assert found.alarms
    assert all(20 <= alarm.step < 30 for alarm in found.alarms)


def test_a_run_without_labels_has_no_verdict():
    rng = np.random.default_rng(0)
    run, _ = simulate_run([Change()] * 3, 16, rng)
    nothing = RunLabels(np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(0), np.zeros(0, bool))
    found = audit_run(run, nothing, simulate_reference(rng), planned_steps=3)
    assert found.final is None
    assert found.unlabelled_steps == 3


def test_the_bounds_of_the_monitors_are_those_that_the_reference_gives_unless_others_are_asked_for():
    rng = np.random.default_rng(3)
    reference = simulate_reference(rng)
    run, labels = simulate_run([Change(hidden=0.3)] * 60, 32, rng)
    found = audit_run(run, labels, reference, planned_steps=60, window_labels=len(labels.rollout) + 1)
    bounds = alarm_bounds(reference)
    assert found.bounds == bounds
    assert 0.8 < bounds.recall < reference.flagged_positives / reference.positives - 0.05
    assert bounds.missed == pytest.approx(2 * 0.09 * (1 - reference.flagged_positives / reference.positives) + 0.01, abs=0.004)
    assert {alarm.bound for alarm in found.alarms} <= {bounds.recall, bounds.missed}
    assert found.alarms
    lenient = audit_run(run, labels, reference, planned_steps=60, window_labels=321, bounds=AlarmBounds(0.3, 0.2))
    assert not lenient.alarms
