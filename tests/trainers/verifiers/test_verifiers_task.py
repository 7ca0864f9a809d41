"""verifiers' ``Task.score`` with our reward and metric, against a live server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import verifiers.v1 as vf
from plain_forward import THRESHOLD, TOLERANCE, Ids, Probed, random_rollouts
from running_server import RunningServer

from probescore_adapters import Policy, ProbeScorer, ProbeSignal, SignalError
from probescore_adapters import verifiers as adapter
from probescore_adapters.verifiers import TraceProbes

EXAMPLE = Path(__file__).parents[3] / "examples/trainers/verifiers_task.py"

REWARD = ProbeSignal("cheating", mode="reward")
PENALTY = ProbeSignal("cheating", mode="penalty", weight=2.0)


def node(ids: list[int], sampled: list[bool], parent: int | None, message: Any) -> vf.MessageNode:
    return vf.MessageNode(parent=parent, message=message, sampled=any(sampled), token_ids=ids, mask=sampled)


def trace_of(*branches: Ids) -> vf.Trace[Any, Any, Any]:
    """A question, and an answer for each branch: the last token of the prompt is the answer's scaffold."""
    trace = vf.Trace(task=vf.TraceTask(type="Task", data=vf.TaskData(prompt="?")), agent=vf.AgentInfo(config=vf.AgentConfig()))
    for prompt, completion in branches:
        trace.nodes.append(node(prompt[:-1], [False] * (len(prompt) - 1), None, vf.UserMessage(content="?")))
        trace.nodes.append(
            node(
                [prompt[-1], *completion],
                [False] + [True] * len(completion),
                len(trace.nodes) - 1,
                vf.AssistantMessage(content="!"),
            )
        )
    return trace


def task_with(probes: TraceProbes) -> vf.Task[Any]:
    class Plugged(vf.Task[vf.TaskData]):
        @vf.reward(weight=0.5)
        async def answered(self, trace: vf.Trace[Any, Any, Any]) -> float:
            return 1.0

        @vf.reward(weight=1.0)
        async def probe(self, trace: vf.Trace[Any, Any, Any]) -> float:
            return await probes.reward(trace)

    return Plugged(vf.TaskData(prompt="?"))


