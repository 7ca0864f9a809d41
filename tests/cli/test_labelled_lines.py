"""Labelled rollouts as lines of JSON: what is read, and what is refused by line and field."""

from __future__ import annotations

import json

import pytest

from probescore.types import Chat, Text
from probescore_probes.fitting.labelled_rollouts import Passage
from probescore_server.cli.labelled_lines import read_labelled_file, read_labelled_lines
from probescore_server.cli.rollout_lines import LineError


def read(*lines, positive=None):
    return list(read_labelled_lines([json.dumps(line) for line in lines], "data.jsonl", positive=positive, add_special_tokens=True))


def test_a_group_is_as_many_rollouts_and_says_where_each_stands():
    found = read(
        {
            "prompt": [1, 2],
            "completions": [[3], {"ids": [4, 5], "mask": [1, 0]}],
            "label": [True, 0],
            "group": 7,
            "slice": "a",
            "weight": 2,
            "split": "test",
        }
    )
    assert [rollout.positive for rollout in found] == [True, False]
    assert [rollout.where for rollout in found] == ["data.jsonl:1 completions[0]", "data.jsonl:1 completions[1]"]
    assert {(rollout.group, rollout.slice, rollout.weight, rollout.split) for rollout in found} == {("7", "a", 2.0, "test")}
    assert found[1].completion.mask == [True, False]


def test_prompts_are_ids_texts_or_chats():
    chat = [{"role": "user", "content": "a"}]
    found = read(*({"prompt": prompt, "completion": "b", "label": 1} for prompt in ([1], "a", chat)))
    assert [type(rollout.prompt) for rollout in found] == [list, Text, Chat]
    assert found[1].prompt.add_special_tokens


def test_labels_are_words_where_the_behaviour_is_named():
    found = read(*({"prompt": "", "completion": "b", "label": label} for label in ("lie", "truth", None, "lie")), positive="lie")
    assert [rollout.positive for rollout in found] == [True, False, True]


def test_spans_and_tokens_have_labels_of_their_own():
    found = read(
        {"prompt": "", "completion": {"text": "a b c", "span_labels": [[0, 1, True], [2, 5, 0]]}},
        {"prompt": "", "completion": {"ids": [4, 5], "token_labels": [1, None]}},
    )
    assert found[0].positive is None
    assert found[0].passages == (Passage(0, 1, True), Passage(2, 5, False))
    assert found[1].token_labels == (True, None)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"label": "yes"}, "label: expected true or false, or 1 or 0, got 'yes'; .*--positive LABEL"),
        ({"label": 2}, "label: expected true or false, or 1 or 0, got 2"),
        ({"label": 1, "group": [1]}, "group: expected text or a whole number"),
        ({"label": 1, "split": "dev"}, "split: expected one of train, calibration, test, ood, got 'dev'"),
        ({"label": 1, "slice": 3}, "slice: expected text"),
        ({"label": 1, "weight": 0}, "weight: expected a number from 1e-06 to 1e\\+06, got 0"),
        ({"label": 1, "completion": {"ids": [1], "follow_ups": [[2]]}}, "completion.follow_ups: a probe is not fitted on follow-ups"),
        ({"completion": {"ids": [1], "span_labels": [[0, 1]]}}, r"completion.span_labels\[0\]: expected \[start, end, label\]"),
        ({"completion": {"ids": [1], "span_labels": {"a": 1}}}, "completion.span_labels: expected a list"),
        ({"completion": {"text": "a", "token_labels": [1]}}, "completion.token_labels: expected a list beside ids"),
        ({"completion": {"ids": [1], "token_labels": ["x"]}}, r"completion.token_labels\[0\]: expected true or false"),
        ({"label": 1, "completion": {"ids": [1], "spam": 1}}, "completion: unknown key 'spam'"),
        ({"label": 1, "completions": [[1]]}, "completions: give either"),
    ],
)
def test_what_is_wrong_names_its_line_and_field(line, says):
    good = {"prompt": [1], "completion": [2], "label": 1}
    with pytest.raises(LineError, match=f"^data.jsonl:2: {says}"):
        read(good, {"prompt": [1], "completion": [2], **line})


@pytest.mark.parametrize("line", ["[1]", "3", '"a"', '{"prompt": [1], "completions": 3}', '{"prompt": [1]}', "{"])
def test_what_is_no_rollout_is_refused_as_elsewhere(line):
    with pytest.raises(LineError, match=r"^data.jsonl:1: "):
        list(read_labelled_lines([line], "data.jsonl", positive=None, add_special_tokens=False))


def test_a_file_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": [1], "completion": [2], "label": true}\n\n')
    assert len(read_labelled_file(str(tmp_path / "a.jsonl"), positive=None, add_special_tokens=False)) == 1
