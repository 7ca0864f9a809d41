"""``rollouts_from_padded``: whatever the padding, the rollouts are those that were read and sampled, or the argument at fault is named."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probescore import InvalidRequestError, rollouts_from_padded

BOS, EOS, OTHER_EOS, PAD = 1, 2, 3, 0
WORDS = st.integers(10, 20)


def tokens_of(groups: Any) -> list[tuple[list[int], list[list[int]]]]:
    return [(group.prompt.tolist(), [completion.tokens.tolist() for completion in group.completions]) for group in groups]


@st.composite
def batches(draw: Any) -> dict[str, Any]:
    """Prompts with EOS inside and at both ends, completions with and without EOS at their end, and how they are padded."""
    per_prompt = draw(st.integers(1, 3))
    pad = draw(st.sampled_from([PAD, EOS, OTHER_EOS, BOS, -100]))
    prompts = draw(st.lists(st.lists(st.one_of(WORDS, st.sampled_from([EOS, BOS])), min_size=1, max_size=5), min_size=1, max_size=4))
    completions = [
        [draw(st.lists(WORDS, min_size=1, max_size=5)) + draw(st.sampled_from([[EOS], [OTHER_EOS]])) for _ in range(per_prompt)]
        for _ in prompts
    ]
    width = max(map(len, prompts)) + draw(st.integers(0, 2))
    sampled = max(len(each) for group in completions for each in group)
    for group in completions:
        for index, each in enumerate(group):  # some ran into the limit
            if draw(st.booleans()) and draw(st.booleans()):
                group[index] = each[:-1] + draw(st.lists(WORDS, min_size=sampled - len(each) + 1, max_size=sampled - len(each) + 1))
    return {
        "prompts": prompts,
        "completions": completions,
        "pad": pad,
        "width": width,
        "sampled": sampled,
        "left": draw(st.booleans()),
        "per_prompt": per_prompt,
    }


def padded(batch: dict[str, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The rows, and the mask over them."""
    rows, masks = [], []
    for prompt, group in zip(batch["prompts"], batch["completions"], strict=True):
        for completion in group:
            before, after = [batch["pad"]] * (batch["width"] - len(prompt)), [batch["pad"]] * (batch["sampled"] - len(completion))
            head = before + prompt if batch["left"] else prompt + before
            mask = [0] * len(before) + [1] * len(prompt) if batch["left"] else [1] * len(prompt) + [0] * len(before)
            rows.append(head + completion + after)
            masks.append(mask + [1] * len(completion) + [0] * len(after))
    return np.array(rows), np.array(masks)


@given(batches(), st.sampled_from(["given", "of the prompts", "whole"]), st.sampled_from([bool, np.int64, np.float32]), st.booleans())
def test_what_was_padded_comes_back(batch: dict[str, Any], kind: str, dtype: Any, says_pad: bool) -> None:
    rows, mask = padded(batch)
    width, per_prompt = batch["width"], batch["per_prompt"]
    masks = {"given": mask[:, :width], "of the prompts": mask[::per_prompt, :width], "whole": mask}
    groups = rollouts_from_padded(
        rows,
        width,
        eos_token_id=[EOS, OTHER_EOS],
        attention_mask=masks[kind].astype(dtype),
        pad_token_id=batch["pad"] if says_pad and batch["pad"] >= 0 else None,
        completions_per_prompt=per_prompt,
    )
    assert tokens_of(groups) == list(zip(batch["prompts"], batch["completions"], strict=True))


@given(batches())
def test_without_a_mask_it_comes_back_or_is_refused(batch: dict[str, Any]) -> None:
    rows, _ = padded(batch)
    if batch["pad"] < 0:
        return
    options = {"eos_token_id": [EOS, OTHER_EOS], "pad_token_id": batch["pad"], "completions_per_prompt": batch["per_prompt"]}
    # nobody can tell a prompt that begins or ends with the padding id of its own
    own = any(batch["pad"] in (prompt[0], prompt[-1]) for prompt in batch["prompts"])
    found = outcome(rows, batch["width"], **options)
    if isinstance(found, str):
        assert found in ("attention_mask", "pad_token_id", "completions_per_prompt")
    else:
        assert own or found == list(zip(batch["prompts"], batch["completions"], strict=True))
    unpadded = any(len(prompt) == batch["width"] for prompt in batch["prompts"])
    if unpadded and batch["pad"] == PAD:
        assert not isinstance(found, str)
    if batch["pad"] == BOS and all(prompt[0] == BOS for prompt in batch["prompts"]):
        assert isinstance(found, str)


def outcome(*arguments: Any, **options: Any) -> Any:
    """The tokens, or the field at fault."""
    try:
        return tokens_of(rollouts_from_padded(*arguments, **options))
    except InvalidRequestError as error:
        return error.field


