"""Whatever a trainer hands over is read as it is meant, or refused by the name of its field."""

from __future__ import annotations

import uuid
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from probescore import InvalidRequestError
from probescore_adapters.arrays import as_group_key, as_ids, as_list, as_mask, as_rewards

IDS = [5, 6, 7]
HOLDERS_OF_IDS: dict[str, Any] = {
    "list": IDS,
    "tuple": tuple(IDS),
    "range": range(5, 8),
    "generator": (token for token in IDS),
    "deque": deque(IDS),
    "numpy int32": np.array(IDS, np.int32),
    "numpy uint16": np.array(IDS, np.uint16),
    "numpy uint64": np.array(IDS, np.uint64),
    "big endian": np.array(IDS, ">i4"),
    "not contiguous": np.array([IDS, IDS]).T[:, 0],
    "list of numpy numbers": [np.int64(token) for token in IDS],
    "object array": np.array(IDS, object),
    "masked array without a masked entry": np.ma.array(IDS, mask=False),
    "torch": torch.tensor(IDS),
    "torch int32": torch.tensor(IDS, dtype=torch.int32),
    "list of torch numbers": [*torch.tensor(IDS)],
    "not contiguous torch": torch.tensor([IDS, IDS]).T[:, 0],
}


@pytest.mark.parametrize("given", HOLDERS_OF_IDS.values(), ids=HOLDERS_OF_IDS.keys())
def test_ids_are_read_whatever_holds_them(given: Any) -> None:
    read = as_ids(given, "ids")
    assert (read.dtype, read.tolist()) == (np.int64, IDS)


@pytest.mark.parametrize("empty", [[], (), np.zeros(0), torch.zeros(0), iter([])])
def test_no_ids_are_no_ids(empty: Any) -> None:
    assert as_ids(empty, "ids").shape == (0,)


class Sharded(torch.Tensor):
    def full_tensor(self) -> torch.Tensor:
        return self


MEANS_MORE: dict[str, Any] = {
    "masked": np.ma.array(IDS, mask=[0, 1, 0]),
    "sparse": torch.tensor(IDS).to_sparse(),
    "nested": torch.nested.nested_tensor([torch.tensor(IDS), torch.tensor(IDS)]),
    "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    "meta": torch.ones(3, device="meta"),
    "a shard": torch.ones(3).as_subclass(Sharded),
    "complex": np.array([1j, 0, 0]),
    "times": np.array(["2026-01-01"] * 3, "datetime64[D]"),
    "records": np.zeros(3, [("id", int)]),
    "words": ["1", "0", "1"],
    "text": "101",
    "bytes": b"101",
    "None": None,
    "a None in it": [1, None, 0],
    "a None in an object array": np.array([1, None, 0]),
    "ragged": [[1, 0], [1]],
    "two axes": [[1, 0, 1]],
    "no axis": np.array(1),
    "a dict": {0: 1},
    "a set": {0, 1},
    "a function": len,
    "too large": [2**70, 0, 1],
}


@pytest.mark.parametrize(
    "read", [lambda given: as_ids(given, "field"), lambda given: as_mask(given, 3, "field"), lambda given: as_rewards(given, 3, "field")]
)
@pytest.mark.parametrize("given", MEANS_MORE.values(), ids=MEANS_MORE.keys())
def test_what_says_more_than_its_numbers_or_less_is_refused_by_its_field(read: Any, given: Any) -> None:
    with pytest.raises(InvalidRequestError, match="field") as refused:
        read(given)
    assert refused.value.field.startswith("field")
    assert isinstance(refused.value, ValueError)


@pytest.mark.parametrize("given", [[1.0, 2.0], [True, False], torch.ones(2), np.array([2**63], np.uint64)])
def test_what_is_no_integer_is_no_id(given: Any) -> None:
    with pytest.raises(InvalidRequestError, match="field"):
        as_ids(given, "field")


