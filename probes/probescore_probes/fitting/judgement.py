"""Judges a fitted probe: checks twelve rules that each may give a warning, and states in one sentence how far the probe can be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from probescore_audit import Estimate
from probescore_probes.fitting.robustness import Condition

LEAK = 0.1
FEWEST_GROUPS = 40
FEWEST_CALIBRATION_GROUPS = 2
TIMES_POOLED = 2.0
INVERTED = 0.4
SINK = 10.0
LOST_AUROC = 0.1
KNOWS = 0.6
GAP = 0.1
ROUNDED = 0.05
SHUFFLED = 0.05


@dataclass(frozen=True)
class SliceResult:
    """The quality of a probe on one slice, a part of the data that is evaluated separately.

    Attributes:
        auroc: AUROC of served scores on the slice alone.
        false_positives: false-positive rate on the slice at the threshold of all data; NaN without a threshold.
    """

    auroc: Estimate
    false_positives: Estimate
    positives: int
    negatives: int
    out_of_distribution: bool = False


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The numbers that the rules for warnings check.

    Attributes:
        test: AUROC of the served probe on test rollouts.
        nested: AUROC of the fitting procedure, by nested cross-validation.
        in_sample: mean AUROC on the examples that were fitted on, in the same cross-validation.
        text: AUROC of bags of words over held-out groups, a dictionary keyed by the text that they are of.
        rivals: AUROC on test rollouts of baselines that need no probe, a dictionary keyed by the baseline's name.
        shuffled: AUROC if labels are shuffled.
        groups_named: whether the data named its groups.
        shared_prompts, shared_completions: numbers of texts that occur both in the data for fitting and in the data for testing.
        groups: number of all groups.
        calibration_negatives, calibration_groups: number of negatives for the threshold, and of their groups.
        false_positive_rate: false-positive rate that was asked for.
        pooled_false_positives: false-positive rate on test rollouts at the threshold of all data; NaN without a threshold.
        slices: results on the slices of the test rollouts and of the out-of-distribution rollouts, a dictionary keyed by name.
        sink: median over examples of the norm at position 0, divided by the rollout's median norm; NaN if position 0 is not read.
        sink_share: share of examples whose position 0 is read.
        prompt_forms: number of examples, a dictionary keyed by the form in which the prompt was given.
        with_bos, without_bos: number of prompts that begin with BOS, or do not, if the tokenizer has a BOS token.
        tokenizer_adds_bos: whether a server puts BOS before a text prompt by default.
        conditions: results on unaltered rollouts, then on each alteration of them.
        paired_accuracy, pairs: how often the model itself tells two completions of one prompt apart, and of how many pairs.
        batch_rounding: p99 of the differences between scores of the same rollouts in other batches, in standard deviations.
        layer, layers: index of the chosen tap among those that were tried, and their number.
    """

    test: Estimate
    nested: Estimate
    in_sample: float
    text: Mapping[str, Estimate]
    rivals: Mapping[str, Estimate]
    shuffled: Estimate
    groups_named: bool
    shared_prompts: int
    shared_completions: int
    groups: int
    calibration_negatives: int
    calibration_groups: int
    false_positive_rate: float
    pooled_false_positives: Estimate
    slices: Mapping[str, SliceResult]
    sink: float
    sink_share: float
    prompt_forms: Mapping[str, int]
    with_bos: int
    without_bos: int
    tokenizer_adds_bos: bool
    conditions: tuple[Condition, ...]
    paired_accuracy: float
    pairs: int
    layer: int
    layers: int
    batch_rounding: float = 0.0


@dataclass(frozen=True)
class Warning:
    """A warning that a reader must know before trusting the probe.

    Attributes:
        number: number of the rule, from 1 to 12.
        title: the warning in a few words.
        text: the warning with its numbers, and what to do.
    """

    number: int
    title: str
    text: str


@dataclass(frozen=True)
class FitVerdict:
    """The verdict on a fitted probe: a sentence and its grade.

    Attributes:
        grade: ``useless``, ``doubtful`` or ``sound``.
    """

    grade: str
    text: str


def warnings_of(evidence: Evidence) -> tuple[Warning, ...]:
    """Returns the warnings about a fitted probe that its measured numbers give, in the order of the twelve rules."""
    return tuple(warning for rule in _RULES for warning in rule(evidence))


