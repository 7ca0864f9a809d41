"""From made rollouts to a served probe and a verdict, in process."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from foreign_autoencoders import autoencoder
from made_rollouts import labelled, meaningless, readable, reference, told_by_length
from models import HIDDEN_SIZE, tiny_model

from probescore.types import Completion, Text
from probescore_audit import auroc, calibrate
from probescore_probes import read_probe_file
from probescore_probes.fitting import cross_validation, pooling_kinds, smoothed_kinds, token_kinds
from probescore_probes.fitting.labelled_rollouts import CALIBRATION, TEST, LabelledRollout, Passage, tokenised
from probescore_probes.fitting.options import EVERY_BLOCK, FitOptions
from probescore_probes.fitting.pipeline import fit_probe
from probescore_probes.fitting.report import check_writable, write_report
from probescore_probes.fitting.serving import agreement, served_scores
from probescore_probes.fitting.splits import split
from probescore_probes.serve_check import BOUND
from probescore_server.engine.engine import Engine
from probescore_server.errors import ProbeRefused


def options(name="made", **changes):
    return FitOptions(name=name, **{"taps": ("resid_post.0", "resid_post.1", "resid_post.2"), "other_dtype": "", **changes})


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """Enough of them for data as plain as these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_kinds, "_STEPS", 100)
        patch.setattr(smoothed_kinds, "_STEPS", 100)
        patch.setattr(pooling_kinds, "_STEPS", 60)
        patch.setattr(cross_validation, "REPEATS", 1)
        yield


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    output = tmp_path_factory.mktemp("fitted") / "made.onnx"
    far = labelled(readable(60, seed=5))
    return fit_probe(labelled(readable(240)), tiny_model(), output, options(other_dtype="bfloat16"), out_of_distribution=far), output


def test_a_readable_label_is_read_and_judged_as_served(fitted):
    result, output = fitted
    assert result.evidence.test.low > 0.8
    assert result.evidence.nested.low > 0.8
    assert result.selection.chosen.tap == "resid_post.1"
    assert result.agreement.largest <= BOUND["float32"]
    assert result.verdict.grade != "useless"
    manifest = read_probe_file(output).manifest
    assert manifest.reduction == result.selection.chosen.pool
    assert manifest.expects_bos is True
    assert manifest.calibrations[0].threshold == pytest.approx(result.thresholds[""].threshold)
    assert manifest.evaluations[0].value == pytest.approx(result.evidence.test.value)
    assert {5, 3} & {warning.number for warning in result.warnings} == set()


def test_the_file_serves_the_scores_of_the_report(fitted):
    result, output = fitted
    engine = Engine.load(str(tiny_model()), [output])
    scores = [
        group.completions[0]["made"].value
        for group in engine.score([each.rollout() for each in tokenised(labelled(readable(240)), engine)]).groups
    ]
    assert set(np.round(result.test_scores, 5)) <= set(np.round(scores, 5))


def test_a_prompt_without_the_bos_that_was_fitted_is_refused_and_said_so(fitted):
    refused = [condition for condition in fitted[0].evidence.conditions if condition.refused]
    assert [condition.name for condition in refused] == ["BOS put in front, or taken away"]
    assert "must start with BOS" in refused[0].refused
    assert refused[0].auroc.value < fitted[0].evidence.test.value  # what it would say if the file did not refuse


def test_the_other_dtype_moves_little(fitted):
    found = next(condition for condition in fitted[0].evidence.conditions if condition.name == "served in bfloat16")
    assert abs(found.auroc.value - fitted[0].evidence.test.value) < 0.02


