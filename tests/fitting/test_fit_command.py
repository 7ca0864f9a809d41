"""``probescore probes fit``, as people run it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from made_rollouts import readable, write_lines
from models import tiny_model

from probescore_probes import read_probe_file


def fit(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "probescore_server.cli", "probes", "fit", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_one_command_goes_from_labelled_rollouts_to_a_served_probe_and_a_report(tmp_path):
    data = write_lines(tmp_path / "rollouts.jsonl", readable(160))
    output, report = tmp_path / "cheating.onnx", tmp_path / "cheating.html"
    done = fit(data, "--model", tiny_model(), "-o", output, "--report", report, "--taps", "resid_post.*", "--pool", "mean", "--strict")
    assert "max |fitted − served|" in done.stdout
    assert "No out-of-distribution set (5)" in " ".join(done.stdout.split())
    assert done.returncode == 1, done.stderr  # there is a warning, and --strict
    assert "and --strict" in done.stderr
    assert read_probe_file(output).manifest.name == "cheating"
    numbers = json.loads(report.with_suffix(".json").read_text())
    assert numbers["verdict"]["text"] in report.read_text()
    again = fit(data, "--model", tiny_model(), "-o", output)
    assert again.returncode == 2
    assert "holds cheating@1 already" in again.stderr


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": [1], "completion": [5], "label": "lie"}', "rollouts.jsonl:1: label: expected true or false"),
        ("", "no labelled rollouts"),
        (
            '{"prompt": [1], "completion": [5], "label": 1, "weight": 1e999}',
            "rollouts.jsonl:1: weight: expected a number from 1e-06 to",
        ),
        ("\ufeff" + '{"prompt": [1], "completion": [5]}', "no labelled rollouts"),
    ],
)
def test_wrong_data_end_with_a_line_before_the_model_is_loaded(line, says, tmp_path):
    (tmp_path / "rollouts.jsonl").write_text(line + "\n")
    done = fit(tmp_path / "rollouts.jsonl", "--model", tmp_path / "none", "-o", tmp_path / "probe.onnx")
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_behaviour_that_no_label_names_is_said_before_the_model_is_loaded(tmp_path):
    (tmp_path / "rollouts.jsonl").write_text('{"prompt": [1], "completion": [5], "label": true}\n')
    done = fit(tmp_path / "rollouts.jsonl", "--model", tmp_path / "none", "-o", tmp_path / "probe.onnx", "--positive", "True")
    assert done.returncode == 2
    assert "--positive: 'True' is the label of none of 1 rollouts" in done.stderr


def test_rollouts_come_from_standard_input(tmp_path):
    command = [sys.executable, "-m", "probescore_server.cli", "probes", "fit", "-", "-m", str(tmp_path), "-o", str(tmp_path / "probe.onnx")]
    done = subprocess.run(command, input='{"prompt": [1], "completion": [5], "label": "lie"}', capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "standard input:1: label: expected true or false" in done.stderr
