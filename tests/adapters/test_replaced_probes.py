"""A running scorer pins what it started with: another graph, calibration or version is never read unnoticed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import BOS, HIDDEN_SIZE, VOCAB_SIZE
from running_server import start_server

from probescore_adapters import Outcome, Policy, ProbeReplaced, ProbeScorer, ProbeSignal, Rollout, SignalError
from probescore_audit import calibrate
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

        def started(signal: ProbeSignal, **policy: Any) -> ProbeScorer:
            scorer = ProbeScorer(signal, server.address, policy=Policy(timeout=60, **policy))
            scorer.score(ROLLOUTS)
            return scorer

        return {
            name: Run(
                int(server.address.rpartition(":")[2]),
                # a number for failures of transport: this is none, and no number may stand in for it
                started(SIGNAL, on_failure=0.0),
                started(SIGNAL, on_replaced="follow"),
                started(ProbeSignal("cheating@1"), on_replaced="follow"),
                started(other),
                ProbeScorer(other, server.address).score(ROLLOUTS),
            )
            for name in CHANGES
        }


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
            assert "on_replaced='follow'" in str(refused.value)
        # a run that follows goes on with what is loaded now, and says from when on
        followed, again = run.following.score(ROLLOUTS, step=7), run.following.score(ROLLOUTS, step=8)
        anew = ProbeScorer(SIGNAL, server.address).score(ROLLOUTS)
        for outcome in (followed, again):
            np.testing.assert_allclose(outcome.values["cheating"], anew.values["cheating"], rtol=1e-5)
            np.testing.assert_array_equal(outcome.flagged["cheating"], anew.flagged["cheating"])
        (warning,) = [record.getMessage() for record in caplog.records if "the run follows" in record.getMessage()]
        assert "step 7" in warning
        # a version that was named is not another one
        if name == "version":
            with pytest.raises(SignalError, match="'cheating@1': it is not loaded"):
                run.of_a_version.score(ROLLOUTS)
        # and who reads another probe notices nothing
        np.testing.assert_allclose(run.of_another_probe.score(ROLLOUTS).values["other"], run.before.values["other"], rtol=1e-5)
