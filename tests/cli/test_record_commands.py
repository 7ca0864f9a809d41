"""``probescore record reference`` and ``record delete-texts``: from scored rollouts to a record that can be audited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from probescore_adapters import ProbeScorer, ProbeSignal, RecordOptions, Rollout
from probescore_audit.record import RecordedProbe, RecordWriter, RolloutRow, RunHeader, read_record, reference_rows
from probescore_server.cli.app import app


def run(*arguments: str | Path, stdin: str = "") -> Result:
    return CliRunner(env={"COLUMNS": "220"}).invoke(app, list(map(str, arguments)), input=stdin)


def scored(count: int = 700, **more: Any) -> list[dict[str, Any]]:
    """As ``probescore score --json`` prints them."""
    return [
        {
            "group": index,
            "completion": 0,
            "label": index % 2 == 0,
            "scores": {
                "cheating": {"version": "1", "labels": [""], "reductions": ["mean", "max"], "reduced": [[[index / 8], [index / 8 + 1]]]},
                "mood@2": {"version": "2", "labels": ["calm", "angry"], "reductions": ["mean"], "reduced": [[[0.5, None]]]},
            },
            **more,
        }
        for index in range(count)
    ]


def written(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_scored_rollouts_become_the_reference_of_a_run(tmp_path):
    file = written(tmp_path / "scored.jsonl", [*scored(), {**scored(1)[0], "label": None}])
    record = tmp_path / "sort-7"
    for _ in range(2):  # the same file counts once
        found = run("record", "reference", record, file, "--random")
        assert found.exit_code == 0, found.output
        assert "added 700 rollouts, 350 with the behaviour" in found.stdout
    rows = read_record(record).references
    assert len(rows) == 700
    assert rows[3].scores == {
        "cheating@1": {"frozen": {"mean": 0.375, "max": 1.375}},
        "mood@2": {"frozen": {"mean": 0.5}},
        "mood@2/angry": {"frozen": {}},
    }
    assert (rows[3].positive, rows[4].positive, rows[3].random) == (False, True, True)
    assert run("record", "reference", record, "-", "--chosen", stdin=json.dumps(scored(1)[0])).exit_code == 0
    assert [row.random for row in read_record(record).references] == [True] * 700 + [False]


def test_whatever_ends_a_line_elsewhere_may_be_in_a_text(tmp_path):
    lines = [json.dumps({**scored(1)[0], "text": "a\u2028b\x85c"}, ensure_ascii=False)] * 2
    (tmp_path / "scored.jsonl").write_text("\n".join(lines))
    found = run("record", "reference", tmp_path / "run", tmp_path / "scored.jsonl", "--random")
    assert found.exit_code == 0, found.output
    assert len(read_record(tmp_path / "run").references) == 2


def test_the_record_of_a_trainer_may_come_before_or_after(tmp_path):
    header = RunHeader(run_id="sort-7", planned_steps=30, probes=(RecordedProbe(key="cheating@1", thresholds={"mean": 1.0, "max": 2.0}),))
    for folder, first in ((tmp_path / "a", True), (tmp_path / "b", False)):
        for is_reference in (first, not first):
            if is_reference:
                assert (
                    run(
                        "record",
                        "reference",
                        folder,
                        written(tmp_path / "s.jsonl", scored()),
                        "--random",
                        *(("--run-id", "sort-7") if first else ()),
                    ).exit_code
                    == 0
                )
            else:
                with RecordWriter(folder, header) as writer:
                    writer.append([RolloutRow(step=0, rollout="0", prompt="p", scores={})])
        record = read_record(folder)
        assert record.header.planned_steps == 30
        assert [probe.key for probe in record.header.probes] == ["cheating@1"]
        assert (len(record.rollouts), len(record.references)) == (1, 700)


def test_what_an_audit_would_miss_is_said(tmp_path):
    header = RunHeader(
        run_id="sort-7", planned_steps=30, probes=(RecordedProbe(key="cheating@1", thresholds={"mean": 1.0, "policy/last": 2.0}),)
    )
    with RecordWriter(tmp_path / "run", header):
        pass
    said = run("record", "reference", tmp_path / "run", written(tmp_path / "s.jsonl", scored(100)), "--chosen").stderr
    assert "no scores of cheating@1 by last" in said
    assert "50 rollouts with the behaviour before training; an audit needs at least 300" in said
    assert "0 rollouts drawn at random" in said


@pytest.mark.parametrize(
    ("lines", "options", "complaint"),
    [
        (scored(2), [], "give --random"),
        ([], ["--random"], "none of its lines has a label"),
        ([{**scored(1)[0], "label": "yes"}], ["--random"], "line 1: label: expected true or false, or 1 or 0, got 'yes'"),
        ([{**scored(1)[0], "scores": {}, "status_message": "too long"}], ["--random"], "line 1: scores: too long"),
        ([{"label": True, "scores": {"cheating": {"version": "1"}}}], ["--random"], "line 1: scores.cheating: expected what"),
        ([[1]], ["--random"], "line 1 is no JSON object"),
        (scored(2), ["--random", "--run-id", "other"], "--run-id: other; the record is of the run sort-7"),
    ],
)
def test_wrong_input_is_named(tmp_path, lines, options, complaint):
    with RecordWriter(tmp_path / "run", RunHeader(run_id="sort-7", planned_steps=3)):
        pass
    found = run("record", "reference", tmp_path / "run", written(tmp_path / "s.jsonl", lines), *options)
    assert found.exit_code == 2
    assert complaint in found.stderr
    assert read_record(tmp_path / "run").references == ()


def test_a_label_may_have_a_name():
    rows = reference_rows([json.dumps({**scored(1)[0], "label": label}) for label in ("copied", "sorted")], random=True, positive="copied")
    assert [row.positive for row in rows] == [True, False]


def test_what_the_server_scored_is_what_a_trainer_would_have_recorded(served, tmp_path):
    """The same rollouts by the command line and by a scorer: equal keys, reductions and scores."""
    random = np.random.default_rng(4)
    given = [([1, *random.integers(4, 90, 4).tolist()], random.integers(4, 90, 5).tolist()) for _ in range(6)]
    lines = [{"prompt": prompt, "completion": completion, "label": index % 2} for index, (prompt, completion) in enumerate(given)]
    data = written(tmp_path / "base.jsonl", lines)
    printed = run("score", data, "--address", served.address, "--reduction", "mean", "--reduction", "max", "--json")
    (tmp_path / "scored.jsonl").write_text(printed.stdout)
    assert run("record", "reference", tmp_path / "cli", tmp_path / "scored.jsonl", "--random").exit_code == 0
    scorer = ProbeScorer(ProbeSignal("cheating", mode="reward"), served.address, record=RecordOptions(tmp_path / "scorer"))
    scorer.record_reference([Rollout(*each) for each in given], [index % 2 == 1 for index in range(6)], random=True)
    by_command, by_scorer = (read_record(tmp_path / name).references for name in ("cli", "scorer"))
    assert [row.positive for row in by_command] == [row.positive for row in by_scorer]
    for one, other in zip(by_command, by_scorer, strict=True):
        assert one.scores["cheating@1"]["frozen"] == pytest.approx(other.scores["cheating@1"]["frozen"], rel=1e-5)


def test_texts_are_deleted_from_a_record(tmp_path):
    with RecordWriter(tmp_path / "run", RunHeader(run_id="sort-7", planned_steps=3), keep_texts=True) as writer:
        writer.append(RolloutRow(step=step, rollout="0", prompt="p", scores={}, completion_text="secret") for step in range(64))
    assert (
        "deleted 1 files; texts or ids of 32 rollouts are left" in run("record", "delete-texts", tmp_path / "run", "--before", "40").stdout
    )
    assert "deleted 1 files; texts or ids of 0 rollouts are left" in run("record", "delete-texts", tmp_path / "run").stdout
    assert len(read_record(tmp_path / "run").rollouts) == 64
    assert run("record", "delete-texts", tmp_path / "nowhere").exit_code == 2
