"""Labels that people give: to whom which rollout is handed, and that none is lost."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from http.client import HTTPException

import pytest
from made_run import KEY, made_run
from reviewed import Refused, Review

from probescore_audit.record import LabelRow, RecordWriter, RolloutRow, RunHeader, read_record
from probescore_audit.recorded_run import recorded_run
from probescore_review.labelling import LabelConflict
from probescore_review.runs import ReviewedRun


@pytest.fixture
def run(tmp_path):
    made_run(tmp_path / "run", 400, 4)
    return ReviewedRun("0", tmp_path / "run", tmp_path / "cache")


def label_all(run, truth, labeller="ann", most=10_000):
    given = []
    for _ in range(most):
        asked = run.labelling.next(labeller)
        if asked["rollout"] is None:
            break
        rollout = asked["rollout"]["rollout"]
        given.append((rollout, asked["second"]))
        run.labelling.give(rollout, "yes" if truth[rollout] else "no", labeller, second=asked["second"])
    return given


def test_labels_of_a_whole_plan_are_what_the_audit_needs(run):
    truth = json.loads((run.folder / "truth.json").read_text())
    added = run.labelling.plan(per_step=16)
    assert added["of"] == added["added"] > 50
    assert run.labelling.plan(per_step=16)["added"] == 0
    planned = run.labelling.next("ann")["of"]

    given = label_all(run, truth)

    firsts = [rollout for rollout, second in given if not second]
    assert len(firsts) == len(set(firsts)) == planned
    record = read_record(run.folder, texts=False)
    assert len(record.labels) == len(given)
    _, labels = recorded_run(record, KEY)
    assert len(labels.rollout) == planned, "each has the probability with which it was drawn"
    assert labels.floor.sum() >= 4 * 8
    assert all(row.labeller == "ann" and row.given and row.source == "person" for row in record.labels)
    assert run.labelling.next("ann")["rollout"] is None


def test_a_blind_rollout_says_nothing_by_which_to_label(run):
    run.labelling.plan(per_step=8)

    shown = run.labelling.next("ann")["rollout"]

    text = json.dumps({name: value for name, value in shown.items() if value is not None})
    for hidden in ('scores": {"', "task_reward", "total_reward", "threshold", "flagged", "stratum", "inclusion", KEY):
        assert hidden not in text
    assert shown["completion"]
    assert shown["tokens"][0]["scores"] == {}
    assert run.labelling.give(shown["rollout"], "no", "ann")["scores"][KEY], "shown once the label is given"


def test_two_labellers_get_two_rollouts_and_a_reload_the_same(run):
    run.labelling.plan(per_step=8)
    anns, bens = run.labelling.next("ann")["rollout"], run.labelling.next("ben")["rollout"]

    assert anns["rollout"] != bens["rollout"]
    assert run.labelling.next("ann")["rollout"]["rollout"] == anns["rollout"]
    run.labelling.give(anns["rollout"], "no", "ann")
    assert run.labelling.next("ann")["rollout"]["rollout"] not in (anns["rollout"], bens["rollout"])


def test_a_claim_ends_after_some_minutes(run, monkeypatch):
    run.labelling.plan(per_step=8)
    anns = run.labelling.next("ann")["rollout"]["rollout"]
    now = time.time()

    monkeypatch.setattr("probescore_review.labelling.time.time", lambda: now + 601)

    assert run.labelling.next("ben")["rollout"]["rollout"] == anns


def test_who_labels_what_somebody_has_labelled_is_told(run):
    run.labelling.give("0:0.0", "yes", "ann")

    with pytest.raises(LabelConflict, match="ann has labelled"):
        run.labelling.give("0:0.0", "no", "ben")
    with pytest.raises(LabelConflict, match="no first judgement"):
        run.labelling.give("0:0.1", "no", "ben", second=True)
    again = run.labelling.give("0:0.0", "yes", "ann")
    assert again["label_id"] == run.rollouts.labels(0, "0.0")[0]["label_id"], "one that is sent twice counts once"
    run.labelling.give("0:0.0", "no", "ben", second=True)
    assert run.rollouts.row("0:0.0")["label"] == "no", "positive only if all judgements say so"
    assert len(read_record(run.folder).labels) == 2


def test_undo_leaves_the_rollout_as_if_it_had_no_label(run):
    run.labelling.plan(per_step=8)
    asked = run.labelling.next("ann")
    rollout = asked["rollout"]["rollout"]
    given = run.labelling.give(rollout, "yes", "ann", spans=[[2, 4], [7, 9]], note="it looks it up")
    assert read_record(run.folder).labels[0].spans == [[2, 4], [7, 9]]
    with pytest.raises(LabelConflict, match="ann's"):
        run.labelling.undo(given["label_id"], "ben")

    run.labelling.undo(given["label_id"], "ann")

    assert read_record(run.folder).labels == ()
    assert run.rollouts.row(rollout)["label"] is None
    assert run.labelling.next("ann") | {"rollout": None} == asked | {"rollout": None}
    with pytest.raises(LabelConflict, match="before"):
        run.labelling.undo(given["label_id"], "ann")
    run.labelling.give(rollout, "no", "ann")
    assert [row.label for row in read_record(run.folder).labels] == ["no"]
    assert read_record(run.folder).labels[0].inclusion, "as it was drawn"


def test_unflagged_positives_are_judged_again_by_somebody_else(run):
    low = run.index.row("SELECT step, name FROM rollouts WHERE s0 < -2")
    high = run.index.row("SELECT step, name FROM rollouts WHERE s0 > 3 AND s1 > 3 AND s2 > 3")
    run.labelling.give(f"{low[0]}:{low[1]}", "yes", "ann")
    run.labelling.give(f"{high[0]}:{high[1]}", "yes", "ann")
    run.labelling.give("3:1.1", "no", "ben")

    assert run.labelling.next("ann")["rollout"] is None, "ben labels here, too"
    asked = run.labelling.next("ben")
    assert (asked["rollout"]["rollout"], asked["second"]) == (f"{low[0]}:{low[1]}", True)
    run.labelling.give(asked["rollout"]["rollout"], "yes", "ben", second=True)
    assert run.labelling.next("ben")["rollout"] is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"label": "maybe"}, "label"),
        ({"labeller": " "}, "labeller"),
        ({"labeller": "a\x1b[2J"}, "labeller"),
        ({"labeller": "a" * 101}, "labeller"),
        ({"spans": [[3, 2]]}, "spans"),
        ({"spans": [[0, 41]]}, "spans"),
        ({"spans": [[0]]}, "spans"),
        ({"note": "n" * 10_001}, "note"),
    ],
)
def test_a_wrong_label_is_refused_and_nothing_is_written(run, wrong, said):
    files = set(run.folder.iterdir())

    with pytest.raises(ValueError, match=said):
        run.labelling.give(**{"rollout": "0:0.0", "label": "yes", "labeller": "ann", **wrong})

    assert read_record(run.folder).labels == ()
    assert set(run.folder.iterdir()) - files <= {run.folder / "review.lock"}


def test_labels_after_training_went_back_are_of_the_new_rollouts(tmp_path):
    folder = tmp_path / "run"
    header = RunHeader(run_id="r", planned_steps=4, launch="first", started=time.time() - 100)

    def rows(score):
        return [RolloutRow(step=step, rollout="a", prompt="p", scores={KEY: {"frozen": {"mean": score}}}) for step in range(4)]

    with RecordWriter(folder, header) as writer:
        writer.append(rows(0.0))
    run = ReviewedRun("0", folder, tmp_path / "cache")
    run.labelling.give("1:a", "yes", "ann")
    time.sleep(0.01)
    with RecordWriter(folder, RunHeader(run_id="r", planned_steps=4, launch="second")) as writer:
        writer.append(rows(1.0)[1:])
    run.index.refresh(force=True)
    assert run.rollouts.row("1:a")["label"] is None, "that label was of the rollout before"
    assert run.rollouts.row("1:a")["s0"] == 1.0

    run.labelling.give("1:a", "no", "ann")

    assert [(row.step, row.label) for row in read_record(folder).labels] == [(1, "no")]
    assert run.rollouts.row("1:a")["label"] == "no"


def test_a_label_that_was_acknowledged_survives_kill_9(tmp_path):
    made_run(tmp_path / "run", 400, 4)
    acknowledged = []
    for attempt in range(3):
        review = Review(tmp_path / "run", cache=tmp_path / "cache")
        if not attempt:
            review.post("/api/runs/0/plan", {"per_step": 48})

        def work(review=review):
            try:
                while (asked := review.get("/api/runs/0/queue", labeller="ann"))["rollout"]:
                    rollout = asked["rollout"]["rollout"]
                    acknowledged.append((rollout, review.label(rollout, "no", second=asked["second"])["label_id"]))
            except (OSError, ValueError, HTTPException, Refused):
                pass  # it was killed

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.4 + 0.3 * attempt)
        review.kill()
        thread.join()

    record = read_record(tmp_path / "run")
    assert len(acknowledged) > 5
    assert {row.row for row in record.labels} >= {label for _, label in acknowledged}
    assert len({(row.step, row.rollout) for row in record.labels}) == len(record.labels), "none was given twice"
    with Review(tmp_path / "run", cache=tmp_path / "cache") as review:
        assert review.get("/api/runs/0/queue", labeller="ann")["done"] == len(record.labels)


FULL = """
import resource, signal, sqlite3, sys
from pathlib import Path
from probescore_review.runs import ReviewedRun
run = ReviewedRun("0", Path(sys.argv[1]), Path(sys.argv[2]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
given, refused = [], 0
for step in range(4):
    for index in range(24):
        if len(given) == 6:
            size = run.labelling._writer.path.stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + int(sys.argv[3]), resource.RLIM_INFINITY))
        try:
            given.append(run.labelling.give(f"{step}:{index // 8}.{index % 8}", "no", "ann", note="x" * 150)["label_id"])
        except (OSError, sqlite3.OperationalError):
            refused += 1
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            given.append(run.labelling.give(f"{step}:{index // 8}.{index % 8}", "yes", "ann")["label_id"])
            break
    if refused:
        break
