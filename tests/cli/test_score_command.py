"""``probescore score`` against a real server: what the client gets is what people and programs are given."""

from __future__ import annotations

import json

import numpy as np
import pytest
from models import BOS

from probescore import Completion, RolloutGroup, Span, Text

LINES = [
    {"prompt": [BOS, 5, 6], "completions": [{"ids": [7, 8, 9], "id": "a", "mask": [1, 1, 0], "spans": {"tool": [0, 2]}}, [10, 11]]},
    {"prompt": [BOS, 5], "completion": {"ids": [12], "follow_ups": [{"ids": [13, 14], "id": "asked"}]}},
]


@pytest.fixture
def rollouts(tmp_path):
    file = tmp_path / "rollouts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return file


def test_the_numbers_are_those_of_the_client(probescore, client, rollouts):
    ran = probescore("score", rollouts, "--json", "--reduction", "mean", "--reduction", "max")

    answers = [json.loads(line) for line in ran.stdout.splitlines()]
    groups = [
        RolloutGroup([BOS, 5, 6], [Completion([7, 8, 9], mask=[1, 1, 0], spans=(Span("tool", 0, 2),), id="a"), [10, 11]]),
        RolloutGroup([BOS, 5], [Completion([12], follow_ups=(Completion([13, 14], id="asked"),))]),
    ]
    expected = [scored for group in client.score(groups, reductions=["mean", "max"], token_scores=True).groups for scored in group]
    assert (ran.returncode, ran.stderr) == (0, "")
    assert [(answer["group"], answer["completion"]) for answer in answers] == [(0, 0), (0, 1), (1, 0)]
    for answer, scored in zip(answers, expected, strict=True):
        for probe, scores in scored.scores.items():
            np.testing.assert_allclose(answer["scores"][probe]["reduced"], scores.reduced, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(answer["scores"][probe]["tokens"], scores.tokens, rtol=1e-5, atol=1e-6)
    assert answers[0]["scores"]["cheating"]["reductions"] == ["mean", "max"]
    assert answers[0]["scores"]["mood"]["labels"] == ["calm", "angry"]
    assert (answers[0]["prompt_ids"], answers[0]["completion_ids"]) == ([BOS, 5, 6], [7, 8, 9])
    assert answers[0]["completion_texts"] == ["w7", " w8", " w9"]
    assert (answers[2]["follow_ups"][0]["id"], answers[2]["follow_ups"][0]["completion_ids"]) == ("asked", [13, 14])
    assert answers[2]["follow_ups"][0]["completion_texts"] == ["w13", " w14"]


def test_an_empty_selection_is_null(probescore, tmp_path):
    ran = probescore("score", "-", "--json", stdin=json.dumps({"prompt": [BOS], "completion": {"ids": [5], "mask": [0]}}))

    assert json.loads(ran.stdout)["scores"]["cheating"]["reduced"] == [[[None]]]


def test_a_text_is_scored_after_its_prompt_with_bos_in_front(probescore, client):
    ran = probescore("score", "w7 w8", "--prompt", "w5 w6", "--json")

    answer = json.loads(ran.stdout)
    result = client.score([RolloutGroup(Text("w5 w6", add_special_tokens=True), ["w7 w8"])])
    assert answer["prompt_ids"] == [BOS, 5, 6]
    assert answer["completion_ids"] == [7, 8]
    assert answer["inexact_ids"] is True
    assert answer["scores"]["cheating"]["reduced"][0][0][0] == pytest.approx(result.values("cheating")[0], rel=1e-5)


def test_people_see_the_words_and_the_scores(probescore):
    ran = probescore("score", "w7 w8", "--prompt", "w5 w6", "--probe", "cheating")

    assert ran.returncode == 0
    assert "w5 w6" in ran.stdout
    assert "w7[" in ran.stdout
    assert "threshold" in ran.stdout
    assert "mood" not in ran.stdout
    assert "\x1b" not in ran.stdout


def test_a_text_without_special_tokens_is_refused_by_a_probe_that_wants_bos(probescore):
    ran = probescore("score", "w7", "--prompt", "w5", "--no-special-tokens")

    assert ran.returncode == 2
    assert ran.stderr.startswith("probescore: groups[0].prompt: ")
    assert "BOS" in ran.stderr


def test_the_page_has_every_rollout_and_every_probe(probescore, rollouts, tmp_path):
    ran = probescore("score", rollouts, "--html", tmp_path / "page.html", "--show", "1")

    page = (tmp_path / "page.html").read_text("utf-8")
    data = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert [entry["title"] for entry in data["rollouts"]] == [
        "group 1, completion 1 · a",
        "group 1, completion 2",
        "group 2",
        "group 2 · follow-up 1 · asked",
    ]
    assert [entry["name"] for entry in data["series"]] == ["cheating", "mood · calm", "mood · angry"]
    assert "… and 3 more" in ran.stdout
    assert "group 1, completion 2" not in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        (["missing.jsonl"], "", "missing.jsonl: No such file or directory"),
        (["-"], "", "there are no rollouts to score"),
        (["-"], "{", "standard input:1: not JSON"),
        (["w5", "--probe", "nothing"], "", "probes[0]: "),
        (["w5", "--reduction", "median"], "", "reductions[0]: unknown reduction 'median'"),
        (["-"], '{"prompt": [1], "completion": {"ids": [5], "mask": [1, 1]}}', "groups[0].completions[0].mask: "),
        (["-"], '{"prompt": [1], "completion": [5000]}', "groups[0].completions[0].ids"),
        (["w5", "--html", "no/such/folder/page.html"], "", "no/such/folder/page.html: No such file or directory"),
    ],
)
def test_wrong_input_is_one_line_that_names_it(probescore, arguments, stdin, said):
    ran = probescore("score", *arguments, stdin=stdin)

    assert ran.returncode == 2
    assert ran.stderr.startswith(f"probescore: {said}")
    assert ran.stderr.count("\n") == 1


def test_a_server_that_is_not_there_is_one_line(probescore, tmp_path):
    ran = probescore("score", "w5", "--address", f"unix:{tmp_path}/nobody")

    assert ran.returncode == 1
    assert ran.stderr.startswith(f"probescore: no server is ready at unix:{tmp_path}/nobody: ")
    assert ran.stderr.count("\n") == 1


def test_waiting_for_a_server_ends(probescore, tmp_path):
    ran = probescore("info", "--address", f"unix:{tmp_path}/nobody", "--wait", "0.5")

    assert ran.returncode == 1
    assert ran.stderr.startswith("probescore: no server is ready at ")
