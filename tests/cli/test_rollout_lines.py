"""Lines of JSON become exactly the rollouts that they describe, or an error that names the line and the field."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probescore import Chat, ChatMessage, Completion, RolloutGroup, Span, Text
from probescore_server.cli.rollout_lines import UNDECODABLE, LineError, read_rollout_lines

ids = st.lists(st.integers(0, 2**31 - 1), max_size=5)
texts = st.text(max_size=8)
names = st.text(min_size=1, max_size=4)
spans = st.dictionaries(names, st.tuples(st.integers(0, 9), st.integers(0, 9)).map(list), max_size=2)
form = ids.map(lambda value: {"ids": value}) | texts.map(lambda value: {"text": value})


def completion_objects(follow_ups):
    optional = {
        "mask": st.lists(st.sampled_from([0, 1]), max_size=5),
        "spans": spans,
        "id": texts,
        "follow_ups": st.lists(follow_ups, max_size=2),
    }
    return st.builds(lambda shape, rest: shape | rest, form, st.fixed_dictionaries({}, optional=optional))


completions = st.recursive(ids | texts, completion_objects, max_leaves=4)
messages = st.lists(st.fixed_dictionaries({"role": texts, "content": texts}), min_size=1, max_size=2)
prompts = ids | texts | messages


def read(*lines: object, add_special_tokens: bool = True) -> list[RolloutGroup]:
    return list(read_rollout_lines([json.dumps(line) for line in lines], "rollouts.jsonl", add_special_tokens=add_special_tokens))


def described(completion: Completion) -> dict[str, object]:
    """What a line that gives this completion has to say."""
    tokens = {"text": completion.tokens} if isinstance(completion.tokens, str) else {"ids": list(completion.tokens)}
    return tokens | {
        "mask": None if completion.mask is None else [int(count) for count in completion.mask],
        "spans": {span.name: [span.start, span.end] for span in completion.spans},
        "id": completion.id,
        "follow_ups": [described(follow_up) for follow_up in completion.follow_ups],
    }


def in_full(written: object) -> dict[str, object]:
    """The longest way to write a completion."""
    if isinstance(written, str):
        written = {"text": written}
    elif isinstance(written, list):
        written = {"ids": written}
    full = {"mask": None, "spans": {}, "id": "", "follow_ups": []} | written
    return full | {"follow_ups": [in_full(follow_up) for follow_up in full["follow_ups"]]}


@given(st.lists(completions, min_size=1, max_size=3))
def test_nothing_that_a_line_says_of_its_completions_is_lost(written):
    (group,) = read({"prompt": "", "completions": written})

    assert [described(completion) for completion in group.completions] == [in_full(completion) for completion in written]


@given(prompts)
def test_a_prompt_is_text_or_ids_or_messages(written):
    (group,) = read({"prompt": written, "completions": [[1]]})

    if isinstance(written, str):
        assert group.prompt == Text(written, True)
    elif written and isinstance(written[0], dict):
        assert group.prompt == Chat(tuple(ChatMessage(**message) for message in written))
    else:
        assert list(group.prompt) == written


def test_a_single_completion_is_a_group_of_one():
    one, listed = read({"prompt": [1], "completion": {"ids": [2], "id": "x"}}, {"prompt": [1], "completions": [{"ids": [2], "id": "x"}]})

    assert [described(completion) for completion in one.completions] == [described(completion) for completion in listed.completions]


def test_special_tokens_are_added_to_prompts_as_told():
    (group,) = read({"prompt": "a", "completion": "b"}, add_special_tokens=False)

    assert group.prompt == Text("a", False)


def test_empty_lines_are_passed_over_and_counted():
    lines = ["", "  \n", '{"prompt": "", "completion": "x"}', "", "{"]

    with pytest.raises(LineError, match=r"^rollouts\.jsonl:5: not JSON"):
        list(read_rollout_lines(lines, "rollouts.jsonl", add_special_tokens=True))


def test_columns_of_a_dataset_are_ignored():
    (group,) = read({"prompt": "", "completion": "x", "reward": 1.0, "label": "cheating"})

    assert len(group.completions) == 1


def test_spans_and_masks_keep_their_order_and_meaning():
    (group,) = read({"prompt": "", "completion": {"ids": [5, 6, 7], "mask": [1, 0, 1], "spans": {"b": [1, 2], "a": [0, 3]}}})

    assert group.completions[0].spans == (Span("b", 1, 2), Span("a", 0, 3))
    assert list(group.completions[0].mask) == [True, False, True]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ([1], "expected an object with prompt and completions"),
        ({"completion": "x"}, "prompt: missing"),
        ({"prompt": ""}, "completions: give either"),
        ({"prompt": "", "completion": "x", "completions": ["x"]}, "completions: give either"),
        ({"prompt": "", "completions": []}, "completions: expected a list of at least one"),
        ({"prompt": "", "completions": "x"}, "completions: expected a list of at least one"),
        ({"prompt": 3, "completion": "x"}, "prompt: expected text, a list of token ids or a list of messages, got 3"),
        ({"prompt": [1.5], "completion": "x"}, "prompt[0]: expected a token id"),
        ({"prompt": [{"role": "user"}], "completion": "x"}, "prompt[0]: expected role and content"),
        ({"prompt": "", "completion": None}, "completion: expected text, a list of token ids or an object"),
        ({"prompt": "", "completions": [[1], [1, -1]]}, "completions[1][1]: expected a token id"),
        ({"prompt": "", "completion": [True]}, "completion[0]: expected a token id"),
        ({"prompt": "", "completion": [2**31]}, "completion[0]: expected a token id"),
        ({"prompt": "", "completion": {}}, "completion: give either text or ids"),
        ({"prompt": "", "completion": {"text": "a", "ids": [1]}}, "completion: give either text or ids"),
        ({"prompt": "", "completion": {"text": 1}}, "completion.text: expected text, got 1"),
        ({"prompt": "", "completion": {"ids": "1"}}, "completion.ids: expected a list of token ids"),
        ({"prompt": "", "completion": {"ids": [1], "masks": [1]}}, "completion: unknown key 'masks'"),
        ({"prompt": "", "completion": {"ids": [1], "mask": 1}}, "completion.mask: expected a list of 0 and 1"),
        ({"prompt": "", "completion": {"ids": [1], "mask": [2]}}, "completion.mask[0]: expected 0 or 1, got 2"),
        ({"prompt": "", "completion": {"ids": [1], "spans": [[0, 1]]}}, "completion.spans: expected an object"),
        ({"prompt": "", "completion": {"ids": [1], "spans": {"a": [0]}}}, "completion.spans.a: expected [start, end]"),
        ({"prompt": "", "completion": {"ids": [1], "id": 7}}, "completion.id: expected text, got 7"),
        ({"prompt": "", "completion": {"ids": [1], "follow_ups": "x"}}, "completion.follow_ups: expected a list"),
        ({"prompt": "", "completion": [1], "mask": [1]}, "mask: belongs into the completion"),
        ({"prompt": "", "completions": [[1]], "spans": {"a": [0, 1]}}, "spans: belongs into the completion"),
        ({"prompt": "", "completion": [1], "follow_ups": [[2]]}, "follow_ups: belongs into the completion"),
        ({"prompt": "", "completion": [1], "mask": None}, "mask: belongs into the completion"),
        ({"prompt": "", "completion": [1], "label": {"a": 1}}, "label: expected text, a number, true, false or null"),
        ({"prompt": "", "completion": [1], "label": [1]}, "label: expected text, a number, true, false or null"),
        ({"prompt": "", "completions": [[1], [2]], "label": [1]}, "label: expected one for each of 2 completions, got 1"),
        ({"prompt": "", "completions": [[1], [2]], "label": [1, []]}, "label[1]: expected text"),
        ({"prompt": "", "completion": {"ids": [1], "label": []}}, "completion.label: expected text"),
        (
            {"prompt": "", "completion": {"ids": [1], "follow_ups": [{"ids": [1], "label": 1}]}},
            "completion.follow_ups[0].label: a label is",
        ),
        ({"prompt": "", "completion": {"ids": [1], "follow_ups": [{"ids": [-1]}]}}, "completion.follow_ups[0].ids[0]: expected a token id"),
    ],
)
def test_a_line_that_is_no_rollout_is_refused_with_its_place(line, said):
    with pytest.raises(LineError) as refused:
        read(line)

    assert str(refused.value).startswith(f"rollouts.jsonl:1: {said}")


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | texts, lambda inner: st.lists(inner) | st.dictionaries(texts, inner)
    )
)
def test_no_json_makes_it_fail_otherwise(content):
    with contextlib.suppress(LineError):
        read(content)


def test_a_completion_has_its_own_label_or_that_of_its_line():
    own, listed, none = read(
        {"prompt": "", "completions": [[1], {"ids": [2], "label": "b"}, {"ids": [3], "label": None}], "label": "a"},
        {"prompt": "", "completions": [[1], [2]], "label": [True, 0]},
        {"prompt": "", "completion": [1]},
    )

    assert (own.labels, listed.labels, none.labels) == (("a", "b", None), (True, 0), (None,))


def test_a_line_that_is_no_utf8_is_named():
    with pytest.raises(LineError, match=r"^rollouts\.jsonl:1: not UTF-8$"):
        list(read_rollout_lines([b'{"prompt": "\xff"}'.decode(errors=UNDECODABLE)], "rollouts.jsonl", add_special_tokens=True))
