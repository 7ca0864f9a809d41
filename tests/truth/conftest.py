"""The trained model of ``make truth``, and a clone in which its reader types."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest
from tutorial import REPOSITORY, Clone


@pytest.fixture(scope="session")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    runpy.run_path(str(REPOSITORY / "examples" / "truth" / "smollm2.py"))["save_smollm2"](directory)
    return directory


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    server = Path(os.environ.get("PROBESCORE_SERVER_PYTHON", sys.executable)).parents[1]
    return Clone.make(tmp_path, server, {".venv-trained": Path(sys.prefix)})
