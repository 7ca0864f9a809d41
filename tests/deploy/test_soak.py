"""A server in its container, under steady load for half an hour, holds what it held; and a server that leaks would be caught."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
from image import server_container
from running_server import start_server
from soak import processes_of, soak

MINUTES = float(os.environ.get("PROBESCORE_SOAK_MINUTES", "30"))


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 1800)
def test_half_an_hour_of_load_leaves_memory_and_descriptors_as_they_were(mounted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"kv_cache_bytes": "20000000", "log_level": "warning"}
    with server_container(mounted / "model", mounted / "probes", name="probescore-soak", **settings) as container:
        processes = processes_of(psutil.Process(int(container.inspect("{{.State.Pid}}"))))
        done = soak(container.address, processes, minutes=MINUTES, say=print)
    with capsys.disabled():  # the figures are wanted when it passes too
        print("", *done.report(), sep="\n")
    assert done.load.failures == []
    assert [name for name, held in done.held.items() if held.leaks_memory()] == []
    assert [name for name, held in done.held.items() if held.leaks_descriptors()] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_that_keeps_something_of_every_call_is_caught(model: Path, probe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with start_server(model, [probe_file], interceptors="leaking:interceptor", kv_cache_bytes=1_000_000) as server:
        done = soak(server.address, processes_of(psutil.Process(server.pid)), minutes=1.5)
    print("\n".join(done.report()))
    assert done.held["front"].leaks_memory()
