"""What tests of the command line share: a real server with two probes, and the command line as people run it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from models import BOS, HIDDEN_SIZE, VOCAB_SIZE, tiny_model
from running_server import RunningServer, start_server

from probescore import ProbeClient
from probescore_audit import calibrate
from probescore_probes import ReferenceModel, linear_probe, write_probe

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def model() -> Path:
    return tiny_model()


@pytest.fixture(scope="session")
def probe_files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``cheating``, calibrated, and ``mood``, with two labels and no threshold."""
    folder = tmp_path_factory.mktemp("probes")
    random = np.random.default_rng(0)
    reference = ReferenceModel.load(model)
    golden = [([BOS, *random.integers(4, VOCAB_SIZE, 5)], random.integers(4, VOCAB_SIZE, 7)) for _ in range(2)]
    common = {"taps": ["resid_post.1"], "golden": golden, "version": "1", "expects_bos": True}
    write_probe(
        folder / "cheating.onnx",
        linear_probe(random.standard_normal(HIDDEN_SIZE)),
        reference,
        name="cheating",
        description="Copies [bold]the[/bold] \x1b[31mcache",
        calibrations=[calibrate(random.standard_normal(100), false_positive_rate=0.05, dataset="honest rollouts")],
        **common,
    )
    write_probe(
        folder / "mood.onnx",
        linear_probe(random.standard_normal((2, HIDDEN_SIZE))),
        reference,
        name="mood",
        labels=["calm", "angry"],
        **common,
    )
    return {path.stem: path for path in sorted(folder.iterdir())}


@pytest.fixture(scope="session")
def served(model: Path, probe_files: dict[str, Path]) -> Iterator[RunningServer]:
    with start_server(model, [probe_files["cheating"].parent]) as server:
        yield server


@pytest.fixture
def client(served: RunningServer) -> Iterator[ProbeClient]:
    with ProbeClient(served.address) as client:
        yield client


@pytest.fixture
def probescore(served: RunningServer) -> Run:
    """Runs ``probescore`` in a process of its own, aimed at ``served``, and returns what it wrote."""

    def run(*arguments: str | Path, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "probescore_server.cli", *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "PROBESCORE_ADDRESS": served.address, "COLUMNS": "120", **environment},
        )

    return run