class _Outside(HTMLParser):
    """What a page would fetch, and whether it has scripts."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.texts = []

    def handle_starttag(self, tag, attributes):
        links = [value for name, value in attributes if name in ("src", "href", "xlink:href") and not (value or "").startswith("#")]
        self.found += links + ([tag] if tag in ("script", "link", "iframe", "img", "object") else [])

    def handle_data(self, data):
        self.texts.append(data)


def test_the_report_needs_nothing_else_and_has_every_number_beside_it(fitted, tmp_path):
    result, _ = fitted
    write_report(tmp_path / "report.html", result)
    html = (tmp_path / "report.html").read_text()
    page = _Outside()
    page.feed(html)
    assert page.found == []
    text = " ".join(" ".join(page.texts).split())
    assert text.index(result.verdict.text) < text.index("What the file serves")
    for part in (
        "Data",
        "Layers and pooling",
        "Kinds",
        "Baselines",
        "As served",
        "Slices",
        "Robustness",
        "Learning curve",
        "most wrong",
        "Provenance",
    ):
        assert part in text
    assert html.count("<svg ") == 8
    identifiers = re.findall(r'\bid="([^"]+)"', html)
    assert len(identifiers) == len(set(identifiers))
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["evidence"]["test"]["value"] == pytest.approx(result.evidence.test.value)
    assert numbers["agreement"]["largest"] == result.agreement.largest
    assert len(numbers["curves"]["logistic"]) == 6
    assert {"kinds", "learning", "roc", "test_scores", "thresholds", "provenance", "warnings"} <= set(numbers)


def numbers_shown(html):
    """Every number of the page's text; drawings have axes, and rollouts and digests numbers of their own."""
    html = re.sub(r"<(style|svg|code)\b.*?</\1>", " ", html, flags=re.S)
    html = re.sub(r'<div class="(tokens|prompt)">.*?</div>', " ", html, flags=re.S)
    text = re.sub(r"<[^>]+>", " ", html).replace("×", " ")
    return re.findall(r"(?<![\w.\-–])[+-]?(?:\d[\d,]*)?\.?\d+(?:e[+-]?\d+)?%?(?![\w])", text)


def ways_to_write(value):
    """All the ways in which a page writes the numbers of a JSON value, and those in its texts."""
    if isinstance(value, dict):
        return set().union(*map(ways_to_write, value), *map(ways_to_write, value.values()))
    if isinstance(value, list):
        return set().union({str(len(value))}, *map(ways_to_write, value))
    if isinstance(value, str):
        return {value, *re.findall(r"[\d.,]*\d%?", value)}
    if isinstance(value, bool) or value is None:
        return set()
    written = {format(value, form) for form in (".4g", ".3f", ".2f", "+.2f", ".1%", ".0%", ",.0f", "g")} | {str(value)}
    return written | {each.removeprefix("0") for each in written}


def test_every_number_of_the_page_is_in_the_json(fitted, tmp_path):
    write_report(tmp_path / "report.html", fitted[0])
    shown = numbers_shown((tmp_path / "report.html").read_text())
    known = ways_to_write(json.loads((tmp_path / "report.json").read_text()))
    assert len(shown) > 100
    # of the page's own words: two standard errors; the number of random directions is in the baseline's name
    assert {number for number in shown if number not in known} <= {"2"}


