"""Whatever is wrong with another library's file, it is read right or refused in one line that names it; never a crash, never its code."""

from __future__ import annotations

import os
import pickle
import resource
import zipfile
from pathlib import Path

import joblib
import numpy as np
import onnx
import pytest
import torch
from foreign_probes import CASES, D, N
from hostile_files import hostile
from onnx import helper, numpy_helper

from probescore_probes.importing.imported import ImportOptions
from probescore_probes.importing.pickles import pickled_names
from probescore_probes.importing.places import read_place
from probescore_probes.importing.registry import FORMATS, format_of
from probescore_probes.importing.source import ProbeSource

OPENED_WITHOUT_TRUST = {
    name: make for name, make in CASES.items() if name not in ("scikit-learn by joblib", "rl-rewardhacking, logistic regression")
}
TAP = ImportOptions(D, N, taps=(read_place("resid_post.1", "tap", N).tap,), features=(3,), heads=2, reduction="last")


def as_an_import_reads_it(case, **more) -> None:
    said = case.told | more
    taps = tuple(read_place(tap, "tap", N).tap for tap in said.pop("taps", ()))
    features, format = tuple(said.pop("features", ())), said.pop("format", None)
    source = ProbeSource(case.file)
    format_of(source, format).read(source, ImportOptions(D, N, taps=taps, features=features, **said))


def refusal(path: Path, format: str | None = None) -> str:
    try:
        source = ProbeSource(path)
        format_of(source, format).read(source, TAP)
    except ValueError as error:
        return _check_message(str(error), path.name)
    raise AssertionError(f"{path.name} was read")


def _check_message(message: str, how: str) -> str:
    assert "\n" not in message, how
    assert len(message) < 700, how
    return message


def _sweep(name: str, folder: Path, every: int) -> None:
    case = CASES[name](folder, np.random.default_rng(3))
    for index, (how, spoil) in enumerate(hostile(folder)):
        if (index + len(name)) % every:
            continue
        kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        try:
            spoil()
            as_an_import_reads_it(case)
        except ValueError as error:
            _check_message(str(error), how)
        except Exception as error:
            raise AssertionError(f"{name}: {how}: {error!r}") from error
        finally:
            for path, content in kept.items():
                path.write_bytes(content)


@pytest.mark.parametrize("name", OPENED_WITHOUT_TRUST)
def test_a_file_that_is_wrong_in_any_way_is_read_or_refused_in_one_line(tmp_path, name):
    _sweep(name, tmp_path, every=9)


@pytest.mark.sweep
@pytest.mark.parametrize("name", OPENED_WITHOUT_TRUST)
def test_a_file_that_is_wrong_in_every_way_is_read_or_refused_in_one_line(tmp_path, name):
    _sweep(name, tmp_path, every=1)


# ------------------------------------------------------------------------------------------------------------------------- large things


def test_an_archive_that_unpacks_to_much_more_than_it_is_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("probescore_probes.importing.source._LARGE_ARCHIVE", 2**22)
    for name, member in (("d.npz", "weight.npy"), ("d.pt", "d/data.pkl")):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member, bytes(2**23))
        assert "as no weights do" in refusal(tmp_path / name)


