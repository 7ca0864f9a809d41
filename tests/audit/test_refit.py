"""Could a fresh probe still see the behaviour? From activations that were recorded of labelled rollouts and of anchors."""

from __future__ import annotations

import numpy as np
import pytest
from recorded_runs import KEY, write_run

from benchmarks.simulated_runs import Change
from probescore_audit import Verdict, audit_record, fresh_auroc
from probescore_audit.record import ActivationRow, AnchorRow, RecordedProbe, RecordWriter, RunHeader, read_record
from probescore_audit.record.rows import to_line
from probescore_audit.report import numbers_of, report_page
from probescore_server.cli.audit_metrics import AuditMetrics

DIMENSIONS = 48


def drawn(n, apart, seed=0, dimensions=DIMENSIONS):
    """Activations of which one direction tells positives apart by so many standard deviations, among others of other scales."""
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.4
    values = rng.standard_normal((n, dimensions))
    values[:, 3] += apart * positive
    return values * np.geomspace(0.01, 100, dimensions), positive


@pytest.mark.parametrize(("apart", "low", "high"), [(0.0, 0.0, 0.62), (4.0, 0.9, 1.01)])
def test_what_is_there_is_seen_and_what_is_not_is_not(apart, low, high):
    values, positive = drawn(240, apart)
    found = fresh_auroc(values, positive, np.arange(240))
    assert low <= found.low
    assert found.value <= high
    if not apart:
        assert found.contains(0.5)


def test_labels_that_have_nothing_to_do_with_the_activations_are_not_learnt_by_heart():
    """With more dimensions than rollouts every labelling can be fitted; what is not fitted says whether it is true."""
    covered = 0
    for seed in range(20):
        values, positive = drawn(80, 0.0, seed, dimensions=512)
        covered += fresh_auroc(values, positive, np.arange(80)).contains(0.5)
    assert covered >= 17


