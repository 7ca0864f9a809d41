"""Real training whose policy is read beside the frozen model: what is logged is what the policy itself says of the ids that it sampled."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from running_server import RunningServer, start_server
from sorting_policy import LAYER, TOLERANCE, SortingPolicy
from training import BATCH, PlainGRPO, ProbedGRPO, digits_in_order, new_trainer
from transformers import AutoModelForCausalLM

from probescore import InvalidRequestError, ProbeClient, ProbescoreError
from probescore_adapters import Policy, ProbeScorer, ProbeSignal
from probescore_adapters.trl import ProbeReward
from probescore_adapters.trl_readings import ReadingCallback

STEPS, EVERY = 20, 5
REWARD = ProbeSignal("cheating", mode="reward", weight=-0.5)
MONITOR = ProbeSignal("cheating", mode="monitor", reading="policy")
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="session")
def readings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory below which the server reads adapters and checkpoints."""
    return tmp_path_factory.mktemp("readings")


@pytest.fixture(scope="session")
def reading_server(policy: SortingPolicy, readings: Path) -> Iterator[RunningServer]:
    with start_server(policy.model, [policy.probe], admin=True, readings_root=readings) as server:
        yield server


class ReadPolicy:
    """Keeps what the policy itself, as it was at the last step that is a multiple of ``EVERY``, says of the rollouts that it sampled."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.expected: list[np.ndarray[Any, Any]] = []
        super().__init__(*args, **kwargs)

    def _calculate_rewards(self, *args: Any) -> Any:
        # another object than the trainer's, in which nothing is wrapped
        if self.state.global_step % EVERY == 0:  # type: ignore[attr-defined]
            plain = AutoModelForCausalLM.from_pretrained(self.read.model, dtype=torch.float32)  # type: ignore[attr-defined]
            self._policy = (get_peft_model(plain, LORA) if hasattr(self.model, "peft_config") else plain).eval()  # type: ignore[attr-defined]
            self._policy.load_state_dict(self.model.state_dict())  # type: ignore[attr-defined]
        fitted = np.load(self.read.folder / "fitted.npz")  # type: ignore[attr-defined]
        found = []
        for prompt, completion in self.generated[-BATCH:]:  # type: ignore[attr-defined]
            with torch.no_grad():
                states = self._policy(torch.tensor([[*prompt, *completion]]), output_hidden_states=True).hidden_states[LAYER + 1][0]
            found.append((states[len(prompt) :].double().numpy() @ fitted["weight"] + fitted["bias"]).mean())
        self.expected.append(np.array(found))
        return super()._calculate_rewards(*args)  # type: ignore[misc]


class ReadProbedGRPO(ReadPolicy, ProbedGRPO):
    pass


class ReadPlainGRPO(ReadPolicy, PlainGRPO):
    pass


def trained(kind: type, policy: SortingPolicy, folder: Path, scorer: ProbeScorer, callback: ReadingCallback, **options: Any) -> Any:
    """A trainer after its run."""
    probed = {"probes": scorer} if issubclass(kind, ProbedGRPO) else {}
    rewards = [digits_in_order] if probed else [digits_in_order, ProbeReward(scorer)]
    trainer = new_trainer(kind, policy, folder, rewards, callbacks=[callback], **probed, **options)
    trainer.read = policy
    trainer.train()
    return trainer


def logged(trainer: Any, key: str) -> list[float]:
    return [math.nan if log[key] is None else log[key] for log in trainer.state.log_history if key in log]


# ------------------------------------------------------------------------------------------------------------ what is logged


@pytest.mark.parametrize("trains", ["lora", "everything"])
@pytest.mark.parametrize("kind", [ReadProbedGRPO, ReadPlainGRPO])
def test_both_readings_are_logged_and_the_policys_is_what_the_policy_says(
    kind: type, trains: str, policy: SortingPolicy, reading_server: RunningServer, readings: Path, tmp_path: Path
) -> None:
    folder = readings / tmp_path.name
    scorer = ProbeScorer([REWARD, MONITOR], reading_server.address)
    options: dict[str, Any] = {"peft_config": LORA, "learning_rate": 1e-2} if trains == "lora" else {}
    trainer = trained(kind, policy, tmp_path, scorer, ReadingCallback(scorer, folder, every=EVERY), **options)

    assert len(trainer.expected) == STEPS
    expected = np.concatenate(trainer.expected)
    frozen = policy.scores(trainer.generated)
    bound = TOLERANCE * frozen.std()
    # each step was read by the policy as it was after the last multiple of five
    assert logged(trainer, "probescore/cheating/policy/reading_step") == [step // EVERY * EVERY for step in range(STEPS)]
    means = np.array(logged(trainer, "probescore/cheating/policy/mean"))
    assert np.abs(means - expected.reshape(STEPS, BATCH).mean(axis=1)).max() <= bound
    assert list(trainer._logs["extra"]["probescore/cheating/policy"]) == pytest.approx(expected[-BATCH:].tolist(), abs=bound)
    assert np.abs(trainer.column + 0.5 * frozen).max() <= bound  # the frozen model's, as without another reading
    # the drift is 0 as training begins, and then what lies between the two
    drift = np.array(logged(trainer, "probescore/cheating/policy/drift"))
    assert np.abs(drift - (expected - frozen).reshape(STEPS, BATCH).mean(axis=1)).max() <= 2 * bound
    assert np.abs(drift[:EVERY]).max() <= (0 if trains == "lora" else bound)
    assert np.abs(drift[-EVERY:]).min() > 100 * bound
    assert sorted(path.name for path in folder.iterdir()) == ["policy-step-15", "policy-step-20"]
    (loaded,) = [reading for reading in ProbeClient(reading_server.address).readings() if reading.name == "policy"]
    assert (loaded.step, loaded.kind.value) == (STEPS, "adapter" if trains == "lora" else "checkpoint")


def test_the_trainers_own_checkpoints_are_loaded(
    policy: SortingPolicy, reading_server: RunningServer, readings: Path, tmp_path: Path
) -> None:
    scorer = ProbeScorer([REWARD, MONITOR], reading_server.address)
    ProbeClient(reading_server.address).unload_reading("policy") if "policy" in names(reading_server) else None
    folder = readings / tmp_path.name
    callback = ReadingCallback(scorer, every=None, server_directory=tmp_path.name)  # relative to the server's own directory
    options = {"peft_config": LORA, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": EVERY, "save_total_limit": 1}
    trainer = trained(ReadProbedGRPO, policy, folder, scorer, callback, **options)
    steps = logged(trainer, "probescore/cheating/policy/reading_step")
    assert np.isnan(steps[:EVERY]).all()  # until the first checkpoint there is none, which ends no run
    assert logged(trainer, "probescore/cheating/policy/reading_missing") == [1.0] * EVERY + [0.0] * (STEPS - EVERY)
    assert steps[EVERY:] == [step // EVERY * EVERY for step in range(EVERY, STEPS)]
    expected = np.concatenate(trainer.expected)
    means = np.array(logged(trainer, "probescore/cheating/policy/mean"))
    difference = np.abs(means - expected.reshape(STEPS, BATCH).mean(axis=1))
    assert np.isnan(means[:EVERY]).all()
    assert difference[EVERY:].max() <= TOLERANCE * policy.scores(trainer.generated).std()


def names(server: RunningServer) -> list[str]:
    return [reading.name for reading in ProbeClient(server.address).readings()]


# -------------------------------------------------------------------------------------------------------------- several ranks


@pytest.mark.parametrize("trains", ["lora", "everything"])
@pytest.mark.parametrize("kind", ["PlainGRPO", "ProbedGRPO"])
def test_two_ranks_are_read_by_one_version_at_each_step(
    kind: str, trains: str, policy: SortingPolicy, reading_server: RunningServer, readings: Path, tmp_path: Path
) -> None:
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parents[1]), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(tests / "rank_with_reading.py"), kind, str(policy.folder), reading_server.address]
    command += [str(readings / tmp_path.name), str(tmp_path), trains]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    # the ranks' steps are averaged where each has scored its own rollouts: a step between two would show that they differ
    assert ranks[0]["steps"] == [0, 0, 2, 2]
    assert all(math.isfinite(drift) for drift in ranks[0]["drift"])
    assert ranks[0]["read"] == ranks[1]["read"]
    assert len({version for _, version in ranks[0]["read"]}) == 2
    assert ranks[0]["steps"] == [step for step, _ in ranks[0]["read"]]
    assert sorted(path.name for path in (readings / tmp_path.name).iterdir()) == ["policy-step-2", "policy-step-4"]
    for rank in ranks:
        assert "readings_root" in rank["refused"]


# ------------------------------------------------------------------------------------------------------------------ failures


def test_a_first_load_that_fails_ends_the_run_unless_there_is_a_number(
    policy: SortingPolicy, address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # a server that takes no readings
    scorer = ProbeScorer([REWARD, MONITOR], address)
    with pytest.raises(ProbescoreError):
        trained(ProbedGRPO, policy, tmp_path, scorer, ReadingCallback(scorer, tmp_path / "saved"), max_steps=2, peft_config=LORA)
    assert list((tmp_path / "saved").iterdir()) == []
    scorer = ProbeScorer([REWARD, MONITOR], address, policy=Policy(on_failure=-3.0))
    callback = ReadingCallback(scorer, tmp_path / "saved", every=1)
    trainer = trained(ProbedGRPO, policy, tmp_path, scorer, callback, max_steps=2, peft_config=LORA)
    assert np.isnan(logged(trainer, "probescore/cheating/policy/mean")).all()
    assert logged(trainer, "probescore/cheating/policy/reading_missing") == [1.0, 1.0]
    assert np.abs(trainer.column + 0.5 * policy.scores(trainer.generated)).max() < 1e-3
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("stays what it was, since the policy could not be saved or loaded" in text for text in said) == 3


class Breaking(ReadingCallback):
    """Loads what cannot be read from some step on, and lets the name mean nothing."""

    def _load(self, folder: Path, saved: Path, step: int) -> None:
        if step == 2:
            ProbeClient(self.address).unload_reading("policy")  # type: ignore[attr-defined]
            (folder / saved / "adapter_config.json").write_text('{"peft_type": "IA3"}')
        super()._load(folder, saved, step)


def test_monitors_go_on_without_a_reading_that_is_lost(
    policy: SortingPolicy, reading_server: RunningServer, readings: Path, tmp_path: Path
) -> None:
    folder = readings / tmp_path.name
    for signals, goes_on in (([REWARD, MONITOR], True), ([ProbeSignal("cheating", mode="reward", reading="policy")], False)):
        scorer = ProbeScorer(signals, reading_server.address)
        callback = Breaking(scorer, folder, every=1)
        callback.address = reading_server.address  # type: ignore[attr-defined]
        if not goes_on:
            with pytest.raises(InvalidRequestError):
                trained(ProbedGRPO, policy, tmp_path, scorer, callback, max_steps=5, peft_config=LORA)
            continue
        trainer = trained(ProbedGRPO, policy, tmp_path, scorer, callback, max_steps=5, peft_config=LORA)
        np.testing.assert_array_equal(logged(trainer, "probescore/cheating/policy/reading_step"), [0, 1, math.nan, 3, 4])
        assert logged(trainer, "probescore/cheating/policy/reading_missing") == [0, 0, 1, 0, 0]
        assert sorted(path.name for path in folder.iterdir()) == ["policy-step-4", "policy-step-5"]


# ----------------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"every": 0}, "every: expected a whole number of at least 1, got 0"),
        ({"every": 2.5}, "every: expected"),
        ({"every": True}, "every: expected"),
        ({"keep": 0}, "keep: expected"),
        ({"keep": None}, "keep: expected"),
        ({"name": "other"}, "name: no signal of the scorer reads 'other', they read 'frozen', 'policy'"),
        ({"every": None, "directory": "here"}, "directory: the trainer's checkpoints are in its output_dir"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ReadingCallback(ProbeScorer([REWARD, MONITOR]), **wrong)


def test_a_sharded_policy_is_read_from_whole_checkpoints_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # no process here has shards: what tells that there are some is set by hand
    monkeypatch.setattr("probescore_adapters.trl_readings.is_deepspeed_zero3_enabled", lambda: True)
    from transformers import TrainerControl, TrainerState, TrainingArguments

    callback = ReadingCallback(ProbeScorer([REWARD, MONITOR]), tmp_path)
    with pytest.raises(ValueError, match=r"every: the policy is sharded .* take every=None"):
        callback.on_train_begin(TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl(), model=None)