def verdict_of(evidence: Evidence, warnings: tuple[Warning, ...]) -> FitVerdict:
    """Returns the verdict on a fitted probe, which states the most serious fault that its measured numbers show."""
    test = shown(evidence.test)
    length = evidence.rivals.get("length")
    by_length = length is not None and length.high >= evidence.test.low and length.low > 0.5
    told = f"Length alone tells these rollouts apart: AUROC {shown(length)}, the probe {test}." if length is not None and by_length else ""
    if evidence.test.low <= 0.5 or evidence.nested.low <= 0.5:
        nested = shown(evidence.nested)
        sentence = (
            f"Useless: chance alone can give this: AUROC {test} on test rollouts, as served, and {nested} by nested cross-validation."
        )
        return FitVerdict("useless", f"{sentence} {told}".strip())
    if told:
        return FitVerdict("doubtful", told)
    leak = next((name for name, found in evidence.text.items() if abs(found.value - 0.5) > LEAK), None)
    rival = next((name for name, found in evidence.rivals.items() if found.high >= evidence.test.low), None)
    if rival is not None:
        return FitVerdict("doubtful", f"Not shown to be better than {rival}: AUROC {shown(evidence.rivals[rival])}, the probe {test}.")
    if leak is not None:
        return FitVerdict("doubtful", f"The data leak: {leak} has AUROC {shown(evidence.text[leak])}, the probe {test}.")
    if warnings:
        one = len(warnings) == 1
        return FitVerdict(
            "doubtful",
            f"AUROC {test} on test rollouts, as served; {len(warnings)} warning{'' if one else 's'} say{'s' if one else ''} where not to "
            "trust it.",
        )
    return FitVerdict("sound", f"AUROC {test} on test rollouts, as served; no warning applies to these data.")


def shown(estimate: Estimate) -> str:
    """Formats an estimate and its interval, such as ``.939 [.924, .951]``."""
    return f"{_short(estimate.value)} [{_short(estimate.low)}, {_short(estimate.high)}]"


def _short(value: float) -> str:
    return "unknown" if np.isnan(value) else f"{value:.3f}".removeprefix("0") if 0 <= value < 1 else f"{value:.3f}"


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"


# ------------------------------------------------------------------------------------------------------------------------- the rules


def _text_leaks(evidence: Evidence) -> Iterator[Warning]:
    for name, found in evidence.text.items():
        if abs(found.value - 0.5) > LEAK:
            if found.value > 0.5:
                advice = "The words give the label away; balance them, so that each text stands on both sides."
            else:
                advice = (
                    "An inverted leak: each text stands once on either side, and what was fitted on tells what was held out; let pairs "
                    "that swap their texts be one group."
                )
            yield Warning(1, "Text gives the label away", f"{name}: AUROC {shown(found)} without any activations. {advice}")


def _no_better_than_a_rival(evidence: Evidence) -> Iterator[Warning]:
    for name, found in evidence.rivals.items():
        if found.overlaps(evidence.test) or found.value > evidence.test.value:
            yield Warning(
                2,
                f"No better than {name}",
                f"{name}: AUROC {shown(found)}; the probe {shown(evidence.test)}: the intervals overlap. Use "
                "what is simpler, or more data.",
            )


def _rollouts_on_both_sides(evidence: Evidence) -> Iterator[Warning]:
    if not evidence.groups_named:
        yield Warning(
            3,
            "No group key",
            f"the data do not say what belongs together; {evidence.groups} groups were derived from equal prompts and completions. "
            'Give "group", such as the id of the problem: paraphrases of one problem are on both sides now.',
        )
    if evidence.shared_prompts or evidence.shared_completions:
        yield Warning(
            3,
            "Same text on both sides",
            f"{evidence.shared_prompts} prompts and {evidence.shared_completions} completions stand both in what was fitted on and in what "
            "was tested on. Put them into one group.",
        )


def _too_little_data(evidence: Evidence) -> Iterator[Warning]:
    if evidence.groups < FEWEST_GROUPS:
        yield Warning(4, "Few groups", f"{evidence.groups} groups; fewer than {FEWEST_GROUPS} leave every number here uncertain.")
    needed = 1 / evidence.false_positive_rate
    if evidence.calibration_negatives < needed:
        yield Warning(
            4,
            "Too few negatives for the threshold",
            f"{evidence.calibration_negatives} negatives to calibrate on; a false-positive rate of {evidence.false_positive_rate:g} "
            f"takes at least {needed:.0f}. The file has no threshold.",
        )
    elif evidence.calibration_groups < FEWEST_CALIBRATION_GROUPS:
        yield Warning(
            4,
            "The negatives for the threshold are of one group",
            f"{evidence.calibration_negatives} negatives in {evidence.calibration_groups} group, which says nothing about other groups. "
            "The file has no threshold. Give negatives of several groups, such as problems.",
        )


def _nothing_out_of_distribution(evidence: Evidence) -> Iterator[Warning]:
    if not any(found.out_of_distribution for found in evidence.slices.values()):
        yield Warning(
            5,
            "No out-of-distribution set",
            "0 sets: nothing here says how the probe does on other topics, negated statements or controls. Give --ood FILE.",
        )


def _slices_flagged_more(evidence: Evidence) -> Iterator[Warning]:
    pooled = evidence.pooled_false_positives
    for name, found in evidence.slices.items():
        if found.false_positives.value > TIMES_POOLED * pooled.value and found.false_positives.low > pooled.value:
            yield Warning(
                6,
                f"False alarms on {name}",
                f"the threshold flags {_percent(found.false_positives)} of its {found.negatives} negatives, against {_percent(pooled)} of "
                "all test negatives. Use a threshold of its own.",
            )


