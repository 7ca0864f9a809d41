"""Activations on disk: what is read back, whole shards or none, a run that was killed, and what is refused before anything is written."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from models import BOS, HIDDEN_SIZE, tiny_model
from numpy.typing import NDArray

from probescore.types import Completion, CompletionActivations, RolloutGroup, Scope, Span
from probescore.wire.number_formats import NUMBER_FORMATS, Overflow
from probescore_server import Engine
from probescore_server.activation_store import writing
from probescore_server.activation_store.index import StoreRefused
from probescore_server.activation_store.reading import StoredActivations
from probescore_server.activation_store.writing import StorePlan, store_activations

TAPS = ("resid_post.1", "mlp_out.3")
POOLS = ("mean", "last", "max")
EVERYTHING = ("tokens", *POOLS)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(str(tiny_model()), taps="*")


def some_groups(count: int = 6, seed: int = 0) -> list[RolloutGroup]:
    random = np.random.default_rng(seed)

    def ids(length: int) -> NDArray[np.int64]:
        return random.integers(4, 90, length)

    asked = []
    for _ in range(count):
        follow_up = Completion(ids(4), spans=(Span("said", 1, 3),), follow_ups=(Completion(ids(2)),))
        spans = (Span("said", 2, 6), Span("nothing", 3, 3))
        asked.append(
            RolloutGroup(
                [BOS, *ids(9)],
                [Completion(ids(8), mask=ids(8) % 2, spans=spans, follow_ups=(follow_up,), id="masked"), ids(5), []],
            )
        )
    return asked


def views(found: CompletionActivations, path: tuple[int, ...] = ()) -> list[tuple[tuple[int, ...], CompletionActivations]]:
    inner = [view for index, each in enumerate(found.follow_ups) for view in views(each, (*path, index))]
    return [(path, found), *inner]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SHARD_TOKENS", 40)


# --------------------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize("dtype", NUMBER_FORMATS)
def test_what_is_read_back_is_what_the_engine_gives(engine: Engine, tmp_path: Path, dtype: str, scope: Scope) -> None:
    asked = some_groups()
    if scope is Scope.PROMPT:
        asked = [RolloutGroup(group.prompt, [Completion([5, 6]), Completion([7])]) for group in asked]
    labels = [[True, "copied", None][: len(group.completions)] for group in asked]
    store_activations(engine, asked, tmp_path / "out", taps=TAPS, pool=EVERYTHING, dtype=dtype, scope=scope, labels=labels)
    stored = StoredActivations(tmp_path / "out")
    assert len(stored.index.shards) > 1
    expected = [view for found in engine.activations(asked, TAPS, pool=EVERYTHING, scope=scope) for view in views(found)]
    assert len(stored) == len(expected)
    matrices = {(tap, pool): stored.matrix(tap, pool) for tap in TAPS for pool in POOLS}
    spans = {tap: stored.matrix(tap, "mean", span="said") for tap in TAPS}
    tolerance = {"float32": 1e-4, "bfloat16": 2**-8, "float16": 2**-10}[dtype]  # the engine's own batches are others here
    for row, (rollout, (path, found)) in enumerate(zip(stored, expected, strict=True)):
        of = rollout.rollout
        assert (of.group, of.completion, of.follow_up, of.id) == (found.group_index, found.completion_index, path, found.id)
        assert of.label == labels[of.group][of.completion]
        assert rollout.finite
        np.testing.assert_array_equal(rollout.token_ids, found.token_ids)
        np.testing.assert_array_equal(rollout.mask, found.selections[0])
        for tap in TAPS:
            np.testing.assert_allclose(rollout.tokens(tap), found.tokens[tap], rtol=tolerance, atol=1e-4)
            for column, pool in enumerate(POOLS):
                np.testing.assert_allclose(rollout.pooled(tap, pool), found.pooled[tap][:, column], rtol=tolerance, atol=1e-4)
                np.testing.assert_array_equal(matrices[tap, pool][row], rollout.pooled(tap, pool)[0])
            own = found.spans.index("said") + 1 if "said" in found.spans else None
            wanted = np.full(HIDDEN_SIZE, np.nan) if own is None else rollout.pooled(tap, "mean")[own]
            np.testing.assert_array_equal(spans[tap][row], wanted)


def test_shards_are_safetensors_for_anyone(engine: Engine, tmp_path: Path) -> None:
    for dtype, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        store_activations(engine, some_groups(), tmp_path / dtype, taps=TAPS, pool=("mean", "tokens"), dtype=dtype)
        tensors = safetensors.torch.load_file(tmp_path / dtype / "activations-00000.safetensors")
        assert {*tensors} == {"token_ids", "mask", "finite", *TAPS, *(f"{tap}/mean" for tap in TAPS)}
        stored = StoredActivations(tmp_path / dtype)
        for tap in TAPS:
            assert tensors[tap].dtype == kind
            np.testing.assert_array_equal(tensors[tap].float().numpy(), np.concatenate([rollout.tokens(tap) for rollout in stored]))


def test_a_rollout_without_numbers_is_nan_and_says_so(tmp_path: Path) -> None:
    shutil.copytree(tiny_model(), tmp_path / "model")
    weights = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"][90] = float("nan")
    safetensors.torch.save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    engine = Engine.load(str(tmp_path / "model"), taps=TAPS)
    store_activations(engine, [RolloutGroup([BOS], [[5, 6], [90, 7], [8]])], tmp_path / "out", taps=TAPS, pool=EVERYTHING)
    stored = StoredActivations(tmp_path / "out")
    assert [rollout.finite for rollout in stored] == [True, False, True]
    assert np.isnan(stored.matrix(TAPS[0], "max")).all(axis=1).tolist() == [False, True, False]
    assert [rollout.token_ids.tolist() for rollout in stored] == [[5, 6], [90, 7], [8]]


def test_reading_needs_no_torch(engine: Engine, tmp_path: Path) -> None:
    store_activations(engine, some_groups(1), tmp_path / "out", taps=TAPS)
    code = (
        "import sys; from probescore_server.activation_store.reading import StoredActivations; "
        f"print(StoredActivations({str(tmp_path / 'out')!r}).matrix('resid_post.1', 'mean').shape, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout == f"(5, {HIDDEN_SIZE}) False\n"


def test_what_is_not_stored_is_named(engine: Engine, tmp_path: Path) -> None:
    store_activations(engine, some_groups(1), tmp_path / "out", taps=TAPS, pool="mean")
    with pytest.raises(KeyError, match=r"resid_post.1/max is not stored; there are resid_post.1/mean, mlp_out.3/mean"):
        StoredActivations(tmp_path / "out").matrix("resid_post.1", "max")


# ------------------------------------------------------------------------------------------------------------------------ numbers


@given(arrays.arrays(np.float32, st.integers(1, 50), elements=st.floats(width=32)))
def test_bfloat16_rounds_as_torch_does_or_refuses(numbers: NDArray[np.float32]) -> None:
    wanted = torch.from_numpy(numbers.copy()).bfloat16().float().numpy()
    number_format = NUMBER_FORMATS["bfloat16"]
    if (np.isinf(wanted) & np.isfinite(numbers)).any():
        with pytest.raises(Overflow):
            number_format.encode(numbers)
    else:
        np.testing.assert_array_equal(number_format.decode(number_format.encode(numbers)), wanted)


@pytest.mark.parametrize(("dtype", "largest", "beyond"), [("float16", 65519.9, 65520.0), ("bfloat16", 3.39e38, 3.4e38)])
def test_the_largest_numbers_are_stored_and_larger_ones_refused(dtype: str, largest: float, beyond: float) -> None:
    number_format = NUMBER_FORMATS[dtype]
    numbers = np.array([[0, -largest], [np.nan, np.inf]], np.float32)
    decoded = number_format.decode(number_format.encode(numbers))
    assert decoded[0, 1] == pytest.approx(-number_format.largest)
    assert np.isnan(decoded[1, 0])
    numbers[1, 0] = -beyond
    with pytest.raises(Overflow) as overflow:
        number_format.encode(numbers)
    assert overflow.value.index == (1, 0)
    assert overflow.value.value == np.float32(-beyond)


def test_float16_refuses_overflow_naming_tap_value_and_rollout(tmp_path: Path) -> None:
    shutil.copytree(tiny_model(), tmp_path / "model")
    weights = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"][50, 3] = 70_000.0
    safetensors.torch.save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    engine = Engine.load(str(tmp_path / "model"), taps="resid_pre.0")
    asked = [RolloutGroup([BOS], [[5, 6]]), RolloutGroup([BOS], [[7], [8, 50]])]
    message = (
        r"^resid_pre.0: 70,000 in row 1 of groups\[1\].completions\[1\] is beyond float16, whose largest number is 65,504; store bfloat16"
    )
    with pytest.raises(StoreRefused, match=message):
        store_activations(engine, asked, tmp_path / "half", taps="*", pool="tokens", dtype="float16")
    assert [path.name for path in (tmp_path / "half").iterdir()] == ["index.json"]
    store_activations(engine, asked, tmp_path / "out", taps="*", pool="tokens", dtype="bfloat16")


# ----------------------------------------------------------------------------------------------------------- killed, and going on

_RUN = """
import sys, time
import numpy as np
from probescore import RolloutGroup
from probescore_server import Engine
from probescore_server.activation_store import writing
writing.SHARD_TOKENS = 40
engine = Engine.load({model!r}, taps="*")
def progress(done, total):
    print(done, flush=True)
    time.sleep(0.05)
