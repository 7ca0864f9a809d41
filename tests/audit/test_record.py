"""The record of a run: what is written is read, whatever happens to those who write."""

from __future__ import annotations

import errno
import gzip
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from probescore_audit import plan_recorded
from probescore_audit.record import (
    AnchorRow,
    LabellerRow,
    LabelRow,
    PlanRow,
    RecordedProbe,
    RecordWriter,
    ReferenceRow,
    RolloutRow,
    RunHeader,
    delete_details,
    read_record,
)
from probescore_audit.recorded_run import recorded_reference, recorded_run

GOLDEN = Path(__file__).parent / "record-1"


def header(rank=0, world_size=1, **more):
    probes = (RecordedProbe(key="cheating@1", graph_sha256="sha256:00", role="reward", thresholds={"mean": 0.5, "max": 1.5}),)
    return RunHeader(run_id="sort-7", planned_steps=300, probes=probes, rank=rank, world_size=world_size, **more)


def rollout(step, number, score=0.0, **more):
    scores = {"cheating@1": {"frozen": {"mean": score, "max": score + 1}}}
    return RolloutRow(step=step, rollout=f"{number}", prompt=f"p{number // 4}", scores=scores, tokens=6, **more)


def write(folder, steps, rank=0, world_size=1, score=0.0, count=8, **more):
    with RecordWriter(folder, header(rank, world_size, **more)) as writer:
        for step in steps:
            writer.append(rollout(step, rank * count + number, score) for number in range(count))
    return writer


def test_rows_of_every_kind_come_back_as_they_were(tmp_path):
    rows = [
        rollout(0, 0, 0.25, task_reward=1.0, total_reward=-2.0, policy_logprob=-8.5, text_sha256="sha256:11"),
        LabelRow(step=0, rollout="0", label="yes", source="checker", inclusion=0.25, stratum="flagged", floor=True, span=[1, 3], row="a"),
        AnchorRow(step=0, anchor="n1", positive=False, scores={"cheating@1": {"frozen": {"mean": -1.5}}}),
        LabellerRow(source="judge", labeller="m", negatives=10, negatives_right=9, positives=5, positives_right=5),
        PlanRow(step=0, rollout="0", probe="cheating@1", reading="frozen", stratum="near", inclusion=0.5, floor=True),
    ]
    with RecordWriter(tmp_path, first := header()) as writer:
        writer.append(rows)
    record = read_record(tmp_path)
    assert record.header == first
    assert [*record.rollouts, *record.labels, *record.anchors, *record.labellers, *record.planned] == rows
    assert (record.torn_lines, record.void_rows) == (0, 0)


def test_a_torn_last_line_costs_that_line(tmp_path):
    path = write(tmp_path, [0, 1]).path
    whole = path.read_bytes()
    for cut in range(len(whole) - 2, len(whole) - 120, -7):
        path.write_bytes(whole[:cut])
        record = read_record(tmp_path)
        assert len(record.rollouts) == 15
        assert record.torn_lines == 1


