"""What the server's tests share: a directory with a probe of the tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models import BOS, HIDDEN_SIZE, tiny_model

from probescore_probes.exporting import linear_probe
from probescore_probes.reference import ReferenceModel
from probescore_probes.writing import write_probe


@pytest.fixture(scope="session")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("probes")
    weight = np.random.default_rng(0).standard_normal(HIDDEN_SIZE)
    golden = [([BOS, 5, 6], [7, 8, 9]), ([BOS, 9], [17, 18])]
    reference = ReferenceModel.load(tiny_model())
    write_probe(
        directory / "direction.onnx", linear_probe(weight), reference, name="direction", version="1", taps=["resid_post.3"], golden=golden
    )
    return directory
