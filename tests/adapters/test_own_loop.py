"""The example without a trainer runs as it stands in the docs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from running_server import RunningServer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "trainers"))

from own_loop import train


def test_loop_of_ones_own_trains_on_what_the_probe_says(model: Path, served: RunningServer) -> None:
    outcome = train(str(model), served.address, steps=2)
    assert not outcome.unscorable.any()
    np.testing.assert_array_equal(outcome.terms, -2.0 * outcome.flagged["cheating"])
