"""Alarms during training: seldom false in a whole run, and soon right."""

from __future__ import annotations

import numpy as np
import pytest

from probescore_audit import MissedMonitor, RecallMonitor

STEPS = 300


def recall_alarm(recall, *, floor=0.85, alpha=0.05, seed=0, positives=3):
    rng, monitor = np.random.default_rng(seed), RecallMonitor(floor, STEPS, alpha)
    for step in range(STEPS):
        caught = int(rng.binomial(positives, recall))
        monitor.update(step, caught, positives - caught)
    return monitor.alarm_step


def missed_alarm(rate, *, ceiling=0.02, alpha=0.05, seed=0, inclusion=0.05, rollouts=512):
    rng, monitor = np.random.default_rng(seed), MissedMonitor(ceiling, STEPS, alpha)
    for step in range(STEPS):
        seen = int(rng.binomial(rng.binomial(rollouts, rate), inclusion))
        monitor.update(step, [inclusion] * seen, rollouts)
    return monitor.alarm_step


def test_at_the_bound_itself_false_alarms_are_as_rare_as_asked_for():
    assert sum(recall_alarm(0.85, seed=seed) is not None for seed in range(200)) <= 17  # of 200; 10 are allowed on average
    assert sum(missed_alarm(0.02, seed=seed) is not None for seed in range(200)) <= 17


def test_looking_at_every_step_costs_nothing():
    """A test at each step at the same level would be wrong nearly always in 300 steps."""
    assert sum(recall_alarm(0.93, seed=seed) is not None for seed in range(100)) <= 2


@pytest.mark.parametrize(("recall", "latest"), [(0.6, 60), (0.1, 10)])
def test_a_fall_of_recall_is_noticed(recall, latest):
    steps = [recall_alarm(recall, seed=seed) for seed in range(20)]
    assert None not in steps
    assert np.median(steps) < latest


def test_missed_rollouts_are_noticed_though_few_are_labelled():
    steps = [missed_alarm(0.06, seed=seed) for seed in range(20)]
    assert None not in steps


def test_a_change_late_in_the_run_is_noticed_as_well():
    rng, monitor = np.random.default_rng(0), RecallMonitor(0.85, STEPS, 0.05)
    for step in range(STEPS):
        caught = int(rng.binomial(3, 0.93 if step < 250 else 0.3))
        monitor.update(step, caught, 3 - caught)
    assert monitor.alarm_step is not None
    assert 250 <= monitor.alarm_step < 265


def test_evidence_starts_at_none_and_an_alarm_keeps_its_step():
    monitor = RecallMonitor(0.5, 10, 0.5)
    assert monitor.update(0, 0, 0) == pytest.approx(0.0, abs=1e-12)
    for step in range(1, 10):
        monitor.update(step, 0, 5)
    first = monitor.alarm_step
    monitor.update(10, 5, 0)
    assert monitor.alarm_step == first is not None


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: RecallMonitor(0, 10, 0.05), "floor: 0"),
        (lambda: RecallMonitor(0.5, 0, 0.05), "planned_steps: 0"),
        (lambda: MissedMonitor(0.1, 10, 1), "alpha: 1"),
        (lambda: MissedMonitor(1, 10, 0.05), "ceiling: 1"),
    ],
)
def test_bad_bounds_are_named(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()