def test_a_process_killed_while_it_writes_loses_nothing_that_it_had_appended(tmp_path):
    code = (
        "import sys, itertools; sys.path.insert(0, sys.argv[2])\n"
        "from test_record import *\n"
        "writer = RecordWriter(sys.argv[1], header())\n"
        "for step in itertools.count():\n"
        "    writer.append([rollout(step, number) for number in range(8)]); print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 50:
            break
    process.send_signal(signal.SIGKILL)
    last = max([50, *(int(line) for line in process.stdout.read().split())])
    process.wait()
    record = read_record(tmp_path)
    assert {row.step for row in record.rollouts} >= set(range(last + 1))
    assert record.torn_lines <= 1


def test_ranks_write_at_once(tmp_path):
    for rank in range(2):
        write(tmp_path, range(3), rank, world_size=2)
    record = read_record(tmp_path)
    assert len(record.rollouts) == 3 * 16
    assert record.table().step.tolist() == sorted(record.table().step.tolist())


@pytest.mark.parametrize("launches", [("", ""), ("a", "b")])
@pytest.mark.parametrize("ranks", [1, 2])
def test_of_a_run_that_goes_on_from_an_earlier_step_the_last_attempt_counts(tmp_path, launches, ranks):
    for attempt, (steps, launch) in enumerate(zip((range(10), range(6, 8)), launches, strict=True)):
        for rank in range(ranks):
            write(tmp_path, steps, rank, ranks, score=attempt, launch=launch, started=1000.0 * attempt + rank)
    record = read_record(tmp_path)
    scores = {row.step: row.scores["cheating@1"]["frozen"]["mean"] for row in record.rollouts}
    assert scores == {**dict.fromkeys(range(6), 0.0), 6: 1.0, 7: 1.0}  # the first attempt's steps 8 and 9 never were
    assert record.void_rows == ranks * 8 * 4


def test_what_an_attempt_had_chosen_that_was_given_up_is_chosen_no_more(tmp_path):
    for started, launch, chosen in ((1.0, "a", "0"), (2.0, "b", "1")):
        with RecordWriter(tmp_path, header(launch=launch, started=started)) as writer:
            for step in (2, 3) if launch == "a" else (3,):
                plan = PlanRow(step=step, rollout=chosen, probe="cheating@1", reading="frozen", stratum="rest", inclusion=0.5)
                writer.append([rollout(step, number) for number in range(4)] + [plan])
    record = read_record(tmp_path)
    assert [(row.step, row.rollout) for row in record.planned] == [(2, "0"), (3, "1")]
    planned = plan_recorded(record, 4)
    assert [(each.step, each.rollout, each.inclusion) for each in planned] == [(2, "0", 0.5), (3, "1", 0.5)]
    with pytest.raises(ValueError, match="the trainer has chosen rollouts by the scores of cheating@1, frozen"):
        plan_recorded(record, 4, probe="other@1")


def test_more_ranks_than_before_are_another_attempt(tmp_path):
    write(tmp_path, range(4), 0, 1, started=0.0)
    for rank in range(2):
        write(tmp_path, range(2, 3), rank, 2, score=1.0, started=100.0 + rank)
    assert {row.step for row in read_record(tmp_path).rollouts} == {0, 1, 2}


def test_a_label_is_retracted_by_a_later_one(tmp_path):
    with RecordWriter(tmp_path, header()) as writer:
        writer.append([rollout(0, 0), LabelRow(step=0, rollout="0", label="yes", source="person", row="a")])
        writer.append([LabelRow(step=0, rollout="0", label="no", source="person", row="b", retracts="a")])
    assert [label.label for label in read_record(tmp_path).labels] == ["no"]


def test_a_label_of_a_rollout_that_is_gone_does_not_count_for_its_namesake(tmp_path):
    with RecordWriter(tmp_path, header()) as writer:
        writer.append([rollout(0, 0, text_sha256="sha256:new")])
        writer.append([LabelRow(step=0, rollout="0", label="yes", source="person", text_sha256="sha256:old")])
    record = read_record(tmp_path)
    assert record.labels == ()
    assert record.void_rows == 1


def test_who_labels_goes_on_while_the_training_starts_again(tmp_path):
    """The file of labels is older than the attempt whose rollouts it labels."""
    write(tmp_path, [0], started=100.0)
    with RecordWriter(tmp_path, header(started=200.0)) as labeller:
        with RecordWriter(tmp_path, header(started=300.0)) as trainer:
            trainer.append([rollout(0, 0, text_sha256="sha256:new")])
        labeller.append([LabelRow(step=0, rollout="0", label="no", source="person", text_sha256=f"sha256:{age}") for age in ("old", "new")])
        labeller.append([LabelRow(step=0, rollout="0", label="yes", source="person")])  # of which of the two nobody knows
    assert [label.text_sha256 for label in read_record(tmp_path).labels] == ["sha256:new"]


def test_a_header_for_labels_is_later_than_that_of_the_run(tmp_path):
    write(tmp_path, [0, 1])
    record = read_record(tmp_path)
    with RecordWriter(tmp_path, record.header.anew()) as writer:
        writer.append([LabelRow(step=1, rollout="0", label="yes", source="person")])
    found = read_record(tmp_path)
    assert len(found.labels) == 1
    assert len(found.rollouts) == 16


@pytest.mark.parametrize("torn", [0, 1, 9, 200])
def test_a_file_that_is_done_may_be_packed(tmp_path, torn):
    path = write(tmp_path, range(30)).path
    whole = gzip.compress(path.read_bytes())
    path.unlink()
    (tmp_path / "rank0.jsonl.gz").write_bytes(whole[: len(whole) - torn])
    record = read_record(tmp_path)
    assert (record.torn_lines > 0) == (torn > 0)
    assert len(record.rollouts) == 240 if not torn else 100 < len(record.rollouts) <= 240


def test_a_reference_counts_whichever_rank_and_attempt_wrote_it(tmp_path):
    for started in (100.0, 200.0):
        with RecordWriter(tmp_path, header(started=started)) as writer:
            writer.append(
                ReferenceRow(rollout=str(index), positive=index < 3, random=index > 0, scores=rollout(0, 0, float(index)).scores)
                for index in range(8)
            )
    write(tmp_path, [0], started=300.0)
    found = recorded_reference(read_record(tmp_path), "cheating@1", reading="policy", reduction="mean")
    counts = found.counts
    assert (counts.positives, counts.flagged_positives, counts.negatives, counts.flagged_negatives) == (3, 2, 5, 5)
    assert (counts.random_rollouts, counts.random_positives) == (7, 2)
    assert counts.auroc.value == 0.0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("policy", ["log", "raise"])
def test_a_full_disk_is_logged_or_ends_the_run(tmp_path, policy, caplog):
    writer = RecordWriter(tmp_path, header(), on_error=policy)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._file)
    if policy == "raise":
        with pytest.raises(OSError, match="No space left"):
            writer.append([rollout(0, 0)])
    else:
        writer.append([rollout(0, 0)])
        assert "lost 1 rows: No space left" in caplog.text
    assert writer.lost_rows == 1