def _slices_inverted(evidence: Evidence) -> Iterator[Warning]:
    for name, found in evidence.slices.items():
        if found.auroc.value < INVERTED and found.auroc.high < 0.5:
            yield Warning(
                7,
                f"Inverted on {name}",
                f"AUROC {shown(found.auroc)} on {found.positives + found.negatives} rollouts: the probe reads something else that goes the "
                "other way here. Fit on negated and control data too.",
            )


def _attention_sink(evidence: Evidence) -> Iterator[Warning]:
    if evidence.sink > SINK:
        yield Warning(
            8,
            "Position 0 is read",
            f"in {evidence.sink_share:.0%} of examples, with {evidence.sink:,.0f} × the median norm: an attention sink, which hides the "
            "rest. Give a prompt or BOS, or mask the first token.",
        )


def _prompts_mixed(evidence: Evidence) -> Iterator[Warning]:
    forms = ", ".join(f"{count} {form}" for form, count in evidence.prompt_forms.items())
    if len(evidence.prompt_forms) > 1:
        yield Warning(9, "Prompt forms mixed", f"{forms}. Give all in the form in which rollouts will be scored.")
    if evidence.with_bos and evidence.without_bos:
        yield Warning(
            9, "BOS mixed", f"{evidence.with_bos} examples begin with BOS and {evidence.without_bos} do not. Scores of the two differ."
        )
    elif evidence.tokenizer_adds_bos and not evidence.with_bos:
        yield Warning(
            9,
            "Without BOS, which will be served",
            f"{evidence.without_bos} examples, none with BOS, but the tokenizer puts it before texts. Fit as you will serve.",
        )


def _moved_by_changes(evidence: Evidence) -> Iterator[Warning]:
    if not evidence.conditions:
        return
    usual, *changed = evidence.conditions
    for found in changed:
        if found.refused or "neutral" not in found.name:
            continue
        rate, usual_rate = found.false_positives, usual.false_positives
        lost = usual.auroc.value - found.auroc.value
        flags = rate.value > TIMES_POOLED * usual_rate.value and rate.low > usual_rate.value
        misses = found.recall.value < usual.recall.value / 2
        if lost > LOST_AUROC or flags or misses:
            rates = ""
            if not np.isnan(rate.value):
                rates = f" False alarms {rate.value:.1%} (before {usual_rate.value:.1%}), "
                rates += f"recall {found.recall.value:.0%} (before {usual.recall.value:.0%})."
            yield Warning(
                10,
                f"Moved by {found.name}",
                f"AUROC {shown(found.auroc)}, before {shown(usual.auroc)}; scores shift by {found.shift:+.2f} σ.{rates} Calibrate on such "
                "rollouts too, or score a span over the answer.",
            )


def _moved_by_rounding(evidence: Evidence) -> Iterator[Warning]:
    if evidence.batch_rounding > ROUNDED:
        yield Warning(
            10,
            "Moved by what else is in a batch",
            f"1 rollout of 100 moves by {evidence.batch_rounding:.2f} σ or more if it is served alone, by rounding in this dtype. "
            "Decisions that near to the threshold are chance; serve in float32, or longer completions.",
        )


def _model_does_not_know(evidence: Evidence) -> Iterator[Warning]:
    if evidence.pairs and evidence.paired_accuracy < KNOWS:
        yield Warning(
            11,
            "The model hardly tells the two apart",
            f"by its own log-probabilities it tells {evidence.paired_accuracy:.0%} of {evidence.pairs} pairs of one prompt apart: what it "
            "does not know no probe can read.",
        )


def _selection_looks_wrong(evidence: Evidence) -> Iterator[Warning]:
    gap = evidence.in_sample - evidence.nested.value
    if gap > GAP:
        yield Warning(
            12,
            "Fitted data look better",
            f"AUROC {_short(evidence.in_sample)} on what was fitted on, {shown(evidence.nested)} on what was held out: a gap of {gap:.2f}. "
            "More groups, or a stronger penalty.",
        )
    if evidence.layers > 2 and evidence.layer in (0, evidence.layers - 1):
        which = "first" if evidence.layer == 0 else "last"
        yield Warning(
            12, "Layer at the edge", f"the chosen tap is the {which} of {evidence.layers} that were swept. Sweep further, or doubt it."
        )
    if abs(evidence.shuffled.value - 0.5) > SHUFFLED and not evidence.shuffled.contains(0.5):
        yield Warning(
            12, "Shuffled labels are not at chance", f"AUROC {shown(evidence.shuffled)} with shuffled labels: groups or folds leak."
        )


_RULES = (
    _text_leaks,
    _no_better_than_a_rival,
    _rollouts_on_both_sides,
    _too_little_data,
    _nothing_out_of_distribution,
    _slices_flagged_more,
    _slices_inverted,
    _attention_sink,
    _prompts_mixed,
    _moved_by_changes,
    _moved_by_rounding,
    _model_does_not_know,
    _selection_looks_wrong,
)
