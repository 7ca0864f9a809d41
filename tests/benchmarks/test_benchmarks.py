"""The benchmark's own arithmetic: its loads, its floor, its ratios and what it writes. Its numbers are nobody's promise here."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import readings
from benchmarks.activations import print_reading, store_many
from benchmarks.compare import compare
from benchmarks.loads import LOADS, Load, LoadGroup, Unit
from benchmarks.model import SHAPES, BenchModel, make_model
from benchmarks.process import VariantProcess, environment_of
from benchmarks.ratios import Spread
from benchmarks.report import results
from benchmarks.service import print_latency
from benchmarks.variants import Job, file_paths, load
from benchmarks.variants.server import deal_out

VOCAB_SIZE = SHAPES["tiny"].vocab_size
SMALL = Load("small", groups=2, completions=3, prompt_tokens=(8, 12), completion_tokens=(2, 9))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BenchModel:
    return make_model(SHAPES["tiny"], folder=tmp_path_factory.mktemp("bench"))


def job(model: BenchModel, variant: str) -> Job:
    return Job(variant, str(model.directory), file_paths(model.probes), str(model.directions), model.layer, concurrency=2)


@pytest.mark.parametrize("name", LOADS)
def test_repetitions_have_the_same_lengths_and_other_ids(name: str) -> None:
    first, second = (list(LOADS[name].units(repetition, VOCAB_SIZE)) for repetition in range(2))
    assert [unit.segment_sizes() for unit in first] == [unit.segment_sizes() for unit in second]
    assert first[0].calls[0].prompt.tolist() != second[0].calls[0].prompt.tolist()


def test_second_epoch_needs_completions_only() -> None:
    (unit,) = LOADS["second_epoch"].units(0, VOCAB_SIZE)
    assert sum(unit.segment_sizes()) == unit.completion_tokens == 1600


def test_each_turn_of_a_conversation_needs_only_what_is_new() -> None:
    (unit,) = LOADS["conversation"].units(0, VOCAB_SIZE)
    last = unit.calls[-1]
    assert len(unit.calls) == 10
    assert sum(unit.segment_sizes()) == len(last.prompt) + len(last.completions[0])
    whole = LOADS["conversation"].compared(unit, VOCAB_SIZE)
    assert whole is not None
    assert whole.real_tokens == sum(unit.segment_sizes())


def test_a_unit_is_read_as_it_was_saved(tmp_path) -> None:
    unit = Unit(
        (LoadGroup(np.arange(3), (np.arange(4), np.arange(2))),),
        earlier=(LoadGroup(np.arange(1), (np.arange(5),)),),
        probes=2,
        per_token=False,
        at_once=True,
    )
    unit.save(tmp_path / "unit.npz")
    read = Unit.read(tmp_path / "unit.npz")
    assert (read.probes, read.per_token, read.at_once) == (2, False, True)
    for before, after in zip((*unit.calls, *unit.earlier), (*read.calls, *read.earlier), strict=True):
        assert [ids.tolist() for ids in before.sequences()] == [ids.tolist() for ids in after.sequences()]


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=5))
def test_ratios_are_made_within_a_repetition(pairs: list[tuple[float, float]]) -> None:
    spread = Spread.of_ratios([above for above, _ in pairs], [below for _, below in pairs])
    assert spread.min == pytest.approx(min(above / below for above, below in pairs))
    assert spread.min <= spread.median <= spread.max


@given(st.integers(1, 20), st.integers(1, 8))
def test_completions_are_dealt_out_evenly_and_in_order(completions: int, clients: int) -> None:
    groups = [
        LoadGroup(np.arange(2), tuple(np.array([index]) for index in range(completions))),
        LoadGroup(np.arange(3), tuple(np.array([completions + index]) for index in range(3))),
    ]
    parts = deal_out(groups, clients)
    dealt = [(len(group.prompt), int(completion[0])) for part in parts for group in part for completion in group.completions]
    assert dealt == [(2 if index < completions else 3, index) for index in range(completions + 3)]
    sizes = [sum(len(group.completions) for group in part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_the_floor_counts_every_matrix_product_of_the_blocks_that_are_loaded(model: BenchModel) -> None:
    shape = model.shape
    (unit, *_) = SMALL.units(0, VOCAB_SIZE)
    heads = shape.head_dim * (2 * shape.num_attention_heads + 2 * shape.num_key_value_heads)
    weights = (model.layer + 1) * shape.hidden_size * (heads + 3 * shape.intermediate_size)
    scored = load(job(model, "floor")).score(unit)
    assert scored.facts["flops"] == 2 * weights * sum(unit.segment_sizes())


def test_variants_agree_and_what_is_written_has_every_field(model: BenchModel) -> None:
    names = ("a", "b", "engine", "server", "floor")
    loads = (SMALL, replace(SMALL, name="data_set", kind="data_set"))
    before = torch.get_num_threads()
    processes: dict[str, VariantProcess] = {}
    try:
        for name in names:
            processes[name] = VariantProcess(job(model, name))
        comparisons = [compare(each, processes, vocab_size=VOCAB_SIZE, repeats=2) for each in loads]
    finally:
        for process in processes.values():
            process.close()
    assert torch.get_num_threads() == before
    written = json.loads(json.dumps(results(comparisons), allow_nan=False))
    for each, comparison in zip(loads, comparisons, strict=True):
        assert comparison.disagreeing() == []
        assert set(written[each.name]) == set(names)
        for name in names:
            result = written[each.name][name]
            assert set(result["over_a"]) == set(result["over_floor"]) == {"median", "min", "max"}
            assert all(math.isfinite(result[field]) for field in ("tokens_per_second", "peak_rss_bytes", "max_abs_diff"))
    # the second load's prompts are those of the first, which the engine has in its cache
    computed = sum(sum(unit.segment_sizes()) for unit in SMALL.units(0, VOCAB_SIZE))
    assert written["small"]["engine"]["tokens_computed"] == written["small"]["floor"]["tokens_computed"] == [computed] * 2


def test_latency_is_told_on_one_core_and_on_all_beside_an_empty_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.service.ROUND_CALLS", 2)
    shown = io.StringIO()
    before, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    try:
        print_latency(Console(file=shown), rounds=1)
    finally:
        torch.set_num_threads(before)
    assert os.sched_getaffinity(0) == cores
    number = r"-?\d+\.\d\d \(-?\d+\.\d\d–-?\d+\.\d\d\)"
    line = rf"(\d+) cores?, ms: engine {number}, server {number}, added {number}; an empty call {number}"
    counts = re.findall(line, shown.getvalue())
    assert [int(count) for count in counts] == sorted({1, len(cores)})


def test_activations_agree_with_padded_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the model is made
    assert print_reading(Console(file=io.StringIO()), "tiny", ["statements"], repeats=1)


def test_what_is_stored_is_counted_and_removed(tmp_path: Path) -> None:
    run = store_many(tmp_path / "run", 4000, hidden_size=64)
    assert run.tokens == 4000
    assert run.stored_bytes >= 4000 * 3 * 64 * 2
    assert run.peak_bytes > 0
    assert not (tmp_path / "run").exists()


def test_readings_are_measured_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the model is made
    monkeypatch.setitem(LOADS, "small", SMALL)
    ran = CliRunner().invoke(readings.app, ["both", "--shape", "tiny", "--load", "small", "--rank", "2", "--repeats", "1"])
    assert ran.exit_code == 0, ran.output
    rows = [re.sub(r"[^\w.–() ]", "", line).split("  ")[0].strip() for line in ran.output.splitlines() if "(" in line and "–" in line]
    assert rows == ["frozen and r2", "frozen and checkpoint", "r2 alone", "checkpoint alone"]


def test_another_version_is_measured_with_its_own_packages(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "probescore_server.py").write_text("here = __file__")
    found = subprocess.run(
        [sys.executable, "-c", "import probescore_server; print(probescore_server.here)"],
        env=environment_of(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(tmp_path / "server" / "probescore_server.py")