def test_after_a_line_written_in_part_the_next_can_be_read(tmp_path, monkeypatch):
    writer = RecordWriter(tmp_path, header())
    real, calls = os.write, []

    def short(file, data):
        calls.append(len(data))
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(file, data[:20])

    monkeypatch.setattr(os, "write", short)
    writer.append([rollout(0, 0)])
    monkeypatch.undo()
    writer.append([rollout(0, 1)])
    record = read_record(tmp_path)
    assert [row.rollout for row in record.rollouts] == ["1"]
    assert record.torn_lines == 1


def test_texts_are_kept_only_if_asked_for(tmp_path):
    for keep in (False, True):
        with RecordWriter(tmp_path / str(keep), header(), keep_texts=keep) as writer:
            writer.append([rollout(0, 0, completion_text="secret", completion_ids=[4, 5], completion_pieces=["secret"])])
    assert "secret" not in next((tmp_path / "False").iterdir()).read_text()
    assert read_record(tmp_path / "True").rollouts[0].completion_ids == [4, 5]


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    with RecordWriter(tmp_path, header()) as writer, pytest.raises(ValueError, match="not JSON compliant"):
        writer.append([rollout(0, 0, float("nan"))])


def test_a_record_of_a_newer_version_is_refused_and_unknown_kinds_and_fields_are_not(tmp_path):
    path = write(tmp_path, [0]).path
    with path.open("a") as file:
        file.write('{"kind":"weather","step":1}\n{"kind":"rollout","step":1,"rollout":"9","prompt":"p","scores":{},"colour":"red"}\n')
    assert len(read_record(tmp_path).rollouts) == 9
    (tmp_path / "newer.jsonl").write_text('{"kind":"header","run_id":"sort-7","planned_steps":3,"schema_version":2}\n')
    with pytest.raises(ValueError, match="schema version 2; this reader knows up to 1"):
        read_record(tmp_path)


