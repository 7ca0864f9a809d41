"""A folder of probe files is what a server serves, live: real workers, real sockets, real files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from calls import TIMEOUT, eventually, scrape, total
from live_folder import PROMPT, TAP, Versions, put, random_completions, served
from models import BOS, HIDDEN_SIZE, tiny_model, tiny_tokenizer
from running_server import START_SECONDS, RunningServer, start_server

from probescore import InvalidRequestError, ProbeClient, ReloadedProbes, RolloutGroup, ScoreUnit, ServerError
from probescore_probes.exporting import linear_probe, torch_probe
from probescore_probes.reference import ReferenceModel
from probescore_probes.writing import write_probe
from probescore_server.probes.format.manifest import METADATA_KEY, Manifest, manifest_digest
from probescore_server.probes.format.probe_file import graph_digest

COMPLETIONS = [[8, 9, 10], [8, 11]]
GROUPS = [RolloutGroup(PROMPT, COMPLETIONS)]


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Versions:
    folder = tmp_path_factory.mktemp("live") / "probes"
    folder.mkdir()
    return Versions(folder)


@pytest.fixture(scope="module")
def server(versions: Versions) -> Iterator[RunningServer]:
    """Two workers that start with an empty folder."""
    with start_server(
        versions.model, [versions.folder], admin=True, devices="cpu,cpu", worker_restart_seconds=0.05, max_retired_versions=2
    ) as running:
        yield running


@pytest.fixture
def client(server: RunningServer, versions: Versions) -> Iterator[ProbeClient]:
    with ProbeClient(server.address, timeout=4 * TIMEOUT) as connected:
        yield connected
        for file in versions.folder.iterdir():
            file.unlink()
        connected.reload_probes()


def values(client: ProbeClient, name: str, completions: list[list[int]] = COMPLETIONS) -> np.ndarray:
    result = client.score([RolloutGroup(PROMPT, completions)], probes=[name])
    return np.array([one.scores[name.split("@")[0]].reduced.item() for one in result.groups[0].completions])


# ------------------------------------------------------------------------------------------------- added, replaced, removed


def test_a_server_of_an_empty_folder_is_given_its_first_probe(server: RunningServer, versions: Versions, client: ProbeClient) -> None:
    assert server.events("no probes")[0]["remedy"].startswith("put a probe file into the directory")
    with pytest.raises(InvalidRequestError, match="no probe"):
        client.score(GROUPS)
    versions.put("first@1")
    reloaded = client.reload_probes()
    assert (reloaded.added, reloaded.current_probes, reloaded.refused) == (("first@1",), ("first@1",), ())
    np.testing.assert_allclose(values(client, "first"), versions.expected("first@1", COMPLETIONS), rtol=1e-4, atol=1e-5)


def test_names_follow_the_files_and_full_names_stay(versions: Versions, client: ProbeClient) -> None:
    for key in ("a@9", "a@10", "b@1"):
        versions.put(key)
    assert client.reload_probes().current_probes == ("a@9", "a@10", "b@1")
    result = client.score(GROUPS)
    assert [probe.key for probe in result.info.probes] == ["a@10", "b@1"]
    assert client.score(GROUPS, probes=["a"]).info.probes[0].version == "10"
    # removed: it is retired, and the bare name means what is left
    (versions.folder / "a@10.onnx").unlink()
    reloaded = client.reload_probes()
    assert (reloaded.added, reloaded.retired, reloaded.retired_probes[-1]) == ((), ("a@10",), "a@10")
    current, retired = served(client)
    assert (current, "a@10" in retired) == ({"a@9", "b@1"}, True)
    listed = [(probe.key, probe.retired) for probe in client.list_probes() if probe.name in "ab"]
    assert listed == [("a@9", False), ("a@10", True), ("b@1", False)]
    for key, name in (("a@9", "a"), ("a@9", "a@9"), ("a@10", "a@10")):
        np.testing.assert_allclose(values(client, name), versions.expected(key, COMPLETIONS), rtol=1e-4, atol=1e-5)
    # replaced in place, and come back: the same bytes again are no new version
    versions.put("a@11", at="a@9.onnx")
    reloaded = client.reload_probes()
    assert (reloaded.added, reloaded.retired) == (("a@11",), ("a@9",))
    versions.put("a@10")
    reloaded = client.reload_probes()
    assert (reloaded.added, reloaded.retired_probes[-1]) == (("a@10",), "a@9")
    nothing = client.reload_probes()
    assert nothing == ReloadedProbes((), (), (), ("a@10", "a@11", "b@1"), reloaded.retired_probes, (), nothing.seconds)
    # a name of which only retired versions are left
    (versions.folder / "b@1.onnx").unlink()
    client.reload_probes()
    with pytest.raises(InvalidRequestError, match="'b' has no current version; its retired ones are served for a while as b@1"):
        client.score(GROUPS, probes=["b"])
    assert values(client, "b@1").shape == (2,)


def test_more_retired_versions_than_are_kept_are_dropped_oldest_first(
    server: RunningServer, versions: Versions, client: ProbeClient
) -> None:
    for version in range(1, 6):
        versions.put(f"old@{version}", at="old.onnx")
        reloaded = client.reload_probes()
    assert (reloaded.current_probes, reloaded.retired_probes[-2:], reloaded.dropped) == (("old@5",), ("old@3", "old@4"), ("old@2",))
    with pytest.raises(InvalidRequestError, match="unknown probe 'old@2'"):
        client.score(GROUPS, probes=["old@2"])
    assert not total(server, "probescore_probe_info", 'probe="old"', 'version="2"')
    assert total(server, "probescore_probes", 'state="retired"') == len(reloaded.retired_probes)
    # what a name and version has meant, it means as long as the server runs, also after it was dropped (the first version came with a new
    # process, the others did not)
    other = versions.folder.parent / "other.onnx"
    write(other, "old", "2", direction=np.ones(HIDDEN_SIZE))
    put(other, versions.folder / "again.onnx")
    (refused,) = client.reload_probes().refused
    assert (refused.file, refused.field) == ("again.onnx", "version")


# ------------------------------------------------------------------------------------------------------- what a bad file does


def write(path: Path, name: str, version: str, *, direction: np.ndarray, tap: str = TAP, model: Path | None = None, **said: object) -> Path:
    golden = [(PROMPT[:3], [8, 9, 10]), ([BOS], [11, 12])]
    reference = ReferenceModel.load(model or tiny_model())
    write_probe(path, linear_probe(direction), reference, name=name, version=version, taps=[tap], golden=golden, **said)
    return path


def edited(path: Path, change: Callable[[dict], None]) -> Path:
    """Changes the manifest of a probe file and seals it again, as somebody would who writes such files by hand."""
    model = onnx.load(path)
    (entry,) = (entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    said = json.loads(entry.value)
    change(said)
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.metadata_props[:]
    said["graph_sha256"] = graph_digest(bare.SerializeToString(deterministic=True))
    with suppress(ValueError):  # of a manifest that is none
        said["manifest_sha256"] = manifest_digest(Manifest.model_validate_json(json.dumps(said)))
    entry.value = json.dumps(said)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def not_a_probe(path: Path, new: Path) -> None:
    path.write_bytes(b"name,score\n1,2\n")


def empty(path: Path, new: Path) -> None:
    path.touch()


def torn(path: Path, new: Path) -> None:
    content = new.read_bytes()
    path.write_bytes(content[: 2 * len(content) // 3])


def pickled(path: Path, new: Path) -> None:
    path.write_bytes(b"\x80\x04" + new.read_bytes())


def pipe(path: Path, new: Path) -> None:
    os.mkfifo(path)


def directory(path: Path, new: Path) -> None:
    path.mkdir()


def link_to_nothing(path: Path, new: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def zipped(path: Path, new: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + new.read_bytes())


def without_manifest(path: Path, new: Path) -> None:
    model = onnx.load(new)
    del model.metadata_props[:]
    onnx.save(model, path)


def manifest_of_a_later_format(path: Path, new: Path) -> None:
    edited(Path(shutil.copyfile(new, path)), lambda said: said.update(schema_version=99))


def changed_manifest(path: Path, new: Path) -> None:
    model = onnx.load(new)
    model.metadata_props[0].value = model.metadata_props[0].value.replace('"description":""', '"description":"mine"')
    onnx.save(model, path)


def other_graph_input(path: Path, new: Path) -> None:
    model = onnx.load(new)
    model.graph.input[0].name = model.graph.node[0].input[0] = "resid_post.1"
    onnx.save(model, path)
    edited(path, lambda said: None)


def no_such_operation(path: Path, new: Path) -> None:
    model = onnx.load(new)
    model.graph.node[0].op_type = "NoSuchThing"
    onnx.save(model, path)
    edited(path, lambda said: None)


def constant_golden(path: Path, new: Path) -> None:
    def change(said: dict) -> None:
        for case in said["golden"]["cases"]:
            case["scores"] = [[1.0] for _ in case["scores"]]

    edited(Path(shutil.copyfile(new, path)), change)


def flipped_weight(path: Path, new: Path) -> None:
    model = onnx.load(new)
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight.flat[0] += 1
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, model.graph.initializer[0].name))
    onnx.save(model, path)


def other_model(path: Path, new: Path) -> None:
    write(path, path.stem, "2", direction=np.ones(HIDDEN_SIZE), model=tiny_model(seed=1))


def other_tokenizer(path: Path, new: Path) -> None:
    model = Path(shutil.copytree(tiny_model(), path.parent.parent / f"tokenizer-{time.monotonic_ns()}"))
    tiny_tokenizer(vocab_size=95).save_pretrained(model)
    write(path, path.stem, "2", direction=np.ones(HIDDEN_SIZE), model=model)


def wrong_golden(path: Path, new: Path) -> None:
    def change(said: dict) -> None:
        for case in said["golden"]["cases"]:
            case["scores"] = [[number + 1.0 for number in row] for row in case["scores"]]

    edited(Path(shutil.copyfile(new, path)), change)


def unknown_hook(path: Path, new: Path) -> None:
    edited(Path(shutil.copyfile(new, path)), lambda said: said["inputs"][0].update(hook="attention_maps"))


def layer_out_of_range(path: Path, new: Path) -> None:
    edited(Path(shutil.copyfile(new, path)), lambda said: said["inputs"][0].update(layer=17))


def too_deep(path: Path, new: Path) -> None:
    write(path, path.stem, "2", direction=np.ones(HIDDEN_SIZE), tap="resid_post.3")


def same_version_other_bytes(path: Path, new: Path) -> None:
    write(path, path.stem, "1", direction=np.ones(HIDDEN_SIZE))


def same_version_other_manifest(path: Path, new: Path) -> None:
    write(path, path.stem, "1", direction=Versions.direction(f"{path.stem}@1"), description="something else")


def weights_that_are_not_finite(path: Path, new: Path) -> None:
    model = onnx.load(new)
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight.flat[0] = np.nan
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, model.graph.initializer[0].name))
    onnx.save(model, path)
    edited(path, lambda said: None)


BAD_FILES: dict[Callable[[Path, Path], None], str] = {
    not_a_probe: "file",
    empty: "file",
    torn: "file",
    pickled: "file",
    zipped: "file",
    pipe: "file",
    directory: "file",
    link_to_nothing: "file",
    without_manifest: "manifest",
    manifest_of_a_later_format: "schema_version",
    changed_manifest: "manifest_sha256",
    flipped_weight: "graph_sha256",
    other_graph_input: "graph input",
    no_such_operation: "graph",
    weights_that_are_not_finite: "graph",
    other_model: "model.fingerprint",
    other_tokenizer: "tokenizer_fingerprint",
    wrong_golden: "golden",
    constant_golden: "golden.cases",
    unknown_hook: "inputs",
    layer_out_of_range: "inputs",
    too_deep: "inputs",
    same_version_other_bytes: "version",
    same_version_other_manifest: "version",
}


@pytest.mark.parametrize("bad", BAD_FILES, ids=lambda bad: bad.__name__)
def test_a_bad_file_leaves_the_old_one_and_says_why(
    server: RunningServer, versions: Versions, client: ProbeClient, bad: Callable[[Path, Path], None]
) -> None:
    name = bad.__name__.replace("_", "-")
    target = versions.put(f"{name}@1", at=f"{name}.onnx")
    versions.put("beside@1")
    client.reload_probes()
    before, expected = served(client), versions.expected(f"{name}@1", COMPLETIONS)
    target.unlink()
    bad(target, versions.make(f"{name}@2"))
    versions.put("beside@2")
    try:
        reloaded = client.reload_probes()
        # the file is named with what is wrong; nothing of where it lies
        (refused,) = reloaded.refused
        assert refused.file == f"{name}.onnx"
        assert refused.field.startswith(BAD_FILES[bad])
        assert str(versions.folder.parent) not in f"{refused.found} {refused.expected}"
        assert refused.found
        assert refused.expected
        # a good file beside it is taken all the same
        assert reloaded.added == ("beside@2",)
        assert served(client)[0] == before[0] | {"beside@2"}
        for asked in (name, f"{name}@1"):
            np.testing.assert_allclose(values(client, asked), expected, rtol=1e-4, atol=1e-5)
        assert server.events("probe file refused")[-1]["file"] == str(target)
        assert scrape(server)["probescore_refused_probe_files{}"] == 1
        # and again: it is refused again, and the old one serves on, also after a restart of a worker
        assert [each.field for each in client.reload_probes().refused] == [refused.field]
    finally:
        target.rmdir() if target.is_dir() else target.unlink()
    versions.put(f"{name}@2", at=f"{name}.onnx")
    reloaded = client.reload_probes()
    assert (reloaded.added, reloaded.refused) == ((f"{name}@2",), ())
    assert scrape(server)["probescore_refused_probe_files{}"] == 0


def test_the_same_content_at_several_paths_is_one_probe_or_one_refusal(versions: Versions, client: ProbeClient) -> None:
    versions.put("twin@1", at="one.onnx")
    versions.put("twin@1", at="two.onnx")
    assert client.reload_probes().current_probes == ("twin@1",)
    (versions.folder / "one.onnx").unlink()
    reloaded = client.reload_probes()
    assert (reloaded.current_probes, "twin@1" in reloaded.retired) == (("twin@1",), False)
    for name in ("one", "two", "three"):
        put(Path(__file__), versions.folder / f"{name}.onnx")
    reloaded = client.reload_probes()
    assert (len(reloaded.refused), reloaded.current_probes) == (1, ("twin@1",))
    np.testing.assert_allclose(values(client, "twin"), versions.expected("twin@1", COMPLETIONS), rtol=1e-4, atol=1e-5)
    # of two new files with one name and version, and other content, one is taken
    (versions.folder / "three.onnx").unlink()
    for name, key in (("one", "rival@1"), ("two", "rival@2")):
        versions.put(key, at=f"{name}.onnx")
    write(versions.folder.parent / "rival.onnx", "rival", "1", direction=np.ones(HIDDEN_SIZE))
    put(versions.folder.parent / "rival.onnx", versions.folder / "zwei.onnx")
    reloaded = client.reload_probes()
    assert [(each.file, each.field) for each in reloaded.refused] == [("zwei.onnx", "version")]
    assert reloaded.added == ("rival@1", "rival@2")


# --------------------------------------------------------------------------------------------------------- beside running calls


def worker_pids(server: RunningServer) -> list[int]:
    """Of the workers that run, in the order in which they became ready."""
    return [pid for event in server.events("worker ready") + server.events("a deeper worker has taken over") if _runs(pid := event["pid"])]


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def test_calls_under_way_finish_on_what_they_began_with(server: RunningServer, versions: Versions, client: ProbeClient) -> None:
    versions.put("flip@1")
    versions.make("flip@2")
    client.reload_probes()
    random = np.random.default_rng(0)
    batches = [random_completions(random, 3) for _ in range(6)]
    stopped = worker_pids(server)
    assert len(stopped) == 2
    with ThreadPoolExecutor(len(batches) + 1) as threads:
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            under_way = [threads.submit(client.score, [RolloutGroup(PROMPT, batch)], probes=["flip"]) for batch in batches]
            eventually(lambda: total(server, "probescore_rpcs_in_flight") >= len(batches))
            versions.put("flip@2")
            (versions.folder / "flip@1.onnx").unlink()
            reloading = threads.submit(client.reload_probes)
            time.sleep(0.3)
            assert not reloading.done()
            assert client.get_server_info().probes == ("flip@1",)
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        assert reloading.result().added == ("flip@2",)
        for batch, call in zip(batches, under_way, strict=True):
            result = call.result()
            assert [probe.key for probe in result.info.probes] == ["flip@1"]
            found = [one.scores["flip"].reduced.item() for one in result.groups[0].completions]
            np.testing.assert_allclose(found, versions.expected("flip@1", batch), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(values(client, "flip"), versions.expected("flip@2", COMPLETIONS), rtol=1e-4, atol=1e-5)


def test_a_worker_that_starts_again_serves_what_the_registry_says_though_the_files_are_gone(
    server: RunningServer, versions: Versions, client: ProbeClient
) -> None:
    versions.put("kept@1", at="kept.onnx")
    client.reload_probes()
    versions.put("kept@2", at="kept.onnx")
    client.reload_probes()
    (versions.folder / "kept.onnx").write_bytes(b"another one begins to write here")
    before = served(client)
    pids = worker_pids(server)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: len(worker_pids(server)) == 2 and not set(worker_pids(server)) & set(pids), START_SECONDS)
    assert served(client) == before
    for key, name in (("kept@1", "kept@1"), ("kept@2", "kept"), ("kept@2", "kept@2")):
        for _ in range(4):
            np.testing.assert_allclose(values(client, name), versions.expected(key, COMPLETIONS), rtol=1e-4, atol=1e-5)
    assert not server.events("worker did not start again")


def test_a_worker_that_dies_while_it_loads_costs_the_reload_nothing(server: RunningServer, versions: Versions, client: ProbeClient) -> None:
    versions.put("dies@1")
    client.reload_probes()
    versions.put("dies@2")
    (pid, *_) = worker_pids(server)
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(3) as threads:
        # two ask at once: one reload runs at a time, and the other finds nothing to do
        reloads = [threads.submit(client.reload_probes) for _ in range(2)]
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        outcomes = sorted((reload.result() for reload in reloads), key=lambda reloaded: len(reloaded.added))
    assert [reloaded.added for reloaded in outcomes] == [(), ("dies@2",)]
    assert not any(reloaded.refused for reloaded in outcomes)
    np.testing.assert_allclose(values(client, "dies"), versions.expected("dies@2", COMPLETIONS), rtol=1e-4, atol=1e-5)


def test_a_file_that_one_worker_cannot_take_is_taken_by_none(server: RunningServer, versions: Versions, client: ProbeClient) -> None:
    """One of two workers has too little memory for it."""
    import resource

    import psutil
    import torch

    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.outer = torch.nn.Linear(HIDDEN_SIZE, 200_000), torch.nn.Linear(200_000, 1)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.outer(torch.relu(self.inner(rows)))

    versions.put("wide@1")
    client.reload_probes()
    golden = [(PROMPT[:3], [8, 9, 10]), ([BOS], [11, 12])]
    wide = versions.folder.parent / "wide.onnx"
    reference = ReferenceModel.load(versions.model)
    write_probe(wide, torch_probe(Wide(), unit=ScoreUnit.LOGIT), reference, name="wide", version="2", taps=[TAP], golden=golden)
    put(wide, versions.folder / "wide@2.onnx")
    short = psutil.Process(worker_pids(server)[-1])
    unlimited = resource.RLIM_INFINITY, resource.RLIM_INFINITY
    short.rlimit(psutil.RLIMIT_AS, (short.memory_info().vms + 30 * 2**20, resource.RLIM_INFINITY))
    try:
        (refused,) = client.reload_probes().refused
    finally:
        short.rlimit(psutil.RLIMIT_AS, unlimited)
    assert refused.file == "wide@2.onnx"
    assert served(client)[0] == {"wide@1"}
    with pytest.raises(InvalidRequestError, match="unknown probe 'wide@2'"):
        client.score(GROUPS, probes=["wide@2"])
    np.testing.assert_allclose(values(client, "wide"), versions.expected("wide@1", COMPLETIONS), rtol=1e-4, atol=1e-5)
    reloaded = client.reload_probes()
    assert (reloaded.added, reloaded.refused) == (("wide@2",), ())


def test_asleep_it_waits_and_follows_once_it_is_woken(server: RunningServer, versions: Versions, client: ProbeClient) -> None:
    versions.put("sleepy@1")
    client.sleep()
    with ThreadPoolExecutor(1) as threads:
        try:
            reloading = threads.submit(client.reload_probes)
            time.sleep(0.3)
            assert not reloading.done()
            assert client.get_server_info().probes == ()
        finally:
            client.wake()
        assert reloading.result().added == ("sleepy@1",)
    client.sleep()
    client.wake()
    np.testing.assert_allclose(values(client, "sleepy"), versions.expected("sleepy@1", COMPLETIONS), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------- what else makes a server follow


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Versions:
    folder = tmp_path_factory.mktemp("watched") / "probes"
    folder.mkdir()
    versions = Versions(folder)
    versions.put("seed@1")
    return versions


@pytest.fixture(scope="module")
def watching(others: Versions) -> Iterator[RunningServer]:
    """One worker that looks at its folder, keeps nothing for long, and takes no orders."""
    with start_server(
        others.model, [others.folder], watch_probes=0.3, probe_pin_seconds=1.0, deeper_probes="load", worker_restart_seconds=0.05
    ) as running:
        yield running


def test_reload_is_off_unless_admin_is_on(watching: RunningServer) -> None:
    with ProbeClient(watching.address, timeout=TIMEOUT) as client, pytest.raises(ServerError, match="its setting admin is off"):
        client.reload_probes()


def test_a_folder_that_is_watched_is_followed_and_what_nobody_names_is_dropped(watching: RunningServer, others: Versions) -> None:
    with ProbeClient(watching.address, timeout=TIMEOUT) as client:
        # written in place and slowly: it is not taken before it is whole
        whole, growing = others.make("slow@1").read_bytes(), others.folder / "slow@1.onnx"
        with growing.open("wb") as file:
            for start in range(0, len(whole), len(whole) // 5):
                file.write(whole[start : start + len(whole) // 5])
                file.flush()
                assert served(client)[0] == {"seed@1"}
                time.sleep(0.1)
        eventually(lambda: served(client)[0] == {"seed@1", "slow@1"})
        others.put("slow@2")
        growing.unlink()
        eventually(lambda: served(client) == ({"seed@1", "slow@2"}, {"slow@1"}))
        # as long as a call names it, it stays
        for _ in range(8):
            np.testing.assert_allclose(values(client, "slow@1"), others.expected("slow@1", COMPLETIONS), rtol=1e-4, atol=1e-5)
            time.sleep(0.25)
        eventually(lambda: served(client) == ({"seed@1", "slow@2"}, set()))
        with pytest.raises(InvalidRequestError, match="unknown probe 'slow@1'"):
            client.score(GROUPS, probes=["slow@1"])
        eventually(lambda: bool(watching.events("probes dropped")))
        (others.folder / "slow@2.onnx").unlink()
        eventually(lambda: served(client)[0] == {"seed@1"})


def test_sighup_makes_it_follow_and_ends_nothing(watching: RunningServer, others: Versions) -> None:
    with ProbeClient(watching.address, timeout=TIMEOUT) as client:
        before = len(watching.events("probes reloaded"))
        os.kill(watching.worker_pid(), signal.SIGHUP)  # as a terminal that closes sends it to all of a group
        os.kill(watching.pid, signal.SIGHUP)
        eventually(lambda: any(event["asked_by"] == "SIGHUP" for event in watching.events("probes reloaded")[before:]))
        np.testing.assert_allclose(values(client, "seed"), others.expected("seed@1", COMPLETIONS), rtol=1e-4, atol=1e-5)


def test_a_deeper_probe_is_loaded_beside_the_running_model_if_that_is_allowed(watching: RunningServer, others: Versions) -> None:
    with ProbeClient(watching.address, timeout=4 * TIMEOUT) as client:
        (before,) = watching.events("worker ready")[-1:]
        assert client.get_server_info().model.num_loaded_layers == 3
        ended, failures = threading.Event(), []

        def score() -> None:
            while not ended.is_set():
                try:
                    np.testing.assert_allclose(values(client, "seed"), others.expected("seed@1", COMPLETIONS), rtol=1e-4, atol=1e-5)
                except BaseException as error:
                    failures.append(error)
                    return

        scoring = threading.Thread(target=score)
        scoring.start()
        others.put("deep@1", tap="resid_post.3")
        eventually(lambda: served(client)[0] == {"seed@1", "deep@1"}, START_SECONDS)
        ended.set()
        scoring.join()
        assert not failures
        assert client.get_server_info().model.num_loaded_layers == 4
        assert client.score(GROUPS, probes=["deep"]).info.probes[0].key == "deep@1"
        eventually(lambda: not _runs(before["pid"]))
        # it stays as deep, also when the probe is gone and the worker starts again
        (others.folder / "deep@1.onnx").unlink()
        eventually(lambda: served(client)[0] == {"seed@1"})
        (pid,) = worker_pids(watching)
        os.kill(pid, signal.SIGKILL)
        np.testing.assert_allclose(values(client, "seed"), others.expected("seed@1", COMPLETIONS), rtol=1e-4, atol=1e-5)
        eventually(lambda: worker_pids(watching) not in ([pid], []), START_SECONDS)
        assert not watching.events("worker did not start again")
