"""Each of the twelve warnings fires on its case, with its number, and not on clean evidence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from probescore_audit import Estimate
from probescore_probes.fitting.judgement import Evidence, SliceResult, verdict_of, warnings_of
from probescore_probes.fitting.robustness import Condition

UNKNOWN = Estimate(float("nan"), float("nan"), float("nan"))


def near(value: float, width: float = 0.03) -> Estimate:
    return Estimate(value, value - width, value + width)


def condition(name: str, auroc: float = 0.94, false_positives: float = 0.05, recall: float = 0.7, refused: str = "") -> Condition:
    return Condition(name, near(auroc), near(false_positives, 0.02), near(recall, 0.1), 0.1, refused)


def judged(auroc: float, false_positives: float, *, width: float = 0.03, out: bool = False) -> SliceResult:
    return SliceResult(near(auroc, width), near(false_positives, 0.02), 50, 50, out)


CLEAN = Evidence(
    test=near(0.94),
    nested=near(0.94),
    in_sample=0.96,
    text={"bag of words of completions": near(0.52)},
    rivals={"length": near(0.55), "−log P of the tokens": near(0.75), "best of 20 random directions": near(0.64)},
    shuffled=near(0.5, 0.02),
    groups_named=True,
    shared_prompts=0,
    shared_completions=0,
    groups=200,
    calibration_negatives=100,
    calibration_groups=40,
    false_positive_rate=0.05,
    pooled_false_positives=near(0.05, 0.02),
    slices={"a": judged(0.93, 0.06), "far (out of distribution)": judged(0.8, 0.07, out=True)},
    sink=float("nan"),
    sink_share=0.0,
    prompt_forms={"ids": 500},
    with_bos=500,
    without_bos=0,
    tokenizer_adds_bos=True,
    conditions=(condition("as they are"), condition("1 neutral sentence appended", 0.92, 0.06, 0.65)),
    paired_accuracy=0.9,
    pairs=200,
    layer=9,
    layers=30,
)


def test_clean_evidence_has_no_warning_and_is_sound():
    assert warnings_of(CLEAN) == ()
    verdict = verdict_of(CLEAN, ())
    assert verdict.grade == "sound"
    assert ".940 [.910, .970]" in verdict.text


@pytest.mark.parametrize(
    ("number", "changes", "says"),
    [
        (1, {"text": {"bag of words of completions": near(0.72)}}, ".720"),
        (1, {"text": {"bag of words of completions": near(0.04)}}, "inverted leak"),
        (2, {"rivals": {**CLEAN.rivals, "−log P of the tokens": near(0.927)}}, ".927"),
        (2, {"rivals": {**CLEAN.rivals, "length": near(0.9)}}, ".900"),
        (2, {"rivals": {**CLEAN.rivals, "best of 20 random directions": near(0.99, 0.005)}}, ".990"),
        (3, {"groups_named": False}, "200 groups"),
        (3, {"shared_prompts": 7}, "7 prompts"),
        (3, {"shared_completions": 3}, "3 completions"),
        (4, {"groups": 39}, "39 groups"),
        (4, {"calibration_negatives": 19}, "19 negatives"),
        (4, {"calibration_groups": 1}, "100 negatives in 1 group"),
        (5, {"slices": {"a": judged(0.93, 0.06)}}, "0 sets"),
        (6, {"slices": {**CLEAN.slices, "b": judged(0.9, 0.11)}}, "11.0%"),
        (7, {"slices": {**CLEAN.slices, "negated (out of distribution)": judged(0.08, 0.05, out=True)}}, ".080"),
        (8, {"sink": 120.0, "sink_share": 1.0}, "120 ×"),
        (9, {"prompt_forms": {"chat": 400, "text": 100}}, "400 chat, 100 text"),
        (9, {"with_bos": 400, "without_bos": 100}, "100 do not"),
        (9, {"with_bos": 0, "without_bos": 500}, "500 examples, none with BOS"),
        (10, {"conditions": (condition("as they are"), condition("1 neutral sentence appended", 0.75))}, ".750"),
        (10, {"conditions": (condition("as they are"), condition("4 neutral sentences appended", 0.9, 0.99))}, "99.0%"),
        (10, {"conditions": (condition("as they are"), condition("4 neutral sentences appended", 0.9, 0.0, 0.15))}, "15%"),
        (10, {"batch_rounding": 0.07}, "0.07 σ"),
        (11, {"paired_accuracy": 0.57}, "57% of 200 pairs"),
        (12, {"in_sample": 1.0, "nested": near(0.85)}, "gap of 0.15"),
        (12, {"layer": 0}, "first of 30"),
        (12, {"layer": 29}, "last of 30"),
        (12, {"shuffled": near(0.62)}, ".620"),
    ],
)
def test_a_warning_fires_alone_and_says_its_number(number, changes, says):
    evidence = replace(CLEAN, **changes)
    found = warnings_of(evidence)
    assert {warning.number for warning in found} == {number}
    assert any(says in warning.text for warning in found)
    assert verdict_of(evidence, found).grade == "doubtful"


@pytest.mark.parametrize(
    "changes",
    [
        {"text": {"bag of words of completions": near(0.59)}},
        {"rivals": {"length": UNKNOWN}},
        {"groups": 40},
        {"calibration_negatives": 20},
        {"calibration_groups": 2},
        {"slices": {**CLEAN.slices, "b": judged(0.9, 0.09)}},
        # more than twice the pooled rate, of so few that chance gives it
        {"slices": {**CLEAN.slices, "b": SliceResult(near(0.9), Estimate(0.125, 0.003, 0.53), 8, 8)}},
        {"slices": {**CLEAN.slices, "b": judged(0.35, 0.05, width=0.2)}},
        {"sink": 9.0, "sink_share": 1.0},
        {"with_bos": 0, "without_bos": 500, "tokenizer_adds_bos": False},
        {"with_bos": 0, "without_bos": 0, "tokenizer_adds_bos": False},
        {"conditions": (condition("as they are"), condition("no prompt", 0.5))},
        {"conditions": (condition("as they are"), condition("4 neutral sentences appended", refused="too long"))},
        {"batch_rounding": 0.05},
        {"paired_accuracy": 0.5, "pairs": 0},
        {"layer": 0, "layers": 1},
        {"shuffled": near(0.45, 0.06)},
    ],
)
def test_what_is_just_within_a_limit_fires_nothing(changes):
    assert warnings_of(replace(CLEAN, **changes)) == ()


def test_chance_is_called_useless_and_length_by_its_name():
    for by_chance in ({"test": near(0.52)}, {"nested": near(0.52)}, {"test": near(0.02)}):
        verdict = verdict_of(replace(CLEAN, **by_chance), ())
        assert verdict.grade == "useless"
        assert verdict.text.startswith("Useless")
    evidence = replace(CLEAN, rivals={"length": near(0.99, 0.01)})
    verdict = verdict_of(evidence, warnings_of(evidence))
    assert verdict.grade == "doubtful"
    assert verdict.text.startswith("Length alone")
