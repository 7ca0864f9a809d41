"""What the trainers' tests share: a tiny model with a probe, what that probe must say, and a real server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from plain_forward import Probed
from running_server import RunningServer, start_server


@pytest.fixture(scope="session")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Probed:
    return Probed.make(tmp_path_factory.mktemp("probed"))


@pytest.fixture(scope="session")
def served(probed: Probed) -> Iterator[RunningServer]:
    """One server for all tests that leave it as it was."""
    with start_server(probed.model, [probed.probe], max_rollout_tokens=200) as server:
        yield server
