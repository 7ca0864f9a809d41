"""Reductions against their formulas, written out one number at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from probescore import Reduction, ReductionKind, reduce_scores

# halves and quarters, so that a threshold can be met exactly
numbers = st.integers(-400, 400).map(lambda quarter: quarter / 4)
scores = arrays.arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 3)), elements=numbers)


def slowly(x: list[float], kind: ReductionKind, parameter: float) -> float:
    """The definition in the proto, for one label."""
    if kind is ReductionKind.MEAN:
        return sum(x) / len(x)
    if kind is ReductionKind.MAX:
        return sorted(x)[-1]
    if kind is ReductionKind.MIN:
        return sorted(x)[0]
    if kind is ReductionKind.SUM:
        return sum(x)
    if kind is ReductionKind.LAST:
        return x[len(x) - 1]
    if kind is ReductionKind.TOPK_MEAN:
        largest = sorted(x, reverse=True)[: int(parameter)]
        return sum(largest) / len(largest)
    if kind is ReductionKind.EMA_MAX:
        averages = [x[0]]
        for value in x[1:]:
            averages.append(parameter * value + (1 - parameter) * averages[-1])
        return max(averages)
    if kind is ReductionKind.WINDOW_MAX_MEAN:
        w = min(int(parameter), len(x))
        return max(sum(x[start : start + w]) / w for start in range(len(x) - w + 1))
    if kind is ReductionKind.SOFTMAX_MEAN:
        weights = [math.exp((value - max(x)) / parameter) for value in x]
        return sum(weight * value for weight, value in zip(weights, x, strict=True)) / sum(weights)
    return sum(value > parameter for value in x) / len(x)


PARAMETERS = {
    ReductionKind.TOPK_MEAN: st.integers(1, 15),
    ReductionKind.EMA_MAX: st.floats(0.01, 1),
    ReductionKind.WINDOW_MAX_MEAN: st.integers(1, 15),
    ReductionKind.SOFTMAX_MEAN: st.floats(0.01, 100),
    ReductionKind.FRACTION_ABOVE: numbers,
}


@pytest.mark.parametrize("kind", ReductionKind)
@given(x=scores, data=st.data())
def test_a_reduction_is_its_formula_for_each_label(kind: ReductionKind, x: np.ndarray, data: st.DataObject) -> None:
    parameter = data.draw(PARAMETERS[kind]) if kind in PARAMETERS else None

    reduced = reduce_scores(x, Reduction(kind, parameter))

    expected = [slowly([float(value) for value in column], kind, parameter or 0.0) for column in x.T]
    assert reduced.dtype == np.float32
    np.testing.assert_allclose(reduced, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ReductionKind)
def test_nothing_selected_is_absent_for_every_label(kind: ReductionKind) -> None:
    reduction = Reduction(kind, 1 if kind in PARAMETERS else None)

    reduced = reduce_scores(np.zeros((0, 2), np.float32), reduction)

    assert reduced.shape == (2,)
    assert np.isnan(reduced).all()


def test_a_tiny_temperature_gives_the_largest_score_instead_of_an_overflow() -> None:
    x = np.array([[1e30], [-1e30], [3e30]], np.float32)
    assert reduce_scores(x, Reduction.parse("softmax_mean(1e-30)")) == pytest.approx(3e30)


def test_a_long_sum_does_not_lose_small_scores() -> None:
    x = np.full((1_000_001, 1), 1e-4, np.float32)
    x[0] = 1e4
    assert reduce_scores(x, Reduction(ReductionKind.MEAN))[0] == pytest.approx(1e4 / 1_000_001 + 1e-4, rel=1e-5)


@pytest.mark.parametrize(
    ("written", "kind", "parameter"),
    [
        ("mean", ReductionKind.MEAN, None),
        (" last ", ReductionKind.LAST, None),
        ("topk_mean(8)", ReductionKind.TOPK_MEAN, 8),
        ("ema_max(alpha=0.2)", ReductionKind.EMA_MAX, 0.2),
        ("window_max_mean( w = 4 )", ReductionKind.WINDOW_MAX_MEAN, 4),
        ("softmax_mean(1e-3)", ReductionKind.SOFTMAX_MEAN, 1e-3),
        ("fraction_above(-0.5)", ReductionKind.FRACTION_ABOVE, -0.5),
    ],
)
def test_a_reduction_can_be_written_as_text(written: str, kind: ReductionKind, parameter: float | None) -> None:
    assert Reduction.parse(written) == Reduction(kind, parameter)


@given(st.floats(0, 1, exclude_min=True))
def test_a_written_reduction_reads_back_with_every_digit(alpha: float) -> None:
    reduction = Reduction(ReductionKind.EMA_MAX, alpha)
    assert Reduction.parse(str(reduction)) == reduction
    assert Reduction.parse(reduction) is reduction


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("median", "unknown reduction 'median'; one of mean, max"),
        ("", "unknown reduction ''"),
        ("mean(1)", "takes no parameter, got 1"),
        ("topk_mean", r"needs its parameter: write topk_mean\(k\)"),
        ("topk_mean(0)", "k of topk_mean must be an integer of at least 1, got 0"),
        ("window_max_mean(1.5)", "w of window_max_mean must be an integer of at least 1, got 1.5"),
        ("ema_max(0)", r"alpha of ema_max must be in \(0, 1\], got 0"),
        ("ema_max(1.1)", r"alpha of ema_max must be in \(0, 1\], got 1.1"),
        ("softmax_mean(0)", "temperature of softmax_mean must be above 0, got 0"),
        ("fraction_above(nan)", "threshold of fraction_above must be finite, got nan"),
        ("ema_max(k=0.1)", "has no parameter 'k'"),
        ("topk_mean(x)", "is not a number"),
    ],
)
def test_a_reduction_that_means_nothing_is_refused(written: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Reduction.parse(written)
