from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from parity_models import write_model
from read_twice import Served
from written_adapters import WrittenAdapter

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


@pytest.fixture(scope="module")
def root(llama: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of readings with two versions of an adapter."""
    folder = tmp_path_factory.mktemp("root")
    for step in range(2):
        WrittenAdapter.random(llama.model, seed=step).write(folder / f"step-{step}")
    return folder
