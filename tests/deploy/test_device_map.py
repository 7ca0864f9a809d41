"""Models larger than one device, as far as a machine without any CUDA device can show it: needs accelerate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers.integrations.accelerate
from accelerate import dispatch_model
from models import LAYERS, tiny_model
from running_server import start_server

from probescore import ProbeClient, RolloutGroup
from probescore.types import Tap
from probescore_server import Engine
from probescore_server.backbone.model_loading import load_decoder
from probescore_server.backbone.selection import choose_backbone
from probescore_server.backbone.self_test import small_forest
from probescore_server.backbone.taps import TapReader
from probescore_server.errors import ModelRefused, StartupError
from probescore_server.settings import load_settings

GROUPS = [RolloutGroup([1, 5, 6, 7], [[8, 9, 10], [11, 12]])]
TAPS = [Tap("resid_pre", 1), Tap("attn_out", 2), Tap("mlp_out", 2), Tap("resid_post", LAYERS - 1), Tap("final_norm")]


def test_without_cuda_devices_auto_is_the_cpu(model: Path, probe_file: Path) -> None:
    plain = Engine.load(str(model), [probe_file])

    spread = Engine.load(str(model), [probe_file], device_map="auto")

    np.testing.assert_array_equal(spread.score(GROUPS).values("direction"), plain.score(GROUPS).values("direction"))
    assert vars(spread.info) == vars(plain.info)


def test_a_server_has_one_worker_for_all_devices(model: Path, probe_file: Path) -> None:
    with start_server(model, [probe_file], device_map="auto") as server, ProbeClient(server.address) as client:
        assert [worker.device for worker in client.get_server_info().workers] == ["cpu"]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3_5_text"])
def test_hooks_that_move_tensors_from_block_to_block_change_nothing(architecture: str) -> None:
    """Accelerate's, as they are put around each block of a model that is spread; here they all move to the CPU."""
    directory = tiny_model(architecture)
    plain = load_decoder(directory, num_layers=LAYERS)
    spread = load_decoder(directory, num_layers=LAYERS)
    places = {name: "cpu" for name, _ in spread.model.named_children() if name != "layers"}
    places |= {f"layers.{layer}": "cpu" for layer in range(LAYERS)}
    dispatch_model(spread.model, places, main_device="cpu", skip_keys=spread.model._skip_keys_device_placement, force_hooks=True)
    assert all(hasattr(block, "_hf_hook") for block in spread.blocks)

    rows = []
    for decoder in (plain, spread):
        reader = TapReader(decoder, TAPS)
        backbone, _ = choose_backbone(decoder, reader)
        rows.append(backbone.forward(small_forest(decoder), TAPS).rows)

    for tap in TAPS:
        torch.testing.assert_close(rows[1][tap], rows[0][tap], rtol=0, atol=0)


def test_a_model_that_the_devices_have_no_room_for_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.integrations.accelerate, "get_max_memory", lambda max_memory=None: {"cpu": 100_000})

    with pytest.raises(ModelRefused, match=r"no room for \d+ of its weights, from layers\.\d"):
        load_decoder(model, num_layers=LAYERS, device_map="auto")


@pytest.mark.parametrize("setting", [{"devices": "cuda:0"}, {"device_memory_fraction": 0.5}])
def test_a_setting_for_one_device_contradicts_it(setting: dict[str, object]) -> None:
    with pytest.raises(StartupError, match="device_map"):
        load_settings({"model": "m", "device_map": "auto", **setting})