def test_a_folder_without_a_record_and_one_with_two_runs_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no record"):
        read_record(tmp_path)
    write(tmp_path, [0])
    with RecordWriter(tmp_path, RunHeader(run_id="other", planned_steps=1)):
        pass
    with pytest.raises(ValueError, match="several runs"):
        read_record(tmp_path)


def test_the_record_of_version_1_stays_readable():
    record = read_record(GOLDEN)
    assert record.header.run_id == "golden"
    assert record.table().columns()["cheating@1/policy/mean"].tolist() == [-0.5, 2.0]
    assert record.labels[0].label == "yes"
    assert record.anchors[0].positive


def test_the_record_of_version_1_with_texts_in_files_of_their_own_stays_readable():
    record = read_record(GOLDEN.with_name("record-1-details"))
    assert [probe.key for probe in record.header.probes] == ["cheating@1", "cheating@2"]
    assert record.header.probes[1].thresholds_on("policy") == {"mean": 0.75}
    first, second = record.rollouts
    assert (first.completion_text, first.completion_ids, first.completion_pieces) == ("1 2", [6, 7], ["1", " 2"])
    assert (first.group, first.reading_steps, first.token_scores) == ("7", {"policy": 0}, {"cheating@1": {"frozen": [-1.5, -1.0]}})
    assert (second.step, second.completion_text) == (40, None)
    assert record.references[0].random


def test_the_audit_takes_scores_and_labels_from_a_record(tmp_path):
    with RecordWriter(tmp_path, header()) as writer:
        writer.append(rollout(step, number, float(number)) for step in range(2) for number in range(4))
        labels = [("0", "yes", 0.5), ("1", "unsure", 0.5), ("2", "no", None), ("3", "no", 1.0)]
        writer.append(LabelRow(step=1, rollout=name, label=said, source="checker", inclusion=chance) for name, said, chance in labels)
        writer.append([LabelRow(step=1, rollout="3", label="yes", source="judge", second=True)])
    run, known = recorded_run(read_record(tmp_path), "cheating@1")
    assert run.scores.tolist() == [0.0, 1.0, 2.0, 3.0] * 2
    assert run.threshold == 0.5
    assert run.max_scores is not None
    assert run.max_threshold == 1.5
    assert known.rollout.tolist() == [4, 7]
    assert known.positive.tolist() == [True, False]  # the second judgement does not agree with the first
    assert known.inclusion.tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"probe": "lying@1"}, "probe: 'lying@1'; the record has cheating@1"),
        ({"probe": "cheating@1", "reading": "policy"}, "reading: 'policy'; of cheating@1 the record has frozen"),
        ({"probe": "cheating@1", "reduction": "last"}, "reduction: last; .* for mean, max"),
    ],
)
def test_scores_that_are_not_recorded_are_named(tmp_path, asked, complaint):
    write(tmp_path, [0])
    with pytest.raises(ValueError, match=complaint):
        recorded_run(read_record(tmp_path), **asked)


def test_a_table_has_one_row_a_rollout_and_gaps_where_nothing_was_said(tmp_path):
    with RecordWriter(tmp_path, header()) as writer:
        writer.append([rollout(0, 0, 1.0, task_reward=0.5), RolloutRow(step=1, rollout="0", prompt="p", scores={})])
    columns = read_record(tmp_path).table().columns()
    assert columns["cheating@1/frozen/mean"][0] == 1.0
    assert np.isnan(columns["cheating@1/frozen/mean"][1])
    assert np.isnan(columns["task_reward"][1])
    assert {len(column) for column in columns.values()} == {2}


def texts_of(record):
    return {row.step: row.completion_text for row in record.rollouts}