def test_what_rollouts_say_is_text_in_the_report(fitted, tmp_path):
    result, _ = fitted
    hostile = replace(result.wrong[0], tokens=("<script>alert(1)</script>",), token_scores=(0.5,), where="<b>x</b>")
    write_report(tmp_path / "report.html", replace(result, wrong=(hostile,)))
    html = (tmp_path / "report.html").read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_a_report_goes_where_it_can_be_written(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.html"):
        check_writable(tmp_path / "report.json")
    with pytest.raises(ValueError, match="in a directory that there is"):
        check_writable(tmp_path / "none" / "report.html")


@pytest.mark.parametrize("kind", ["mean-of-sigmoids", "rolling-max", "exponential-smoothing", "sae-feature"])
def test_every_way_to_fit_goes_from_rollouts_to_a_judged_probe(kind, tmp_path):
    # test_every_kind.py has all kinds
    told = {}
    if kind == "sae-feature":
        direction = np.random.default_rng(99).standard_normal(HIDDEN_SIZE)  # which the label is the side of
        told = {"autoencoder": autoencoder(tmp_path / "sae", "blocks.1.hook_resid_post", direction)[0], "taps": EVERY_BLOCK}
    asked = options(kind=kind, false_positive_rate=0.01, **told)
    result = fit_probe(labelled(readable(120)), tiny_model(), tmp_path / "made.onnx", asked)
    assert result.agreement.largest <= BOUND["float32"]
    assert result.evidence.test.value > 0.7
    assert kind in result.kinds
    manifest = read_probe_file(tmp_path / "made.onnx").manifest
    assert manifest.context.kind == ("pointwise" if kind in ("exponential-smoothing", "sae-feature") else "rollout")
    taps = {str(each.tap) for each in manifest.inputs}
    if kind == "sae-feature":
        assert "feature 5 of a sparse autoencoder, mean" in result.provenance["method"]
        assert taps == {"resid_post.1"}
        assert manifest.reduction == "mean"
    if kind == "exponential-smoothing":
        assert taps == {"resid_post.0", "resid_post.1", "resid_post.2"}
        assert manifest.reduction == "ema_max(0.1)"
        assert {"attention"} & {*result.kinds} == {"attention"}  # its tap is among those that were read
    # too few negatives for such a threshold: there is none, and it is said
    assert result.thresholds == {}
    assert manifest.calibrations == ()
    assert any(warning.number == 4 and "12 negatives" in warning.text for warning in result.warnings)


def test_what_is_fitted_on_the_last_token_is_served_so_under_masks_in_bfloat16(tmp_path):
    lines = readable(120)
    rollouts = [
        LabelledRollout(
            line["prompt"],
            Completion(line["completion"], mask=[1, 1, 1, index % 2, 1, index % 3 > 0]),
            line["label"],
            f"line {index}",
            str(index),
        )
        for index, line in enumerate(lines)
    ]
    output = tmp_path / "made.onnx"
    result = fit_probe(rollouts, tiny_model(), output, options(pools=("last",), dtype="bfloat16", false_positive_rate=0.1))
    manifest = read_probe_file(output).manifest
    assert manifest.reduction == "last"
    assert result.agreement.largest <= BOUND["float32"]  # fitted on what is served, of the same batches
    assert result.batch_rounding.largest <= BOUND["bfloat16"]
    # every number is of what the file serves in this dtype
    engine = Engine.load(str(tiny_model()), [output], dtype="bfloat16")
    examples = tokenised(rollouts, engine)
    scores, positive = served_scores(engine, examples), np.array([each.positive for each in examples])
    parts = split(examples, 0).parts
    tested, negatives = parts[TEST], [index for index in parts[CALIBRATION] if not positive[index]]
    np.testing.assert_allclose(result.test_scores, scores[tested])
    assert result.evidence.test.value == manifest.evaluations[0].value == auroc(scores[tested], positive[tested])
    threshold = calibrate(scores[negatives], false_positive_rate=0.1, dataset="made").threshold
    assert result.thresholds[""].threshold == manifest.calibrations[0].threshold == pytest.approx(threshold)
    conditions = manifest.calibrations[0].conditions
    assert (conditions.dtype, conditions.groups, conditions.longest_completion) == ("bfloat16", len(negatives), 6)
    assert result.calibrated_on == conditions.model_dump()


def test_another_function_than_was_fitted_is_refused(fitted):
    # fitted on the last token, served as the mean: .918 became .703, without a word
    _, output = fitted
    scores = np.random.default_rng(0).standard_normal(50)
    assert agreement(scores, scores + 1e-6, "float32", read_probe_file(output)).largest < 1e-5
    with pytest.raises(ProbeRefused, match="another function than was fitted"):
        agreement(scores, scores * 0.8, "float32", read_probe_file(output))
    with pytest.raises(ProbeRefused, match="another function than was fitted"):
        agreement(scores, scores + 0.06 * scores.std(), "bfloat16", read_probe_file(output))
    # one rollout is enough, in every dtype, and so is one without a score
    for dtype in BOUND:
        for apart in (0.06 * scores.std(), np.nan):
            with pytest.raises(ProbeRefused, match="another function than was fitted"):
                agreement(scores, scores + np.where(np.arange(50) == 3, apart, 0.0), dtype, read_probe_file(output))


@pytest.mark.parametrize("seed", range(3))
def test_labels_that_nothing_tells_are_called_useless(tmp_path, seed):
    result = fit_probe(labelled(meaningless(200, seed)), tiny_model(), tmp_path / "made.onnx", options())
    assert result.evidence.nested.contains(0.5)  # of the test's interval one in twenty misses, and does with seed 1
    assert result.verdict.grade == "useless"


def test_a_task_that_length_solves_is_called_out(tmp_path):
    result = fit_probe(labelled(told_by_length(160)), tiny_model(), tmp_path / "made.onnx", options())
    assert "Length alone tells these rollouts apart: AUROC 1.000" in result.verdict.text
    assert any(warning.number == 2 and warning.text.startswith("length: AUROC 1.000") for warning in result.warnings)


def test_passages_are_fitted_and_served_apart(tmp_path):
    # one half of each completion is about the label, the other about the opposite
    lines = readable(160)
    positives, negatives = ([line for line in lines if line["label"] is kind] for kind in (True, False))
    rollouts = [
        LabelledRollout(
            above["prompt"],
            Completion([*above["completion"], *below["completion"]]),
            None,
            f"line {number}",
            str(number),
            passages=(Passage(0, 6, True), Passage(6, 12, False)),
        )
        for number, (above, below) in enumerate(zip(positives, negatives, strict=True))
    ]
    result = fit_probe(rollouts, tiny_model(), tmp_path / "made.onnx", options())
    assert result.data["examples"] == 160
    assert result.agreement.largest <= BOUND["float32"]


def test_characters_and_tokens_of_a_text_are_the_same_passage():
    engine = Engine.load(str(tiny_model()), taps=["resid_post.0"])
    text = "w10 w11 w12 w13"
    rollout = LabelledRollout(
        Text("w20 w21", True), Completion(text), None, "line 1", passages=(Passage(4, 11, True), Passage(0, 15, False))
    )
    found = tokenised([rollout], engine)
    assert [example.passage for example in found] == [(1, 3), (0, 4)]
    assert found[0].prompt_ids[0] == reference().tokenizer.bos_token_id
    tokens = LabelledRollout([1, 5], Completion([7, 8, 9]), None, "line 2", token_labels=(True, True, None))
    assert [(example.passage, example.positive) for example in tokenised([tokens], engine)] == [((0, 2), True)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"passages": (Passage(2, 9, True),)}, r"line 1: span \[2, 9\] of a completion of 3 tokens"),
        ({"token_labels": (True,)}, "line 1: token_labels: 1 for 3 tokens"),
        ({"completion": Completion([])}, "line 1: the completion has no tokens"),
        ({"completion": Completion([5, 6, 7], mask=[0, 0, 0]), "positive": True}, "line 1: no token of the completion counts"),
    ],
)
def test_what_cannot_be_read_names_its_line(changes, says):
    engine = Engine.load(str(tiny_model()), taps=["resid_post.0"])
    given = {"prompt": [1], "completion": Completion([5, 6, 7]), "positive": None, "where": "line 1", **changes}
    with pytest.raises(ValueError, match=says):
        tokenised([LabelledRollout(**given)], engine)


