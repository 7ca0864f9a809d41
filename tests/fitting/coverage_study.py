"""Counts how often the intervals of a fit hold where the truth is known: of nested cross-validation, and of thresholds.

Run by ``make fit-study``; the tests count the quick cases of the same draws.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from drawn_activations import Source, estimate_and_truth
from drawn_negatives import calibration_data, grouped_scores

from probescore_probes.fitting.linear_kinds import DIFFERENCE_OF_MEANS, LOGISTIC
from probescore_probes.fitting.options import FitOptions
from probescore_probes.fitting.thresholds import thresholds_of

SOURCES = {
    "labels that nothing tells": Source(0.0),
    "a weak signal": Source(1.5),
    "a strong signal": Source(2.5),
    "a weak signal, 30 layers": Source(1.5, layers=30),
    "a weak signal, a quarter positive": Source(1.5, positives=0.25),
    "a weak signal, groups of 4": Source(1.5, per_group=4),
}
NEGATIVES = 5_000
GROUPINGS = ((1, 0.0), (4, 0.5), (10, 0.3), (10, 0.95), (25, 0.7))
"""Rollouts of a prompt, and the share of the scores' variance that they have in common."""


def nested_case(case: tuple[str, str, int, int]) -> tuple[float, float, float, bool]:
    """Value and truth of one draw, the interval's width, and whether it holds."""
    name, kind, groups, seed = case
    found, truth = estimate_and_truth(SOURCES[name], groups, seed, kind)
    estimate = found.estimate
    return estimate.value, truth, estimate.high - estimate.low, estimate.contains(truth)


def threshold_case(case: tuple[int, float, int]) -> bool:
    """Whether a threshold's interval holds for fresh negatives."""
    per_prompt, of_prompt, seed = case
    random, prompts = np.random.default_rng(seed), NEGATIVES // per_prompt
    data = calibration_data(np.repeat(np.arange(prompts), per_prompt))
    options = FitOptions(name="study", false_positive_rate=0.01)
    found = thresholds_of(data, grouped_scores(random, prompts, per_prompt, of_prompt), options, "mean")[""]
    fresh = np.mean(grouped_scores(random, prompts, per_prompt, of_prompt) >= found.threshold)
    return bool(found.false_positive_rate_low <= fresh <= found.false_positive_rate_high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--groups", type=int, default=40)
    parser.add_argument("--kinds", default=f"{DIFFERENCE_OF_MEANS},{LOGISTIC}")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    with ProcessPoolExecutor(given.processes) as pool:
        print(f"nested cross-validation of {given.groups} groups, {given.draws} draws: truth, estimate, their distance (root mean square),")
        print("mean width of the interval, share of draws in which it holds")
        for kind in given.kinds.split(","):
            for name in SOURCES:
                cases = [(name, kind, given.groups, seed) for seed in range(given.draws)]
                value, truth, width, holds = (np.array(column) for column in zip(*pool.map(nested_case, cases), strict=True))
                off = np.sqrt(np.mean((value - truth) ** 2))
                print(
                    f"{kind:20} {name:36} {truth.mean():.3f} {value.mean():.3f} {off:.3f} {width.mean():.3f} {holds.mean():.2f}", flush=True
                )
        print(
            f"thresholds for 1% of {NEGATIVES:,} negatives, {given.draws} seeds: share in which the interval holds for as many fresh ones"
        )
        for per_prompt, of_prompt in GROUPINGS:
            held = list(pool.map(threshold_case, [(per_prompt, of_prompt, seed) for seed in range(given.draws)]))
            print(f"{per_prompt:3} of a prompt, {of_prompt:.0%} of the variance in common: {np.mean(held):.2f}", flush=True)


if __name__ == "__main__":
    main()
