"""``ProbeSignal``: what it accepts, which probe it is bound to, and what its transforms compute."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from handmade_values import probe_info
from hypothesis import given
from hypothesis import strategies as st

from probescore import OutputPer
from probescore_adapters import ProbeSignal, SignalError
from probescore_adapters.signals import BoundSignal

REFUSED = [
    ({"probe": ""}, "probe"),
    ({"mode": "punish"}, "mode"),
    ({"mask": "some"}, "mask"),
    ({"transform": "cube"}, "transform"),
    ({"reduction": "median"}, "reduction"),
    ({"reduction": "mean", "mode": "dense"}, "reduction"),
    ({"weight": 0}, "weight"),
    ({"weight": math.nan}, "weight"),
    ({"weight": -1.0}, "weight"),
    ({"weight": 1.5, "mode": "gate"}, "weight"),
    ({"weight": "1"}, "weight"),
    ({"threshold": math.inf}, "threshold"),
    ({"transform": "sigmoid", "mode": "screen"}, "transform"),
    ({"transform": "excess", "mode": "agreement", "report": bool}, "transform"),
    ({"transform": np.tanh, "mode": "agreement", "report": bool}, "transform"),
    ({"mode": "agreement"}, "report"),
    ({"mode": "agreement", "report": "sorted"}, "report"),
    ({"mode": "penalty", "report": bool}, "report"),
    ({"weight": -1.0, "mode": "relative_gate"}, "weight"),
    ({"weight": -1.0, "mode": "agreement", "report": bool}, "weight"),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED)
def test_what_cannot_mean_anything_is_refused_with_its_field(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(SignalError) as refused:
        ProbeSignal(**{"probe": "cheating", **fields})
    assert refused.value.field == named


@pytest.mark.parametrize(
    ("mode", "transform"),
    [
        *(("reward", "identity"), ("penalty", "flag"), ("screen", "flag"), ("gate", "flag"), ("relative_gate", "identity")),
        *(("agreement", "flag"), ("monitor", "identity"), ("dense", "identity")),
    ],
)
def test_each_mode_has_a_transform_of_its_own(mode: str, transform: str) -> None:
    assert ProbeSignal("cheating", mode=mode, report=bool if mode == "agreement" else None).transform == transform


def test_reward_may_weigh_less_than_nothing() -> None:
    assert ProbeSignal("cheating", mode="reward", weight=-2.0).weight == -2.0


# --------------------------------------------------------------------------------------------------------------------- binding


def test_threshold_is_the_calibrations_where_none_is_given() -> None:
    info = probe_info(thresholds=[1.5])
    assert BoundSignal.bind(ProbeSignal("cheating"), (info,)).threshold == 1.5
    assert BoundSignal.bind(ProbeSignal("cheating", threshold=0.5), (info,)).threshold == 0.5


def test_calibration_for_another_reduction_is_none() -> None:
    with pytest.raises(SignalError, match="threshold: cheating@1 has no calibration"):
        BoundSignal.bind(ProbeSignal("cheating", reduction="max"), (probe_info(thresholds=[1.5]),))


def test_threshold_is_required_where_there_is_no_calibration_and_only_where_it_means_something() -> None:
    info = (probe_info(),)
    with pytest.raises(SignalError, match="threshold"):
        BoundSignal.bind(ProbeSignal("cheating"), info)
    assert math.isnan(BoundSignal.bind(ProbeSignal("cheating", mode="monitor"), info).threshold)


def test_a_bare_name_is_bound_to_its_highest_version_that_is_not_retired() -> None:
    infos = tuple(replace(probe_info(version=version), retired=version == "11") for version in ("9", "11", "10"))
    bound = [BoundSignal.bind(ProbeSignal(name, mode="monitor"), infos).probe for name in ("cheating", "cheating@9", "cheating@11")]
    assert bound == ["cheating@10", "cheating@9", "cheating@11"]


def test_probe_is_bound_with_its_version() -> None:
    infos = (probe_info(), probe_info("mood", version="7"))
    assert BoundSignal.bind(ProbeSignal("mood", mode="monitor"), infos).probe == "mood@7"


@pytest.mark.parametrize("named", ["absent", "cheating@2", "retired"])
def test_probe_that_is_not_loaded_is_refused_naming_what_there_is(named: str) -> None:
    infos = (probe_info(), probe_info("twice"), replace(probe_info("retired"), retired=True))
    with pytest.raises(SignalError, match=r"twice@1|cheating@1"):
        BoundSignal.bind(ProbeSignal(named, mode="monitor"), infos)


def test_label_is_found_by_its_name() -> None:
    info = (probe_info(labels=("calm", "angry")),)
    assert BoundSignal.bind(ProbeSignal("cheating", mode="monitor", label="angry"), info).label == 1
    with pytest.raises(SignalError, match="label: 'sad' is none of calm, angry"):
        BoundSignal.bind(ProbeSignal("cheating", mode="monitor", label="sad"), info)


def test_probe_that_pools_by_itself_cannot_be_dense() -> None:
    with pytest.raises(SignalError, match="pools by itself"):
        BoundSignal.bind(ProbeSignal("cheating", mode="dense"), (probe_info(output_per=OutputPer.ROLLOUT),))


# ------------------------------------------------------------------------------------------------------------------ transforms


@given(st.lists(st.floats(-50, 50), min_size=1), st.floats(-10, 10))
def test_transforms_compute_what_they_say(values: list[float], threshold: float) -> None:
    numbers = np.array(values)

    def transformed(name: str) -> np.ndarray:
        return BoundSignal.bind(ProbeSignal("cheating", transform=name, threshold=threshold), (probe_info(),)).transformed(numbers)

    flags = (numbers >= threshold).astype(float)
    excess = np.where(numbers > threshold, numbers - threshold, 0.0)
    np.testing.assert_array_equal(transformed("identity"), numbers)
    np.testing.assert_allclose(transformed("sigmoid"), 1 / (1 + np.exp(-numbers)), atol=1e-12)
    np.testing.assert_array_equal(transformed("flag"), flags)
    np.testing.assert_array_equal(transformed("excess"), excess)
    np.testing.assert_array_equal(transformed("flag_and_excess"), flags + excess)


def test_function_is_a_transform_and_must_keep_the_shape() -> None:
    info, numbers = (probe_info(),), np.array([1.0, -2.0])
    doubled = BoundSignal.bind(ProbeSignal("cheating", transform=lambda values: 2 * values), info)
    np.testing.assert_array_equal(doubled.transformed(numbers), [2.0, -4.0])
    summed = BoundSignal.bind(ProbeSignal("cheating", transform=lambda values: values.sum()), info)
    with pytest.raises(SignalError, match="transform: it gave the shape"):
        summed.transformed(numbers)
