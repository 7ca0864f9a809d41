"""The index of a record, and what is asked of it: the same as a reader of the record would say, by rows that are shown and no others."""

from __future__ import annotations

import gzip
import json
import shutil
import time
from dataclasses import replace

import pytest
from made_run import HELD_OUT, KEY, made_run

from probescore_audit.record import RecordWriter, RolloutRow, RunHeader, delete_details, read_record
from probescore_review.columns import columns
from probescore_review.index import Index
from probescore_review.queries import Queries, Query, page_statement, statements
from probescore_review.run_files import run_files
from probescore_review.runs import ReviewedRun

FROZEN, POLICY = f"score:{KEY}:frozen", f"score:{KEY}:policy"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reviewed")
    made_run(folder / "run", 800, 8, labels_per_step=16, activations=10)
    return ReviewedRun("0", folder / "run", folder / "cache")


def everything(run, query=None):
    return run.queries.page(query or Query(), 0, 1000)[1]


def score(row, reading="frozen", probe=KEY):
    return row.scores[probe][reading]["mean"]


def test_the_index_says_what_the_record_says(run):
    record = read_record(run.folder)
    rows = {row["rollout"]: row for row in everything(run)}

    assert set(rows) == {f"{row.step}:{row.rollout}" for row in record.rollouts}
    for row in record.rollouts:
        shown = rows[f"{row.step}:{row.rollout}"]
        assert (shown[FROZEN], shown[POLICY], shown[f"score:{HELD_OUT}:frozen"]) == (
            score(row),
            score(row, "policy"),
            score(row, probe=HELD_OUT),
        )
        assert shown[f"difference:{KEY}"] == pytest.approx(score(row, "policy") - score(row))
        assert (shown["task_reward"], shown["tokens"], shown["prompt_id"]) == (row.task_reward, row.tokens, row.prompt)
    labels = {f"{row.step}:{row.rollout}": row.label for row in record.labels}
    assert {name: row["label"] for name, row in rows.items() if row["label"]} == labels


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("sort", ["step", FROZEN, f"difference:{KEY}", "task_reward", "label", "logprob"])
def test_sorting(run, sort, descending):
    values = [row[sort] for row in everything(run, Query(sort=sort, descending=descending))]

    known = [value for value in values if value is not None]
    assert known == sorted(known, reverse=descending)
    assert values[len(known) :] == [None] * (800 - len(known)), "those without a value come last, either way"


@pytest.mark.parametrize(
    ("where", "holds"),
    [
        ([FROZEN, ">=", 1.0], lambda row: row[FROZEN] >= 1.0),
        ([FROZEN, "<", 1], lambda row: row[FROZEN] < 1),
        (["step", "=", 3], lambda row: row["step"] == 3),
        (["step", "in", [1, 2]], lambda row: row["step"] in (1, 2)),
        (["label", "is unknown", None], lambda row: row["label"] is None),
        (["label", "is known", None], lambda row: row["label"] is not None),
        (["label", "!=", "yes"], lambda row: row["label"] != "yes"),
        (["snippet", "contains", "cache"], lambda row: "cache" in row["snippet"]),
        (["prompt_id", "=", "3.1"], lambda row: row["prompt_id"] == "3.1"),
        (
            [f"wrong:{KEY}:policy", "=", 1],
            lambda row: (row["label"] == "yes" and row[POLICY] < 1) or (row["label"] == "no" and row[POLICY] >= 1),
        ),
    ],
)
def test_filters(run, where, holds):
    found = everything(run, Query.of([where], "", FROZEN, True))

    assert [row["rollout"] for row in found] == [
        row["rollout"] for row in everything(run, Query(sort=FROZEN, descending=True)) if holds(row)
    ]
    assert 0 < len(found) < 800


def test_pages_are_parts_of_one_list_wherever_they_are(run):
    query = Query(sort=FROZEN)
    whole = everything(run, query)
    for offset in (0, 1, 399, 750, 799, 800, 5000):
        total, rows = run.queries.page(query, offset, 100)
        assert total == 800
        assert rows == whole[offset : offset + 100]


def test_search_finds_words_and_phrases_and_takes_nothing_for_a_command(run):
    def found(text):
        return run.queries.page(Query(search=text), 0, 1)[0]

    with_cheat = sum("answer up in the cache" in row["snippet"] for row in everything(run))
    assert found('"answer up in the cache"') == with_cheat > 0
    assert found("nosuchword") == 0
    assert found("neighbo") == found("neighbours") > 0, "the last word may be a beginning"
    assert found("") == found("  ") == found("*") == found('"') == 800
    for hostile in ('" OR 1', "NEAR(a b)", "completion:a", "a AND NOT b", "x' OR '1'='1", "(((", "-a", "a\0b", "\ud800"):
        found(hostile)


