"""Weights that leave for host memory come back as they were. On a CPU the same storages move as on a GPU; only pinning is left out."""

from __future__ import annotations

import copy
import resource

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probescore_server.engine.weight_offload import WeightOffload

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)

shapes = st.lists(st.integers(0, 9), max_size=3)
tensors = st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=8)


def of_bytes(shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bytes, NaN and all, except in bool, which has two values."""
    size = torch.Size(shape).numel() * dtype.itemsize
    content = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return content.view(dtype).reshape(shape)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.flatten().view(torch.uint8).clone().numpy().tobytes()  # a storage that numpy has seen can no longer be resized


def tied() -> torch.nn.Module:
    """An embedding whose weight is the head's too, a buffer, and a weight in another dtype."""
    model = torch.nn.Sequential(torch.nn.Embedding(11, 3), torch.nn.Linear(3, 11, bias=False), torch.nn.Linear(3, 5).to(torch.bfloat16))
    model[1].weight = model[0].weight
    model.register_buffer("inverse_frequencies", torch.rand(7), persistent=False)
    return model.requires_grad_(False)


def of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


@given(tensors, st.sampled_from([1, 2, 16, 1024]))
def test_every_byte_comes_back_whatever_the_sizes_and_pieces(described: list[tuple[list[int], torch.dtype]], piece_bytes: int) -> None:
    moved = [of_bytes(shape, dtype, seed) for seed, (shape, dtype) in enumerate(described)]
    before = [bytes_of(tensor) for tensor in moved]
    away = WeightOffload(piece_bytes)

    away.leave(moved)
    away.come_back()

    assert [bytes_of(tensor) for tensor in moved] == before


def test_while_they_are_away_they_take_no_memory() -> None:
    model, away = tied(), WeightOffload()

    away.leave(of(model))

    assert [tensor.untyped_storage().nbytes() for tensor in of(model)] == [0] * len(of(model))


def test_tied_weights_move_once_and_stay_tied() -> None:
    model, away = tied(), WeightOffload()
    view = model[0].weight[3]
    expected = copy.deepcopy(view)

    away.leave([*of(model), model[1].weight, view])
    moved = away.bytes
    away.come_back()

    assert moved == 11 * 3 * 4 + (3 * 5 + 5) * 2 + 7 * 4
    assert model[0].weight is model[1].weight
    assert torch.equal(view, expected)


def test_the_second_time_takes_no_more_host_memory() -> None:
    model, away = tied(), WeightOffload(piece_bytes=32)
    for _ in range(2):
        away.leave(of(model))
        away.come_back()
    pieces = [piece.data_ptr() for piece in away._pieces]

    away.leave(of(model))

    assert [piece.data_ptr() for piece in away._pieces] == pieces
    assert sum(map(len, away._pieces)) == away.bytes


def test_coming_back_twice_changes_nothing() -> None:
    model, away = tied(), WeightOffload()
    before = copy.deepcopy(model.state_dict())
    away.leave(of(model))
    for _ in range(2):
        away.come_back()

    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_one_bit_that_changed_on_the_way_is_noticed() -> None:
    model, away = tied(), WeightOffload()
    away.leave(of(model))

    away._pieces[0][20] ^= 1

    with pytest.raises(RuntimeError, match="not those that left"):
        away.come_back()


def test_if_there_is_no_host_memory_nothing_has_moved() -> None:
    large = torch.arange(64 << 20, dtype=torch.int32)  # 256 MiB: more than what may come free meanwhile
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + large.nbytes // 2, limits[1]))
    try:
        with pytest.raises(RuntimeError, match="memory"):
            WeightOffload().leave([large])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)

    assert torch.equal(large, torch.arange(64 << 20, dtype=torch.int32))