groups = [RolloutGroup(prompt, completions) for prompt, completions in {groups!r}]
writing.store_activations(engine, groups, {directory!r}, taps="*", pool={pool!r}, dtype="bfloat16", progress=progress)
"""


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.usefixtures("small_shards")
def test_a_run_that_is_killed_ends_bit_equal(engine: Engine, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    prompts = [random.integers(4, 90, 9).tolist() for _ in range(12)]
    groups = [RolloutGroup(prompt, [random.integers(4, 90, length).tolist() for length in (8, 5, 0)]) for prompt in prompts]
    store_activations(engine, groups, tmp_path / "whole", taps="*", pool=EVERYTHING, dtype="bfloat16")
    code = _RUN.format(
        model=str(tiny_model()),
        groups=[(group.prompt, group.completions) for group in groups],
        directory=str(tmp_path / "killed"),
        pool=EVERYTHING,
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        next(line for line in run.stdout if int(line) >= 20)
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    killed = contents(tmp_path / "killed")
    assert any(name.endswith(".partial") for name in killed)
    kept = {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in killed if name.endswith(".safetensors")}
    assert 0 < len(kept) < len(contents(tmp_path / "whole")) - 1
    with pytest.raises(StoreRefused, match=r"is missing: the run did not come to its end; started again, it goes on"):
        StoredActivations(tmp_path / "killed")
    done: list[int] = []
    store_activations(
        engine, groups, tmp_path / "killed", taps="*", pool=EVERYTHING, dtype="bfloat16", progress=lambda count, _: done.append(count)
    )
    assert done[0] > 10  # what is whole is not computed again
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in kept} == kept


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", ["shorter", "longer", "other header"])
def test_a_shard_that_is_not_whole_is_written_again(engine: Engine, tmp_path: Path, damage: str) -> None:
    store_activations(engine, some_groups(), tmp_path / "out", taps=TAPS)
    before = contents(tmp_path / "out")
    shard = tmp_path / "out" / "activations-00001.safetensors"
    content = bytearray(shard.read_bytes())
    if damage == "other header":
        content[60] ^= 1
    shard.write_bytes(content[:-1] if damage == "shorter" else content + b"0" * (damage == "longer"))
    with pytest.raises(StoreRefused, match=r"activations-00001.safetensors: is not the shard that the index tells of"):
        StoredActivations(tmp_path / "out")
    store_activations(engine, some_groups(), tmp_path / "out", taps=TAPS)
    assert contents(tmp_path / "out") == before


@pytest.mark.usefixtures("small_shards")
def test_what_ends_a_run_from_within_leaves_whole_shards_only(engine: Engine, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store_activations(engine, some_groups(), tmp_path / "out", taps=TAPS, progress=stop)
    left = contents(tmp_path / "out")
    assert len(left) > 1
    assert not any(name.endswith(".partial") for name in left)
    store_activations(engine, some_groups(), tmp_path / "out", taps=TAPS)
    assert contents(tmp_path / "out").items() >= left.items()


# ------------------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"taps": "resid_post.1"}, "taps: resid_post.1, mlp_out.3 there and resid_post.1 here"),
        ({"pool": "max"}, "pools: mean, last there and max here"),
        ({"dtype": "bfloat16"}, "dtype: 'float32' there and 'bfloat16' here"),
        ({"scope": "all"}, "scope: 'completion' there and 'all' here"),
        ({"max_batch_bytes": 1 << 20}, "model.max_batch_bytes: 1073741824 there and 1048576 here"),
        ({"groups": some_groups(1, seed=1)}, "the rollouts are others"),
        ({"labels": [[1, 2, 3]]}, "ids, labels, spans or the cut into shards are others"),
    ],
)
def test_a_directory_of_other_activations_is_left_alone(engine: Engine, tmp_path: Path, changed: dict[str, object], message: str) -> None:
    asked = {"groups": some_groups(1), "directory": tmp_path / "out", "taps": TAPS}
    store_activations(engine, **asked)  # type: ignore[arg-type]
    before = contents(tmp_path / "out")
    with pytest.raises(StoreRefused, match="holds other activations") as refusal:
        store_activations(engine, **(asked | changed))  # type: ignore[arg-type]
    assert message in str(refusal.value)
    assert contents(tmp_path / "out") == before


def test_a_directory_with_something_else_is_left_alone(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreRefused, match="is not empty, and holds no activations; give another directory"):
        store_activations(engine, some_groups(1), tmp_path, taps=TAPS)
    assert contents(tmp_path) == {"notes.txt": b"mine"}
    (tmp_path / "notes.txt").rename(tmp_path / "index.json")
    with pytest.raises(StoreRefused, match="no index of activations"):
        store_activations(engine, some_groups(1), tmp_path, taps=TAPS)


def test_two_runs_do_not_write_to_one_directory(engine: Engine, tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(StoreRefused, match="another run is writing to it"):
            store_activations(engine, some_groups(1), tmp_path, taps=TAPS)
    finally:
        os.close(descriptor)
    store_activations(engine, some_groups(1), tmp_path, taps=TAPS)


@pytest.mark.usefixtures("small_shards")
def test_what_does_not_fit_on_the_disk_is_refused_before_anything_is_written(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = StorePlan.make(engine, some_groups(), taps=TAPS, pool=EVERYTHING)
    usage = namedtuple("usage", "total used free")
    free = plan.bytes - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, free))
    with pytest.raises(StoreRefused, match=r"GB are to be written, and .* GB are free; ask for fewer taps"):
        plan.write(tmp_path / "out")
    assert contents(tmp_path / "out") == {}
    free = plan.bytes
    plan.write(tmp_path / "out")
    assert sum(map(len, contents(tmp_path / "out").values())) == plan.bytes  # the estimate is exact
    (tmp_path / "out" / "activations-00002.safetensors").unlink()
    free = plan.index.file_bytes(plan.index.shards[2])  # only what is missing counts
    plan.write(tmp_path / "out")
    StoredActivations(tmp_path / "out")


def test_a_full_disk_names_the_file_and_leaves_nothing_of_it(engine: Engine, tmp_path: Path) -> None:
    import resource

    plan = StorePlan.make(engine, some_groups(), taps=TAPS, pool=EVERYTHING)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (plan.bytes // 2, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as full:
            plan.write(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert full.value.filename == str(tmp_path / "out" / "activations-00000.safetensors")
    assert [*contents(tmp_path / "out")] == ["index.json"]


@pytest.mark.parametrize("fields", [{"dtype": "float8"}, {"dtype": "auto"}])
def test_a_dtype_that_is_none_is_refused(engine: Engine, tmp_path: Path, fields: dict[str, str]) -> None:
    with pytest.raises(StoreRefused, match="is none of float32, bfloat16, float16"):
        store_activations(engine, some_groups(1), tmp_path / "out", taps=TAPS, **fields)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{}", "[]", "nothing", '{"format": "probescore-activations", "format_version": 1}'])
def test_what_is_no_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(StoreRefused, match="no index of activations"):
        StoredActivations(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"format": "probescore-activations", "format_version": 2}))
    with pytest.raises(StoreRefused, match="format_version 2 is not 1, the one that is read here"):
        StoredActivations(tmp_path)
    with pytest.raises(StoreRefused, match="no activations here"):
        StoredActivations(tmp_path / "nowhere")


def test_what_the_documentation_shows_runs(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/activations.md").read_text()
    reading, asking, _from_a_server, _of_a_reading = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    store_activations(engine, some_groups(2), tmp_path / "activations", taps=TAPS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_model())
    exec(reading, names := {})  # noqa: S102
    assert names["features"].shape == names["answers"].shape == (10, HIDDEN_SIZE)
    exec(asking, names := {})  # noqa: S102
    assert names["found"].completion_index == 1
