"""Serves a fitted probe's file under other conditions: altered rollouts, prompts that the file refuses, and another dtype."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from probescore_probes.fitting.fitting_data import FittingData
from probescore_probes.fitting.labelled_rollouts import TEST
from probescore_probes.fitting.options import FitOptions
from probescore_probes.fitting.robustness import MOST, Condition, conditions, measure
from probescore_probes.fitting.serving import ServedProbe, serve, served_scores, write_without_bos_check


def served_conditions(
    model: str | Path, served: ServedProbe, data: FittingData, threshold: float | None, options: FitOptions
) -> tuple[Condition, ...]:
    """Measures a probe on test rollouts as they are, then on each alteration of them, then in the other dtype of the options.

    Args:
        model: the model, as ``Engine.load`` takes it.
        served: the probe, as it is served in the dtype of the options.
        data: all examples, of whose test rollouts at most ``MOST`` are used.
        threshold: threshold for all data; ``None`` = none.
        options: options of fitting.
    """
    tested = data.splits[TEST]
    if len(tested) > MOST:
        tested = np.sort(np.random.default_rng(options.seed).permutation(tested)[:MOST])
    some, groups, usual = [data.examples[index] for index in tested], data.labels.groups[tested], served.scores[tested]
    unchecked = served.file.with_name("unchecked.onnx")
    write_without_bos_check(served.file, unchecked)
    of_unchecked = serve(
        model,
        unchecked,
        dtype=options.dtype,
        device=options.device,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    found = conditions(served.engine, of_unchecked, some, groups, threshold, usual)
    del of_unchecked
    if options.other_dtype and options.other_dtype != options.dtype:
        other = serve(
            model,
            served.file,
            dtype=options.other_dtype,
            device=options.device,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
        )
        found.append(measure(f"served in {options.other_dtype}", served_scores(other, some), some, groups, threshold, usual))
    return tuple(found)
