"""verl's hook after a checkpoint with ours, against a live server: the policy is read beside the frozen model."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf, open_dict
from peft import LoraConfig, get_peft_model
from plain_forward import TOLERANCE, Probed, random_rollouts
from rollouts_of_verl import configuration, streamed
from running_server import RunningServer, start_server
from transformers import AutoModelForCausalLM
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback, build_checkpoint_callback
from verl.trainer.ppo.reward import load_reward_manager
from verl.utils import hf_tokenizer

from probescore_adapters.verl_readings import ReadingCheckpointCallback

SIGNALS = [{"probe": "cheating", "mode": "monitor"}, {"probe": "cheating", "mode": "monitor", "reading": "policy"}]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def reading_server(probed: Probed, root: Path) -> Iterator[RunningServer]:
    with start_server(probed.model, [probed.probe], admin=True, readings_root=root) as server:
        yield server


def configured(folder: Path, server: RunningServer, signals: list[dict[str, Any]] = SIGNALS, **settings: Any) -> Any:
    config = configuration(folder, address=server.address, signals=signals, **settings)
    OmegaConf.set_struct(config, False)
    with open_dict(config):
        config.trainer = {"checkpoint_callback_class": "probescore_adapters.verl_readings.ReadingCheckpointCallback"}
    return config


def trained(probed: Probed, folder: Path, seed: int) -> Any:
    """A policy that training has moved, saved as a whole to where its own scores can be computed."""
    shutil.copytree(probed.model, folder / "model")
    shutil.copy(probed.folder / "weight.npy", folder)
    policy = AutoModelForCausalLM.from_pretrained(probed.model, dtype=torch.float32)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=random)
    policy.save_pretrained(folder / "model")
    return policy


def save(callback: CheckpointCallback, checkpoint: Path, step: int) -> None:
    callback.on_save(trainer=None, global_step=step, checkpoint_dir=str(checkpoint), async_save=False)


def read(config: Any, probed: Probed, rollouts: list[Any]) -> list[dict[str, Any]]:
    manager = load_reward_manager(config, hf_tokenizer(str(probed.model)))

    async def run_all() -> list[dict[str, Any]]:
        return await asyncio.gather(*(manager.run_single(streamed(ids)) for ids in rollouts))

    return [result["reward_extra_info"] for result in asyncio.run(run_all())]


def test_each_checkpoint_is_what_the_monitor_reads(probed: Probed, reading_server: RunningServer, root: Path, tmp_path: Path) -> None:
    config, rollouts = configured(tmp_path, reading_server), random_rollouts(6)
    callback = build_checkpoint_callback(config)
    assert isinstance(callback, ReadingCheckpointCallback)
    frozen = np.array([scores.mean() for scores in probed.scores(rollouts)])
    for step in (5, 10):
        own = tmp_path / f"own-{step}"
        trained(probed, own, step)
        checkpoint = root / f"global_step_{step}"
        shutil.copytree(own / "model", checkpoint / "actor" / "huggingface")  # where verl saves hf_model
        save(callback, checkpoint, step)
        found = read(config, probed, rollouts)
        expected = np.array([scores.mean() for scores in Probed(own).scores(rollouts)])
        means = np.array([info["probescore/cheating/policy/mean"] for info in found])
        assert np.abs(means - expected).max() <= TOLERANCE * expected.std()
        assert np.abs(np.array([info["probescore/cheating/mean"] for info in found]) - frozen).max() <= TOLERANCE * frozen.std()
        drifts = np.array([info["probescore/cheating/policy/drift"] for info in found])
        assert np.abs(drifts - (expected - frozen)).max() <= 2 * TOLERANCE * expected.std()
        assert {info["probescore/cheating/policy/reading_step"] for info in found} == {float(step)}


def test_an_adapter_of_the_model_merger_is_taken_before_whole_weights(
    probed: Probed, reading_server: RunningServer, root: Path, tmp_path: Path
) -> None:
    config = configured(tmp_path, reading_server)
    checkpoint = root / "global_step_20"
    shutil.copytree(probed.model, checkpoint / "actor" / "huggingface")
    base = AutoModelForCausalLM.from_pretrained(probed.model)
    get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(
        checkpoint / "actor" / "lora_adapter"
    )
    callback = build_checkpoint_callback(config)
    save(callback, checkpoint, 20)
    assert {info["probescore/cheating/policy/drift"] for info in read(config, probed, random_rollouts(2))} == {0.0}


def test_what_cannot_be_loaded_ends_the_run_or_not(probed: Probed, reading_server: RunningServer, root: Path, tmp_path: Path) -> None:
    empty = root / "global_step_30"
    (empty / "actor" / "huggingface").mkdir(parents=True)
    shutil.copy(probed.model / "config.json", empty / "actor" / "huggingface")  # as verl does without hf_model
    callback = build_checkpoint_callback(configured(tmp_path, reading_server))
    with pytest.raises(FileNotFoundError, match=r"global_step_30: neither .* has weights; have verl save them: .*hf_model"):
        save(callback, empty, 30)
    # a number lets it go on from the beginning
    save(build_checkpoint_callback(configured(tmp_path, reading_server, on_failure=-1.0)), empty, 30)
    # monitors let it go on once there was a reading
    whole = root / "global_step_40"
    shutil.copytree(probed.model, whole / "actor" / "huggingface")
    save(callback, whole, 40)
    save(callback, empty, 30)
    with pytest.raises(ValueError, match="async_save: a checkpoint that is still being written"):
        callback.on_save(trainer=None, global_step=40, checkpoint_dir=str(whole), async_save=True)


@pytest.mark.parametrize(
    ("signals", "said"),
    [
        (SIGNALS[:1], "signals: they read the frozen model only"),
        ([*SIGNALS, {"probe": "cheating", "mode": "monitor", "reading": "other"}], "signals: they read policy, other"),
    ],
)
def test_signals_must_read_one_policy(signals: list[dict[str, Any]], said: str, reading_server: RunningServer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        build_checkpoint_callback(configured(tmp_path, reading_server, signals))