@given(batches())
def test_a_completion_mask_is_cut_with_its_completion(batch: dict[str, Any]) -> None:
    rows, mask = padded(batch)
    counted = mask[:, batch["width"] :] * (np.arange(batch["sampled"]) % 2)
    groups = rollouts_from_padded(
        rows,
        batch["width"],
        eos_token_id=[EOS, OTHER_EOS],
        attention_mask=mask,
        completion_mask=counted,
        completions_per_prompt=batch["per_prompt"],
    )
    for group in groups:
        for completion in group.completions:
            assert completion.mask.tolist() == [bool(index % 2) for index in range(len(completion.tokens))]


ROWS = [[PAD, 11, EOS, 12, 13, 14, EOS, PAD], [11, 12, 13, 14, 15, 16, 17, 18]]
MASK = [[0, 1, 1, 1], [1, 1, 1, 1]]
GOOD: dict[str, Any] = {"sequences": ROWS, "prompt_length": 4, "eos_token_id": EOS, "attention_mask": MASK}


def test_the_usual_call() -> None:
    assert tokens_of(rollouts_from_padded(**GOOD)) == [([11, EOS, 12], [[13, 14, EOS]]), ([11, 12, 13, 14], [[15, 16, 17, 18]])]
    [first, _] = rollouts_from_padded(**GOOD)
    assert first.prompt.dtype == np.int64
    assert first.completions[0].mask is None


def test_padding_that_is_eos_keeps_the_eos_that_was_sampled() -> None:
    groups = rollouts_from_padded([[EOS, EOS, 11, 12, EOS, EOS, EOS]], 3, eos_token_id=EOS, attention_mask=[[0, 1, 1]], pad_token_id=EOS)
    assert tokens_of(groups) == [([EOS, 11], [[12, EOS]])]


def test_an_eos_may_be_all_that_was_sampled() -> None:
    assert tokens_of(rollouts_from_padded([[11, EOS, PAD]], 1, eos_token_id=EOS, attention_mask=[[1]])) == [([11], [[EOS]])]


