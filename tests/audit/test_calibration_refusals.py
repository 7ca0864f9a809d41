"""What is handed over wrong is refused in words: the argument, its value, what to give instead; what is right works in any form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from refusals import check_in_words, generator

from probescore.reductions import Reduction
from probescore_audit import calibrate, evaluate_auroc

NOT_SCORES: list[Any] = [
    None,
    "scores",
    [],
    ["a"],
    [1, None],
    [1, float("nan")],
    [np.inf],
    {},
    [[1, 2], [3, 4]],
    [[1], [2, 3]],
    np.array([True, False]),
    generator([1.0]),
]
SCORES = np.random.default_rng(0).standard_normal(50)
CALIBRATING: dict[str, list[Any]] = {
    "negatives": NOT_SCORES,
    "false_positive_rate": [None, "0.01", 0, 1, -1, 2, float("nan"), True, [0.1, 0.2], 1e-9],
    "dataset": [None, 3, "", " ", ["d"], b"d"],
    "reduction": [3, "median", "", "topk_mean(0)", ["mean"]],
    "label": [None, 3, ["a"], b"a"],
}
EVALUATING: dict[str, list[Any]] = {
    "positives": NOT_SCORES,
    "negatives": NOT_SCORES,
    "dataset": [None, 3, "", ["d"]],
    "dataset_sha256": [3, "", "abc", "sha256:" + "g" * 64, "sha256:" + "A" * 64, b"a"],
}


@pytest.mark.parametrize(
    ("argument", "index"), [(argument, index) for argument, values in CALIBRATING.items() for index in range(len(values))]
)
def test_calibration_refuses_a_wrong_argument_in_words(argument, index):
    said: dict[str, Any] = {"negatives": SCORES, "false_positive_rate": 0.1, "dataset": "held out"} | {
        argument: CALIBRATING[argument][index]
    }
    with pytest.raises((ValueError, TypeError)) as refused:
        calibrate(said.pop("negatives"), **said)
    check_in_words(refused.value, argument.replace("false_positive_rate", "false"))


@pytest.mark.parametrize(
    ("argument", "index"), [(argument, index) for argument, values in EVALUATING.items() for index in range(len(values))]
)
def test_evaluation_refuses_a_wrong_argument_in_words(argument, index):
    said: dict[str, Any] = {"positives": SCORES, "negatives": SCORES, "dataset": "held out"} | {argument: EVALUATING[argument][index]}
    with pytest.raises((ValueError, TypeError)) as refused:
        evaluate_auroc(said.pop("positives"), said.pop("negatives"), **said)
    check_in_words(refused.value, argument)


@pytest.mark.parametrize(
    "form", [list, tuple, torch.tensor, lambda s: s.astype(np.float32), lambda s: s[:, None], lambda s: torch.tensor(s, requires_grad=True)]
)
def test_scores_are_taken_in_any_form(form):
    expected = calibrate(SCORES, false_positive_rate=0.1, dataset="d")
    found = calibrate(form(SCORES), false_positive_rate=np.float64(0.1), dataset="d", reduction=Reduction.parse("mean"))

    assert found.threshold == pytest.approx(expected.threshold, abs=1e-5)
    assert evaluate_auroc(form(SCORES + 1), form(SCORES), dataset="d").value == pytest.approx(
        evaluate_auroc(SCORES + 1, SCORES, dataset="d").value, abs=0.01
    )


@pytest.mark.parametrize("negatives", [[1e39] * 50, [1.7e308] * 50 + [1.6e308] * 50, [*SCORES, *SCORES, *[1e39] * 10]])
@pytest.mark.filterwarnings("ignore:overflow")
def test_a_threshold_that_no_server_could_compare_with_is_refused(negatives):
    with pytest.raises(ValueError, match=r"^negatives: scores up to .* beyond float32") as refused:
        calibrate(negatives, false_positive_rate=0.05, dataset="d")
    check_in_words(refused.value, "negatives")
