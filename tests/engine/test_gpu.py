"""The engine on a CUDA device gives what it gives on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_probes import linear, pooled_mean, running_mean

from probescore import RolloutGroup

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

PROBES = (linear(), running_mean(sees_prompt=True), pooled_mean())
GROUPS = [RolloutGroup([1, 5, 9, 12], [[7, 8, 30], [7, 8, 31, 40, 41]]), RolloutGroup([], [[1, 50, 60]])]


@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-3), ("bfloat16", 0.25), ("float16", 0.05)])
def test_scores_on_a_gpu_are_those_of_the_cpu(load, dtype, within):
    on_cpu = load(*PROBES).score(GROUPS)
    on_gpu = load(*PROBES, device="cuda", dtype=dtype).score(GROUPS)

    for probe in PROBES:
        expected = on_cpu.values(probe.name)
        assert np.abs(on_gpu.values(probe.name) - expected).max() <= within * expected.std()