def test_texts_of_old_steps_are_deleted_as_the_run_goes_on(tmp_path):
    with RecordWriter(tmp_path, header(), keep_texts=True, kept_steps=8) as writer:
        for step in range(40):
            writer.append([rollout(step, 0, completion_text=f"text {step}", token_scores={"cheating@1": {"frozen": [0.5]}})])
            kept = {each for each, text in texts_of(read_record(tmp_path)).items() if text is not None}
            assert kept >= set(range(max(0, step - 7), step + 1))
            assert len(kept) <= 12
    record = read_record(tmp_path)
    assert len(record.rollouts) == 40
    assert all(row.scores for row in record.rollouts)
    assert texts_of(record)[39] == "text 39"
    assert "text 3 " not in " ".join(path.read_text() for path in tmp_path.iterdir())


def test_texts_are_deleted_on_request_while_the_run_goes_on(tmp_path):
    with RecordWriter(tmp_path, header(), keep_texts=True) as writer:
        writer.append(rollout(step, 0, completion_text=f"text {step}") for step in range(100))
        assert delete_details(tmp_path, before=70) == 2
        assert [step for step, text in texts_of(read_record(tmp_path)).items() if text is None] == list(range(64))
        assert delete_details(tmp_path) == 2
        writer.append([rollout(100, 0, completion_text="text 100")])
    assert [text for text in texts_of(read_record(tmp_path)).values() if text] == ["text 100"]
    assert texts_of(read_record(tmp_path, texts=False)) == dict.fromkeys(range(101))


def test_texts_are_those_of_the_attempt_that_counts(tmp_path):
    for attempt in range(2):
        with RecordWriter(tmp_path, header(launch=f"{attempt}", started=float(attempt)), keep_texts=True) as writer:
            writer.append(rollout(step, 0, completion_text=f"attempt {attempt}") for step in range(attempt, 2))
    assert texts_of(read_record(tmp_path)) == {0: "attempt 0", 1: "attempt 1"}


def test_a_torn_line_of_texts_costs_that_text(tmp_path):
    with RecordWriter(tmp_path, header(), keep_texts=True) as writer:
        writer.append([rollout(0, 0, completion_text="whole")])
        (details,) = tmp_path.glob("*-details-*")
        with details.open("a") as file:
            file.write('{"kind":"details","step":0,"rollout":"1","completion_te')
        writer.append([rollout(0, 1), rollout(0, 2, completion_text="next")])
    record = read_record(tmp_path)
    assert [row.completion_text for row in record.rollouts] == ["whole", None, "next"]
    assert record.torn_lines == 0


def test_rows_are_read_though_the_header_could_not_be_written_at_first(tmp_path, monkeypatch):
    """A disk that is full when a process begins, and has room later."""

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", fails)
    writer = RecordWriter(tmp_path, header())
    writer.append([rollout(0, 0)])
    monkeypatch.undo()
    writer.append([rollout(1, 0)])
    assert [row.step for row in read_record(tmp_path).rollouts] == [1]
    assert writer.lost_rows == 1


def test_the_description_of_the_run_may_change_while_it_goes_on(tmp_path):
    with RecordWriter(tmp_path, header(started=1.0)) as writer:
        writer.append([rollout(0, 0)])
        newer = RecordedProbe(key="cheating@2", thresholds={"mean": 0.75, "policy/mean": 1.5})
        writer.append([RunHeader(run_id="sort-7", planned_steps=300, probes=(newer,), started=2.0), rollout(1, 0)])
    record = read_record(tmp_path)
    assert [probe.key for probe in record.header.probes] == ["cheating@2"]
    assert len(record.rollouts) == 2
    assert newer.thresholds_on("frozen") == {"mean": 0.75}
    assert newer.thresholds_on("policy") == {"mean": 1.5}