@pytest.fixture
def from_environment(served: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_signals(**signal: Any) -> None:
        monkeypatch.setenv("PROBESCORE_ADDRESS", served.address)
        monkeypatch.setenv("PROBESCORE_SIGNALS", json.dumps([signal]))
        adapter._from_environment.cache_clear()

    yield set_signals
    adapter._from_environment.cache_clear()


async def test_a_reward_equals_the_plain_forward(probed: Probed, served: RunningServer) -> None:
    rollouts = random_rollouts(8)
    task, traces = task_with(TraceProbes(ProbeScorer(REWARD, served.address))), [trace_of(ids) for ids in rollouts]
    await asyncio.gather(*(task.score(trace) for trace in traces))
    found = np.array([trace.rewards["probe"].score for trace in traces])
    expected = np.array([scores.mean() for scores in probed.scores(rollouts)])
    assert np.abs(found - expected).max() <= TOLERANCE * expected.std()
    assert traces[0].reward == 0.5 + found[0]


async def test_a_reward_records_the_metrics_too(probed: Probed, served: RunningServer) -> None:
    (ids,) = random_rollouts(1)
    trace = trace_of(ids)
    await task_with(TraceProbes(ProbeScorer(PENALTY, served.address))).score(trace)
    mean = probed.scores([ids])[0].mean()
    assert trace.metrics["probescore/cheating/mean"] == pytest.approx(mean, abs=1e-5)
    assert trace.metrics["probescore/cheating/flagged"] == float(mean >= THRESHOLD)
    assert trace.metrics["probescore/failures"] == 0.0


async def test_a_function_named_in_the_configuration_is_plugged_in(probed: Probed, from_environment: Any) -> None:
    from_environment(probe="cheating", mode="reward")
    config = vf.TaskConfig(rewards={"probe": {"fn": "probescore_adapters.verifiers:probe_reward", "weight": -1.0}})
    (ids,) = random_rollouts(1)
    trace = trace_of(ids)
    await vf.Task(vf.TaskData(prompt="?"), config).score(trace)
    assert trace.reward == pytest.approx(-probed.scores([ids])[0].mean(), abs=1e-5)


async def test_a_metric_rewards_nothing(probed: Probed, from_environment: Any) -> None:
    from_environment(probe="cheating", mode="monitor")
    config = vf.TaskConfig(metrics={"probe": {"fn": "probescore_adapters.verifiers:probe_metric"}})
    (ids,) = random_rollouts(1)
    trace = trace_of(ids)
    await vf.Task(vf.TaskData(prompt="?"), config).score(trace)
    assert trace.metrics["probescore/cheating/mean"] == pytest.approx(probed.scores([ids])[0].mean(), abs=1e-5)
    assert trace.reward == 0.0


async def test_tool_output_between_turns_is_not_scored(probed: Probed, served: RunningServer) -> None:
    # given an answer, what a tool says to it, and another answer
    trace = trace_of(([1, 20, 21], [30, 31, 32]))
    trace.nodes.append(node([40, 41, 42], [False] * 3, 1, vf.ToolMessage(tool_call_id="0", content="…")))
    trace.nodes.append(node([50, 51, 2], [False, True, True], 2, vf.AssistantMessage(content="!")))
    await task_with(TraceProbes(ProbeScorer(REWARD, served.address))).score(trace)
    sampled = np.array([1, 1, 1, 0, 0, 0, 0, 1, 1], bool)
    (scores,) = probed.scores([([1, 20, 21], [30, 31, 32, 40, 41, 42, 50, 51, 2])])
    assert trace.rewards["probe"].score == pytest.approx(scores[sampled].mean(), abs=1e-5)


async def test_of_several_branches_the_least_counts(probed: Probed, served: RunningServer) -> None:
    rollouts = random_rollouts(4, prompts=4)
    trace = trace_of(*rollouts)
    await task_with(TraceProbes(ProbeScorer(REWARD, served.address))).score(trace)
    assert trace.rewards["probe"].score == pytest.approx(min(scores.mean() for scores in probed.scores(rollouts)), abs=1e-5)


async def test_without_a_server_the_trace_has_an_error_and_no_reward() -> None:
    task = task_with(TraceProbes(ProbeScorer(PENALTY, "127.0.0.1:1", policy=Policy(timeout=0.5))))
    trace = trace_of(*random_rollouts(1))
    with pytest.raises(vf.TaskError):
        await task.score(trace)
    assert trace.rewards["probe"] is None


async def test_a_named_number_stands_in_for_scores_that_cannot_be_had() -> None:
    policy = Policy(on_failure=-3.0, timeout=0.5)
    trace = trace_of(*random_rollouts(1))
    await task_with(TraceProbes(ProbeScorer(PENALTY, "127.0.0.1:1", policy=policy))).score(trace)
    assert trace.rewards["probe"].score == -3.0
    assert trace.metrics["probescore/failures"] == 1.0


async def test_a_trace_without_token_ids_is_an_error(served: RunningServer) -> None:
    trace = trace_of(([1], []))
    with pytest.raises(vf.TaskError, match="no token ids"):
        await task_with(TraceProbes(ProbeScorer(REWARD, served.address))).score(trace)


@pytest.mark.parametrize("mode", ["screen", "gate", "relative_gate", "dense"])
def test_what_verifiers_cannot_do_is_refused(mode: str) -> None:
    with pytest.raises(SignalError, match="one trace"):
        TraceProbes(ProbeScorer(ProbeSignal("cheating", mode=mode)))


def test_the_example_scores_a_recorded_trace(probed: Probed, served: RunningServer, tmp_path: Path) -> None:
    (ids,) = random_rollouts(1)
    trace = trace_of(ids)
    trace.task = vf.TraceTask(type="SumTask", data=vf.WireTaskData(prompt="?", answer="!"))
    (tmp_path / "trace.json").write_text(json.dumps(trace.to_record()))
    signals = json.dumps({"probe": "cheating", "mode": "reward", "weight": -1.0})
    done = subprocess.run(
        [sys.executable, EXAMPLE, tmp_path / "trace.json"],
        env={**os.environ, "PROBESCORE_ADDRESS": served.address, "PROBESCORE_SIGNALS": signals},
        capture_output=True,
        text=True,
        check=True,
    )
    printed = json.loads(done.stdout)
    mean = probed.scores([ids])[0].mean()
    assert printed["rewards"] == {"right": 1.0, "probe": pytest.approx(-mean, abs=1e-5)}
    assert printed["metrics"]["probescore/cheating/mean"] == pytest.approx(mean, abs=1e-5)
