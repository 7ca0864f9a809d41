"""The parts of the registry that need no worker: which files there are, what is kept of them, and how long versions are served."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from probescore_server.activity import Activity
from probescore_server.engine.fair_lock import FairLock
from probescore_server.errors import StartupError
from probescore_server.registry.folder import ProbeFolder
from probescore_server.registry.retirement import Retirement
from probescore_server.spool import Spool, SpooledFile

# ------------------------------------------------------------------------------------------------------------------------- folder


@pytest.fixture
def spool() -> Iterator[Spool]:
    opened = Spool()
    yield opened
    opened.close()


def test_a_directory_means_its_whole_files_and_a_file_means_itself(tmp_path: Path, spool: Spool) -> None:
    folder = tmp_path / "probes"
    folder.mkdir()
    for name in ("b.onnx", "a.onnx", "notes.txt", ".hidden.onnx", ".a.onnx.0123", "c.onnx.partial"):
        (folder / name).write_text(name)
    single = tmp_path / "single.onnx"
    single.write_text("single")
    found = ProbeFolder([str(folder), str(single)]).read(spool)
    assert list(found.files) == [str(folder / "a.onnx"), str(folder / "b.onnx"), str(single)]
    assert [file.read() for file in found.files.values()] == [b"a.onnx", b"b.onnx", b"single"]
    assert not found.refused


def test_what_cannot_be_read_is_refused_by_name_and_what_is_gone_is_left_out(tmp_path: Path, spool: Spool) -> None:
    gone, link, pipe, good = (tmp_path / f"{name}.onnx" for name in ("gone", "link", "pipe", "good"))
    link.symlink_to(tmp_path / "nowhere")
    os.mkfifo(pipe)
    good.write_text("good")
    folder = ProbeFolder([str(path) for path in (gone, link, pipe, good)])
    found = folder.read(spool)
    assert list(found.files) == [str(good)]
    assert {Path(path).stem: refusal.found for path, refusal in found.refused.items()} == {
        "link": "No such file or directory",
        "pipe": "a named pipe",
    }
    assert str(gone) in folder.read(spool, missing_is_refused=True).refused


def test_a_directory_that_goes_away_is_no_empty_one(tmp_path: Path, spool: Spool) -> None:
    directory = tmp_path / "probes"
    directory.mkdir()
    folder = ProbeFolder([str(directory)])
    assert not folder.read(spool).files
    directory.rmdir()
    with pytest.raises(StartupError, match="is not there any more"):
        folder.read(spool)


# -------------------------------------------------------------------------------------------------------------------------- spool


def keep(spool: Spool, *contents: bytes) -> list[SpooledFile]:
    with spool.keeping() as writer:
        return [writer.keep(f"{index}.onnx", content) for index, content in enumerate(contents)]


def test_what_was_read_stays_whatever_becomes_of_the_file_and_is_freed_when_it_is_forgotten(spool: Spool) -> None:
    process = psutil.Process()
    before = process.num_fds()
    first = keep(spool, b"one", b"two", b"one")
    assert [file.read() for file in first] == [b"one", b"two", b"one"]
    assert first[0].sha256 == first[2].sha256
    assert process.num_fds() == before + 1
    (again, three) = keep(spool, b"two", b"three")
    assert (again.volume, again.start) == (first[1].volume, first[1].start)
    spool.keep_only({three.sha256, first[1].sha256})
    assert (again.read(), three.read()) == (b"two", b"three")
    spool.keep_only({three.sha256})
    with pytest.raises(StartupError, match=r"1\.onnx"):
        first[1].read()
    keep(spool, b"three")  # nothing new: no file stays open for it
    assert process.num_fds() == before + 1
    spool.close()
    assert process.num_fds() == before


def test_other_bytes_in_its_place_are_noticed(spool: Spool) -> None:
    (kept,) = keep(spool, b"right")
    Path(kept.volume).write_bytes(b"wrong")
    with pytest.raises(StartupError, match="has changed in memory"):
        kept.read()


# --------------------------------------------------------------------------------------------------------------------- retirement


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def source(content: str) -> SpooledFile:
    return SpooledFile(f"{content}.onnx", content, "", 0, 0)


def retire(retirement: Retirement, *keys: str) -> None:
    retirement.retire((key, key.split("@")[0], source(key)) for key in keys)


def test_the_oldest_of_too_many_versions_go_and_each_name_counts_by_itself() -> None:
    retirement = Retirement(10.0, 2, Clock())
    retire(retirement, "a@1", "b@1", "a@2", "a@3")
    assert list(retirement.take_expired()) == ["a@1"]
    assert retirement.keys == ("b@1", "a@2", "a@3")
    retirement.restore(["a@3"])
    retire(retirement, "a@4")
    assert not retirement.take_expired()
    assert not Retirement(10.0, 0, Clock()).take_expired()


def test_a_version_is_kept_as_long_as_calls_name_it_and_then_for_its_time() -> None:
    clock = Clock()
    retirement = Retirement(10.0, 5, clock)
    assert retirement.seconds_left() is None
    retire(retirement, "a@1", "a@2")
    clock.now += 9
    retirement.begin(["a@1", "c@1"])
    assert retirement.seconds_left() == 1
    clock.now += 1
    assert list(retirement.take_expired()) == ["a@2"]
    clock.now += 60  # the call takes long
    assert not retirement.take_expired()
    assert retirement.in_use("a@1")
    retirement.end(["a@1", "c@1"])
    assert not retirement.in_use("a@1")
    clock.now += 9.5
    assert retirement.seconds_left() == pytest.approx(0.5)
    clock.now += 0.5
    assert list(retirement.take_expired()) == ["a@1"]
    assert not retirement._calls


def test_with_none_kept_a_version_goes_at_once() -> None:
    retirement = Retirement(10.0, 0, Clock())
    retire(retirement, "a@1")
    retirement.begin(["a@1"])
    assert list(retirement.take_expired()) == ["a@1"]
    assert retirement.in_use("a@1")


# ------------------------------------------------------------------------------------------------------------ beside the batches


def test_a_thread_that_waits_gets_the_lock_before_the_one_that_has_just_had_it() -> None:
    lock, order, ended = FairLock(), [], threading.Event()

    def compute() -> None:
        while not ended.is_set():
            with lock:
                order.append("batch")
                time.sleep(0.01)

    computing = threading.Thread(target=compute)
    computing.start()
    try:
        while len(order) < 3:
            time.sleep(0.001)
        for _ in range(5):
            with lock:
                order.append("golden")
    finally:
        ended.set()
        computing.join()
    gaps = [end - start for start, end in zip(_places(order), _places(order)[1:], strict=False)]
    assert max(gaps) <= 3  # never more than a batch or two in between
    with pytest.raises(KeyError), lock:
        raise KeyError
    with lock:
        pass


def _places(order: list[str]) -> list[int]:
    return [index for index, who in enumerate(order) if who == "golden"]


def test_what_another_thread_tries_is_no_progress_of_a_batch() -> None:
    activity = Activity()
    activity.begin("loading", 1)
    activity.begin_order(7, 10)
    activity.begin("the model", 10)
    step = activity.step
    other = threading.Thread(target=activity.begin, args=("probe new@1", 5))
    other.start()
    other.join()
    assert activity.step is step
    assert (step.order, step.name) == (7, "the model")
