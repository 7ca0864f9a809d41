"""All workers of a server, before and after restarts, serve the same bytes; files that cannot be read as a whole are refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from models import BOS, HIDDEN_SIZE, VOCAB_SIZE, tiny_model
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from watched_worker import running

from probescore_probes import ReferenceModel, linear_probe, model_fingerprint, read_probe_file, write_probe
from probescore_server import Engine
from probescore_server.errors import ModelRefused, ProbeRefused, StartupError
from probescore_server.files import UnreadableFile, read_regular_file
from probescore_server.workers.handle import PinnedContent

RANDOM = np.random.default_rng(0)
GOLDEN = [([BOS, *RANDOM.integers(4, 50, 5)], RANDOM.integers(4, 50, 7)) for _ in range(2)]


@pytest.fixture(scope="module")
def reference() -> ReferenceModel:
    return ReferenceModel.load(tiny_model())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model(), tmp_path / "model"))


@pytest.fixture
def probe(tmp_path: Path, reference: ReferenceModel) -> Path:
    return write(tmp_path / "probe.onnx", reference)


def write(path: Path, reference: ReferenceModel, seed: int = 1, version: str = "1", **said: object) -> Path:
    direction = np.random.default_rng(seed).standard_normal(HIDDEN_SIZE)
    write_probe(path, linear_probe(direction), reference, name="probe", version=version, taps=["resid_post.1"], golden=GOLDEN, **said)
    return path


# --------------------------------------------------------------------------------------------------- what changes under a server


def one_weight(model: Path) -> None:
    """A number between those that the fingerprint samples, of a token that no golden rollout has."""
    before = model_fingerprint(model)
    weights = load_file(model / "model.safetensors")
    for column in range(HIDDEN_SIZE):
        changed = weights["model.embed_tokens.weight"].clone()
        changed[VOCAB_SIZE - 5, column] += 1
        save_file(weights | {"model.embed_tokens.weight": changed}, model / "model.safetensors", metadata={"format": "pt"})
        if model_fingerprint(model) == before:
            return
    raise AssertionError("every number is sampled")


def chat_template(model: Path) -> None:
    path = model / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def a_normaliser(model: Path) -> None:
    path = model / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))


CHANGES: dict[str, Callable[[Path], None]] = {"one weight": one_weight, "chat template": chat_template, "tokenizer": a_normaliser}


@pytest.mark.parametrize("change", CHANGES)
def test_another_worker_that_reads_other_model_files_is_refused(model: Path, probe: Path, change: str) -> None:
    pinned = PinnedContent()
    pinned.check(Engine.load(str(model), [probe]).info)
    pinned.check(Engine.load(str(model), [probe]).info)
    CHANGES[change](model)
    with pytest.raises(StartupError, match=r"have changed since the server started \(model model\); restart the server"):
        pinned.check(Engine.load(str(model), [probe]).info)


def test_the_same_bytes_are_the_same_though_they_were_written_again(model: Path, probe: Path) -> None:
    pinned = PinnedContent()
    pinned.check(Engine.load(str(model), [probe]).info)
    again = Path(shutil.copytree(model, model.with_name("again")))
    shutil.rmtree(model)
    again.rename(model)
    (model / "trainer_state.json").write_text("{}")  # that nobody reads
    pinned.check(Engine.load(str(model), [probe]).info)


async def test_no_worker_of_a_server_starts_with_other_bytes_the_first_time_or_again(
    model: Path, probe: Path, reference: ReferenceModel
) -> None:
    pinned = PinnedContent()
    said = "the files of the model or of a probe have changed since the server started (model model); restart the server"
    others = said.replace("(model model)", "(model model, probe probe@1)")
    with capture_logs() as logs:
        async with running(pinned=pinned, model=str(model), probes=[str(probe)], worker_restart_seconds=0.01) as watched:
            one_weight(model)
            replace_by_another(probe, reference)
            # it reads the other bytes of the probe; a process that is started again gets those that were read at first
            with pytest.raises(StartupError, match=re.escape(others)):
                async with running(pinned=pinned, model=str(model), probes=[str(probe)]):
                    pass
            assert watched.worker.ready
            assert watched.pid is not None
            os.kill(watched.pid, signal.SIGKILL)
            await watched.until_failed_to_start()
            assert not watched.worker.ready
    assert {log["problem"] for log in logs if log["event"] == "worker did not start again"} == {said}


def replace_by_another(probe: Path, reference: ReferenceModel) -> None:
    probe.unlink()
    write(probe, reference, seed=2)


# ----------------------------------------------------------------------------------------------------- files that are no files


def pipe(path: Path) -> None:
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.mkdir()


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to(path.with_name("pipe"))


def link_to_nothing(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


IRREGULAR = {
    "pipe": (pipe, "a named pipe"),
    "directory": (directory, "a directory"),
    "socket": (unix_socket, "a socket"),
    "link to a device": (link_to_a_device, "a device"),
    "link to a pipe": (link_to_a_pipe, "a named pipe"),
    "link to nothing": (link_to_nothing, "No such file or directory"),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", IRREGULAR)
def test_a_probe_that_is_no_regular_file_is_refused_at_once(tmp_path: Path, reference: ReferenceModel, kind: str) -> None:
    make, found = IRREGULAR[kind]
    make(tmp_path / "probe.onnx")
    with pytest.raises(ProbeRefused) as refused:
        read_probe_file(tmp_path / "probe.onnx")
    assert (refused.value.field, refused.value.found) == ("file", found)
    with pytest.raises((ProbeRefused, ValueError), match=r"something else than a probe file|is a directory; give the path of the file"):
        write(tmp_path / "probe.onnx", reference)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "more.safetensors", "chat_template.jinja"]
)
@pytest.mark.parametrize("kind", ["pipe", "link to a device", "socket"])
def test_a_model_with_a_file_that_is_none_is_refused_at_once(model: Path, name: str, kind: str) -> None:
    (model / name).unlink(missing_ok=True)
    IRREGULAR[kind][0](model / name)
    with pytest.raises(ModelRefused):
        Engine.load(str(model))


@pytest.mark.timeout(60)
def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "growing"
    path.write_bytes(b"x" * (1 << 25))
    ended = threading.Event()

    def grow() -> None:
        with path.open("ab") as file:
            while not ended.is_set():
                file.write(b"y" * 4096)
                file.flush()

    growing = threading.Thread(target=grow)
    growing.start()
    try:
        time.sleep(0.05)
        with pytest.raises(UnreadableFile, match="changes while it is read"):
            read_regular_file(path, 1 << 40)
    finally:
        ended.set()
        growing.join()
    assert len(read_regular_file(path, 1 << 40)) == path.stat().st_size


def test_a_file_of_unknown_size_is_no_probe_file() -> None:
    with pytest.raises(ProbeRefused, match="changes while it is read"):
        read_probe_file("/proc/self/maps")


def test_nothing_beyond_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ProbeRefused) as refused:
        read_probe_file(path)
    assert refused.value.field == "file size"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_that_changes_while_it_is_loaded_is_refused(model: Path, probe: Path, name: str) -> None:
    def write_again(step: str) -> None:
        if step.startswith("loading"):
            (model / name).write_bytes((model / name).read_bytes())

    with pytest.raises(ModelRefused, match=rf"{name} changed while the model was loaded"):
        Engine.load(str(model), [probe], report=write_again)


# ------------------------------------------------------------------------------------------------------- writing over a file


def test_a_version_is_written_once(tmp_path: Path, reference: ReferenceModel, probe: Path) -> None:
    before, stamp = probe.read_bytes(), probe.stat().st_mtime_ns
    with pytest.raises(ProbeRefused) as refused:
        write(probe, reference, seed=2)
    assert str(refused.value) == f"{probe}: version: found probe@1 there with other content, expected a new version for new content"
    with pytest.raises(ProbeRefused, match="version"):
        write(probe, reference, description="only the manifest differs")
    assert (probe.read_bytes(), probe.stat().st_mtime_ns) == (before, stamp)
    assert [path.name for path in tmp_path.iterdir()] == ["probe.onnx"]


def test_the_same_again_is_no_change(reference: ReferenceModel, probe: Path) -> None:
    before = probe.read_bytes()
    write(probe, reference)
    assert probe.read_bytes() == before


def test_another_version_takes_the_place_of_the_last(reference: ReferenceModel, probe: Path) -> None:
    write(probe, reference, seed=2, version="2")
    assert read_probe_file(probe).manifest.version == "2"


def test_what_is_no_probe_file_is_never_written_over(tmp_path: Path, reference: ReferenceModel) -> None:
    path = tmp_path / "results.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ProbeRefused, match="something else than a probe file"):
        write(path, reference)
    assert path.read_text() == "a,b\n1,2\n"
