"""What the deployment tests share: a tiny model with a calibrated probe, and the adapters of the readings' tests."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from models import BOS, HIDDEN_SIZE, VOCAB_SIZE, tiny_model

from probescore_probes.exporting import linear_probe
from probescore_probes.reference import ReferenceModel
from probescore_probes.writing import write_probe
from probescore_server.probes.format.manifest import CalibrationConditions, CalibrationRecord

sys.path.append(str(Path(__file__).parents[1] / "readings"))


@pytest.fixture(scope="session")
def model() -> Path:
    return tiny_model()


@pytest.fixture(scope="session")
def probe_file(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear probe called "direction" on `model`, with a threshold near the middle of its scores."""
    path = tmp_path_factory.mktemp("probes") / "direction.onnx"
    random = np.random.default_rng(0)
    golden = [([BOS, *random.integers(4, VOCAB_SIZE, 5)], random.integers(4, VOCAB_SIZE, 7)) for _ in range(2)]
    weight = random.standard_normal(HIDDEN_SIZE).astype(np.float32)
    calibration = CalibrationRecord(
        threshold=0.0,
        false_positive_rate=0.5,
        false_positive_rate_low=0.4,
        false_positive_rate_high=0.6,
        negatives=100,
        dataset="random ids",
        reduction="mean",
        conditions=CalibrationConditions(
            groups=100,
            dtype="float32",
            shortest_prompt=0,
            longest_prompt=512,
            shortest_completion=1,
            longest_completion=512,
            prompt_forms=["ids"],
        ),
    )
    reference = ReferenceModel.load(model)
    taps = ["resid_post.2"]
    write_probe(path, linear_probe(weight), reference, name="direction", version="1", taps=taps, golden=golden, calibrations=[calibration])
    return path


@pytest.fixture(scope="session")
def mounted(model: Path, probe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``model`` and ``probes`` that every user may read, as a container's does."""
    folder = tmp_path_factory.mktemp("mounted")
    shutil.copytree(model, folder / "model")
    shutil.copytree(probe_file.parent, folder / "probes")
    for path in (folder, *folder.rglob("*"), *folder.parents[:2]):
        path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))
    return folder