MASKS: dict[str, Any] = {
    "bool": [True, False, True],
    "int": [1, 0, 1],
    "float": [1.0, -0.0, 1.0],
    "mixed": [True, 0, 1.0],
    "torch bool": torch.tensor([True, False, True]),
    "bfloat16": torch.tensor([1, 0, 1], dtype=torch.bfloat16),
    "float8": torch.tensor([1.0, 0.0, 1.0]).to(torch.float8_e4m3fn),
    "with a gradient": torch.tensor([1.0, 0.0, 1.0], requires_grad=True),
    "negated lazily": torch._neg_view(torch.tensor([-1.0, 0.0, -1.0])),
}


@pytest.mark.parametrize("given", MASKS.values(), ids=MASKS.keys())
def test_masks_are_read_in_every_type_of_numbers(given: Any) -> None:
    assert as_mask(given, 3, "mask").tolist() == [True, False, True]


@pytest.mark.parametrize("wrong", [-100, 2, 0.001, float("nan"), float("inf"), 1 - 1e-9])
@pytest.mark.parametrize("holder", [list, np.array, lambda entries: torch.tensor(entries, dtype=torch.float64)])
def test_entry_of_a_mask_that_is_neither_0_nor_1_is_refused(holder: Any, wrong: float) -> None:
    with pytest.raises(InvalidRequestError, match=r"^mask\[1\]: a mask holds 0 and 1, got "):
        as_mask(holder([1.0, wrong, 0.0]), 3, "mask")


def test_mask_of_another_length_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"^mask: 2 entries for 3 tokens$"):
        as_mask([1, 0], 3, "mask")


REWARDS: dict[str, Any] = {
    "list": [0.5, -1, True],
    "float32": np.array([0.5, -1, 1], np.float32),
    "bfloat16": torch.tensor([0.5, -1, 1], dtype=torch.bfloat16),
    "with a gradient": torch.tensor([0.5, -1, 1], requires_grad=True) * 1,
    "tensors": [torch.tensor(0.5, requires_grad=True), torch.tensor(-1.0), 1],
    "generator": (reward for reward in (0.5, -1.0, 1.0)),
}


@pytest.mark.parametrize("given", REWARDS.values(), ids=REWARDS.keys())
def test_rewards_are_read_whatever_holds_them(given: Any) -> None:
    assert as_rewards(given, 3, "task_rewards").tolist() == [0.5, -1.0, 1.0]


@pytest.mark.parametrize("given", [[1.0, None, 1.0], [1.0, float("nan"), 1.0], [0, np.inf, 0], torch.tensor([0, torch.nan, 0])])
def test_reward_that_is_no_number_is_named(given: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"^task_rewards\[1\]: "):
        as_rewards(given, 3, "task_rewards")


EQUAL_KEYS: dict[str, tuple[Any, Any]] = {
    "torch numbers": tuple(torch.tensor([3, 3])),
    "torch and int": (torch.tensor(3), 3),
    "numpy numbers": (np.int64(3), np.int32(3)),
    "arrays": (np.array([1, 2]), np.array([1, 2])),
    "rows of a tensor": tuple(torch.tensor([[1, 2], [1, 2]])),
    "lists": ([1, [2]], (1, (2,))),
    "words": ("a", np.str_("a")),
    "uuids": (uuid.UUID(int=1), uuid.UUID(int=1)),
    "bfloat16": tuple(torch.tensor([3, 3], dtype=torch.bfloat16)),
    "with a gradient": tuple(torch.tensor([3.0, 3.0], requires_grad=True)),
}


@pytest.mark.parametrize(("one", "other"), EQUAL_KEYS.values(), ids=EQUAL_KEYS.keys())
def test_keys_of_groups_are_equal_by_value(one: Any, other: Any) -> None:
    assert as_group_key(one, "group") == as_group_key(other, "group")
    assert len({as_group_key(one, "group"), as_group_key(other, "group")}) == 1


@pytest.mark.parametrize("given", [float("nan"), torch.tensor(float("nan")), object(), {"a": 1}, {1}, (1, object()), lambda: 1])
def test_key_without_a_value_is_refused(given: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"^group"):
        as_group_key(given, "group")


@pytest.mark.parametrize("given", [None, "abc", 5])
def test_one_thing_is_no_batch(given: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"^prompts: expected one for each rollout"):
        as_list(given, "prompts")
