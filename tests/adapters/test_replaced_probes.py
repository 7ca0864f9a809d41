"""A running scorer is pinned to what it started with, or follows: another graph, calibration or version is never read unnoticed."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import BOS, HIDDEN_SIZE, VOCAB_SIZE
from running_server import start_server

from probescore_adapters import Outcome, Policy, ProbeReplaced, ProbeScorer, ProbeSignal, Rollout, SignalError
from probescore_audit import calibrate
from probescore_audit.record import read_record
from probescore_probes import ReferenceModel, linear_probe, write_probe

SIGNAL = ProbeSignal("cheating", mode="penalty")
ROLLOUTS = [Rollout([BOS, 5, 6], [7, 8, 9]), Rollout([BOS, 5, 6], [10, 11])]


def write(folder: Path, model: Path, *, weights: int = 0, threshold: int = 0, version: str = "1", name: str = "cheating") -> Path:
    random = np.random.default_rng(9)
    golden = [([BOS, *random.integers(4, VOCAB_SIZE, 5)], random.integers(4, VOCAB_SIZE, 7)) for _ in range(2)]
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.onnx"
    path.unlink(missing_ok=True)
    write_probe(
        path,
        linear_probe(np.random.default_rng(weights).standard_normal(HIDDEN_SIZE)),
        ReferenceModel.load(model),
        name=name,
        version=version,
        taps=["resid_post.1"],
        golden=golden,
        calibrations=[calibrate(np.random.default_rng(threshold).standard_normal(50), false_positive_rate=0.1, dataset="honest")],
    )
    return path


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"weights": 1}, "its graph was sha256:.* and is sha256:"),
    "threshold": ({"threshold": 1}, "its threshold was .* and is "),
    "version": ({"version": "2"}, "cheating@1 is no longer loaded; the server has cheating@2"),
}


def said_of_a_change(name: str) -> str:
    return {"weights": "its graph was sha256:", "threshold": "its threshold was ", "version": "its manifest was sha256:"}[name]


@dataclass(frozen=True)
class Run:
    """Scorers that started with the first probes, and go on at a port where others are served later."""

    port: int
    raising: ProbeScorer
    following: ProbeScorer
    of_a_version: ProbeScorer
    of_another_probe: ProbeScorer
    before: Outcome


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """One for each change."""
    folder = tmp_path_factory.mktemp("first")
    write(folder, model)
    write(folder, model, name="other")
    other = ProbeSignal("other", mode="reward")
    with start_server(model, [folder]) as server:

        def started(signal: ProbeSignal, *, follow: bool = False, **policy: Any) -> ProbeScorer:
            scorer = ProbeScorer(signal, server.address, policy=Policy(timeout=60, **policy), follow=follow)
            scorer.score(ROLLOUTS)
            return scorer

        return {
            name: Run(
                int(server.address.rpartition(":")[2]),
                # a number for failures of transport: this is none, and no number may stand in for it
                started(SIGNAL, on_failure=0.0),
                started(SIGNAL, follow=True),
                started(ProbeSignal("cheating@1"), follow=True),
                started(other),
                ProbeScorer(other, server.address).score(ROLLOUTS),
            )
            for name in CHANGES
        }


def test_a_record_has_each_version_that_a_run_followed_to(model: Path, tmp_path: Path) -> None:
    write(tmp_path / "probes", model)
    with start_server(model, [tmp_path / "probes"]) as server:
        scorer = ProbeScorer(SIGNAL, server.address, follow=True, record=tmp_path / "record", policy=Policy(timeout=60))
        scorer.score(ROLLOUTS, step=0)
        port = int(server.address.rpartition(":")[2])
    write(tmp_path / "probes", model, version="2", threshold=1)
    with start_server(model, [tmp_path / "probes"], port=port):
        scorer.score(ROLLOUTS, step=1)
    record = read_record(tmp_path / "record")
    assert [[*row.scores] for row in record.rollouts] == [["cheating@1"]] * 2 + [["cheating@2"]] * 2
    first, second = record.header.probes
    assert (first.key, second.key) == ("cheating@1", "cheating@2")
    assert first.thresholds["mean"] != second.thresholds["mean"]


@pytest.mark.parametrize("name", CHANGES)
def test_replaced_probe_is_never_read_unnoticed(
    name: str, runs: dict[str, Run], model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, (changes, said) = runs[name], CHANGES[name]
    write(tmp_path, model, **changes)
    write(tmp_path, model, name="other")
    with start_server(model, [tmp_path], port=run.port) as server:
        # by default it ends the run's scoring, says what is another, and stays ended
        for _ in range(2):
            with pytest.raises(ProbeReplaced, match=said) as refused:
                run.raising.score(ROLLOUTS)
            assert "ProbeScorer(follow=True)" in str(refused.value)
        # a run that follows goes on with what is loaded now, and says from when on
        followed, again = run.following.score(ROLLOUTS, step=7), run.following.score(ROLLOUTS, step=8)
        anew = ProbeScorer(SIGNAL, server.address).score(ROLLOUTS)
        for outcome in (followed, again):
            np.testing.assert_allclose(outcome.values["cheating"], anew.values["cheating"], rtol=1e-5)
            np.testing.assert_array_equal(outcome.flagged["cheating"], anew.flagged["cheating"])
        (warning,) = [record.getMessage() for record in caplog.records if "the run follows" in record.getMessage()]
        assert "step 7" in warning
        assert f"cheating@1 was replaced by {'cheating@2' if name == 'version' else 'cheating@1'}: " in warning
        assert said_of_a_change(name) in warning
        # a version that was named is not another one
        if name == "version":
            with pytest.raises(SignalError, match="'cheating@1': it is not loaded"):
                run.of_a_version.score(ROLLOUTS)
        # and who reads another probe notices nothing
        np.testing.assert_allclose(run.of_another_probe.score(ROLLOUTS).values["other"], run.before.values["other"], rtol=1e-5)


# ------------------------------------------------------------------------------------------------ several versions side by side


@pytest.fixture(scope="module")
def side_by_side(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions 9, 10 and 10.1 of ``cheating``, each with weights and a threshold of its own."""
    folder = tmp_path_factory.mktemp("several")
    for number, version in enumerate(("9", "10", "10.1")):
        write(tmp_path_factory.mktemp("one"), model, weights=number, threshold=number, version=version).rename(folder / f"{version}.onnx")
    return folder


