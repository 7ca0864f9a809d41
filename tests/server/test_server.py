"""Parts of the front process that need no worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from probescore_server.errors import StartupError
from probescore_server.front import server
from probescore_server.front.server import Server, find_devices
from probescore_server.settings import ServerSettings


async def test_named_devices_are_taken_as_they_are() -> None:
    assert await find_devices(("cuda:1", "cpu")) == ("cuda:1", "cpu")


async def test_auto_is_the_cpu_where_there_is_no_cuda_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(server, "CUDA_DRIVER", tmp_path / "no-driver")
    assert await find_devices(("auto",)) == ("cpu",)


async def test_auto_asks_torch_in_another_process_where_there_is_a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("class cuda:\n    device_count = staticmethod(lambda: 2)\n")
    monkeypatch.setattr(server, "CUDA_DRIVER", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert await find_devices(("auto",)) == ("cuda:0", "cuda:1")
    (tmp_path / "torch.py").write_text("raise ImportError('broken driver')\n")
    with pytest.raises(StartupError, match="broken driver"):
        await find_devices(("auto",))


@pytest.mark.parametrize("reference", ["no_such_module:x", "json:nothing", "json:loads"])
async def test_an_interceptor_that_is_none_is_refused(reference: str) -> None:
    with pytest.raises(StartupError, match=reference):
        Server(ServerSettings(model="m", interceptors=(reference,)), ("cpu",))


async def test_a_unix_socket_path_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious.txt"
    path.write_text("data")
    with pytest.raises(StartupError, match="not a socket"):
        Server(ServerSettings(model="m", unix_socket=path), ("cpu",))._listen()
    assert path.read_text() == "data"
