"""What tests of the adapters share: a tiny model with two probes, and a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from models import BOS, HIDDEN_SIZE, VOCAB_SIZE, tiny_model
from running_server import RunningServer, start_server

from probescore_audit import calibrate
from probescore_probes import ReferenceModel, linear_probe, write_probe


@pytest.fixture(scope="session")
def model() -> Path:
    return tiny_model()


@pytest.fixture(scope="session")
def probe_files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """``cheating``, calibrated, and ``mood``, with two labels and no threshold."""
    folder = tmp_path_factory.mktemp("probes")
    random = np.random.default_rng(0)
    reference = ReferenceModel.load(model)
    golden = [([BOS, *random.integers(4, VOCAB_SIZE, 5)], random.integers(4, VOCAB_SIZE, 7)) for _ in range(2)]
    common = {"taps": ["resid_post.1"], "golden": golden, "version": "1"}
    calibration = calibrate(random.standard_normal(100), false_positive_rate=0.05, dataset="honest rollouts")
    cheating, mood = folder / "cheating.onnx", folder / "mood.onnx"
    write_probe(
        cheating, linear_probe(random.standard_normal(HIDDEN_SIZE)), reference, name="cheating", calibrations=[calibration], **common
    )
    write_probe(mood, linear_probe(random.standard_normal((2, HIDDEN_SIZE))), reference, name="mood", labels=["calm", "angry"], **common)
    return [cheating, mood]


@pytest.fixture(scope="session")
def served(model: Path, probe_files: list[Path]) -> Iterator[RunningServer]:
    with start_server(model, probe_files, max_rollout_tokens=200) as server:
        yield server
