"""The server's worker is killed while it computes; the server goes and does not come back."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running_server import RunningServer
from sorting_policy import TOLERANCE, SortingPolicy
from training import BATCH, PlainGRPO, ProbedGRPO, digits_in_order, new_trainer
from transformers import AutoTokenizer

from probescore import DeadlineExceededError, MismatchError, TransientError
from probescore_adapters import Policy, ProbeScorer, ProbeSignal
from probescore_adapters.trl import ProbeReward

STEPS = 6
STRUCK = 3
REWARD = ProbeSignal("cheating", mode="reward", weight=-0.5)


class StrikingReward:
    """The task's reward, which TRL asks for just before it asks the probe: at one step it first does harm."""

    __name__ = "digits_in_order"

    def __init__(self, strike: Callable[[], None]) -> None:
        self._strike = strike

    def __call__(self, completions: list[Any], trainer_state: Any, **_: Any) -> list[float]:
        if trainer_state.global_step == STRUCK:
            self._strike()
        return digits_in_order(completions)


def trained(kind: type, policy: SortingPolicy, folder: Path, server: RunningServer, strike: Callable[[], None], failing: Policy) -> Any:
    scorer = ProbeScorer(REWARD, server.address, policy=failing)
    if kind is ProbedGRPO:
        trainer = new_trainer(kind, policy, folder, [StrikingReward(strike)], probes=scorer, max_steps=STEPS)
    else:
        trainer = new_trainer(kind, policy, folder, [StrikingReward(strike), ProbeReward(scorer)], max_steps=STEPS)
    trainer.train()
    return trainer


def calls_in_flight(server: RunningServer) -> float:
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("probescore_rpcs_in_flight"))


@pytest.mark.parametrize("kind", [PlainGRPO, ProbedGRPO])
def test_kill_of_the_worker_while_a_request_computes_changes_no_reward(
    kind: type, policy: SortingPolicy, own_server: RunningServer, tmp_path: Path
) -> None:
    undisturbed = trained(kind, policy, tmp_path, own_server, lambda: None, Policy())
    killed = threading.Event()

    def kill_in_mid_request() -> None:
        end = time.monotonic() + 30
        while calls_in_flight(own_server) == 0 and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(worker, signal.SIGKILL)
        killed.set()

    def strike() -> None:
        os.kill(worker, signal.SIGSTOP)  # so that the next request is still being computed when the worker dies
        threading.Thread(target=kill_in_mid_request).start()

    worker = own_server.worker_pid()
    disturbed = trained(kind, policy, tmp_path, own_server, strike, Policy())
    assert killed.is_set()
    assert own_server.worker_pid() != worker
    assert disturbed.generated == undisturbed.generated
    # what a batch computes depends on what is cached, within the bound that "equal" means
    assert np.abs(disturbed.column - undisturbed.column).max() <= TOLERANCE * undisturbed.column.std()


@pytest.mark.parametrize("kind", [PlainGRPO, ProbedGRPO])
def test_without_a_server_raise_ends_the_run(kind: type, policy: SortingPolicy, own_server: RunningServer, tmp_path: Path) -> None:
    with pytest.raises((TransientError, DeadlineExceededError)):
        trained(kind, policy, tmp_path, own_server, own_server.process.kill, Policy(timeout=2.0))


@pytest.mark.parametrize("kind", [PlainGRPO, ProbedGRPO])
def test_without_a_server_a_number_that_the_user_named_is_given_and_counted(
    kind: type, policy: SortingPolicy, own_server: RunningServer, tmp_path: Path
) -> None:
    trainer = trained(kind, policy, tmp_path, own_server, own_server.process.kill, Policy(on_failure=-7.0, timeout=1.0))
    given = trainer.column == -7.0
    assert given.reshape(STEPS, BATCH).all(axis=1).tolist() == [step >= STRUCK for step in range(STEPS)]
    assert [log["probescore/failures"] for log in trainer.state.log_history[:STEPS]] == [float(step >= STRUCK) for step in range(STEPS)]
    assert set(trainer.state.log_history[0]) == set(trainer.state.log_history[STRUCK])


def test_another_tokenizer_than_the_trainers_is_refused(own_server: RunningServer, policy: SortingPolicy, tmp_path: Path) -> None:
    trainer = new_trainer(ProbedGRPO, policy, tmp_path, [digits_in_order], probes=ProbeScorer(REWARD, own_server.address), max_steps=1)
    trainer._probes.require_tokenizer("sha256:" + "0" * 64)
    with pytest.raises(MismatchError):
        trainer.train()


def another_vocabulary(policy: SortingPolicy, folder: Path) -> Any:
    """The policy's tokenizer with its words in another order: the same ids are other words."""
    AutoTokenizer.from_pretrained(policy.model).save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    words = [word for word in vocabulary if word not in {token["content"] for token in content["added_tokens"]}]
    ids = [vocabulary[word] for word in words]
    vocabulary.update(zip(words, ids[1:] + ids[:1], strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("shown", [False, True])
def test_reward_function_notices_another_vocabulary_by_itself(
    own_server: RunningServer, policy: SortingPolicy, tmp_path: Path, chat: bool, shown: bool
) -> None:
    """Given a trainer whose ids mean other words than the server's, then the first step ends it, whether or not the tokenizer is shown."""
    tokenizer = another_vocabulary(policy, tmp_path / "tokenizer")
    reward = ProbeReward(ProbeScorer(REWARD, own_server.address), **({"processing_class": tokenizer} if shown else {}))
    trainer = new_trainer(PlainGRPO, policy, tmp_path, [digits_in_order, reward], chat=chat, max_steps=1, processing_class=tokenizer)
    with pytest.raises(MismatchError, match="tokenizer"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("chat", [False, True])
def test_reward_function_takes_the_same_vocabulary_and_a_column_of_any_name(
    own_server: RunningServer, policy: SortingPolicy, tmp_path: Path, chat: bool
) -> None:
    """Given a data set with a column ``scorer``, as the reward function calls its own argument."""
    reward = ProbeReward(ProbeScorer(REWARD, own_server.address), processing_class=AutoTokenizer.from_pretrained(policy.model))
    trainer = new_trainer(PlainGRPO, policy, tmp_path, [digits_in_order, reward], chat=chat, max_steps=1)
    trainer.train_dataset = trainer.train_dataset.add_column("scorer", ["a person"] * len(trainer.train_dataset))
    trainer.train()
    assert np.isfinite(trainer.column).all()
