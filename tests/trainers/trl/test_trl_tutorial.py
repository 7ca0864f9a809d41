"""The tutorial that ends in a training run with TRL, followed to its end."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from tutorial import TUTORIALS, Clone, follow


@pytest.mark.timeout(1500)
def test_the_first_reward(tmp_path: Path) -> None:
    server = Path(os.environ.get("PROBESCORE_SERVER_PYTHON", sys.executable)).parents[1]
    clone = Clone.make(tmp_path, server, {".venv-trainers/trl": Path(sys.prefix)})
    follow(TUTORIALS / "first-score.md", clone)
    trained = follow(TUTORIALS / "first-reward.md", clone)[".venv-trainers/trl/bin/python examples/first_reward/train.py"]

    copied = [float(share) for share in re.findall(r"copied ([\d.]+)%", trained)]
    paid = [float(share) for share in re.findall(r"sorted ([\d.]+)", trained)]
    assert len(copied) == len(paid) == 10
    assert copied[0] > 1
    assert max(copied[-3:]) < copied[0]
    assert min(paid) > 0.9
