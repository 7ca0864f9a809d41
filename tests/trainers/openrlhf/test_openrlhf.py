"""OpenRLHF's own executor, with a model that really samples, against a live server: by agent, by file and by URL."""

from __future__ import annotations

import importlib.util
import json
import math
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_tokenizer
from openrlhf.utils.agent import AgentExecutorBase, SingleTurnAgentExecutor
from plain_forward import THRESHOLD, TOLERANCE, Probed
from running_gateway import start_gateway
from running_server import RunningServer, start_server
from tiny_llm import TinyLLM, counts_even_words
from transformers import AutoTokenizer

from probescore import MismatchError, ProbescoreError
from probescore_adapters import SignalError
from probescore_audit.record import read_record

EXAMPLES = Path(__file__).parents[3] / "examples" / "trainers"
REWARD_FILE, AGENT_FILE = str(EXAMPLES / "openrlhf_reward.py"), str(EXAMPLES / "openrlhf_agent.py")
PROMPTS = [f"w{first} w{first + 1} w{second}" for first in (5, 20, 41, 70) for second in (9, 13, 33, 60)]
RAW = [{"probe": "cheating", "mode": "reward"}]
TASK = "tiny_llm:counts_even_words"

Configure = Callable[..., None]


@pytest.fixture
def llm(probed: Probed) -> TinyLLM:
    torch.manual_seed(0)
    return TinyLLM(probed.model)


@pytest.fixture
def tokenizer(probed: Probed) -> Any:
    return AutoTokenizer.from_pretrained(probed.model)


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch, served: RunningServer) -> Configure:
    """Sets variables of the environment; by default to the live server and the probe's number as the reward."""

    def set_variables(signals: Any = RAW, address: str = served.address, **variables: str) -> None:
        given = {"signals": json.dumps(signals), "address": address, "timeout": "20", **variables}
        for name, value in given.items():
            monkeypatch.setenv(f"PROBESCORE_{name.upper()}", value)

    return set_variables


