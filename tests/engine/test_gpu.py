"""The engine on a CUDA device gives what it gives on the CPU, and the packed path there what the universal one gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import varlen_reference
from engine_probes import linear, pooled_mean, running_mean
from packed_models import open_decoder
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from probescore import RolloutGroup
from probescore.types import Scope, Tap
from probescore_server.backbone.forest import Forest
from probescore_server.backbone.packed.backbone import PackedBackbone
from probescore_server.backbone.selection import choose_backbone
from probescore_server.backbone.taps import TapReader
from probescore_server.backbone.universal.backbone import UniversalBackbone
from probescore_server.rollouts import CheckedRollout, Continuation, ResolvedOptions

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


# ---------------------------------------------------------------------------------------------------------------- packed path

DEEPEST = Tap("resid_post", 3)
PACKABLE = ["llama", "mistral", "deepseek_v3", "gpt_oss"]  # unequal heads, a window, narrow values, sinks


def a_forest() -> Forest:
    random = np.random.default_rng(0)
    prompts = [random.integers(4, 96, count, np.int32) for count in (50, 7)]
    options = ResolvedOptions(probes=(), scope=Scope.ALL)
    lengths = [(0, 1), (0, 33), (1, 20), (0, 5)]
    return Forest.build(
        [CheckedRollout(prompts[which], Continuation(random.integers(4, 96, count, np.int32)), options) for which, count in lengths], {}
    )


@pytest.mark.parametrize("window_size", [(-1, 0), (5, 0)])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_kernel_does_what_its_stand_in_does(window_size, key_heads):
    lengths_q, lengths_k = [3, 1, 9, 16], [10, 1, 9, 40]  # aligned at their ends
    query = torch.randn(sum(lengths_q), 4, 32)
    key, value = torch.randn(2, sum(lengths_k), key_heads, 32).unbind(0)
    ends = [torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32) for lengths in (lengths_q, lengths_k)]
    options = {"return_aux": AuxRequest(lse=True), "scale": 0.3, "window_size": window_size, "enable_gqa": key_heads != 4}

    halves = [tensor.bfloat16() for tensor in (query, key, value)]
    expected = varlen_reference.varlen_attn(*halves, *ends, 16, 40, **options)
    found = varlen_attn(*(tensor.cuda() for tensor in (*halves, *ends)), 16, 40, **options)

    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu().float(), other.float(), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("architecture", PACKABLE)
def test_packed_path_is_as_near_to_float32_as_the_universal_one(architecture):
    exact = open_decoder(architecture, device="cuda")
    decoder = open_decoder(architecture, dtype="bfloat16", device="cuda")
    expected = UniversalBackbone(exact, TapReader(exact, [DEEPEST])).forward(a_forest(), [DEEPEST]).rows[DEEPEST]
    reader = TapReader(decoder, [DEEPEST])

    def median_error(backbone):
        rows = backbone.forward(a_forest(), [DEEPEST]).rows[DEEPEST]
        return float(((rows - expected).norm(dim=1) / expected.norm(dim=1)).median())

    assert median_error(PackedBackbone(decoder, reader)) <= 1.5 * median_error(UniversalBackbone(decoder, reader))


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_self_test_chooses_the_packed_path(architecture):
    decoder = open_decoder(architecture, dtype="bfloat16", device="cuda")
    backbone, reason = choose_backbone(decoder, TapReader(decoder, [DEEPEST]))
    assert (backbone.name, reason) == ("packed", "the packed path agrees with the universal one")


def test_float32_is_served_by_the_universal_path():
    decoder = open_decoder("llama", device="cuda")
    backbone, reason = choose_backbone(decoder, TapReader(decoder, [DEEPEST]))
    assert (backbone.name, reason) == ("universal", "not packed: the kernel computes in float16 and bfloat16, not in float32")


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_host_does_not_wait_for_the_device_while_a_forest_runs(architecture):
    decoder = open_decoder(architecture, dtype="bfloat16", device="cuda")
    backbone = PackedBackbone(decoder, TapReader(decoder, [DEEPEST]), max_pass_tokens=40)
    backbone.forward(a_forest(), [DEEPEST])  # libraries set themselves up
    torch.cuda.set_sync_debug_mode("error")
    try:
        backbone.forward(a_forest(), [DEEPEST])
    finally:
        torch.cuda.set_sync_debug_mode("default")