print(len(given), refused)
print("\\n".join(given))
"""


@pytest.mark.parametrize("room", [0, 1, 100, 480])
def test_a_full_disk_refuses_a_label_and_loses_none(tmp_path, room):
    made_run(tmp_path / "run", 400, 4)

    ran = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path / "run", tmp_path / "cache", str(room)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )

    count, refused = map(int, ran.stdout.splitlines()[0].split())
    record = read_record(tmp_path / "run")
    assert (refused, record.torn_lines) == (1, 0)
    assert sorted(row.row for row in record.labels) == sorted(ran.stdout.splitlines()[1:])
    assert [row.label for row in record.labels] == ["no"] * (count - 1) + ["yes"], "nothing of the label that was refused"


def test_two_processes_label_one_record(tmp_path):
    made_run(tmp_path / "run", 400, 4)
    with Review(tmp_path / "run", cache=tmp_path / "cache") as first, Review(tmp_path / "run", cache=tmp_path / "other") as second:
        planned = first.post("/api/runs/0/plan", {"per_step": 12})["of"]
        conflicts = []

        def work(review, labeller):
            while (asked := review.get("/api/runs/0/queue", labeller=labeller))["rollout"] and not asked["second"]:
                try:
                    review.label(asked["rollout"]["rollout"], "no", labeller)
                except Refused as refused:
                    conflicts.append(refused.status)

        threads = [threading.Thread(target=work, args=each) for each in ((first, "ann"), (second, "ben"), (first, "cy"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        record = read_record(tmp_path / "run")
        assert len(record.labels) == planned
        assert len({(row.step, row.rollout) for row in record.labels}) == planned
        assert set(conflicts) <= {409}, "with an index each they do not see the other's claims, and are told"
        assert {row.labeller for row in record.labels} == {"ann", "ben", "cy"}
        for review in (first, second):
            assert review.get("/api/runs")["runs"][0]["labelled"] == planned


def test_more_is_planned_once_the_plan_is_labelled(run):
    truth = json.loads((run.folder / "truth.json").read_text())
    run.labelling.plan(per_step=8)
    with pytest.raises(ValueError, match="not labelled yet"):
        run.labelling.plan(more=10)
    label_all(run, truth)

    planned = run.labelling.plan(more=10)

    assert 0 < planned["added"] <= 10
    further = label_all(run, truth)
    assert len([rollout for rollout, second in further if not second]) == planned["added"]
    assert sum(row.population is not None for row in read_record(run.folder).labels) == planned["added"]


def test_a_label_from_the_table_does_not_spoil_the_plan(run):
    run.labelling.give("0:0.0", "no", "ann")
    assert read_record(run.folder).labels[0].inclusion is None, "nobody drew it"

    added = run.labelling.plan(per_step=16)

    steps = {json_entry["step"] for json_entry in json.loads((run.folder / "review-plan.json").read_text())}
    assert steps == {0, 1, 2, 3}
    assert added["added"] == added["of"]


def test_old_labels_are_read_as_before(tmp_path):
    made_run(tmp_path / "run", 400, 4, labels_per_step=8)
    run = ReviewedRun("0", tmp_path / "run", tmp_path / "cache")
    record = read_record(tmp_path / "run")
    assert run.facts()["labelled"] == len({(row.step, row.rollout) for row in record.labels})
    with RecordWriter(tmp_path / "run", record.header.anew()) as writer:
        old = record.labels[0]
        writer.append([LabelRow(step=old.step, rollout=old.rollout, label="unsure", source="person", retracts=old.row)])
    run.index.refresh(force=True)
    assert run.rollouts.row(f"{old.step}:{old.rollout}")["label"] == "unsure"
