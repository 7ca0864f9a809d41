from __future__ import annotations

from collections.abc import Iterator

import pytest
from parity_models import write_model
from read_twice import Served

from probescore_server import Engine


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(write_model(tmp_path_factory.mktemp("model"), "llama"), tmp_path_factory.mktemp("probes"))


@pytest.fixture
def engine(llama: Served, shared_engine: Engine) -> Iterator[Engine]:
    """An engine with probes at every depth; its readings are unloaded after each test."""
    yield shared_engine
    for reading in shared_engine.readings()[1:]:
        shared_engine.unload_reading(reading.name)


@pytest.fixture(scope="session")
def shared_engine(llama: Served) -> Engine:
    return llama.engine()