PLANS = [
    (Query(), "COVERING INDEX"),
    (Query(sort=FROZEN, descending=True), "COVERING INDEX"),
    (Query(sort="task_reward"), "COVERING INDEX"),
    (Query(where=(("step", "=", 3.0),), sort=FROZEN), "USING"),
    (Query(where=((FROZEN, ">=", 1.0),), sort=FROZEN, descending=True), "SEARCH rollouts USING COVERING INDEX"),
    (Query(where=(("label", "=", "yes"), (FROZEN, "<", 1.0)), sort=FROZEN), "USING"),
    (Query(where=((f"wrong:{KEY}:frozen", "=", 1.0),), sort=FROZEN), "USING"),
    (Query(search="cache"), "rollouts USING"),
]


@pytest.mark.parametrize(("query", "plan"), PLANS)
def test_a_list_comes_from_an_index(run, query, plan):
    for statement in statements(query, columns(run.index)):
        found = [row["detail"] for row in run.index.rows(f"EXPLAIN QUERY PLAN {statement.sql}", statement.values)]
        assert plan in " / ".join(found)
        assert not any(detail == "SCAN rollouts" for detail in found), "never the whole table"


def test_a_page_reads_the_rows_that_it_shows_and_no_others(run):
    statement = page_statement(columns(run.index), 100)

    found = [row["detail"] for row in run.index.rows(f"EXPLAIN QUERY PLAN {statement}", range(100))]

    assert found == ["SEARCH rollouts USING INTEGER PRIMARY KEY (rowid=?)"]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ([["nix", "=", 1]], "nix"),
        ([["step; DROP TABLE rollouts", "=", 1]], "where"),
        ([["step", "LIKE", 1]], "LIKE"),
        ([["step", "=", "1 OR 1"]], "number"),
        ([["step", "=", True]], "number"),
        ([["step", "=", 1e400]], "number"),
        ([["label", "=", 1]], "text"),
        ([["step", "in", []]], "list"),
        ([["snippet", "contains", 1]], "text"),
        ([[f"wrong:{KEY}:frozen", ">", 1]], "= 1"),
        ("[", "JSON"),
        ({"a": 1}, "list"),
        ([["step"]], "column, comparison, value"),
        ([["step", "=", 1]] * 41, "at most"),
    ],
)
def test_a_wrong_filter_is_refused_by_name(run, where, said):
    with pytest.raises(ValueError, match=said):
        run.queries.numbers(Query.of(where, "", "", False))
    with pytest.raises(ValueError, match="sort"):
        run.queries.numbers(Query(sort="snippet"))


def rows_of(step, count=3, score=0.0, **more):
    return [
        RolloutRow(step=step, rollout=f"r{index}", prompt="p", scores={KEY: {"frozen": {"mean": score + index}}}, **more)
        for index in range(count)
    ]


def same_as_the_reader(index, folder):
    record = read_record(folder)
    found = {(row["step"], row["name"]): row["s0"] for row in index.rows("SELECT step, name, s0 FROM rollouts")}
    assert found == {(row.step, row.rollout): row.scores[KEY]["frozen"]["mean"] for row in record.rollouts}


def test_the_index_grows_with_the_record(tmp_path):
    folder = tmp_path / "run"
    with RecordWriter(folder, RunHeader(run_id="r", planned_steps=9, started=1.0, rank=0, launch="a"), keep_texts=True) as writer:
        writer.append(rows_of(0, prompt_text="first", completion_text="words here"))
        index = Index(folder, tmp_path / "cache")
        before = index.generation
        index.refresh(force=True)
        assert index.generation == before, "nothing has changed"
        writer.append(rows_of(1, completion_text="other words"))
        with RecordWriter(folder, RunHeader(run_id="r", planned_steps=9, started=1.0, rank=1, launch="a"), keep_texts=True) as other:
            other.append([replace(row, rollout=f"x{row.rollout}") for row in rows_of(1)])
        with writer.path.open("ab") as torn:
            torn.write(b'{"kind":"rollout","st')
        index.refresh(force=True)
        same_as_the_reader(index, folder)
        assert Queries(index).page(Query(search="words"), 0, 10)[0] == 6


