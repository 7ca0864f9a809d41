"""What the core has for trainers that have one rollout at a time scored."""

from __future__ import annotations

import pytest
from handmade_values import combined, signal_values
from hypothesis import given
from hypothesis import strategies as st

from probescore_adapters import Mode, ProbeScorer, ProbeSignal, SignalError

PENALTY = ProbeSignal("cheating", threshold=1.0, weight=2.0)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8))
def test_means_over_rollouts_are_the_metrics_of_the_batch(values: list[float]) -> None:
    batch = combined(signal_values(PENALTY, values)).metrics
    alone = [combined(signal_values(PENALTY, [value])).rollout_metrics for value in values]
    for key in ("cheating/mean", "cheating/flagged", "cheating/reward", "unscorable", "failures"):
        mean = sum(one[f"probescore/{key}"] for one in alone) / len(values)
        assert mean == pytest.approx(batch[f"probescore/{key}"], abs=1e-9)


def test_the_metrics_of_a_rollout_have_the_same_keys_where_it_is_unscorable() -> None:
    scored, unscorable = (combined(signal_values(PENALTY, [value])).rollout_metrics for value in (0.0, float("nan")))
    assert list(scored) == list(unscorable)


def test_a_mode_that_a_trainer_cannot_do_is_refused() -> None:
    with pytest.raises(SignalError, match="signal 'cheating': mode: screen cannot be done here: so it is"):
        ProbeScorer(ProbeSignal("cheating", mode="screen")).refuse_modes(Mode.SCREEN, Mode.DENSE, because="so it is")


def test_other_modes_are_let_through() -> None:
    scorer = ProbeScorer(PENALTY)
    scorer.refuse_modes(Mode.SCREEN, because="so it is")
