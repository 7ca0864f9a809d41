"""What the client's tests share: each of the two clients, connected to a scripted server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from scripted_server import BlockingAsyncClient, Service, serving

from probescore import ProbeClient


@pytest.fixture(params=[ProbeClient, BlockingAsyncClient], ids=["sync", "async"])
def client_class(request: pytest.FixtureRequest) -> Any:
    """Each of the two clients."""
    return request.param


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def address(service: Service) -> Iterator[str]:
    with serving(service) as where:
        yield where


@pytest.fixture
def client(client_class: Any, address: str) -> Iterator[Any]:
    with client_class(address, timeout=20) as opened:
        yield opened