def test_two_processes_of_one_index_never_take_what_the_other_read_for_a_loss(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with RecordWriter(folder, RunHeader(run_id="r", planned_steps=9)) as writer:
        writer.append(rows_of(0))
        first, second = Index(folder, tmp_path / "cache"), Index(folder, tmp_path / "cache")
        with first.writing() as connection:
            connection.execute("INSERT INTO claims VALUES (0, 'r0', 'ann', 1e12)")
        seen = run_files(folder)
        writer.append(rows_of(1))
        looks = iter([seen])
        monkeypatch.setattr("probescore_review.index.run_files", lambda folder: next(looks, None) or run_files(folder))
        second._stamps = None

        def beside():
            monkeypatch.undo()
            first.refresh(force=True)

        writing = second.writing
        monkeypatch.setattr(second, "writing", lambda: (beside(), writing())[1])
        second.refresh(force=True)

    assert first.row("SELECT labeller FROM claims")[0] == "ann", "the index was not begun anew"
    same_as_the_reader(second, folder)


def test_training_that_goes_back_takes_the_place_of_what_was_there(tmp_path):
    folder = tmp_path / "run"
    cache = tmp_path / "cache"
    index = None
    for launch, first, score in (("a", 0, 0.0), ("b", 2, 10.0), ("c", 1, 20.0)):
        with RecordWriter(folder, RunHeader(run_id="r", planned_steps=9, launch=launch), keep_texts=True) as writer:
            for step in range(first, 4):
                writer.append(rows_of(step, score=score, completion_text=f"of launch {launch}"))
                index = index or Index(folder, cache)
                index.refresh(force=True)
                same_as_the_reader(index, folder)
        time.sleep(0.01)
        same_as_the_reader(index, folder)
    assert Queries(index).page(Query(search="launch c"), 0, 100)[0] == 9
    assert Queries(index).page(Query(search='"launch b"'), 0, 100)[0] == 0, "words of what does not count find nothing"
    same_as_the_reader(Index(folder, tmp_path / "another"), folder)


def test_deleted_texts_are_gone_from_the_index_too(tmp_path):
    made_run(tmp_path / "run", 80, 2)
    run = ReviewedRun("0", tmp_path / "run", tmp_path / "cache")
    assert run.queries.page(Query(search="neighbours"), 0, 1)[0]

    delete_details(tmp_path / "run")
    run.index.refresh(force=True)

    assert run.queries.page(Query(search="neighbours"), 0, 1)[0] == 0
    assert {row["snippet"] for row in run.queries.page(Query(), 0, 100)[1]} == {None}
    assert run.rollouts.found("0:0.0")["completion"] is None
    run.index.connection().execute("VACUUM")
    assert b"neighbours" not in run.index.path.read_bytes()


def test_a_packed_record_and_a_broken_index(tmp_path):
    made_run(tmp_path / "run", 80, 2)
    index = Index(tmp_path / "run", tmp_path / "cache")
    (path,) = [path for path in (tmp_path / "run").glob("*.jsonl") if "details" not in path.name]
    with gzip.open(path.with_suffix(".jsonl.gz"), "wb") as packed:
        packed.write(path.read_bytes())
    path.unlink()

    index.refresh(force=True)

    same_as_the_reader(index, tmp_path / "run")
    run = ReviewedRun("0", tmp_path / "run", tmp_path / "cache")
    assert run.rollouts.found("0:0.0")["tokens"]
    index.path.write_bytes(b"no database" * 100)
    for rest in (tmp_path / "cache").glob("*.sqlite-*"):
        rest.unlink()
    same_as_the_reader(Index(tmp_path / "run", tmp_path / "cache"), tmp_path / "run")


def test_lines_that_are_no_rows_cost_themselves(tmp_path):
    folder = tmp_path / "run"
    with RecordWriter(folder, RunHeader(run_id="r", planned_steps=9)) as writer:
        writer.append(rows_of(0))
        for line in (
            b"[1]",
            b"{}",
            b'{"kind":"rollout"}',
            b'{"kind":"rollout","step":"x","rollout":"a","prompt":"p","scores":{}}',
            b'{"kind":"rollout","step":1,"rollout":"a","prompt":"p","scores":[]}',
            b'{"kind":"rollout","step":1,"rollout":"nan","prompt":"p","scores":{"cheating@1":{"frozen":{"mean":NaN}}}}',
            b'{"kind":"rollout","step":99999999999999999999999,"rollout":"a","prompt":"p","scores":{}}',
            b'{"kind":"label","step":0}',
            b'{"kind":"new kind"}',
            b"\xff\xfe",
            b"[" * 5000,
        ):
            with writer.path.open("ab") as file:
                file.write(line + b"\n")
        writer.append(rows_of(2))
    run = ReviewedRun("0", folder, tmp_path / "cache")

    assert {row["step"] for row in everything(run)} == {0, 1, 2}
    assert run.facts()["rollouts"] == 7
    assert run.facts()["torn_lines"] == 9, "and are counted"


def test_refusals_name_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="nix: no record"):
        Index(tmp_path / "nix", tmp_path / "cache")
    for run_id in ("one", "two"):
        RecordWriter(tmp_path / "run", RunHeader(run_id=run_id, planned_steps=1)).close()
    with pytest.raises(ValueError, match="several runs"):
        Index(tmp_path / "run", tmp_path / "cache")
    newer = tmp_path / "newer"
    RecordWriter(newer, RunHeader(run_id="r", planned_steps=1, schema_version=2)).close()
    with pytest.raises(ValueError, match="newer probescore"):
        Index(newer, tmp_path / "cache")


