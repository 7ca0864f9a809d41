from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_probes import Probe
from models import tiny_model

from probescore_probes.reference import ReferenceModel
from probescore_server import Engine


@pytest.fixture(scope="session")
def reference() -> ReferenceModel:
    """The tiny model as plain Hugging Face runs it."""
    return ReferenceModel.load(tiny_model())


@pytest.fixture
def load(reference: ReferenceModel, tmp_path: Path) -> Callable[..., Engine]:
    """An engine of the tiny model with the given probes, all checked against their golden scores."""

    def load_engine(*probes: Probe, **options: Any) -> Engine:
        return Engine.load(str(tiny_model()), [probe.write(tmp_path, reference) for probe in probes], **options)

    return load_engine
