"""Which directories a request may have read: those below the operator's, whatever links say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from probescore_server.errors import InvalidRequest, ReadingRefused
from probescore_server.reading_paths import check_links, resolve_reading_path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "run" / "step-1").mkdir(parents=True)
    (tmp_path / "root-of-others" / "step-1").mkdir(parents=True)
    return tmp_path / "root"


def test_what_lies_below_is_found_by_every_way_to_it(root: Path) -> None:
    (root / "latest").symlink_to("run/step-1")
    (root.parent / "way-in").symlink_to(root / "run")
    for path in ("run/step-1", "./run/../run/step-1", str(root / "run" / "step-1"), "latest", str(root.parent / "way-in" / "step-1")):
        assert resolve_reading_path(path, root) == (root / "run" / "step-1").resolve()
    linked_root = root.parent / "linked"
    linked_root.symlink_to(root)
    assert resolve_reading_path("run/step-1", linked_root) == (root / "run" / "step-1").resolve()


@pytest.mark.parametrize(
    "path", ["", ".", "run/..", "..", "../root-of-others/step-1", "/", "/etc", "run/../../root-of-others", "../no-such"]
)
def test_what_does_not_lie_below_is_refused_whether_it_exists_or_not(root: Path, path: str) -> None:
    with pytest.raises(InvalidRequest, match="does not lie below") as refused:
        resolve_reading_path(path, root)
    assert (refused.type, refused.value.field) == (InvalidRequest, "path")
    assert str(root.parent) not in str(refused.value)


def test_what_lies_below_and_is_not_there_is_said_not_to_be_there(root: Path) -> None:
    for path in ("no-such", "~"):
        with pytest.raises(ReadingRefused, match=f"{path!r} is no directory that this server sees"):
            resolve_reading_path(path, root)


def test_links_that_lead_out_are_refused_at_every_depth(root: Path) -> None:
    outside = root.parent / "root-of-others" / "step-1"
    (outside / "secret").write_text("")
    for place in (root / "run" / "step-1" / "model.safetensors", root / "run" / "step-1" / "deeper" / "also"):
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(outside / "secret")
        with pytest.raises(ReadingRefused, match=f"{place.name!r} in it is a link that leads out"):
            resolve_reading_path("run/step-1", root)
        place.unlink()
    (root / "run" / "step-1" / "sub").symlink_to(outside)
    with pytest.raises(ReadingRefused, match="'sub' in it is a link"):
        check_links(root / "run" / "step-1", root)
    (root / "run" / "step-1" / "sub").unlink()
    (root / "blobs").mkdir()
    (root / "blobs" / "weights").write_text("")
    (root / "run" / "step-1" / "model.safetensors").symlink_to("../../blobs/weights")  # as in a cache of the hub
    assert resolve_reading_path("run/step-1", root).name == "step-1"


def test_a_directory_that_has_become_a_link_out_is_refused_when_it_is_read(root: Path) -> None:
    directory = resolve_reading_path("run/step-1", root)
    directory.rmdir()
    directory.symlink_to(root.parent / "root-of-others" / "step-1")
    with pytest.raises(ReadingRefused, match="does not lie below"):
        check_links(directory, root)


@pytest.mark.parametrize("path", ["a\0b", "a" * 5000, "a/" * 5000, os.sep * 3 + "\0"])
def test_what_is_no_path_is_said_to_be_none(root: Path, path: str) -> None:
    with pytest.raises(InvalidRequest):
        resolve_reading_path(path, root)


def test_a_loop_of_links_ends(root: Path) -> None:
    (root / "loop").symlink_to("loop")
    with pytest.raises(InvalidRequest):
        resolve_reading_path("loop", root)
