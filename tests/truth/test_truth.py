"""From labelled statements to a probe of a trained model that is judged, served and replaced: as `make truth` and the tutorial do it."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tutorial import REPOSITORY, TUTORIALS, Clone, follow

from probescore_probes import read_probe_file

CORES, SECONDS = 2, 300


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.timeout(1800)
def test_make_truth_does_each_step_in_one_command_and_says_what_the_probe_is_worth(trained_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "truth"
    folder.mkdir()
    (folder / "model").symlink_to(trained_model)
    before = children_seconds()
    done = subprocess.run(
        [sys.executable, REPOSITORY / "examples" / "truth" / "truth.py", "--folder", folder], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert children_seconds() - before < CORES * SECONDS  # of the processor: the machine may be busy with other things

    commands = re.findall(r"^\$ probescore (\w+(?: \w+)?)", done.stdout, re.MULTILINE)
    steps = ["probes fit", "probes calibrate", "probes verify", "serve", "info", "score", "score", "probes reload", "score"]
    assert [command if command.startswith("probes") else command.split()[0] for command in commands[: len(steps)]] == steps
    told = done.stdout.partition("What this probe is worth")[2]
    assert re.search(r"Negated cities: AUROC 0\.[0-3]", told)  # upside down, and said to be
    assert re.search(r"Arithmetic: AUROC 0\.[4-7]", told)
    assert "1 neutral sentence appended" in told
    evidence = json.loads((folder / "report.json").read_text())["evidence"]
    assert evidence["test"]["value"] > 0.85
    assert f"{evidence['rivals']['−log P of the tokens']['value']:.2f}" in told
    assert f"{evidence['test']['value']:.2f}" in told
    assert "<svg" in (folder / "report.html").read_text()
    first, second = (read_probe_file(folder / name).manifest for name in ("probes/untrue.onnx", "probes/untrue-2.onnx"))
    assert first.graph_sha256 == second.graph_sha256
    assert first.calibrations[0].threshold != second.calibrations[0].threshold


@pytest.mark.timeout(1800)
def test_the_first_probe(clone: Clone) -> None:
    typed = follow(TUTORIALS / "first-probe.md", clone)
    scored = next(output for command, output in typed.items() if command.startswith('probescore score "'))
    assert "flagged" in scored
    assert (clone.folder / "truth" / "report.json").exists()
