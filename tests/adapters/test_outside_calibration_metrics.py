"""A run is told which of its rollouts are unlike those that a signal's threshold was found on."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from models import BOS
from running_server import start_server

from probescore_adapters import ProbeScorer, ProbeSignal, Rollout
from probescore_probes import read_probe_file
from probescore_server.probes.format.manifest import CalibrationConditions
from probescore_server.probes.format.new_version import write_new_version

ROLLOUTS = [
    Rollout([BOS, 5, 6], [7, 8, 9]),
    Rollout([BOS, 5, 6], [7, 8, 9, 10, 11]),  # longer than any negative was
    Rollout([5, 6], [7, 8, 9]),  # without BOS
    Rollout([BOS, 5, 6], []),  # without a score
    Rollout([BOS, 5, 6], [7, 8, 9, 10, 11], [1, 1, 1, 0, 0]),
]


def test_signals_say_which_rollouts_their_thresholds_do_not_cover(
    model: Path, probe_files: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = read_probe_file(probe_files[0])
    conditions = CalibrationConditions(
        groups=20,
        dtype="float32",
        shortest_prompt=0,
        longest_prompt=5,
        shortest_completion=1,
        longest_completion=4,
        prompt_forms=["ids"],
        prompt_shapes=["bos text"],
    )
    (record,) = before.manifest.calibrations
    write_new_version(tmp_path / "two.onnx", before, version="2", calibrations=[record.model_copy(update={"conditions": conditions})])
    (tmp_path / "one.onnx").write_bytes(probe_files[0].read_bytes())
    signals = [
        ProbeSignal("cheating"),
        ProbeSignal("cheating", mask="all", mode="monitor", name="of all"),
        ProbeSignal("cheating", threshold=0.5, name="with a threshold of its own"),
        ProbeSignal("cheating", reduction="max", mode="monitor", name="without a threshold"),
        ProbeSignal("cheating@1", mode="monitor", name="of which nobody knows"),
    ]
    with start_server(model, [tmp_path]) as server:
        scorer = ProbeScorer(signals, server.address)
        outcomes = [scorer.score(ROLLOUTS) for _ in range(2)]
        single = scorer.score(ROLLOUTS[:1])
    for outcome in outcomes:
        assert outcome.outside_calibration["cheating"].tolist() == [False, True, True, False, False]
        assert outcome.outside_calibration["of all"].tolist() == [False, True, True, False, True]
        assert outcome.metrics["probescore/cheating/outside_calibration"] == 2 / 4
        assert outcome.metrics["probescore/of all/outside_calibration"] == 3 / 4
        for signal in signals[2:]:
            assert not outcome.outside_calibration[signal.name].any()
            assert math.isnan(outcome.metrics[f"probescore/{signal.name}/outside_calibration"])
        assert outcome.rollout_metrics["probescore/cheating/outside_calibration"] == 2 / 4
    assert single.metrics["probescore/cheating/outside_calibration"] == 0.0
    # said once for each signal and condition, however many batches there are; and nothing of it changes a reward
    said = [record.getMessage() for record in caplog.records if "unlike those" in record.getMessage()]
    assert len(said) == 4
    assert "signal 'cheating': 1 of 5 rollouts are unlike those that the threshold of cheating@2 was found on (prompt_shape)" in said[1]
    np.testing.assert_allclose(outcomes[0].values["cheating"], outcomes[0].values["of which nobody knows"], rtol=1e-5)
