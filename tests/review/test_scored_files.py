"""Files of scored rollouts, and what is exported."""

from __future__ import annotations

import io
import json

import pytest
from made_run import KEY, made_run

from probescore_audit.record import read_record
from probescore_review.queries import Query
from probescore_review.runs import ReviewedRun
from probescore_review.scored_file import record_of


def scored(group, completion, score, **more):
    pieces = [f"text {group}", " of", f" completion {completion}"]
    probe = {"version": "1", "unit": "logit", "labels": ["cheating"], "reductions": ["mean", "max"]}
    of = {"cheating": probe | {"reduced": [[[score], [score + 1]]], "tokens": [[score - 1], [None], [score + 1]]}}
    policy = {"cheating": probe | {"reduced": [[[score - 2], [score - 1]]], "tokens": None}}
    follow = {"id": "asked", "completion_texts": [" Honest?"], "scores": of, "follow_ups": []}
    line = {
        "group": group,
        "completion": completion,
        "label": None,
        "id": "x",
        "status": "ok",
        "prompt_ids": [1, 2],
        "completion_ids": [3, 4, 5],
    }
    line |= {"completion_texts": pieces, "scores": of, "readings": {"frozen": {"id": "m"}, "policy": {"id": "p", "scores": policy}}}
    return json.dumps(line | {"follow_ups": [follow]} | more) + "\n"


def test_a_file_of_scored_rollouts_is_reviewed_as_a_run_is(tmp_path):
    path = tmp_path / "scored.jsonl"
    path.write_text(scored(0, 0, 3.0, label=True) + scored(0, 1, -1.0) + scored(1, 0, 0.5, status="failed", scores={}, readings={}))
    folder = record_of(path, {KEY: 1.0})
    run = ReviewedRun("0", folder, tmp_path / "cache")

    total, rows = run.queries.page(Query(sort=f"score:{KEY}:frozen", descending=True), 0, 10)
    assert total == 3
    assert [(row["name"], row[f"score:{KEY}:frozen"], row[f"difference:{KEY}"]) for row in rows] == [
        ("0.0", 3.0, -2.0),
        ("0.1", -1.0, -2.0),
        ("1.0", None, None),
    ]
    assert rows[0]["label"] == "yes"
    found = run.rollouts.found("0:0.1")
    assert found["completion"] == "text 0 of completion 1"
    assert [token["scores"][f"{KEY}:frozen"] for token in found["tokens"]] == [-2.0, None, 0.0], "what is absent stays absent"
    assert found["follow_ups"][0]["text"] == " Honest?"
    assert run.facts()["probes"][0]["thresholds"] == {"frozen": 1.0, "policy": 1.0}
    run.labelling.give("0:0.1", "no", "ann")

    with path.open("a") as file:
        file.write(scored(2, 0, 9.0))
    assert record_of(path) == folder
    again = ReviewedRun("0", folder, tmp_path / "cache")
    assert again.facts()["rollouts"] == 4
    assert again.rollouts.row("0:0.1")["label"] == "no", "labels stay"
    assert again.facts()["probes"][0]["thresholds"]["frozen"] == 1.0
    before = sorted(folder.iterdir())
    record_of(path)
    assert sorted(folder.iterdir()) == before, "nothing is new"
    assert len(read_record(folder).labels) == 2

    path.write_text(scored(5, 0, 9.0))
    with pytest.raises(ValueError, match="another file"):
        record_of(path)


@pytest.mark.parametrize(
    ("text", "said"), [("{}\n", "line 1"), ("", "no scored rollouts"), ("x\ny\n", "line 1"), (scored(0, 0, 1.0) + "[]\n", "line 2")]
)
def test_another_file_is_refused_by_line(tmp_path, text, said):
    (tmp_path / "other.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said):
        record_of(tmp_path / "other.jsonl")
    (tmp_path / "scored.jsonl").write_text(scored(0, 0, 1.0))
    with pytest.raises(ValueError, match="threshold"):
        record_of(tmp_path / "scored.jsonl", {"nix@1": 1.0})


def test_a_view_is_exported(tmp_path):
    made_run(tmp_path / "run", 80, 2, labels_per_step=8)
    run = ReviewedRun("0", tmp_path / "run", tmp_path / "cache")
    numbers = run.queries.numbers(Query(where=(("step", "=", 1.0),), sort=f"score:{KEY}:frozen"))

    lines = [json.loads(line) for line in run.export.lines(numbers)]
    record = {f"{row.step}:{row.rollout}": row for row in read_record(run.folder).rollouts}
    assert len(lines) == 40
    for line in lines:
        assert (line["completion"], line["prompt"]) == (record[line["rollout"]].completion_text, record[line["rollout"]].prompt_text)
        assert line["scores"] == record[line["rollout"]].scores
    assert any(line["labels"] for line in lines)

    parquet = pytest.importorskip("pyarrow.parquet").read_table(io.BytesIO(run.export.parquet(numbers)))
    assert parquet.column("rollout").to_pylist() == [line["rollout"] for line in lines]
    assert parquet.column(f"score:{KEY}:policy").to_pylist() == [line[f"score:{KEY}:policy"] for line in lines]

    page = run.export.page(numbers, "run <1>").decode()
    assert "run &lt;1&gt;" in page
    assert page.count("<article>") == 40
    assert "<script" not in page
    assert "http:" not in page
    assert "https:" not in page