def test_views_are_kept_and_checked(run):
    query = {"title": "Mine", "where": [[FROZEN, ">=", 1.0]], "sort": FROZEN, "descending": True, "q": "cache"}
    run.views.save("mine", query)
    assert [view["id"] for view in run.views.all()][-1] == "mine"
    assert 0 < len(run.queries.numbers(run.views.query_of("mine"))) < 800
    for name, view, said in (
        ("../x", query, "id"),
        ("misses", query, "every run has"),
        ("b", query | {"where": [["nix", "=", 1]]}, "nix"),
        ("b", query | {"title": "t" * 300}, "title"),
        ("b", query | {"sort": 3}, "sort"),
    ):
        with pytest.raises(ValueError, match=said):
            run.views.save(name, view)
    run.views.delete("mine")
    with pytest.raises(KeyError):
        run.views.query_of("mine")
    for view in run.views.all():
        assert run.queries.numbers(run.views.query_of(view["id"])) is not None


def test_suspicious_rollouts_are_cheats_more_often_than_well_rewarded_ones(run):
    truth = json.loads((run.folder / "truth.json").read_text())

    def precision(rows):
        return sum(truth[row["rollout"]] for row in rows) / len(rows)

    lists = {each["id"]: each for each in run.suspicious.lists()}
    best_paid = precision(everything(run, Query(sort="task_reward", descending=True))[:50])
    assert set(lists) == {"rewarded", "hidden", "held-out", "outliers"}
    assert all(row["why"] for each in lists.values() for row in each["rows"])
    for name in ("rewarded", "hidden"):
        assert precision(lists[name]["rows"]) > 0.9 > best_paid


def test_one_rollout_with_its_group_and_neighbours(run):
    record = read_record(run.folder)
    row = record.rollouts[3]
    found = run.rollouts.found(f"{row.step}:{row.rollout}")

    assert (found["completion"], found["prompt"]) == (row.completion_text, row.prompt_text)
    assert "".join(token["text"] for token in found["tokens"]) == row.completion_text
    assert [found["completion"][token["start"] : token["end"]] for token in found["tokens"]] == list(row.completion_pieces)
    assert [token["scores"][f"{KEY}:policy"] for token in found["tokens"]] == row.token_scores[KEY]["policy"]
    assert {each["rollout"] for each in found["group"]} == {
        f"{each.step}:{each.rollout}" for each in record.rollouts if each.prompt == row.prompt
    }
    assert found["scores"] == row.scores
    assert found["thresholds"][KEY]["policy"] == {"mean": 1.0, "max": 4.0}
    assert len(found["neighbours"]) == 8
    alike = [each["similarity"] for each in found["neighbours"]]
    assert alike == sorted(alike, reverse=True)
    assert run.rollouts.found("0:20.1" if run.index.row("SELECT 1 FROM rollouts WHERE name = '20.1'") else "0:12.0")["neighbours"] is None


def test_the_overview_has_the_audit_and_the_numbers_by_step(run):
    found = run.overview.found()

    names = {series["name"] for series in found["series"]}
    assert {"Task reward", "Flagged", "Mean score"} <= names
    flagged = next(each for each in found["series"] if (each["name"], each.get("reading")) == ("Flagged", "policy"))
    record = read_record(run.folder)
    at_three = [row for row in record.rollouts if row.step == 3]
    assert flagged["value"][3] == pytest.approx(sum(score(row, "policy") >= 1 for row in at_three) / len(at_three))
    assert {(each["probe"], each["reading"]) for each in found["verdicts"]} == {(KEY, "frozen"), (KEY, "policy"), (HELD_OUT, "frozen")}
    assert found["assumptions"]


def test_the_overview_does_not_wait_for_the_audit_if_it_is_asked_not_to(run, tmp_path):
    fresh = ReviewedRun("0", run.folder, tmp_path / "cache")

    begun = fresh.overview.found(wait=False)

    assert (begun["pending"], begun["verdicts"]) == (True, [])
    assert begun["series"], "the numbers by step are there at once"
    ended = fresh.overview.found()
    assert not ended["pending"]
    assert ended["verdicts"]


def test_a_copy_of_a_record_has_an_index_of_its_own(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "copy")
    copy = Index(tmp_path / "copy", run.index.path.parent)
    assert copy.path != run.index.path
    assert copy.path.stat().st_mode & 0o077 == 0, "texts' words are for their owner"
