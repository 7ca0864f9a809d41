"""``probescore activations``: what is in the directory, what is told, and how it ends when something is wrong or it is stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from models import BOS, HIDDEN_SIZE, LAYERS
from typer.testing import CliRunner

from probescore import Completion, RolloutGroup, Span, Text
from probescore_server import Engine
from probescore_server.activation_store.reading import StoredActivations
from probescore_server.cli.app import app

LINES = [
    {
        "prompt": [BOS, 5],
        "completions": [{"ids": [7, 8, 9], "id": "a", "mask": [1, 1, 0], "spans": {"tool": [0, 2]}}, [10]],
        "label": [1, 0],
    },
    {"prompt": "w5 w6", "completion": {"text": "w7 w8", "follow_ups": [{"ids": [13, 14]}]}, "label": "copied"},
]
GROUPS = [
    RolloutGroup([BOS, 5], [Completion([7, 8, 9], mask=[1, 1, 0], spans=(Span("tool", 0, 2),), id="a"), [10]]),
    RolloutGroup(Text("w5 w6", True), [Completion("w7 w8", follow_ups=(Completion([13, 14]),))]),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "rollouts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return file


def run(*arguments: str | Path, stdin: str = "") -> Result:
    """The command, in this process: torch is imported once."""
    return CliRunner().invoke(app, ["activations", *map(str, arguments)], input=stdin)


def test_a_file_of_rollouts_becomes_a_directory(probescore, model, data, tmp_path):
    wanted = ("--taps", "resid_post.*, final_norm", "--pool", "mean,last")
    ran = probescore("activations", data, "--model", model, *wanted, "-o", tmp_path / "new" / "out")

    assert ran.returncode == 0, ran.stderr
    stored = StoredActivations(tmp_path / "new" / "out")
    taps = [*(f"resid_post.{layer}" for layer in range(LAYERS)), "final_norm"]
    assert (list(stored.index.taps), stored.index.pools, stored.index.tokens) == (taps, ("mean", "last"), False)
    assert [rollout.label for rollout in stored.rollouts] == [1, 0, "copied", "copied"]
    assert [rollout.id for rollout in stored.rollouts] == ["a", "", "", ""]
    expected = [*Engine.load(str(model), taps=taps).activations(GROUPS, taps, pool=("mean", "last"))]
    assert stored.matrix("final_norm", "mean").shape == (4, HIDDEN_SIZE)
    for tap in taps:
        whole = [found.pooled[tap][0] for found in (*expected, *expected[2].follow_ups)]
        np.testing.assert_allclose(stored.matrix(tap, "mean"), [rows[0] for rows in whole], atol=1e-5)
        np.testing.assert_allclose(stored.matrix(tap, "last"), [rows[1] for rows in whole], atol=1e-5)
    files = [*(tmp_path / "new" / "out").iterdir()]
    told = f"3 completions at {len(taps)} taps: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB in 1 files; "
    assert told in ran.stdout
    assert f"wrote {tmp_path / 'new' / 'out'}\n" in ran.stdout


def test_asked_for_again_it_goes_on(model, data, tmp_path):
    wanted = ("--taps", "resid_pre.1", "--pool", "tokens", "--store-dtype", "bfloat16")
    command = ("-", "--model", model, *wanted, "-o", tmp_path / "out")
    first = run(*command, stdin=data.read_text())
    written = (tmp_path / "out" / "activations-00000.safetensors").stat().st_mtime_ns
    again = run(*command, stdin=data.read_text())

    assert (first.exit_code, again.exit_code) == (0, 0), again.stderr
    assert (tmp_path / "out" / "activations-00000.safetensors").stat().st_mtime_ns == written
    assert next(iter(StoredActivations(tmp_path / "out"))).tokens("resid_pre.1").shape == (3, HIDDEN_SIZE)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--taps", "resid_post.9"), "taps[0]: 'resid_post.9' is none of the taps of this model: resid_pre.0 … resid_pre.3, "),
        (("--taps", "resid_post.1", "--pool", "median"), "pool: 'median' is none of tokens, mean, last, max"),
        (("--taps", "resid_post.1", "--scope", "answer"), "scope: 'answer' is none of completion, prompt, all"),
        (("--taps", "resid_post.1", "--store-dtype", "float8"), "dtype 'float8' is none of float32, bfloat16, float16"),
        (
            ("--taps", "*", "--pool", "tokens", "--max-batch-bytes", "1000"),
            "groups[0].completions[0]: 6528 bytes of activations; ",
        ),
    ],
)
def test_what_is_wrong_is_one_line(model, data, tmp_path, arguments, said):
    ran = run(data, "--model", model, *arguments, "-o", tmp_path / "out")

    assert ran.exit_code == 2
    assert ran.stderr.startswith(f"probescore: {said}")
    assert ran.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"prompt": [1], "completion": [5]}\n{"prompt": [1]}', ":2: completions: give either"),
        ("", "there are no rollouts in it"),
        ('{"prompt": [1], "completion": [500]}', "groups[0].completions[0].ids: id 500 at index 0 is not in the vocabulary"),
    ],
)
def test_a_wrong_line_is_named(model, tmp_path, lines, said):
    (tmp_path / "rollouts.jsonl").write_text(lines)
    ran = run(tmp_path / "rollouts.jsonl", "--model", model, "--taps", "*", "-o", tmp_path / "out")

    assert ran.exit_code == 2
    assert said in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_a_directory_of_something_else_is_refused_before_the_model_is_loaded(data, tmp_path):
    ran = run(data, "--model", "/nowhere", "--taps", "*", "-o", tmp_path)
    no_model = run(data, "--model", "/nowhere", "--taps", "*", "-o", tmp_path / "out")

    assert ran.exit_code == 2
    assert ran.stderr == f"probescore: {tmp_path}: is not empty, and holds no activations; give another directory\n"
    assert (no_model.exit_code, no_model.stderr) == (1, "probescore: /nowhere: not a directory with a model\n")


def test_ctrl_c_keeps_whole_files_and_says_how_far_it_came(model, tmp_path):
    random = np.random.default_rng(0)
    lines = [{"prompt": [BOS], "completion": random.integers(4, 90, 400).tolist()} for _ in range(3000)]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["activations", "rollouts.jsonl", "--model", str(model), "--taps", "*", "-o", "out"]
    with subprocess.Popen(
        [sys.executable, "-m", "probescore_server.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as running:
        deadline = time.monotonic() + 100
        while not (tmp_path / "out" / "activations-00000.safetensors").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=100)
    assert running.returncode == 128 + signal.SIGINT
    assert "of 3000 completions; the same command goes on with the file that it was at" in said.splitlines()[-1]
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert {name.partition("-")[0] for name in names} == {"index.json", "activations"}
    assert not any(name.endswith(".partial") for name in names)
