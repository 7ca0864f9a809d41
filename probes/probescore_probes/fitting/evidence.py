"""Collects the evidence on a fitted probe that the rules for warnings check: its quality, baselines, slices (parts of the data), prompts
and controls.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from probescore_audit import Estimate
from probescore_probes.fitting.baselines import bag_of_words, oriented, paired_accuracy, random_directions
from probescore_probes.fitting.fitted import Fitted
from probescore_probes.fitting.fitting_data import FittingData
from probescore_probes.fitting.judgement import Evidence
from probescore_probes.fitting.labelled_rollouts import CALIBRATION, TEST, TRAIN
from probescore_probes.fitting.options import FitOptions
from probescore_probes.fitting.robustness import Condition
from probescore_probes.fitting.serving import BatchRounding
from probescore_probes.fitting.slices import false_positives, slices_of
from probescore_probes.fitting.splits import shared_texts


def evidence_of(
    fitted: Fitted,
    scores: NDArray[np.float64],
    threshold: float | None,
    conditions: tuple[Condition, ...],
    rounding: BatchRounding,
    options: FitOptions,
) -> Evidence:
    """Collects the evidence on a fitted probe.

    Args:
        fitted: the probe, with what it was fitted on.
        scores: served scores of all examples, ``(n,)``.
        threshold: threshold for all data; ``None`` = none.
        conditions: results on altered rollouts.
        rounding: differences between scores of the same rollouts in other batches.
        options: options of fitting.
    """
    data, table, tap = fitted.data, fitted.table, fitted.candidate.tap
    inside, splits, seed = data.inside, data.splits, options.seed
    accuracy, pairs = paired_accuracy(table.surprise[inside], [data.examples[index] for index in inside])
    sink = table.sink[tap][inside]
    read = np.isfinite(sink)
    calibration = data.negatives(splits[CALIBRATION])
    shared_prompts, shared_completions = shared_texts(data.examples, splits.parts)
    tokenizer = fitted.reference.tokenizer
    bos, with_bos = tokenizer.bos_token_id, int(data.begins_with_bos[inside].sum())
    return Evidence(
        test=data.auroc(scores, splits[TEST], seed),
        nested=fitted.nested.estimate,
        in_sample=fitted.nested.in_sample,
        text=_text_baselines(data, seed),
        rivals=_rivals(fitted, seed),
        shuffled=fitted.comparisons.shuffled(fitted.candidate),
        groups_named=splits.named or splits.given,
        shared_prompts=shared_prompts,
        shared_completions=shared_completions,
        groups=len(np.unique(splits.groups[inside])),
        calibration_negatives=len(calibration),
        calibration_groups=len(np.unique(splits.groups[calibration])),
        false_positive_rate=options.false_positive_rate,
        pooled_false_positives=false_positives(data, scores, threshold, data.negatives(splits[TEST]), seed),
        slices=slices_of(data, scores, threshold, seed),
        sink=float(np.median(sink[read])) if read.any() else float("nan"),
        sink_share=float(read.mean()),
        prompt_forms=dict(sorted(Counter(data.examples[index].form for index in inside).items())),
        with_bos=with_bos,
        without_bos=0 if bos is None else len(inside) - with_bos,
        tokenizer_adds_bos=bos is not None and tokenizer("a")["input_ids"][:1] == [bos],
        conditions=conditions,
        batch_rounding=rounding.p99,
        paired_accuracy=accuracy,
        pairs=pairs,
        layer=table.taps.index(tap),
        layers=len(table.taps),
    )


def _text_baselines(data: FittingData, seed: int) -> dict[str, Estimate]:
    """Returns the AUROC of bags of words, which read no activations, of the completions and of the prompts if there are any."""
    some, labels = [data.examples[index] for index in data.inside], data.labels.of(data.inside)
    found = {"bag of words of completions": bag_of_words([each.completion_ids[each.selected] for each in some], labels, seed)}
    if any(len(each.prompt_ids) for each in some):
        found["bag of words of prompts"] = bag_of_words([each.prompt_ids for each in some], labels, seed)
    return found


def _rivals(fitted: Fitted, seed: int) -> dict[str, Estimate]:
    """Returns the AUROC on test rollouts of length, of the model's own log-probability, and of random directions."""
    data, table, candidate = fitted.data, fitted.table, fitted.candidate
    train, tested = data.splits[TRAIN], data.splits[TEST]
    numbers = {
        "length": np.array([float(example.selected.sum()) for example in data.examples]),
        "−log P of the tokens": table.surprise,
        "−log P a token": table.surprise / np.maximum(table.predicted, 1),
    }
    found = {
        name: oriented(values, data.labels, train, tested, seed)
        for name, values in numbers.items()
        if np.isfinite(values[tested]).any() and np.isfinite(values[train]).any()
    }
    rows = table.pooled[candidate.tap, candidate.pool]
    found["best of 20 random directions"] = random_directions(rows, data.labels, train, tested, seed)
    return found