def only(folder: Path, *versions: str, into: Path) -> Path:
    into.mkdir()
    for version in versions:
        (into / f"{version}.onnx").write_bytes((folder / f"{version}.onnx").read_bytes())
    return into


def test_a_name_means_the_highest_version_and_a_run_keeps_to_it(
    model: Path, side_by_side: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with start_server(model, [only(side_by_side, "9", "10", into=tmp_path / "before")]) as server:
        port = int(server.address.rpartition(":")[2])
        pinned, following = (ProbeScorer(SIGNAL, server.address, follow=follow) for follow in (False, True))
        first = pinned.score(ROLLOUTS)
        np.testing.assert_array_equal(following.score(ROLLOUTS).values["cheating"], first.values["cheating"])
        state = pinned.state_dict()
        assert json.loads(json.dumps(state)) == state
        assert state["probes"]["cheating"]["probe"] == "cheating@10"  # a number, and not a text in which 9 is higher
    with start_server(model, [side_by_side], port=port) as server:
        anew = ProbeScorer(SIGNAL, server.address)
        highest = anew.score(ROLLOUTS)
        assert anew.pin()["probes"]["cheating"]["probe"] == "cheating@10.1"
        np.testing.assert_allclose(pinned.score(ROLLOUTS).values["cheating"], first.values["cheating"], rtol=1e-5)
        followed = [following.score(ROLLOUTS, step=step) for step in (7, 8)]
        for outcome in followed:
            np.testing.assert_allclose(outcome.values["cheating"], highest.values["cheating"], rtol=1e-5)
            np.testing.assert_array_equal(outcome.flagged["cheating"], highest.flagged["cheating"])
        (warning,) = [record.getMessage() for record in caplog.records if "the run follows" in record.getMessage()]
        assert "cheating@10 was replaced by cheating@10.1: its graph was sha256:" in warning
        assert "its manifest was sha256:" in warning
        assert "its threshold was " in warning

        # ranks that begin later, and a run that is resumed, read what the first one read
        for state_of_a_rank in (state, pinned.pin()):
            rank = ProbeScorer(SIGNAL, server.address)
            rank.load_state_dict(json.loads(json.dumps(state_of_a_rank)))
            np.testing.assert_allclose(rank.score(ROLLOUTS).values["cheating"], first.values["cheating"], rtol=1e-5)
        np.testing.assert_allclose(
            pickle.loads(pickle.dumps(pinned)).score(ROLLOUTS).values["cheating"], first.values["cheating"], rtol=1e-5
        )
        # a run that follows is told what has changed while it did not run
        caplog.clear()
        resumed = ProbeScorer(SIGNAL, server.address, follow=True)
        resumed.load_state_dict(state)
        np.testing.assert_allclose(resumed.score(ROLLOUTS).values["cheating"], highest.values["cheating"], rtol=1e-5)
        assert len([record for record in caplog.records if "cheating@10 was replaced by cheating@10.1" in record.getMessage()]) == 1


def test_a_restored_scorer_reads_what_it_read_or_nothing(model: Path, side_by_side: Path, tmp_path: Path) -> None:
    with start_server(model, [only(side_by_side, "10", into=tmp_path / "ten")]) as server:
        state = ProbeScorer(SIGNAL, server.address).pin()
        other_bytes = {"probes": {"cheating": {**state["probes"]["cheating"], "manifest_sha256": "sha256:another"}}}
        gone = {"probes": {"cheating": {**state["probes"]["cheating"], "probe": "cheating@9"}}}
        for wrong, said in ((other_bytes, "its manifest was sha256:another and is sha256:"), (gone, "cheating@9 is no longer loaded")):
            scorer = ProbeScorer(SIGNAL, server.address)
            scorer.load_state_dict(wrong)
            for _ in range(2):
                with pytest.raises(ProbeReplaced, match=said):
                    scorer.score(ROLLOUTS)
        # what was never used has nothing to restore
        unused = ProbeScorer(SIGNAL, server.address)
        unused.load_state_dict(ProbeScorer(SIGNAL, server.address).state_dict())
        assert unused.pin() == state
    for broken in ({}, {"probes": 1}, {"probes": {"cheating": "cheating@10"}}, {"probes": {"cheating": {"probe": 1}}}):
        with pytest.raises(ValueError, match=r"expected what ProbeScorer\.state_dict"):
            unused.load_state_dict(broken)
    with pytest.raises(ValueError, match="a signal reads 'cheating'; give what a scorer of these signals gave"):
        unused.load_state_dict({"probes": {"other": state["probes"]["cheating"]}})
    with pytest.raises(TypeError, match="follow: expected True or False"):
        ProbeScorer(SIGNAL, follow="follow")  # type: ignore[arg-type]
