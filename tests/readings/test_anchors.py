"""Anchors: chosen from labelled rollouts, scored again by a trainer on both readings of a real server, and looked at by the audit."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from read_twice import ROLLOUTS, Served
from running_server import RunningServer, start_server
from typer.testing import CliRunner

from probescore_adapters import ProbeScorer, ProbeSignal, RecordOptions, Rollout
from probescore_adapters.anchors import read_anchors
from probescore_audit import advice
from probescore_audit.record import Record, read_record
from probescore_audit.recorded_run import read_run, recorded_anchors
from probescore_server.cli.app import app

BATCH = [Rollout(prompt, completion) for prompt, completions in ROLLOUTS for completion in completions]
SIGNALS = [
    ProbeSignal("last", threshold=0.1),
    ProbeSignal("last", mode="monitor", reading="policy", threshold=0.1, reduction="max", transform="flag"),
]


@pytest.fixture(scope="module")
def server(llama: Served, root: Path) -> Iterator[RunningServer]:
    with start_server(llama.model, [llama.probe("last")], admin=True, readings_root=root) as running:
        yield running


def run(*arguments: Any) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, arguments)))


def labelled(folder: Path, per_class: int = 12, **more: Any) -> Path:
    """Rollouts of ids, four of a prompt, and of both labels."""
    rng = np.random.default_rng(0)
    lines = [
        {
            "prompt": (prompt := rng.integers(4, 90, 5).tolist()),
            "completions": [{"ids": rng.integers(4, 90, 6).tolist(), "mask": [1, 1, 1, 1, 1, 0]} for _ in range(4)],
            "label": [True, False, True, False],
            **more,
        }
        for _ in range((per_class + 1) // 2)
    ]
    assert prompt
    path = folder / "labelled.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def anchors(tmp_path: Path) -> Path:
    assert run("anchors", "make", labelled(tmp_path), "-o", tmp_path / "anchors.jsonl", "--per-class", 8).exit_code == 0
    return tmp_path / "anchors.jsonl"


def test_anchors_are_balanced_and_of_many_prompts_and_the_same_again(tmp_path, anchors):
    found = read_anchors(anchors)
    assert Counter(anchor.positive for anchor in found) == {True: 8, False: 8}
    prompts = Counter(np.asarray(anchor.rollout.prompt).tobytes() for anchor in found)
    assert max(prompts.values()) - min(prompts.values()) <= 1 + 2
    assert len(prompts) == 6
    assert len({anchor.name for anchor in found}) == len({anchor.text_sha256 for anchor in found}) == 16
    before = anchors.read_bytes()
    run("anchors", "make", tmp_path / "labelled.jsonl", "-o", anchors, "--per-class", 8)
    assert anchors.read_bytes() == before
    run("anchors", "make", tmp_path / "labelled.jsonl", "-o", anchors, "--per-class", 8, "--seed", 1)
    assert anchors.read_bytes() != before
    assert run("score", anchors, "--json", "-a", "localhost:1").exit_code == 1  # what it writes are lines of rollouts


def test_texts_and_chats_stay_what_they_are(tmp_path):
    prompts = ["Sort.", [{"role": "user", "content": "Sort."}], [5, 6]]
    lines = [
        {"prompt": prompt, "completion": f"{number} {label}", "label": label}
        for prompt in prompts
        for number in range(2)
        for label in ("copied", "sorted")
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["anchors", "make", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--per-class", 6, "--positive", "copied"]
    assert run(*arguments, "--no-special-tokens").exit_code == 0
    kinds = Counter(type(anchor.rollout.prompt).__name__ for anchor in read_anchors(tmp_path / "out.jsonl"))
    assert kinds == {"Text": 4, "Chat": 4, "ndarray": 4}
    for anchor in read_anchors(tmp_path / "out.jsonl"):
        assert anchor.positive == str(anchor.rollout.completion).endswith("copied")
        assert getattr(anchor.rollout.prompt, "add_special_tokens", False) is False


@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b", "a\x85b", "a\rb\nc"])
def test_whatever_ends_a_line_elsewhere_may_be_in_a_text(tmp_path, text):
    lines = [{"prompt": "Sort.", "completion": f"{number} {text}", "label": number % 2 == 0} for number in range(4)]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert run("anchors", "make", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--per-class", 2).exit_code == 0
    assert {str(anchor.rollout.completion)[2:] for anchor in read_anchors(tmp_path / "out.jsonl")} == {text}


@pytest.mark.parametrize(
    ("more", "options", "complaint"),
    [
        ({}, ["--per-class", "99"], "--per-class: 99; the data have 12 rollouts with the behaviour"),
        ({"split": "train"}, ["--per-class", "2"], "the data have 0 rollouts"),
        ({"label": ["x", "y", "x", "y"]}, ["--per-class", "2"], "expected true or false, or 1 or 0, got 'x'"),
        ({"label": [None] * 4}, ["--per-class", "2"], "the data have 0 rollouts"),
        ({"prompt": 3}, ["--per-class", "2"], "labelled.jsonl:1: prompt"),
    ],
)
def test_data_that_cannot_be_anchors_are_named(tmp_path, more, options, complaint):
    done = run("anchors", "make", labelled(tmp_path, **more), "-o", tmp_path / "out.jsonl", *options)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert complaint in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


GOOD = {"prompt": [5, 6], "completion": {"id": "a", "ids": [7]}, "label": True}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "no JSON"), ("[" * 100_000, "no JSON"), ([1], "no anchor"), ({**GOOD, "label": 1}, "label: 1"),
        ({**GOOD, "label": None}, "label"), ({**GOOD, "prompt": None}, "prompt"), ({**GOOD, "prompt": [{"role": "user"}]}, "prompt"),
        ({**GOOD, "completion": "x"}, "no anchor"), ({**GOOD, "completion": {"id": "", "ids": [7]}}, "completion.id"),
        ({**GOOD, "completion": {"id": "a"}}, "either text or ids"), ({**GOOD, "completion": {"id": "a", "ids": "x"}}, "completion"),
        ({**GOOD, "completion": {"id": "a", "ids": [1.5]}}, "completion"), ({**GOOD, "add_special_tokens": 1, "prompt": "x"}, "add_"),
        ({**GOOD, "completion": {"id": "a", "ids": [7], "mask": [2]}}, "mask"),
        (GOOD, "comes twice"),
    ],
)  # fmt: skip
def test_lines_that_are_no_anchors_are_named(tmp_path, line, complaint):
    first = {**GOOD, "label": False}
    written = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(first)}\n\n{written}\n")
    with pytest.raises(ValueError, match=rf"^a\.jsonl:3: .*{complaint}"):
        read_anchors(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text(json.dumps(first))
    with pytest.raises(ValueError, match="not of both labels"):
        read_anchors(tmp_path / "a.jsonl")


def trained(server: RunningServer, folder: Path, anchors: Path, steps: int = 6, **options: Any) -> Record:
    one = ProbeScorer(SIGNALS, server.address, record=RecordOptions(folder, anchors=anchors, anchors_every=2, **options))
    for step in range(steps):
        if step in (0, 3):
            one.load_reading("policy", f"step-{step // 3}", step)
        one.score(BATCH[:2], step=step)
        one.score(BATCH[2:], step=step)
    one.close()
    return read_record(folder)


def test_a_trainer_scores_them_again_on_both_readings(server, tmp_path, anchors):
    record = trained(server, tmp_path / "run", anchors)
    assert Counter(row.step for row in record.anchors) == {0: 16, 2: 16, 4: 16}
    assert len(record.rollouts) == 6 * len(BATCH)
    by_step = {step: {row.anchor: row for row in record.anchors if row.step == step} for step in (0, 2, 4)}
    for name, first in by_step[0].items():
        second, third = by_step[2][name], by_step[4][name]
        np.testing.assert_allclose(second.scores["last@1"]["frozen"]["mean"], first.scores["last@1"]["frozen"]["mean"], atol=1e-5)
        assert second.reading_ids == first.reading_ids != third.reading_ids
        assert abs(third.scores["last@1"]["policy"]["max"] - first.scores["last@1"]["policy"]["max"]) > 1e-3
    frozen = recorded_anchors(record, "last@1", reading="frozen", reduction="mean")
    policy = recorded_anchors(record, "last@1", reading="policy", reduction="max")
    assert [each.step for each in frozen] == [each.step for each in policy] == [0, 2, 4]
    assert max(each.largest_move for each in frozen) < 1e-3
    assert policy[1].largest_move < 1e-3 < 0.05 < policy[2].largest_move
    for reading, scorings in (("frozen", frozen), ("policy", policy)):
        assert not list(advice.moved_anchors(read_run(record, record.table(), "last@1", reading=reading), scorings))


def test_by_hand_they_score_as_in_the_trainer(server, tmp_path, anchors):
    record = trained(server, tmp_path / "run", anchors, steps=3)
    done = run("anchors", "score", tmp_path / "run", anchors, "--step", 9, "-a", server.address)
    assert done.exit_code == 0, done.stderr
    assert "added the scores of 16 anchors at step 9, on frozen, policy" in done.stdout
    again = {row.anchor: row for row in read_record(tmp_path / "run").anchors if row.step == 9}
    for row in record.anchors:
        if row.step == 2:
            assert (again[row.anchor].text_sha256, again[row.anchor].reading_ids) == (row.text_sha256, row.reading_ids)
            for reading, reductions in again[row.anchor].scores["last@1"].items():
                for reduction, score in reductions.items():
                    assert score == pytest.approx(row.scores["last@1"][reading][reduction], abs=1e-5)
    for more, code, complaint in (
        (["--reading", "gone"], 2, "--reading: gone"),
        (["-a", "localhost:1"], 1, "localhost:1"),
    ):
        refused = run("anchors", "score", tmp_path / "run", anchors, "--step", 9, "-a", server.address, *more)
        assert (refused.exit_code, complaint in refused.stderr) == (code, True), refused.stderr


def test_an_anchor_with_another_text_is_another_anchor(server, tmp_path, anchors):
    trained(server, tmp_path / "run", anchors, steps=1)
    lines = [json.loads(line) for line in anchors.read_text().splitlines()]
    for line in lines:
        line["completion"]["ids"] = line["completion"]["ids"][::-1]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("anchors", "score", tmp_path / "run", tmp_path / "other.jsonl", "--step", 9, "-a", server.address)
    found = recorded_anchors(read_record(tmp_path / "run"), "last@1", reading="frozen", reduction="mean")
    assert [each.largest_move for each in found] == [0.0, 0.0]


def test_anchors_are_never_in_the_way_of_training(server, tmp_path, anchors, caplog):
    bad = {"prompt": [5], "completion": {"id": "bad", "ids": [10**6]}, "label": True}
    (tmp_path / "some.jsonl").write_text(anchors.read_text() + json.dumps(bad))
    with caplog.at_level(logging.WARNING, "probescore_adapters"):
        record = trained(server, tmp_path / "run", tmp_path / "some.jsonl", steps=1)
    assert (len(record.anchors), len(record.rollouts)) == (16, len(BATCH))
    assert "1 of 17 anchors have no scores, such as bad" in caplog.text
    with pytest.raises(OSError, match="gone"):
        trained(server, tmp_path / "other", tmp_path / "gone.jsonl")


def test_one_process_of_a_run_scores_them(server, tmp_path, anchors, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not trained(server, tmp_path / "run", anchors, steps=1).anchors
