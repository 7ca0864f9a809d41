"""A policy's adapter and its checkpoint, read by a server in one request, score as plain Hugging Face does, for each architecture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from parity_models import write_model
from read_twice import BOUND, TAPS, deviations, plain_scores, token_scores, write_probes
from running_server import start_server
from served_readings import ReadingsClient
from test_adapter_scores import OTHERS
from test_checkpoints import moved, write_checkpoint
from written_adapters import WrittenAdapter, load

IN_EVERY_RUN = ("gemma2", "mixtral")


@pytest.mark.parametrize("architecture", [pytest.param(name, marks=() if name in IN_EVERY_RUN else pytest.mark.sweep) for name in OTHERS])
def test_both_kinds_of_policies_score_as_they_do_themselves(tmp_path: Path, architecture: str) -> None:
    model = write_model(tmp_path / "model", architecture)
    adapter = WrittenAdapter.random(model)
    adapter.write(tmp_path / "readings" / "adapter")
    trained = tmp_path / "readings" / "checkpoint"
    write_checkpoint(trained, model, lambda name, tensor: tensor + 0.1 * (moved(name, tensor) - tensor))
    expected = {
        "frozen": plain_scores(load(model).double()),
        "adapter": plain_scores(adapter.merged().double()),
        "checkpoint": plain_scores(load(trained).double()),
    }
    probes = write_probes(tmp_path, model)
    with start_server(model, probes, admin=True, readings_root=tmp_path / "readings") as server, ReadingsClient.of(server) as client:
        alone = client.score()
        loaded = [client.load(name, name).reading for name in ("adapter", "checkpoint")]
        assert [reading.kind.value for reading in loaded] == ["adapter", "checkpoint"]
        result = client.score(*expected)
    far = {(reading, probe): each for reading in expected for probe, each in deviations(result, expected[reading], reading).items()}
    print({reading: f"{max(far[reading, probe] for probe in TAPS):.1e}" for reading in expected})
    assert {place: each for place, each in far.items() if not each <= BOUND} == {}
    for probe in TAPS:
        np.testing.assert_array_equal(token_scores(result, probe), token_scores(alone, probe))
        for reading in ("adapter", "checkpoint"):
            assert np.abs(token_scores(result, probe, reading) - token_scores(result, probe)).max() > 1e-3
