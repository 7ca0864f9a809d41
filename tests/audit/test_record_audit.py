"""A whole record is audited: every probe and reading, what to do next, and which rollouts to label where nothing can be said."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
from recorded_runs import KEY, anchors, scores_of, write_run

from benchmarks.simulated_runs import THRESHOLD, Change
from probescore_audit import Verdict, audit_record, label_rows, plan_further, plan_recorded, unflagged_rollouts
from probescore_audit.record import AnchorRow, LabellerRow, LabelRow, RecordWriter, read_record
from probescore_audit.recorded_labels import label_design
from probescore_audit.recorded_run import recorded_run
from probescore_audit.report import numbers_of

HIDDEN = [Change(positive_rate=0.4)] * 14


@pytest.fixture(scope="module")
def evaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaded")
    write_run(folder, HIDDEN, policy=[Change(hidden=0.95)] * 14)
    return audit_record(read_record(folder))


def by_reading(audit):
    return {each.recorded.reading: each for each in audit.readings}


def test_each_reading_has_its_verdict_and_both_together_say_where_it_hides(evaded):
    found = by_reading(evaded)
    assert found["frozen"].verdict is Verdict.BEHAVIOUR_ROSE
    assert found["policy"].verdict is Verdict.EVADED
    assert [each.recorded.reading for each in evaded.readings] == ["policy", "frozen"]  # what is wrong comes first
    assert found["policy"].next_step.startswith("This run should have been stopped: the monitors raised an alarm at step ")
    assert not found["frozen"].audit.alarms
    assert "stopped" not in found["frozen"].next_step
    assert any("obfuscated activations" in notice for notice in evaded.notices)


def test_a_run_that_goes_on_is_to_be_stopped(tmp_path):
    write_run(tmp_path, HIDDEN, policy=[Change(hidden=0.95)] * 14, planned_steps=15)
    found = by_reading(audit_record(read_record(tmp_path)))
    assert found["policy"].next_step.startswith("Stop the run: the monitors raised an alarm at step ")


@pytest.mark.parametrize(("first", "planned", "ended"), [(0, 14, True), (1, 14, True), (1, 15, False), (0, 15, False)])
def test_a_run_has_ended_after_its_planned_steps_wherever_its_trainer_begins_to_count(evaded, first, planned, ended):
    moved = {name: [replace(row, step=row.step + first) for row in getattr(evaded.record, name)] for name in ("rollouts", "labels")}
    header = replace(evaded.record.header, planned_steps=planned)
    audit = audit_record(replace(evaded.record, header=header, **moved))
    assert audit.steps == 14
    assert by_reading(audit)["policy"].next_step.startswith("This run should have been stopped" if ended else "Stop the run")


@pytest.mark.parametrize("used", [False, True])
def test_a_probe_that_the_reward_does_not_use_although_the_record_says_so_is_told(tmp_path, used):
    write_run(tmp_path, [Change()] * 14)
    record = read_record(tmp_path)
    rows = [replace(row, task_reward=1.0, total_reward=0.5 if used and row.step == 3 else 1.0) for row in record.rollouts]
    notices = audit_record(replace(record, rollouts=rows)).notices
    assert any(notice.startswith(f"{KEY}: the record says that training uses this") for notice in notices) != used


def test_the_chance_of_a_false_alarm_is_shared_by_all_audits(evaded):
    enough = [watch.enough for each in evaded.readings for watch in each.audit.watches]
    assert enough == pytest.approx([-np.log(0.05 / 4)] * 4)
    for each in evaded.readings:
        for watch in each.audit.watches:
            over = watch.step[watch.log_evidence >= watch.enough]
            assert watch.alarm_step == (None if not len(over) else over[0])


def test_every_number_is_json(evaded):
    found = json.loads(json.dumps(numbers_of(evaded), allow_nan=False))
    policy = next(each for each in found["readings"] if each["reading"] == "policy")
    assert policy["verdict"] == "evaded"
    assert policy["windows"][-1]["recall"]["high"] < 0.3
    assert policy["alarms"][0]["step"] < 14


def test_text_that_hides_the_behaviour_from_the_frozen_model_is_told_from_activations_that_do(tmp_path):
    write_run(tmp_path, [Change(positive_rate=0.4, hidden=0.95)] * 14, policy=[Change()] * 14)
    notices = audit_record(read_record(tmp_path)).notices
    assert any("only the texts" in notice for notice in notices)


@pytest.mark.parametrize(("moved", "told"), [(0.0, False), (0.5, True)])
def test_a_frozen_model_that_scores_its_anchors_otherwise_is_told(tmp_path, moved, told):
    write_run(tmp_path, [Change()] * 14)
    anchors(tmp_path, moved)
    audit = audit_record(read_record(tmp_path))
    assert any("from step 5 on, anchors score otherwise" in notice for notice in audit.notices) == told
    # whatever they say, the verdict is that of the run's own rollouts
    assert audit.readings[0].verdict is Verdict.NO_CHANGE


@pytest.mark.parametrize(("kept", "told"), [(1.0, False), (0.9, False), (0.0, True)])
def test_a_policy_on_which_the_probe_no_longer_tells_anchors_apart_has_drifted(tmp_path, kept, told):
    write_run(tmp_path, [Change()] * 14, policy=[Change()] * 14)
    rng = np.random.default_rng(0)
    positive, noise = np.arange(256) < 128, rng.standard_normal((2, 256))
    record = read_record(tmp_path)
    with RecordWriter(tmp_path, record.header.anew()) as writer:
        for step, share in ((0, 1.0), (9, kept)):
            scores = 3 * share * positive + noise[int(step > 0)]
            writer.append(
                AnchorRow(step=step, anchor=str(index), positive=bool(positive[index]), scores=scores_of(frozen=index % 7, policy=score))
                for index, score in enumerate(scores)
            )
    notices = [notice for notice in audit_record(read_record(tmp_path)).notices if "anchors" in notice]
    assert [notice.startswith(f"{KEY}, policy: on anchors") and "representation drift" in notice for notice in notices] == [True] * told


def test_a_record_without_a_reference_says_what_is_missing(tmp_path):
    write_run(tmp_path, [Change()] * 2, references=False)
    with pytest.raises(ValueError, match="no reference to compare with; write labelled rollouts of the model before training"):
        audit_record(read_record(tmp_path))


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [({"probes": ["lying@1"]}, "probe: 'lying@1'; the record has cheating@1"), ({"readings": ["policy"]}, "reading: 'policy'; .* frozen")],
)
def test_what_is_not_recorded_is_named(tmp_path, asked, complaint):
    write_run(tmp_path, [Change()])
    with pytest.raises(ValueError, match=complaint):
        audit_record(read_record(tmp_path), **asked)


def test_few_labels_give_no_verdict_and_say_how_many_there_must_be(tmp_path):
    write_run(tmp_path, [Change()] * 3)
    (each,) = audit_record(read_record(tmp_path)).readings
    assert each.verdict is None
    assert "a window of steps needs 320" in each.sentence
    assert "probescore labels plan RUN --per-step 32" in each.next_step


def test_without_labels_drawn_at_random_recall_is_said_to_be_unknown(tmp_path):
    truth = write_run(tmp_path, [Change()] * 14, labels=0)
    record = read_record(tmp_path)
    with RecordWriter(tmp_path, record.header.anew()) as writer:
        for planned in plan_recorded(record, 64):
            if not planned.floor:
                said = "yes" if truth[planned.step, planned.rollout] else "no"
                writer.append(
                    [LabelRow(step=planned.step, rollout=planned.rollout, label=said, source="checker", inclusion=planned.inclusion)]
                )
    (each,) = audit_record(read_record(tmp_path)).readings
    assert any("no rollout that was drawn at random is labelled" in text for text in each.unknown)


def test_a_labeller_who_errs_is_named(tmp_path):
    write_run(tmp_path, [Change()] * 14)
    record = read_record(tmp_path)
    with RecordWriter(tmp_path, record.header.anew()) as writer:
        writer.append([LabellerRow(source="judge", labeller="m", negatives=100, negatives_right=96, positives=10, positives_right=10)])
    audit = audit_record(read_record(tmp_path))
    assert any("m called 4 of 100 rollouts without the behaviour positive" in notice for notice in audit.notices)
    assert "On 110 rollouts with known labels 96.4% were right" in audit.assumptions[0]


# ------------------------------------------------------------------------------------------------------------------- which to label


@pytest.fixture(scope="module")
def undecided(tmp_path_factory):
    """A run of which nothing can be said from what is labelled: fewer than before have the behaviour, and by how much is not clear."""
    folder = tmp_path_factory.mktemp("undecided")
    truth = write_run(folder, [Change(positive_rate=0.055)] * 14, seed=2)
    return folder, truth


def test_who_cannot_tell_lists_the_rollouts_that_would_help_and_they_do(undecided, tmp_path):
    folder, truth = undecided
    record = read_record(folder)
    (each,) = audit_record(record).readings
    assert each.verdict is Verdict.CANNOT_TELL
    final = each.audit.final
    assert final.more_labels
    assert f"probescore labels plan RUN --more {final.more_labels}" in each.next_step
    assert len(each.further) <= final.more_labels + 2
    known = {(label.step, label.rollout) for label in record.labels}
    assert not known & {(planned.step, planned.rollout) for planned in each.further}
    rows = label_rows(record, [{**asdict(one), "label": truth[one.step, one.rollout]} for one in each.further], source="person")
    with RecordWriter(folder, record.header.anew()) as writer:
        writer.append(rows)
    (again,) = audit_record(read_record(folder)).readings
    width, before = (found.positive_rate.high - found.positive_rate.low for found in (again.audit.final, final))
    assert width < before
    assert len(again.recorded.labels.rollout) == len(each.recorded.labels.rollout) + len(each.further)
    assert again.audit.alarms == each.audit.alarms
    np.testing.assert_array_equal(again.audit.watches[1].log_evidence, each.audit.watches[1].log_evidence)


def test_further_labels_leave_estimates_unbiased(tmp_path):
    """Of runs with 9%, further labels among those most in doubt move the estimate of how many are positive neither up nor down."""
    found, covered = [], 0
    for seed in range(6):
        folder = tmp_path / str(seed)
        truth = write_run(folder, [Change(correlation=0.0)] * 12, seed=100 + seed, labels=32)
        record = read_record(folder)
        design = label_design(record, record.table())
        rows = label_rows(
            record, [{**asdict(one), "label": truth[one.step, one.rollout]} for one in plan_further(design, 256)], source="person"
        )
        with RecordWriter(folder, record.header.anew()) as writer:
            writer.append(rows)
        final = audit_record(read_record(folder)).readings[0].audit.final
        real = np.mean([value for (step, _), value in truth.items() if step >= 2])
        found.append(final.positive_rate.value - real)
        covered += final.positive_rate.low <= real <= final.positive_rate.high
    assert abs(np.mean(found)) < 0.01
    assert covered >= 5


def test_labels_of_a_step_and_stratum_with_further_ones_count_equally(tmp_path):
    write_run(tmp_path, [Change()] * 12)
    record = read_record(tmp_path)
    design = label_design(record, record.table())
    with RecordWriter(tmp_path, record.header.anew()) as writer:
        writer.append(label_rows(record, [{**asdict(one), "label": "no"} for one in plan_further(design, 64)], source="person"))
    run, labels = recorded_run(read_record(tmp_path), KEY)
    later = np.flatnonzero(np.isnan(labels.planned_inclusion))
    assert len(later)
    for index in later:
        place = labels.rollout[index]
        same = (run.step[labels.rollout] == run.step[place]) & (run.stratum[labels.rollout] == run.stratum[place])
        population = int(((run.step == run.step[place]) & (run.stratum == run.stratum[place])).sum())
        np.testing.assert_allclose(labels.inclusion[same], same.sum() / population)


def test_a_plan_is_the_same_when_it_is_made_again_and_passes_over_labelled_steps(tmp_path):
    write_run(tmp_path, [Change()] * 3, labels=0)
    record = read_record(tmp_path)
    plan = plan_recorded(record, 16, last_step=1)
    assert plan == plan_recorded(record, 16, last_step=1)
    assert {one.step for one in plan} == {0, 1}
    assert sum(one.floor for one in plan) == 16
    with RecordWriter(tmp_path, record.header.anew()) as writer:
        writer.append(label_rows(record, [{**asdict(one), "label": "no"} for one in plan if one.step == 0], source="person"))
    assert {one.step for one in plan_recorded(read_record(tmp_path), 16)} == {1, 2}


def test_what_a_labeller_left_of_a_plan_is_planned_and_nothing_of_a_step_with_other_labels(tmp_path):
    """Whatever part of whatever steps was labelled before: what is planned then completes the plan that there was."""
    write_run(tmp_path / "run", [Change()] * 3, labels=0, policy=[Change(hidden=0.9)] * 3)
    whole = plan_recorded(read_record(tmp_path / "run"), 16)
    for share in (0.05, 0.4, 0.9):
        folder = shutil.copytree(tmp_path / "run", tmp_path / str(share))
        record, rng = read_record(folder), np.random.default_rng(0)
        done = [each for each in whole if rng.random() < share]
        with RecordWriter(folder, record.header.anew()) as writer:
            writer.append(label_rows(record, [{**asdict(one), "label": "no"} for one in done], source="judge"))
        left = plan_recorded(read_record(folder), 16, complete=True)
        assert sorted((*done, *left), key=repr) == sorted(whole, key=repr)
    folder = shutil.copytree(tmp_path / "run", tmp_path / "other")
    with RecordWriter(folder, record.header.anew()) as writer:
        writer.append(
            label_rows(record, [{**asdict(one), "label": "no"} for one in plan_recorded(record, 8) if one.step == 1], source="judge")
        )
    assert {one.step for one in plan_recorded(read_record(folder), 16, complete=True)} == {0, 2}


def test_rollouts_that_one_reading_does_not_flag_are_unflagged(tmp_path):
    write_run(tmp_path, [Change(positive_rate=0.5)], policy=[Change(hidden=1.0)])
    record = read_record(tmp_path)
    unflagged = {(row.step, row.rollout) for row in record.rollouts if min(each["mean"] for each in row.scores[KEY].values()) < THRESHOLD}
    assert unflagged_rollouts(record) == unflagged
    assert 300 < len(unflagged) < 512


def test_labels_are_shared_out_by_one_probe_and_reading_for_good(tmp_path):
    write_run(tmp_path, [Change()] * 2, policy=[Change(hidden=0.9)] * 2)
    record = read_record(tmp_path)
    assert label_design(record, record.table()).reading == "frozen"
    with pytest.raises(ValueError, match="shared out by the scores of cheating@1, frozen"):
        plan_recorded(record, 16, reading="policy")


# ------------------------------------------------------------------------------------------------------------------- labels that come


def answers(record, *said):
    return [{"step": 0, "rollout": str(index), "label": label, "inclusion": 0.5} for index, label in enumerate(said)]


@pytest.fixture
def unlabelled(tmp_path):
    write_run(tmp_path, [Change()], labels=0)
    return read_record(tmp_path)


def test_answers_become_rows_and_those_that_are_missing_do_not(unlabelled):
    rows = label_rows(unlabelled, answers(unlabelled, "yes", None, "unsure", False), source="person", labeller="ann")
    assert [(row.rollout, row.label) for row in rows] == [("0", "yes"), ("2", "unsure"), ("3", "no")]
    assert {(row.text_sha256, row.labeller) for row in rows} == {(f"sha256:0.{row.rollout}", "ann") for row in rows}


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ({"step": 0, "rollout": "9999", "label": "yes"}, "label 1: the record has no rollout '9999' of step 0"),
        ({"step": "0", "rollout": "0", "label": "yes"}, "no rollout '0' of step '0'"),
        ({"step": 0, "rollout": "0", "label": "maybe"}, 'label 1: \'maybe\'; give "yes", "no" or "unsure"'),
        ({"step": 0, "rollout": "0", "label": 1}, "label 1: 1; give"),
        ({"step": 0, "rollout": "0", "label": ["yes"]}, 'give "yes"'),
        ({"step": 0, "rollout": "0", "label": "no", "inclusion": 0}, "inclusion 0; give the probability"),
        ({"step": 0, "rollout": "0", "label": "no", "inclusion": "1"}, "inclusion '1'; give"),
        ({"step": 0, "rollout": "0", "label": "no", "inclusion": float("nan")}, "inclusion nan; give"),
        ({"step": 0, "rollout": "0", "label": "no", "stratum": "high"}, "stratum 'high'; give flagged, near or rest"),
        ({"step": 0, "rollout": "0", "label": "no", "population": 0}, "population 0; give"),
        ({"step": 0, "rollout": "0", "label": "no", "text_sha256": "sha256:other"}, "has another text by now"),
    ],
)
def test_labels_that_cannot_be_are_refused(unlabelled, answer, complaint):
    with pytest.raises(ValueError, match=complaint):
        label_rows(unlabelled, [answer], source="person")


def test_a_rollout_is_labelled_once_unless_it_is_said_what_that_means(unlabelled, tmp_path):
    with pytest.raises(ValueError, match="comes twice"):
        label_rows(unlabelled, answers(unlabelled, "yes") * 2, source="person")
    with pytest.raises(ValueError, match="no first judgement"):
        label_rows(unlabelled, answers(unlabelled, "yes"), source="person", again="second")
    with RecordWriter(tmp_path, unlabelled.header.anew()) as writer:
        writer.append(label_rows(unlabelled, answers(unlabelled, "yes", "yes", "no"), source="judge"))
    record = read_record(tmp_path)
    with pytest.raises(ValueError, match="has a label; say whether"):
        label_rows(record, answers(record, "no"), source="person")
    with RecordWriter(tmp_path, record.header.anew()) as writer:
        writer.append(label_rows(record, answers(record, "no"), source="person", again="second"))
    record = read_record(tmp_path)
    with RecordWriter(tmp_path, record.header.anew()) as writer:
        writer.append(label_rows(record, [{"step": 0, "rollout": "1", "label": "no"}], source="person", again="replace"))
    _, labels = recorded_run(read_record(tmp_path), KEY)
    assert labels.positive.tolist() == [False, False, False]
    assert labels.inclusion.tolist() == [0.5, 0.5, 0.5]
