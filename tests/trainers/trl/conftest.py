"""The demo's model and a server that scores with its probe."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_server import RunningServer, start_server
from sorting_policy import SortingPolicy

os.environ.setdefault("HF_HUB_OFFLINE", "1")
KEPT = Path(__file__).parents[3] / "build" / "trl-tests"


@pytest.fixture(scope="session")
def policy() -> SortingPolicy:
    """Kept between runs, since its training takes half a minute."""
    return SortingPolicy.make(KEPT)


@pytest.fixture(scope="session")
def address(policy: SortingPolicy) -> Iterator[str]:
    """Of one server for all tests that leave it as it was."""
    with start_server(policy.model, [policy.probe]) as server:
        yield server.address


@pytest.fixture
def own_server(policy: SortingPolicy) -> Iterator[RunningServer]:
    """For a test that does it harm."""
    with start_server(policy.model, [policy.probe], worker_restart_seconds=0.1) as server:
        yield server
