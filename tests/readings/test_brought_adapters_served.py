"""Probes that bring a LoRA adapter, as a server follows their files: real workers, real sockets, real files; and on the command line."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from read_twice import BOUND, GROUPS, Served, plain_scores, token_scores
from running_server import RunningServer, start_server
from test_brought_adapters import write
from typer.testing import CliRunner, Result
from written_adapters import WrittenAdapter

from probescore import InvalidRequestError, ProbeClient
from probescore_adapters import ProbeScorer, ProbeSignal, Rollout
from probescore_server.cli.app import app
from probescore_server.files import adapter_path
from probescore_server.registry.folder import ProbeFolder
from probescore_server.spool import Spool


@pytest.fixture(scope="module")
def adapter(llama: Served) -> WrittenAdapter:
    return WrittenAdapter.random(llama.model, ["q_proj", "v_proj"], seed=7)


@pytest.fixture(scope="module")
def own(llama: Served, adapter: WrittenAdapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("own"), llama.model, "own", "last", adapter)


@pytest.fixture
def folder(llama: Served, own: Path, tmp_path: Path) -> Path:
    """A registry with a plain probe and one that brings an adapter."""
    registry = tmp_path / "probes"
    registry.mkdir()
    for path in (llama.probe("last"), own, adapter_path(own)):
        shutil.copy(path, registry)
    return registry


@pytest.fixture
def server(llama: Served, folder: Path) -> Iterator[RunningServer]:
    with start_server(llama.model, [folder], admin=True, worker_restart_seconds=0.05) as running:
        yield running


def test_a_server_keeps_what_it_has_read(server: RunningServer, llama: Served, folder: Path, adapter: WrittenAdapter) -> None:
    """A worker that is started again has the adapter, also where its file is gone; a folder that lacks it is refused, by name."""
    expected = plain_scores(adapter.merged(), ["last"])["last"]
    with ProbeClient(server.address) as client:

        def check() -> None:
            result = client.score(GROUPS, token_scores="all")
            assert set(result.groups[0][0].scores) == {"last", "own"}
            assert np.abs(token_scores(result, "own") - expected).max() <= BOUND * expected.std()
            assert np.array_equal(token_scores(result, "last"), plain)

        plain = token_scores(client.score(GROUPS, probes=["last"], token_scores="all"), "last")
        check()
        (brought,) = [probe for probe in client.list_probes() if probe.name == "own"]
        assert '"adapter":{"sha256":"sha256:' in brought.manifest_json
        beside = folder / "own-1.adapter.safetensors"
        kept = beside.rename(folder / "kept")
        refused = client.reload_probes().refused
        assert [(each.file, each.field, each.found) for each in refused] == [("own-1.onnx", "adapter", f"no file {beside.name}")]
        check()
        os.kill(server.worker_pid(), signal.SIGKILL)
        server.wait_for("worker ready", count=2)
        check()
        beside.write_bytes(kept.read_bytes()[:-1] + b"\x01")
        (refusal,) = client.reload_probes().refused
        assert (refusal.field, "sha256:" in refusal.found) == ("adapter.sha256", True)
        check()
        kept.rename(beside)
        reloaded = client.reload_probes()
        assert (reloaded.added, reloaded.retired, reloaded.refused) == ((), (), ())
        check()
        for path in (folder / "own-1.onnx", beside):
            path.unlink()
        assert client.reload_probes().retired == ("own@1",)
        assert np.allclose(client.score(GROUPS, probes=["own@1"]).values("own"), client.score(GROUPS, probes=["own@1"]).values("own"))


def test_what_an_adapter_costs_counts_in_the_limits_of_a_request(llama: Served, folder: Path) -> None:
    tokens = sum(len(group.prompt) + sum(map(len, group.completions)) for group in GROUPS)
    most = 2 * (tokens - len(GROUPS[1].prompt)) - 1  # the first two are of one prompt, which a trainer's batch is grouped by
    with (
        start_server(llama.model, [folder], max_request_tokens=most, max_rollout_tokens=64) as server,
        ProbeClient(server.address) as client,
    ):
        for alone in ("last", "own"):
            client.score(GROUPS, probes=[alone])
        with pytest.raises(InvalidRequestError, match=f"groups: {2 * tokens} tokens; the limit max_request_tokens is {most}"):
            client.score(GROUPS)
        # a trainer's batch is sent in as many calls as it takes
        expected = {name: client.score(GROUPS, probes=[name]).values(name) for name in ("last", "own")}
        scorer = ProbeScorer([ProbeSignal("last", mode="reward"), ProbeSignal("own", mode="monitor")], server.address)
        outcome = scorer.score([Rollout(group.prompt, completion) for group in GROUPS for completion in group.completions])
        for name, values in expected.items():
            np.testing.assert_allclose(outcome.values[name], values, atol=1e-4)


def test_a_change_of_the_adapter_is_a_change_of_the_probe(folder: Path) -> None:
    probes, spool = ProbeFolder([str(folder)]), Spool()
    before, path = probes.stamps(), str(folder / "own-1.onnx")
    first = probes.read(spool).files
    assert probes.stamps() == before
    adapter_path(path).write_bytes(b"changed")
    assert {name for name, stamp in probes.stamps().items() if stamp != before[name]} == {path}
    second = probes.read(spool).files
    assert first[path].sha256 != second[path].sha256
    spool.keep_only({first[path].sha256})
    assert first[path].adapter is not None
    assert first[path].read() == Path(path).read_bytes()
    assert first[path].adapter.read() != b"changed"
    spool.close()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["probes", *map(str, arguments)], env={"COLUMNS": "200"})


def test_commands(llama: Served, folder: Path, tmp_path: Path) -> None:
    own = folder / "own-1.onnx"
    assert "own@1" in run("list", folder).output
    shown = run("inspect", own)
    assert (shown.exit_code, "the model with the adapter that it brings" in shown.output) == (0, True), shown.output
    differing = run("diff", folder / "last.onnx", own).output
    assert "adapter" in differing
    verified = run("verify", folder, "--model", llama.model)
    assert verified.exit_code == 0, verified.output
    adapter_path(own).unlink()
    for command in (["list", folder], ["inspect", own], ["verify", folder, "--model", llama.model]):
        missing = run(*command)
        assert missing.exit_code == 1
        assert "own-1.onnx: adapter: found no file own-1.adapter.safetensors, expected the adapter that the probe brings" in missing.output
