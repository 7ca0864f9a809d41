"""Negatives in groups, with served scores that are drawn, for thresholds whose hold on fresh rollouts can be counted."""

from __future__ import annotations

import numpy as np

from probescore_probes.fitting.cross_validation import Labels
from probescore_probes.fitting.fitting_data import FittingData
from probescore_probes.fitting.labelled_rollouts import CALIBRATION, SPLITS, Example
from probescore_probes.fitting.splits import Split

PROMPT, COMPLETION = np.array([1, 5], np.int32), np.array([7, 8, 9], np.int32)


def example(*, positive: bool = False, slice: str = "", form: str = "ids", prompt: np.ndarray = PROMPT) -> Example:
    return Example(prompt, COMPLETION, None, None, positive, "line 1", None, None, slice, 1.0, form)


def calibration_data(groups: np.ndarray, examples: list[Example] | None = None) -> FittingData:
    """All of it in the split that thresholds are found on."""
    examples = [example()] * len(groups) if examples is None else examples
    nothing = np.zeros(0, np.int64)
    parts = {name: np.arange(len(groups)) if name == CALIBRATION else nothing for name in SPLITS}
    positive = np.array([each.positive for each in examples])
    bos = np.ones(len(groups), bool)
    return FittingData(tuple(examples), Labels(positive, groups, np.ones(len(groups))), Split(groups, True, False, parts), bos)


def grouped_scores(random: np.random.Generator, prompts: int, per_prompt: int, of_prompt: float) -> np.ndarray:
    """``of_prompt`` is the share of the scores' variance that all rollouts of a prompt have in common; some prompts are far out."""
    effect, own = random.standard_t(3, prompts), random.standard_normal(prompts * per_prompt)
    return np.sqrt(of_prompt) * np.repeat(effect, per_prompt) + np.sqrt(1 - of_prompt) * own
