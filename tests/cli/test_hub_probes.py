"""Probe files by the name of a repository on the hub: of one commit, which is shown, and *.onnx alone; a clear word without a hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from fake_hub import FakeHub, serving
from models import BOS
from running_server import start_server

from probescore import ProbeClient, RolloutGroup
from probescore_probes import read_probe_file
from probescore_server.errors import ProbeRefused
from probescore_server.hub_probes import HubProbes, local_paths
from probescore_server.probes.format.manifest import AdapterReference
from probescore_server.probes.format.new_version import write_new_version
from probescore_server.probes.format.probe_file import adapter_digest, write_probe_file

OLD, NEW = "a" * 40, "b" * 40
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def hub(probe_files: dict[str, Path], tmp_path: Path) -> Iterator[FakeHub]:
    """``cheating`` alone in the old commit; its version 2, ``mood`` and files that nobody asked for in the new one."""
    write_new_version(tmp_path / "two.onnx", read_probe_file(probe_files["cheating"]), version="2", calibrations=[])
    cheating, mood = (probe_files[name].read_bytes() for name in ("cheating", "mood"))
    others = {"README.md": b"# Probes", "setup.py": b"raise SystemExit('never run')", "weights.bin": b"\x80\x04."}
    new = {"cheating.onnx": (tmp_path / "two.onnx").read_bytes(), "sub/mood.onnx": mood, **others}
    commits = {OLD: {"cheating.onnx": cheating, **others}, NEW: new}
    with serving(FakeHub("org/probes", commits, {"main": NEW, "v1": OLD})) as hub:
        yield hub


@pytest.fixture
def run(hub: FakeHub, tmp_path: Path) -> Run:
    """The command in a process of its own, online, with an empty cache."""

    def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        online = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache"), "COLUMNS": "200"}
        command = [sys.executable, "-m", "probescore_server.cli", "probes", *map(str, arguments)]
        settings = {**os.environ, **online, **environment}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=settings)

    return run


def downloads(hub: FakeHub) -> set[str]:
    return {path.split("/resolve/")[1] for path in hub.asked if "/resolve/" in path}


def test_every_probe_file_of_one_commit_is_listed_and_nothing_else_is_taken(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    listed = run("list", "hf:org/probes")
    assert listed.returncode == 0, listed.stderr
    assert "cheating@2" in listed.stdout
    assert "mood@1" in listed.stdout
    # the commit is said, so that the same files can be had again
    assert f"hf:org/probes@{NEW}:cheating.onnx" in listed.stderr
    assert downloads(hub) == {f"{NEW}/cheating.onnx", f"{NEW}/sub/mood.onnx"}
    assert not list((tmp_path / "cache").rglob("*.py"))

    assert "cheating@1" in run("list", "hf:org/probes@v1").stdout
    assert "mood@1" in run("inspect", "hf:org/probes:sub/mood.onnx").stdout
    differences = run("diff", "hf:org/probes@v1", "hf:org/probes@main:cheating.onnx")
    assert "the graphs are equal, byte for byte" in differences.stdout
    # what names its commit needs no hub once it is there, and what does not is never guessed
    before = len(hub.asked)
    assert "cheating@1" in run("list", f"hf:org/probes@{OLD}:cheating.onnx", HF_HUB_OFFLINE="1").stdout
    assert len(hub.asked) == before
    for name in ("hf:org/probes@v1", f"hf:org/probes@{OLD}", f"hf:org/probes@{OLD}:other.onnx"):
        offline = run("list", name, HF_HUB_OFFLINE="1")
        assert offline.returncode == 1
        assert f"{name}: hub: found that it cannot be reached (" in offline.stderr
        assert (
            "name what was downloaded before as hf:org/probes@COMMIT:FILE.onnx, or download the file, and give its path" in offline.stderr
        )
        assert offline.stderr.count("\n") == 1


def test_the_adapter_beside_a_probe_file_comes_with_it(probe_files: dict[str, Path], run: Run, hub: FakeHub, tmp_path: Path) -> None:
    """Whether the hub was asked for the files of a commit, or for one file of it; a file that is there is not asked for again."""
    own = read_probe_file(probe_files["cheating"])
    adapter = AdapterReference(sha256=adapter_digest(b"tensors"), settings={"peft_type": "LORA"})
    graph, manifest = onnx.load_model_from_string(own.graph), own.manifest.model_copy(update={"adapter": adapter})
    write_probe_file(tmp_path / "own.onnx", graph, manifest, adapter=b"tensors")
    hub.commits[NEW] = {
        "sub/own.onnx": (tmp_path / "own.onnx").read_bytes(),
        "sub/own.adapter.safetensors": b"tensors",
        "x.safetensors": b"",
    }
    both = {f"{NEW}/sub/own.adapter.safetensors", f"{NEW}/sub/own.onnx"}
    for number, name in enumerate(("hf:org/probes", f"hf:org/probes@{NEW}:sub/own.onnx")):
        cache = {"HF_HOME": str(tmp_path / f"cache{number}")}
        hub.asked.clear()
        assert "cheating@1" in run("list", name, **cache).stdout
        assert downloads(hub) == both
        hub.asked.clear()
        assert "cheating@1" in run("list", f"hf:org/probes@{NEW}:sub/own.onnx", HF_HUB_OFFLINE="1", **cache).stdout
        assert not hub.asked
    del hub.commits[NEW]["sub/own.adapter.safetensors"]
    refused = run("list", "hf:org/probes", HF_HOME=str(tmp_path / "cache2"))
    assert (refused.returncode, "adapter: found no file own.adapter.safetensors" in refused.stderr) == (1, True), refused.stderr


def test_what_the_hub_does_not_have_is_named(run: Run, hub: FakeHub) -> None:
    for name, said in (
        ("hf:org/nothing", "repository: found no such repository, expected one of the hub"),
        ("hf:org/probes@v9", "revision: found no v9, expected a branch, tag or commit of the repository"),
        ("hf:org/probes:nothing.onnx", "file: found cheating.onnx, sub/mood.onnx, expected nothing.onnx"),
        (f"hf:org/probes@{NEW}:nothing.onnx", "file: found no such file of this commit"),
    ):
        refused = run("inspect", name)
        assert (refused.returncode, f"{name}: {said}" in refused.stderr) == (1, True), refused.stderr
        assert refused.stderr.count("\n") == 1
    hub.gated = True
    assert "repository: found one that is gated, expected an accepted licence" in run("inspect", "hf:org/probes").stderr
    nobody = run("inspect", "hf:org/probes", HF_ENDPOINT="http://127.0.0.1:9")
    assert "hub: found that it cannot be reached (" in nobody.stderr
    assert "Traceback" not in nobody.stderr


def test_a_server_serves_them(hub: FakeHub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    with start_server(model, ["hf:org/probes"]) as server, ProbeClient(server.address) as client:
        assert [probe.key for probe in client.list_probes()] == ["cheating@2", "mood@1"]
        assert np.isfinite(client.score([RolloutGroup([BOS, 5], [[6, 7]])], probes=["cheating"]).values("cheating")).all()
        assert [event["probe"] for event in server.events("probe from the hub")] == [
            f"hf:org/probes@{NEW}:cheating.onnx",
            f"hf:org/probes@{NEW}:sub/mood.onnx",
        ]


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("hf:org/probes", HubProbes("org/probes")),
        ("hf:org/probes@main", HubProbes("org/probes", "main")),
        ("hf:org/probes@refs/pr/1:a/b.onnx", HubProbes("org/probes", "refs/pr/1", "a/b.onnx")),
        ("hf:or-g/pro_bes.1:b.onnx", HubProbes("or-g/pro_bes.1", "", "b.onnx")),
    ],
)
def test_names_are_read_and_written_alike(name: str, parsed: HubProbes) -> None:
    assert HubProbes.parse(name) == parsed
    assert str(parsed) == name


@pytest.mark.parametrize(
    "name",
    ["hf:", "hf:a", "hf:a/b/c", "hf:a/b@", "hf:a/b:", "hf:a/b@x:c.bin", "hf:a/b: c.onnx", "hf:a/b:/c.onnx", "hf:a/b:../c.onnx", "hf:ä/b"],
)
def test_names_of_another_form_are_refused(name: str) -> None:
    with pytest.raises(ProbeRefused, match="name: found another form"):
        local_paths([name], print)


def test_paths_stay_as_they_are() -> None:
    assert local_paths(["./probes", "hf.onnx"], print) == ("./probes", "hf.onnx")