@pytest.fixture
def nobody() -> str:
    """An address at which nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{bound.getsockname()[1]}"


def load_agent(path: str = AGENT_FILE) -> AgentExecutorBase:
    """As OpenRLHF's ``_load_agent_executor`` does, whose module needs vLLM."""
    spec = importlib.util.spec_from_file_location("agent_module", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert issubclass(module.AgentExecutor, AgentExecutorBase)
    return module.AgentExecutor()


async def run(
    executor: Any, llm: TinyLLM, tokenizer: Any, *, prompts: list[str] = PROMPTS, label: str = "", max_length: int = 64
) -> list[Any]:
    params = SimpleNamespace(max_tokens=16, logprobs=None)
    return [await executor.execute(prompt, label, params, max_length, tokenizer, llm) for prompt in prompts]


def captured(samples: list[Any]) -> list[tuple[list[int], list[int]]]:
    """The ids of generation: of prompt and completion."""
    return [
        (sample["observation_tokens"][:start], sample["observation_tokens"][start:])
        for sample in samples
        for start, _ in sample["action_ranges"]
    ]


def rewards_of(samples: list[Any]) -> np.ndarray[Any, Any]:
    """As OpenRLHF reads them: it makes a tensor of each."""
    return torch.cat([torch.tensor([sample["reward"]]).flatten() for sample in samples]).double().numpy()


def logs_of(samples: list[Any], key: str) -> list[float]:
    return [float(torch.as_tensor(sample["extra_logs"][f"probescore/{key}"]).flatten()[0]) for sample in samples]


def expected(probed: Probed, samples: list[Any]) -> np.ndarray[Any, Any]:
    """The mean of the probe over each completion, by plain Hugging Face, in float32, on the ids of generation."""
    return np.array([scores.mean() for scores in probed.scores(captured(samples))])


def assert_equal(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> None:
    assert np.abs(found - wanted).max() <= TOLERANCE * wanted.std()


# ---------------------------------------------------------------------------------------------------------------------- the agent


async def test_agent_rewards_exactly_the_ids_that_were_generated(
    configure: Configure, probed: Probed, llm: TinyLLM, tokenizer: Any
) -> None:
    configure()
    samples = await run(load_agent(), llm, tokenizer)
    assert_equal(rewards_of(samples), expected(probed, samples))
    assert [sample["scores"] for sample in samples] == [sample["reward"] for sample in samples]
    assert set(logs_of(samples, "inexact_ids")) == {0.0}


async def test_agent_records_what_was_generated(configure: Configure, probed: Probed, llm: TinyLLM, tokenizer: Any, tmp_path: Path) -> None:
    """Steps are counted, since OpenRLHF does not say them."""
    configure(record=json.dumps({"directory": str(tmp_path), "rollouts_per_step": 4, "ids": True}), run_id="run-7", task_reward=TASK)
    samples = await run(load_agent(), llm, tokenizer)
    rows = read_record(tmp_path).rollouts
    assert [row.step for row in rows] == np.repeat(range(4), 4).tolist()
    assert [(row.prompt_ids, row.completion_ids) for row in rows] == captured(samples)
    assert_equal(np.array([row.scores["cheating@1"]["frozen"]["mean"] for row in rows]), expected(probed, samples))
    np.testing.assert_allclose([row.total_reward for row in rows], rewards_of(samples), rtol=1e-5)


async def test_agent_scores_what_is_left_of_a_prompt_that_openrlhf_cuts(
    configure: Configure, probed: Probed, llm: TinyLLM, tokenizer: Any
) -> None:
    configure()
    samples = await run(load_agent(), llm, tokenizer, max_length=18)
    assert {len(prompt) for prompt, _ in captured(samples)} == {2}
    assert_equal(rewards_of(samples), expected(probed, samples))


@pytest.mark.parametrize("label", ["", "bad"])
async def test_agent_adds_to_the_reward_of_the_task(configure: Configure, probed: Probed, llm: TinyLLM, tokenizer: Any, label: str) -> None:
    """A penalty is subtracted from it, and a gate takes what is above 0."""
    signals = [
        {"probe": "cheating", "mode": "penalty", "weight": 2.0, "name": "penalty"},
        {"probe": "cheating", "mode": "gate", "reduction": "max", "threshold": 0.5, "name": "gate"},
    ]
    configure(signals, task_reward=TASK)
    samples = await run(load_agent(), llm, tokenizer, label=label)
    tasks = [
        float(counts_even_words([tokenizer.decode(sample["observation_tokens"])], [sample["prompt"]], [label])["rewards"][0])
        for sample in samples
    ]
    scores = probed.scores(captured(samples))
    flagged = [float(one.mean() >= THRESHOLD) for one in scores]
    factors = [1.0 if one.max() < 0.5 or task <= 0 else 0.0 for one, task in zip(scores, tasks, strict=True)]
    np.testing.assert_allclose(rewards_of(samples), np.array(tasks) * factors - 2 * np.array(flagged), rtol=1e-6)
    assert 0 < sum(flagged) < len(samples)


async def test_agent_refuses_a_server_with_another_tokenizer(configure: Configure, llm: TinyLLM) -> None:
    configure()
    with pytest.raises(MismatchError):
        await run(load_agent(), llm, tiny_tokenizer(vocab_size=90))


async def test_agent_ends_the_run_when_the_server_is_gone(configure: Configure, probed: Probed, llm: TinyLLM, tokenizer: Any) -> None:
    with start_server(probed.model, [probed.probe]) as server:
        configure(address=server.address, timeout="1")
        agent = load_agent()
    with pytest.raises(ProbescoreError):
        await run(agent, llm, tokenizer, prompts=PROMPTS[:1])


async def test_agent_gives_the_number_that_was_named_and_counts_it(configure: Configure, nobody: str, llm: TinyLLM, tokenizer: Any) -> None:
    configure(address=nobody, timeout="1", on_failure="-1.5")
    samples = await run(load_agent(), llm, tokenizer, prompts=PROMPTS[:2])
    assert rewards_of(samples).tolist() == [-1.5, -1.5]
    assert logs_of(samples, "failures") == [1.0, 1.0]
    assert all(map(math.isnan, logs_of(samples, "cheating/mean")))


def test_agent_that_cannot_mean_anything_does_not_load(configure: Configure, nobody: str) -> None:
    for signals, message in (
        ([{"probe": "cheating", "mode": "screen"}], "screen cannot be done here"),
        ([{"probe": "cheating", "mode": "relative_gate"}], "relative_gate cannot be done here"),
        ([{"probe": "cheating", "mode": "gate"}], "no reward of the task"),
        ([{"probe": "honesty"}], "not loaded"),
    ):
        configure(signals)
        with pytest.raises(SignalError, match=message):
            load_agent()
    configure(task_reward="tiny_llm:nothing")
    with pytest.raises(ValueError, match="PROBESCORE_TASK_REWARD"):
        load_agent()
    configure(address=nobody, task_reward=TASK, timeout="1")
    with pytest.raises(ProbescoreError):
        load_agent()


# ------------------------------------------------------------------------------------------------------------ the file, and the URL


async def test_file_rewards_the_same_ids_where_text_is_exact(configure: Configure, probed: Probed, llm: TinyLLM, tokenizer: Any) -> None:
    configure(on_failure="wait")
    samples = await run(SingleTurnAgentExecutor(REWARD_FILE), llm, tokenizer)
    assert_equal(rewards_of(samples), expected(probed, samples))
    assert set(logs_of(samples, "inexact_ids")) == {1.0}


async def test_file_adds_to_the_reward_of_the_task(configure: Configure, llm: TinyLLM, tokenizer: Any) -> None:
    configure([{"probe": "cheating", "mode": "monitor"}], on_failure="wait", task_reward=TASK)
    samples = await run(SingleTurnAgentExecutor(REWARD_FILE), llm, tokenizer)
    tasks = [
        float(counts_even_words([tokenizer.decode(sample["observation_tokens"])], [sample["prompt"]], [""])["rewards"][0])
        for sample in samples
    ]
    np.testing.assert_allclose(rewards_of(samples), tasks)


async def test_file_gives_the_number_that_was_named(configure: Configure, nobody: str, llm: TinyLLM, tokenizer: Any) -> None:
    configure(address=nobody, timeout="1", on_failure="-1.5")
    samples = await run(SingleTurnAgentExecutor(REWARD_FILE), llm, tokenizer, prompts=PROMPTS[:1])
    assert rewards_of(samples).tolist() == [-1.5]


def test_file_does_not_load_with_a_policy_that_openrlhf_would_swallow(configure: Configure) -> None:
    configure(on_failure="raise")
    with pytest.raises(ValueError, match="PROBESCORE_ON_FAILURE"):
        SingleTurnAgentExecutor(REWARD_FILE)


async def test_url_rewards_the_same_ids_where_text_is_exact(served: RunningServer, probed: Probed, llm: TinyLLM, tokenizer: Any) -> None:
    with start_gateway("--address", served.address, "--signals", json.dumps(RAW)) as gateway:
        samples = await run(SingleTurnAgentExecutor(gateway.url("/openrlhf")), llm, tokenizer)
    assert_equal(rewards_of(samples), expected(probed, samples))
    assert set(logs_of(samples, "inexact_ids")) == {1.0}


async def test_url_gives_the_number_that_was_named(nobody: str, llm: TinyLLM, tokenizer: Any) -> None:
    with start_gateway("--address", nobody, "--signals", json.dumps(RAW), "--on-failure", "-1.5", "--timeout", "1") as gateway:
        samples = await run(SingleTurnAgentExecutor(gateway.url("/openrlhf")), llm, tokenizer, prompts=PROMPTS[:1])
    assert rewards_of(samples).tolist() == [-1.5]
    assert logs_of(samples, "failures") == [1.0]


@pytest.mark.parametrize("by", ["file", "url"])
async def test_prompt_that_openrlhf_cuts_is_unscorable_as_text(
    configure: Configure, served: RunningServer, llm: TinyLLM, tokenizer: Any, by: str
) -> None:
    """Since the decoded text no longer begins with the prompt, and where the response begins would be a guess."""
    rails = '{"clip": 7}'
    configure(on_failure="wait", rails=rails)
    with start_gateway("--address", served.address, "--signals", json.dumps(RAW), "--rails", rails) as gateway:
        executor = SingleTurnAgentExecutor(REWARD_FILE if by == "file" else gateway.url("/openrlhf"))
        samples = await run(executor, llm, tokenizer, prompts=PROMPTS[:2], max_length=18)
    assert rewards_of(samples).tolist() == [-7, -7]
    assert logs_of(samples, "unscorable") == [1.0, 1.0]