def test_a_run_of_300_steps_of_512_rollouts_is_read_in_seconds(tmp_path):
    scores = np.random.default_rng(0).standard_normal((256, 4)).tolist()
    for rank in range(2):
        with RecordWriter(tmp_path, header(rank, 2)) as writer:
            for step in range(300):
                writer.append(
                    RolloutRow(
                        step=step,
                        rollout=f"{rank}.{number}",
                        prompt=f"p{number // 8}",
                        scores={"cheating@1": {"frozen": {"mean": a, "max": b}, "policy": {"mean": c, "max": d}}},
                        text_sha256="sha256:00",
                    )
                    for number, (a, b, c, d) in enumerate(scores)
                )
    started = time.process_time()
    table = read_record(tmp_path).table()
    assert len(table) == 153_600
    assert time.process_time() - started < 20  # 3 s on one core


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_table_goes_into_a_data_frame(tmp_path, library):
    write(tmp_path, [0, 1])
    table = read_record(tmp_path).table()
    if importlib.util.find_spec(library) is None:
        with pytest.raises(ImportError, match=library):
            getattr(table, f"to_{library}")()
        return
    frame = getattr(table, f"to_{library}")()
    assert list(frame.columns) == list(table.columns())
    assert frame["cheating@1/frozen/max"].to_numpy().tolist() == [1.0] * 16


@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_of_labels_is_no_attempt_whichever_rank_it_names(tmp_path, rank):
    """Whoever adds labels takes over the header of one of the ranks."""
    for number in range(2):
        write(tmp_path, range(6), number, 2, started=float(number))
    with RecordWriter(tmp_path, header(rank, 2, started=10.0)) as labeller:
        labeller.append(LabelRow(step=step, rollout="0", label="yes", source="person") for step in (1, 5))
    for number in range(2):
        write(tmp_path, range(4, 6), number, 2, score=1.0, started=20.0 + number)
    record = read_record(tmp_path)
    assert {step: sum(row.step == step for row in record.rollouts) for step in range(6)} == dict.fromkeys(range(6), 16)
    assert {row.scores["cheating@1"]["frozen"]["mean"] for row in record.rollouts if row.step >= 4} == {1.0}
    assert [label.step for label in record.labels] == [1]  # of which rollout of step 5 nobody knows


def test_half_a_character_in_a_text_is_kept_as_it_is(tmp_path):
    with RecordWriter(tmp_path, RunHeader(run_id="r", planned_steps=1), keep_texts=True) as writer:
        writer.append([RolloutRow(step=0, rollout="a", prompt="p", scores={}, completion_text="half \ud800 of one")])
        writer.append([LabelRow(step=0, rollout="a", label="no", source="person", note="\udc00")])

    record = read_record(tmp_path)
    assert record.rollouts[0].completion_text == "half \ud800 of one"
    assert record.labels[0].note == "\udc00"
    for path in tmp_path.iterdir():
        path.read_text(encoding="utf-8")


def test_a_withdrawn_label_is_as_if_it_had_not_been_given(tmp_path):
    with RecordWriter(tmp_path, RunHeader(run_id="r", planned_steps=1)) as writer:
        writer.append([RolloutRow(step=0, rollout="a", prompt="p", scores={})])
        writer.append([LabelRow(step=0, rollout="a", label="no", source="person", row="first", given=12.5, spans=[[0, 1], [3, 4]])])
        assert read_record(tmp_path).labels[0].given == 12.5
        writer.append([LabelRow(step=0, rollout="a", label="withdrawn", source="person", row="undo", retracts="first")])

    record = read_record(tmp_path)
    assert record.labels == ()
    assert record.void_rows == 0


def test_a_durable_writer_leaves_nothing_of_rows_that_it_could_not_write(tmp_path):
    with RecordWriter(tmp_path, RunHeader(run_id="r", planned_steps=1), on_error="raise", durable=True) as writer:
        writer.append([RolloutRow(step=0, rollout="a", prompt="p", scores={})])
        before = writer.path.read_bytes()
        written = os.write

        def half(file, data):
            written(file, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(os, "write", half)
            with pytest.raises(OSError, match="No space"):
                writer.append([RolloutRow(step=0, rollout="b", prompt="p", scores={})])
        assert writer.path.read_bytes() == before
        writer.append([RolloutRow(step=0, rollout="c", prompt="p", scores={})])

    record = read_record(tmp_path)
    assert [row.rollout for row in record.rollouts] == ["a", "c"]
    assert record.torn_lines == 0
