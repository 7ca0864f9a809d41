"""One tiny model for the tests that need activations."""

from __future__ import annotations

import numpy as np
import pytest
from models import VOCAB_SIZE, tiny_model

from probescore_probes import ReferenceModel

Rollouts = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="session")
def reference() -> ReferenceModel:
    return ReferenceModel.load(tiny_model("qwen3"))


@pytest.fixture(scope="session")
def rollouts() -> Rollouts:
    random = np.random.default_rng(0)
    return [(random.integers(4, VOCAB_SIZE, 5).tolist(), random.integers(4, VOCAB_SIZE, 6 + i).tolist()) for i in range(24)]