def test_a_header_that_promises_more_than_the_file_holds_takes_no_memory(tmp_path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }"
    (tmp_path / "d.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "d.npy" in refusal(tmp_path / "d.npy")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_a_number_of_labels_takes_no_memory(tmp_path):
    case = CASES["SingProbe, attention"](tmp_path, np.random.default_rng(3))
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"num_labels": 2', '"num_labels": 1000000000'))
    with pytest.raises(ValueError, match=r"classifier\.weight: shape"):
        as_an_import_reads_it(case)


def test_a_small_standard_deviation_that_makes_weights_infinite_is_refused(tmp_path):
    torch.save({"weight": torch.ones(D) * 1e38, "mean": torch.zeros(D), "std": torch.full((D,), 1e-30)}, tmp_path / "d.pt")
    assert refusal(tmp_path / "d.pt")


# -------------------------------------------------------------------------------------------------------------- things that are no files


def test_a_pipe_a_loop_and_a_broken_link_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    (tmp_path / "gone.pt").symlink_to(tmp_path / "nothing")
    (tmp_path / "zeros.pt").symlink_to("/dev/zero")
    for name in ("pipe.pt", "loop.pt", "gone.pt", "zeros.pt"):
        assert name in refusal(tmp_path / name)


def test_links_to_files_are_followed_as_the_hubs_cache_needs(tmp_path):
    (tmp_path / "blobs").mkdir()
    case = CASES["hallucination probe"](tmp_path / "blobs", np.random.default_rng(3))
    (tmp_path / "snapshot").mkdir()
    for path in case.file.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    as_an_import_reads_it(type(case)(tmp_path / "snapshot", case.scores))


@pytest.mark.parametrize("link", [True, False])
def test_weights_of_a_graph_that_lie_in_another_file_are_not_read(tmp_path, link):
    """A graph could name any file of the machine."""
    (tmp_path / "secret").write_bytes(np.ones(D, np.float32).tobytes())
    outside = tmp_path / "folder"
    outside.mkdir()
    if link:
        (outside / "weights").symlink_to(tmp_path / "secret")
    weight = numpy_helper.from_array(np.ones((D, 1), np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "weights" if link else "../secret"), ("offset", "0"), ("length", str(4 * D))):
        weight.external_data.add(key=key, value=value)
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", size]) for name, size in (("x", D), ("y", 1))]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (outside / "d.onnx").write_bytes(model.SerializeToString())
    assert "with its weights inside" in refusal(outside / "d.onnx")


# ------------------------------------------------------------------------------------------------------------------------------ pickles


class _Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["d.safetensors", "d.npy", "d.npz", "d.pt", "d.bin", "d.onnx", "d.skops", "d", "d.json"])
def test_a_pickle_under_any_name_runs_nothing(tmp_path, name):
    for format in (None, *(known.name for known in FORMATS)):
        (tmp_path / name).write_bytes(pickle.dumps({"weight": _Runs(tmp_path / "ran")}))
        assert name in refusal(tmp_path / name, format) or format is not None
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("member", ["sae_weights.safetensors", "model.pt", "probe_head.bin", "model.safetensors"])
def test_a_pickle_in_place_of_a_folders_weights_runs_nothing(tmp_path, member):
    of = {"sae_weights.safetensors": "SAELens 6, standard", "model.pt": "Atlas, quadratic"}
    of |= {"probe_head.bin": "hallucination probe", "model.safetensors": "SingProbe, MLP"}
    case = CASES[of[member]](tmp_path, np.random.default_rng(3))
    file = next(tmp_path.rglob(member))
    for content in (pickle.dumps({"weight": _Runs(tmp_path / "ran")}), None):
        if content is None:
            torch.save({"weight": _Runs(tmp_path / "ran")}, file)
        else:
            file.write_bytes(content)
        with pytest.raises(ValueError, match=member):
            as_an_import_reads_it(case)
        assert not (tmp_path / "ran").exists()


HIDDEN = {
    "pushed and dropped": b"\x80\x04\x8c\x05posix\x8c\x06system\x8c\x07sklearn\x8c\x01X00\x93.",
    "from the memo": b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x8c\x07sklearn\x8c\x01X\x930h\x00h\x01\x93.",
    "of protocol 0": b"cposix\nsystem\n(S'true'\ntR.",
    "by instance": b"(S'true'\niposix\nsystem\n.",
    "by object": b"(cposix\nsystem\nS'true'\no.",
}


@pytest.mark.parametrize("how", HIDDEN)
def test_a_pickle_cannot_hide_what_it_would_run(tmp_path, how):
    (tmp_path / "d.pkl").write_bytes(HIDDEN[how])
    assert "posix.system" in refusal(tmp_path / "d.pkl")


@pytest.mark.parametrize("compress", [0, 1, 3, 9, ("gzip", 3), ("bz2", 3), ("xz", 3), ("lzma", 3)])
@pytest.mark.parametrize("before", ["numbers", "text", "objects"])
def test_what_follows_an_array_or_lies_in_it_is_named_however_it_is_compressed(tmp_path, compress, before):
    array = {"numbers": np.arange(12.0).reshape(3, 4), "text": np.array(["a", "bc"]), "objects": np.array([None, 1, "a"], dtype=object)}
    joblib.dump([array[before], {"weight": _Runs(tmp_path / "ran")}], tmp_path / "d.joblib", compress=compress)
    names = pickled_names(ProbeSource(tmp_path / "d.joblib"))
    assert names.complete
    assert "posix.mkdir" in names.names
    joblib.dump([np.array([_Runs(tmp_path / "ran")], dtype=object)], tmp_path / "d.joblib", compress=compress)
    assert "posix.mkdir" in refusal(tmp_path / "d.joblib")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_cannot_be_followed_says_so(tmp_path):
    (tmp_path / "d.pkl").write_bytes(b"\x80\x04cos\ngetcwd\n\x81garbage")
    assert "os.getcwd and perhaps more" in refusal(tmp_path / "d.pkl")