def test_a_stop_string_ends_a_completion_without_eos() -> None:
    rows = [[11, 12, PAD, PAD], [11, 12, 13, EOS]]
    assert tokens_of(rollouts_from_padded(rows, 1, eos_token_id=EOS, pad_token_id=PAD)) == [([11], [[12]]), ([11], [[12, 13, EOS]])]
    # with an EOS as padding only a mask can tell
    rows = [[11, 12, EOS, EOS], [11, 12, 13, EOS]]
    mask = [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert tokens_of(rollouts_from_padded(rows, 1, eos_token_id=None, attention_mask=mask)) == [([11], [[12]]), ([11], [[12, 13, EOS]])]


def test_copies_do_not_keep_the_batch() -> None:
    rows = np.array(ROWS)
    [first, _] = rollouts_from_padded(**{**GOOD, "sequences": rows})
    rows[:] = 99
    assert first.prompt.tolist() == [11, EOS, 12]
    assert first.completions[0].tokens.base is None


@pytest.mark.parametrize("eos", [EOS, np.int32(EOS), [EOS], (EOS, OTHER_EOS), np.array([EOS, 50]), np.array(EOS)])
def test_eos_may_be_one_id_or_several(eos: Any) -> None:
    assert tokens_of(rollouts_from_padded(**{**GOOD, "eos_token_id": eos}))[0][1] == [[13, 14, EOS]]


@pytest.mark.parametrize(
    ("changes", "field", "problem"),
    [
        ({"sequences": [1, 2, 3]}, "sequences", "has shape (3,)"),
        ({"sequences": [[1, 2], [3]]}, "sequences", "sequences"),
        ({"sequences": np.ones((2, 8))}, "sequences", "holds float64"),
        ({"sequences": np.ones((2, 8), bool)}, "sequences", "holds bool"),
        ({"sequences": None}, "sequences", "holds object"),
        ({"sequences": [["a"] * 8] * 2}, "sequences", "numbers of one length"),
        ({"sequences": SimpleNamespace(sequences=ROWS)}, "sequences", "give its .sequences"),
        ({"sequences": np.ma.masked_equal(ROWS, PAD)}, "sequences", "masked array"),
        ({"prompt_length": 8}, "prompt_length", "leaves no completion"),
        ({"prompt_length": 0}, "prompt_length", "at least 1"),
        ({"prompt_length": 4.0}, "prompt_length", "an integer is expected"),
        ({"prompt_length": True}, "prompt_length", "an integer is expected"),
        ({"prompt_length": [3, 4]}, "prompt_length", "an integer is expected"),
        ({"eos_token_id": "</s>"}, "eos_token_id", "an integer is expected"),
        ({"eos_token_id": -1}, "eos_token_id", "at least 0"),
        ({"eos_token_id": [0.5]}, "eos_token_id", "an id, several ids or None"),
        ({"eos_token_id": [[2]]}, "eos_token_id", "an id, several ids or None"),
        ({"eos_token_id": True}, "eos_token_id", "an integer is expected"),
        ({"pad_token_id": -1}, "pad_token_id", "at least 0"),
        ({"pad_token_id": "x"}, "pad_token_id", "an integer is expected"),
        ({"pad_token_id": 5}, "attention_mask", "it is not the mask of these sequences"),
        ({"attention_mask": None}, "attention_mask", "is needed"),
        ({"attention_mask": None, "pad_token_id": EOS}, "pad_token_id", "middle"),
        ({"attention_mask": [[0, 1, 1, 1]]}, "attention_mask", "has shape (1, 4); (2, 4) or (2, 8) is expected"),
        ({"attention_mask": [[0, 1, 1, 1], [1, 1, 1, 0.5]]}, "attention_mask", "[1, 3] is 0.5"),
        ({"attention_mask": [[0, 1, 1, 1], [1, 1, 1, np.nan]]}, "attention_mask", "[1, 3] is nan"),
        ({"attention_mask": [[0, 1, 1, 1], [1, 1, 1, -100]]}, "attention_mask", "[1, 3] is -100"),
        ({"attention_mask": [[0, 1, 1, 1], [0, 0, 0, 0]]}, "attention_mask", "leaves no token of the prompt of row 1"),
        ({"attention_mask": [[0, 1, 0, 1], [1, 1, 1, 1]]}, "attention_mask", "middle of the prompt of row 0"),
        ({"attention_mask": [[1, 1, 1, 0], [1, 1, 1, 0]]}, "attention_mask", "it is not the mask of these sequences"),
        ({"completion_mask": [[1, 1, 1, 1]] * 2}, "completion_mask", "[0, 3] is 1, after the end"),
        ({"completion_mask": [[1, 1, 1]] * 2}, "completion_mask", "has shape (2, 3)"),
        ({"completion_mask": [[1, 1, 0, 0], [1, 2, 1, 1]]}, "completion_mask", "[1, 1] is 2"),
        ({"completions_per_prompt": 3}, "completions_per_prompt", "does not divide"),
        ({"completions_per_prompt": 2}, "completions_per_prompt", "rows 0 and 1 of sequences have different prompts"),
        ({"completions_per_prompt": 0}, "completions_per_prompt", "at least 1"),
        ({"eos_token_id": 13}, "sequences", "after the first EOS"),
    ],
)
def test_what_means_nothing_or_two_things_is_refused_by_its_field(changes: dict[str, Any], field: str, problem: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        rollouts_from_padded(**{**GOOD, **changes})
    assert raised.value.field == field
    assert problem in str(raised.value)
    assert str(raised.value).startswith(field)


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(InvalidRequestError) as raised:
        rollouts_from_padded(*arguments, **options)
    return str(raised.value)


def test_padding_that_may_be_text_is_refused() -> None:
    # a prompt that ends in its EOS, or right padding
    assert "is an EOS too" in refused([[11, EOS, 12, EOS]], 2, eos_token_id=EOS, pad_token_id=EOS)
    # a row that nobody ended, in an id that is padding elsewhere
    rows = [[11, 12, 13, PAD], [11, 12, EOS, PAD]]
    assert "[0] has no EOS and ends in 0, which is padding elsewhere" in refused(rows, 1, eos_token_id=EOS, attention_mask=[[1], [1]])


def test_a_row_of_padding_alone_is_refused() -> None:
    assert "completion of row 0" in refused([[11, PAD, PAD]], 1, eos_token_id=EOS, pad_token_id=PAD)
    assert "completion of row 0" in refused([[11, PAD, PAD]], 1, eos_token_id=EOS, attention_mask=[[1, 0, 0]])
    assert "prompt of row 0" in refused([[PAD, PAD, 5], [11, 12, 5]], 2, eos_token_id=EOS, pad_token_id=PAD)
    assert "every prompt begins, or ends, with pad_token_id 0" in refused([[PAD, PAD, 5]], 2, eos_token_id=EOS, pad_token_id=PAD)


def test_a_mask_that_disagrees_with_the_eos_is_refused() -> None:
    rows = [[11, 12, EOS, 13, 14]]
    assert "[0, 3] is 1, after the first EOS" in refused(rows, 1, eos_token_id=EOS, attention_mask=[[1, 1, 1, 1, 1]])
    assert "[0, 2] is 0 at the first EOS" in refused(rows, 1, eos_token_id=EOS, attention_mask=[[1, 1, 0, 0, 0]])
    assert "before its end" in refused(rows, 1, eos_token_id=EOS, attention_mask=[[1, 1, 0, 1, 0]])
    assert "before its end" in refused(rows, 1, eos_token_id=EOS, attention_mask=[[1, 0, 1, 0, 0]])
    # a multi-turn completion, where an EOS ends a turn: the mask alone decides
    assert tokens_of(rollouts_from_padded(rows, 1, eos_token_id=None, attention_mask=[[1] * 5])) == [([11], [[12, EOS, 13, 14]])]


def test_a_turn_that_ends_in_eos_is_not_the_end_of_what_was_sampled() -> None:
    for options in ({"attention_mask": [[1]]}, {"pad_token_id": PAD}):
        assert "after the first EOS" in refused([[11, 12, EOS, 13, 14, EOS]], 1, eos_token_id=EOS, **options)
        assert "after the first EOS" in refused([[11, 12, EOS, 13, EOS, PAD]], 1, eos_token_id=EOS, **options)
        assert "after the first EOS" in refused([[11, 12, EOS, PAD, EOS]], 1, eos_token_id=EOS, **options)


def test_a_prompt_length_of_another_batch_is_noticed() -> None:
    assert "is prompt_length the width" in refused([[11, 12, PAD, 13, EOS]], 2, eos_token_id=EOS, pad_token_id=PAD)


def test_an_id_below_zero_is_no_token() -> None:
    assert "[0, 2] is -100" in refused([[11, 12, -100, EOS]], 1, eos_token_id=EOS, attention_mask=[[1]])


def test_an_empty_batch_has_no_rollouts() -> None:
    assert rollouts_from_padded(np.zeros((0, 5), int), 2, eos_token_id=EOS, attention_mask=np.ones((0, 2))) == []


def test_prompts_in_turn_instead_of_together_are_noticed() -> None:
    rows = [[11, 12, EOS], [21, 12, EOS]] * 2
    assert "different prompts" in refused(rows, 1, eos_token_id=EOS, attention_mask=np.ones((4, 1)), completions_per_prompt=2)
    groups = rollouts_from_padded(sorted(rows), 1, eos_token_id=EOS, attention_mask=np.ones((2, 1)), completions_per_prompt=2)
    assert [len(group.completions) for group in groups] == [2, 2]


# ------------------------------------------------------------------------------------------------------------------------- torch


def test_tensors_are_read_whatever_their_type() -> None:
    torch = pytest.importorskip("torch")
    rows, mask = torch.tensor(ROWS), torch.tensor(MASK)
    expected = tokens_of(rollouts_from_padded(**GOOD))
    for kind in (torch.bool, torch.int64, torch.float32, torch.bfloat16, torch.float16):
        groups = rollouts_from_padded(rows.to(torch.int32), 4, eos_token_id=torch.tensor([EOS]), attention_mask=mask.to(kind))
        assert tokens_of(groups) == expected
    with_grad = mask.float().requires_grad_()
    assert tokens_of(rollouts_from_padded(rows, torch.tensor(4), eos_token_id=EOS, attention_mask=with_grad)) == expected
    assert "holds float32" in refused(rows.to(torch.bfloat16), 4, eos_token_id=EOS, attention_mask=mask)
    for unreadable in (rows.to_sparse(), rows.to("meta"), torch.nested.nested_tensor([rows[0].float()])):
        assert refused(unreadable, 4, eos_token_id=EOS, attention_mask=mask).startswith("sequences")


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_generate_gives_is_what_it_gives_without_padding(side: str, pad_is_eos: bool) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
    )
    model = transformers.LlamaForCausalLM(config).eval()
    pad = EOS if pad_is_eos else PAD
    prompts = [[5, EOS, 6, 7], [8], [9, EOS]]
    width = max(map(len, prompts))
    filled = [[pad] * (width - len(each)) + each if side == "left" else each + [pad] * (width - len(each)) for each in prompts]
    masked = [
        [0] * (width - len(each)) + [1] * len(each) if side == "left" else [1] * len(each) + [0] * (width - len(each)) for each in prompts
    ]
    mask = torch.tensor(masked)
    options = {"do_sample": True, "max_new_tokens": 20, "num_return_sequences": 6, "eos_token_id": [EOS, OTHER_EOS], "pad_token_id": pad}
    sequences = model.generate(torch.tensor(filled), attention_mask=mask, **options)

    groups = rollouts_from_padded(sequences, width, eos_token_id=[EOS, OTHER_EOS], attention_mask=mask, completions_per_prompt=6)

    assert [group.prompt.tolist() for group in groups] == prompts
    for row, completion in enumerate(completion for group in groups for completion in group.completions):
        sampled, kept = sequences[row, width:].tolist(), completion.tokens.tolist()
        assert sampled[: len(kept)] == kept
        assert Counter(token in (EOS, OTHER_EOS) for token in kept[:-1])[True] == 0
        assert kept[-1] in (EOS, OTHER_EOS) or len(kept) == len(sampled)
        assert set(sampled[len(kept) :]) <= {pad}