def test_rollouts_of_one_prompt_are_never_both_fitted_and_judged():
    """Each prompt has activations of its own by which its label can be learnt, and no other's."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(30), 6)
    values = rng.standard_normal((30, 200))[prompts] * 5 + 0.1 * rng.standard_normal((180, 200))
    positive = (rng.random(30) < 0.5)[prompts]
    assert fresh_auroc(values, positive, prompts).value < 0.75


@pytest.mark.parametrize("few", [(30, 3), (3, 30)])
def test_of_a_few_rollouts_of_a_class_nothing_is_said(few):
    positive = np.repeat([True, False], few)
    assert np.isnan(fresh_auroc(np.zeros((33, 4)), positive, np.arange(33)).value)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (np.zeros(30), r"activations: .*shape \(30,\)"),
        (np.full((30, 2), np.nan), "activations: .*finite"),
        (np.zeros((29, 2)), "positive: 30 for 29"),
    ],
)
def test_activations_are_checked(values, complaint):
    with pytest.raises(ValueError, match=complaint):
        fresh_auroc(values, np.arange(30) < 15, np.arange(30))


# ------------------------------------------------------------------------------------------------------------------ from a record


def record_activations(folder, truth, apart, *, reading="policy", steps=range(14), anchors=False):
    """Adds activations of all labelled rollouts, or of anchors of steps 0 and 13 whose activations tell less from step to step."""
    rng = np.random.default_rng(1)
    record = read_record(folder)
    with RecordWriter(folder, record.header.anew()) as writer:
        if anchors:
            for step, far in ((0, 4.0), (13, apart)):
                for number in range(256):
                    values = rng.standard_normal(DIMENSIONS)
                    values[3] += far * (number < 128)
                    writer.append(
                        [
                            AnchorRow(step=step, anchor=str(number), positive=number < 128, scores={}),
                            ActivationRow.of(values, step=step, reading=reading, anchor=str(number)),
                        ]
                    )
            return
        for label in record.labels:
            if label.step in steps:
                values = rng.standard_normal(DIMENSIONS)
                values[3] += apart * truth[label.step, label.rollout]
                writer.append([ActivationRow.of(values, step=label.step, reading=reading, rollout=label.rollout)])


def audited(folder, apart, **more):
    truth = write_run(folder, [Change(positive_rate=0.4)] * 14, policy=[Change(hidden=0.95)] * 14)
    if apart is not None:
        record_activations(folder, truth, apart, **more)
    return {each.recorded.reading: each for each in audit_record(read_record(folder)).readings}


@pytest.mark.parametrize(
    ("apart", "anchors", "said"),
    [(4.0, False, "A refit would see it: the"), (4.0, True, "A refit would see it: the"), (0.0, True, "Not even a refit on these")],
)
def test_an_evaded_probe_is_said_to_be_worth_a_refit_if_it_is(tmp_path, apart, said, anchors):
    found = audited(tmp_path, apart, anchors=anchors)
    assert found["policy"].verdict is Verdict.EVADED
    assert said in found["policy"].sentence
    assert "refit" not in found["frozen"].sentence
    assert found["policy"].refit.source == ("anchors" if anchors else "rollouts")
    assert found["frozen"].refit is None


def test_without_activations_nothing_is_said_of_a_refit(tmp_path):
    found = audited(tmp_path, None)
    assert "refit" not in found["policy"].sentence
    assert found["policy"].refit is None


def test_activations_outside_of_the_window_do_not_count(tmp_path):
    assert audited(tmp_path, 4.0, steps=range(3))["policy"].refit is None


def test_anchors_are_compared_with_what_they_were(tmp_path):
    refit = audited(tmp_path, 0.0, anchors=True)["policy"].refit
    assert refit.change.high < -0.3
    assert refit.auroc.high < 0.8


def test_rollouts_of_which_a_fresh_probe_learns_too_little_prove_nothing(tmp_path):
    """That a refit sees nothing is said only where one saw something before."""
    found = audited(tmp_path, 0.0)["policy"]
    assert found.refit.auroc.high < 0.7
    assert "refit" not in found.sentence


def test_numbers_and_page_have_it(tmp_path):
    audited(tmp_path, 4.0)
    audit = audit_record(read_record(tmp_path))
    policy = next(each for each in numbers_of(audit)["readings"] if each["reading"] == "policy")
    assert policy["refit"]["auroc"]["low"] > 0.9
    assert policy["refit"]["source"] == "rollouts"
    assert "AUROC of a refit" in report_page(audit)
    metrics = AuditMetrics()
    metrics.update(audit)
    (refit,) = (family for family in metrics.collect() if family.name == "probescore_audit_refit_auroc")
    assert {sample.labels["reading"] for sample in refit.samples} == {"policy"}
    assert min(sample.value for sample in refit.samples) > 0.9


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_an_activation_keeps_what_bfloat16_keeps(tmp_path, scale):
    values = scale * np.random.default_rng(0).standard_normal(300)
    with RecordWriter(tmp_path, RunHeader(run_id="r", planned_steps=1, probes=(RecordedProbe(key=KEY),))) as writer:
        writer.append([ActivationRow.of(values, step=0, reading="frozen", rollout="0")])
    (row,) = read_record(tmp_path).activations
    np.testing.assert_allclose(row.vector(), values, rtol=2**-8)
    assert len(row.values) < 2.8 * 300


@pytest.mark.parametrize(
    ("values", "place", "complaint"),
    [
        ([[1.0]], {"rollout": "0"}, "values: .*one number for each dimension"),
        ([np.inf], {"rollout": "0"}, "values: .*finite"),
        ([1.0], {}, "rollout, anchor: give one of them"),
        ([1.0], {"rollout": "0", "anchor": "0"}, "rollout, anchor: give one of them"),
    ],
)
def test_an_activation_that_cannot_be_is_refused(values, place, complaint):
    with pytest.raises(ValueError, match=complaint):
        ActivationRow.of(values, step=0, reading="frozen", **place)


def test_activations_that_were_pooled_otherwise_are_not_mixed_in(tmp_path):
    """A run that was resumed with other options: what most rows are of counts."""
    truth = write_run(tmp_path, [Change(positive_rate=0.4)] * 14, policy=[Change(hidden=0.95)] * 14)
    record_activations(tmp_path, truth, 4.0)
    plain = audit_record(read_record(tmp_path)).readings
    with RecordWriter(tmp_path, read_record(tmp_path).header.anew()) as writer:
        for label in read_record(tmp_path).labels[::2]:
            writer.append([ActivationRow.of([1.0], step=label.step, reading="policy", rollout=label.rollout, pool="last")])
    mixed = audit_record(read_record(tmp_path)).readings
    assert [each.refit for each in mixed] == [each.refit for each in plain]
    assert any(each.refit is not None for each in mixed)


@pytest.mark.parametrize("width", [64, 4096])
def test_a_row_is_as_large_as_the_documentation_says(width):
    values = np.random.default_rng(0).standard_normal(width)
    row = ActivationRow.of(
        values, step=10**4, reading="policy", rollout="0123abcd.511", tap="resid_post.63", pool="mean", reading_id=f"sha256:{'0' * 64}"
    )
    assert len(to_line(row)) <= 8 / 3 * width + 250


def test_activations_of_an_attempt_that_was_given_up_do_not_count(tmp_path):
    for started, attempt in ((1.0, "a"), (2.0, "b")):
        header = RunHeader(run_id="r", planned_steps=9, launch=attempt, started=started)
        with RecordWriter(tmp_path, header) as writer:
            from probescore_audit.record import RolloutRow

            writer.append([RolloutRow(step=3, rollout="0", prompt="p", scores={})])
            if attempt == "a":
                writer.append([ActivationRow.of([1.0], step=3, reading="frozen", rollout="0")])
    assert read_record(tmp_path).activations == ()
