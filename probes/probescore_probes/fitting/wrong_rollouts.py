"""Finds the test rollouts that a served probe misjudges most, with the scores of their tokens, so that people can read them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probescore_probes.fitting.fitting_data import FittingData
from probescore_probes.fitting.labelled_rollouts import TEST
from probescore_probes.fitting.serving import ServedProbe, token_scores

WRONG_SHOWN = 4
"""Number of misjudged rollouts of each class that a report shows."""


@dataclass(frozen=True, eq=False)
class WrongRollout:
    """A test rollout that the probe misjudges, with the scores of its tokens if the probe scores tokens."""

    where: str
    positive: bool
    score: float
    prompt: tuple[str, ...]
    tokens: tuple[str, ...]
    token_scores: tuple[float, ...] | None


def wrong_rollouts(served: ServedProbe, data: FittingData, threshold: float | None) -> tuple[WrongRollout, ...]:
    """Returns the negative test rollouts with the highest scores and the positive ones with the lowest.

    Without a threshold, the median score of the test rollouts stands for it.
    """
    found = []
    scores, tested = served.scores, data.splits[TEST]
    middle = float(np.median(scores[tested])) if threshold is None else threshold
    for positive in (False, True):
        of_class = [index for index in tested if data.examples[index].positive is positive and bool(scores[index] < middle) is positive]
        for index in sorted(of_class, key=lambda index: scores[index], reverse=not positive)[:WRONG_SHOWN]:
            example = data.examples[index]
            tokens, per_token = token_scores(served.engine, example)
            found.append(
                WrongRollout(
                    example.where,
                    positive,
                    float(scores[index]),
                    tuple(served.engine.decode_tokens(example.prompt_ids)),
                    tuple(tokens),
                    None if per_token is None else tuple(float(value) for value in per_token),
                )
            )
    return tuple(found)