REFUSED = {
    "the model has no such id": ({"completion": Completion([5, 100_000])}, r"^line 3: ids: id 100000 at index 1 is not in the vocabulary"),
    "longer than the model takes": ({"completion": Completion([5] * 600)}, r"^line 3: 606 tokens with its prompt .* limit .* is 512"),
    "a weight of nothing": ({"weight": 0.0}, r"^line 3: weight: 0; give a number from 1e-06 to 1e\+06"),
    "a weight that hides the others": ({"weight": 1e300}, r"^line 3: weight: 1e\+300; give a number"),
    "a weight that is none": ({"weight": float("nan")}, r"^line 3: weight: nan; give a number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_rollout_that_cannot_be_fitted_on_is_named_by_its_line(case, tmp_path):
    change, says = REFUSED[case]
    rollouts = labelled(readable(60))
    rollouts[2] = replace(rollouts[2], **change)
    with pytest.raises(ValueError, match=says):
        fit_probe(rollouts, tiny_model(), tmp_path / "made.onnx", options())


def test_labels_that_contradict_each_other_are_refused_where_they_leave_nothing_to_read(tmp_path):
    both = [replace(each, positive=side) for each in labelled(readable(60)) for side in (True, False)]
    with pytest.raises(ValueError, match=r"label: the fitted probe gives each of \d+ training examples the score .* beside either label"):
        fit_probe(both, tiny_model(), tmp_path / "made.onnx", options())
    assert list(tmp_path.iterdir()) == []


def test_a_version_never_changes_and_that_is_said_before_anything_is_computed(fitted):
    _, output = fitted
    with pytest.raises(ValueError, match="holds made@1 already"):
        fit_probe([], tiny_model(), output, options())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "svm"}, "kind: 'svm'"),
        ({"pools": ("max",)}, "pool: 'max'"),
        ({"pools": ()}, "pool: none given"),
        ({"taps": ()}, "taps: none given"),
        ({"seed": -1}, "seed: -1"),
        ({"name": "a b"}, "name: 'a b'; give 1 to 64 of a-z"),
        ({"version": ""}, "version: ''; give 1 to 32"),
        ({"false_positive_rate": 1.0}, "false_positive_rate: 1"),
        ({"kind": "sae-feature"}, "sae: none given; the kind sae-feature takes a folder of SAELens"),
        ({"feature": 3}, "feature: for the kind sae-feature alone, and the kind is logistic"),
        ({"autoencoder": Path("sae")}, "sae: for the kind sae-feature alone"),
        ({"kind": "sae-feature", "autoencoder": Path("sae")}, "taps: resid_post.0, resid_post.1, resid_post.2; sae-feature reads where"),
    ],
)
def test_an_option_that_there_is_not_is_refused(changes, says, tmp_path):
    with pytest.raises(ValueError, match=re.escape(says)):
        fit_probe([], tiny_model(), tmp_path / "made.onnx", options(**changes))
