"""``probescore probes reload``: what it shows, and what it says of files that are refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from running_server import RunningServer, start_server

from probescore import RefusedProbeFile, ReloadedProbes
from probescore_server.cli.reloading import reload_table


@pytest.fixture(scope="module")
def folder(probe_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    shutil.copy(probe_files["cheating"], folder)
    return folder


@pytest.fixture(scope="module")
def live(model: Path, folder: Path) -> Iterator[RunningServer]:
    with start_server(model, [folder], admin=True) as server:
        yield server


def test_it_shows_what_changed_and_fails_for_a_refused_file(probescore, live, folder, probe_files):
    shutil.copy(probe_files["mood"], folder)
    (folder / "notes.onnx").write_text("no probe")
    ran = probescore("probes", "reload", "--address", live.address, COLUMNS="200")

    assert ran.returncode == 1
    assert [line.split() for line in ran.stdout.splitlines()[1:]] == [
        ["probe", "state", "changed"],
        ["cheating@1", "current"],
        ["mood@1", "current", "added"],
    ]
    assert ran.stderr.startswith("probescore: notes.onnx: file: found bytes that do not parse")
    assert ran.stderr.count("\n") == 1

    (folder / "notes.onnx").unlink()
    (folder / probe_files["mood"].name).unlink()
    ran = probescore("probes", "reload", "--address", live.address, COLUMNS="200")

    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[-1].split() == ["mood@1", "retired", "its", "file", "is", "gone"]
    listed = probescore("probes", "list", "--address", live.address, COLUMNS="200")
    assert "retired: served by its full name alone" in listed.stdout


def test_a_server_that_takes_no_orders_is_named_with_the_setting_to_change(probescore):
    ran = probescore("probes", "reload")

    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "probescore: the server does not take sleep, wake and reload: its setting admin is off\n"


def test_what_is_dropped_is_shown_too():
    refused = RefusedProbeFile("a.onnx", "file", "nothing", "something")
    console = Console(record=True, width=100)
    console.print(reload_table(ReloadedProbes(("b@2",), (), ("b@1",), ("b@2",), (), (refused,), 0.5)))

    assert console.export_text().splitlines()[-1].split() == ["b@1", "not", "served", "dropped"]
    console.print(reload_table(ReloadedProbes((), (), (), (), (), (), 0.5)))
    assert "the server has no probe files" in console.export_text()
