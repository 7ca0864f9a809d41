"""What end-to-end tests share: a tiny model with probes, and real servers.

`start_server` is in ``running_server``; the fixture of the same name stops what a test started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from models import BOS, HIDDEN_SIZE, VOCAB_SIZE, tiny_model
from running_server import RunningServer
from running_server import start_server as start

from probescore_probes.exporting import linear_probe
from probescore_probes.reference import ReferenceModel
from probescore_probes.writing import write_probe

StartServer = Callable[..., RunningServer]


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """`running_server.start_server`, whose servers are stopped at the end of the test."""
    with ExitStack() as running:
        yield lambda *args, **settings: running.enter_context(start(*args, **settings))


@pytest.fixture(scope="session")
def model() -> Path:
    return tiny_model()


@pytest.fixture(scope="session")
def probe_file(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear probe called "direction" on `model`."""
    path = tmp_path_factory.mktemp("probes") / "direction.onnx"
    random = np.random.default_rng(0)
    golden = [([BOS, *random.integers(4, VOCAB_SIZE, 5)], random.integers(4, VOCAB_SIZE, 7)) for _ in range(2)]
    weight = random.standard_normal(HIDDEN_SIZE).astype(np.float32)
    write_probe(path, linear_probe(weight), ReferenceModel.load(model), name="direction", version="1", taps=["resid_post.2"], golden=golden)
    return path


@pytest.fixture(scope="session")
def served(model: Path, probe_file: Path) -> Iterator[RunningServer]:
    """One server for all tests that leave it as it was."""
    with start(model, [probe_file]) as server:
        yield server
