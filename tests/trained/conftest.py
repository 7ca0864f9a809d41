"""A trained model: SmolLM2-135M-Instruct as ``make truth`` takes it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "truth" / "smollm2.py"


@pytest.fixture(scope="session")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its directory, in float32."""
    directory = tmp_path_factory.mktemp("trained")
    runpy.run_path(str(EXAMPLE))["save_smollm2"](directory)
    return directory
