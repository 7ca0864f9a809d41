"""``probescore probes import``: from another library's file to one that is served, in one command."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import joblib
import numpy as np
import pytest
import torch
from models import BOS, HIDDEN_SIZE, VOCAB_SIZE
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

from probescore import Completion, RolloutGroup
from probescore_probes import ReferenceModel, read_probe_file
from probescore_server import Engine
from probescore_server.cli.app import app

RANDOM = np.random.default_rng(2)
WEIGHT = RANDOM.standard_normal(HIDDEN_SIZE).astype(np.float32)
ROLLOUTS = [([BOS, *RANDOM.integers(4, VOCAB_SIZE - 2, 4).tolist()], RANDOM.integers(4, VOCAB_SIZE - 2, 8).tolist()) for _ in range(3)]


@pytest.fixture(scope="module")
def direction(tmp_path_factory):
    np.save(tmp_path_factory.mktemp("foreign") / "direction.npy", WEIGHT)
    return tmp_path_factory.getbasetemp() / "foreign0" / "direction.npy"


@pytest.fixture(scope="module")
def author(model):
    """What the author's code gives, after block 1."""
    reference = ReferenceModel.load(model)
    activations = reference.completion_activations(ROLLOUTS, "resid_post.1")
    return [rows.astype(np.float64) @ WEIGHT for rows in activations]


def lines(path, extra):
    path.write_text(
        "\n".join(json.dumps({"prompt": p, "completion": c} | more) for (p, c), more in zip(ROLLOUTS, extra, strict=True)) + "\n\n"
    )
    return path


def command(model, file, output, *more) -> list[str]:
    said = ["probes", "import", file, "--model", model, "--name", "foreign", "--version", "1", "-o", output, *more]
    return [str(each) for each in said]


@pytest.fixture
def imports(model):
    """Runs the command in this process, where torch is there already."""
    return lambda *said: CliRunner(env={"COLUMNS": "220"}).invoke(app, command(model, *said))


def test_an_imported_direction_agrees_with_its_author_and_is_served(model, direction, author, tmp_path):
    scores = lines(tmp_path / "scores.jsonl", [{"token_scores": each.tolist()} for each in author])
    output = tmp_path / "foreign.onnx"

    said = command(model, direction, output, "--tap", "hidden_states[2]", "--author-scores", scores)
    ran = subprocess.run(
        [sys.executable, "-m", "probescore_server.cli", *said],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"COLUMNS": "220"},
    )

    assert (ran.returncode, ran.stderr) == (0, "")
    assert "foreign@1, imported as direction" in ran.stdout
    assert "✓ Agrees with its author's scores within" in ran.stdout
    answer = Engine.load(str(model), [output]).score([RolloutGroup(p, [Completion(c)]) for p, c in ROLLOUTS])
    found = answer.values("foreign")
    assert np.allclose(found, [each.mean() for each in author], rtol=1e-4)


def test_without_scores_it_is_written_and_everybody_sees_that_nobody_compared_it(imports, direction, tmp_path):
    output = tmp_path / "foreign.onnx"
    golden = lines(tmp_path / "golden.jsonl", [{}, {}, {}])

    ran = imports(direction, output, "--tap", "resid_post.1", "--golden", golden)

    assert ran.exit_code == 0
    assert "! Nobody has compared it with its author's scores" in ran.stdout
    assert "Nobody has compared it" in CliRunner(env={"COLUMNS": "200"}).invoke(app, ["probes", "inspect", str(output)]).stdout


def test_a_layer_off_by_one_fails_and_names_the_right_tap(imports, direction, author, tmp_path):
    scores = lines(tmp_path / "scores.jsonl", [{"score": float(each.mean())} for each in author])
    output = tmp_path / "foreign.onnx"

    ran = imports(direction, output, "--tap", "resid_post.2", "--author-scores", scores)

    assert (ran.exit_code, ran.stdout) == (1, "")
    assert "give --tap resid_post.1" in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert not output.exists()


def test_text_and_several_completions_of_a_line_are_read(imports, model, direction, tmp_path):
    texts = ["w5 w6 w7 w8", "w9 w10 w11"]
    prompt, completions = [BOS, 10, 11], [[5, 6, 7, 8], [9, 10, 11]]
    rows = ReferenceModel.load(model).completion_activations([(prompt, c) for c in completions], "resid_post.1")
    content = {"prompt": "w10 w11", "completions": texts, "token_scores": [(r.astype(np.float64) @ WEIGHT).tolist() for r in rows]}
    scores = tmp_path / "scores.jsonl"
    scores.write_text(json.dumps(content))

    more = ("--tap", "resid_post.1", "--author-scores", scores, "--add-special-tokens")
    ran = imports(direction, tmp_path / "foreign.onnx", *more)

    assert ran.exit_code == 0, ran.stderr
    assert "7 scores" in ran.stdout


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": [1], "completion": [5, 6]}, "give token_scores or score"),
        ({"prompt": [1], "completion": [5, 6], "score": "high"}, "author_scores[0].score"),
        ({"prompt": [1], "completions": [[5], [6]], "score": 1.0}, "one entry for each of the 2 completions"),
        ({"prompt": [1], "completion": {"ids": [5, 6], "mask": [0, 1]}, "score": 1.0}, "a mask"),
        ({"prompt": [1]}, "completions: give either"),
    ],
)
def test_lines_without_scores_are_named(imports, direction, tmp_path, line, said):
    scores = tmp_path / "scores.jsonl"
    scores.write_text(json.dumps(line))

    ran = imports(direction, tmp_path / "foreign.onnx", "--tap", "resid_post.1", "--author-scores", scores)

    assert ran.exit_code == 2
    assert said in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_a_pickle_is_opened_only_if_it_is_trusted(imports, tmp_path):
    x = RANDOM.standard_normal((40, HIDDEN_SIZE))
    joblib.dump(LogisticRegression().fit(x, x[:, 0] > 0), tmp_path / "probe.joblib")
    golden = lines(tmp_path / "golden.jsonl", [{}, {}, {}])
    output = tmp_path / "foreign.onnx"
    told = ("--tap", "model.layers[1].output[0]", "--golden", golden)

    refused = imports(tmp_path / "probe.joblib", output, *told)
    trusted = imports(tmp_path / "probe.joblib", output, *told, "--trust-pickle")

    assert refused.exit_code == 2
    assert "sklearn.linear_model._logistic.LogisticRegression" in refused.stderr
    assert "--trust-pickle" in refused.stderr
    assert trusted.exit_code == 0, trusted.stderr
    assert "probe.joblib: runs the code of a pickle, which names sklearn.linear_model._logistic.LogisticRegression" in trusted.stderr
    assert trusted.stdout.lstrip().startswith("foreign@1")
    assert str(read_probe_file(output).manifest.taps[0]) == "resid_post.1"


def test_what_a_file_leaves_open_is_asked_for(imports, tmp_path):
    torch.save({"state_dict": {"direction": torch.ones(HIDDEN_SIZE)}, "hyperparams": {"layer": 2}}, tmp_path / "probe.pt")

    ran = imports(tmp_path / "probe.pt", tmp_path / "foreign.onnx")

    assert ran.exit_code == 2
    assert "resid_post.2 if that is a block counted from 0 or resid_post.1 if it is hidden_states[2]" in ran.stderr
