"""In processes of its own: pickled, forked, spawned, and under torchrun."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running_server import RunningServer
from sorting_policy import TOLERANCE, SortingPolicy
from trl.trainer.utils import get_callable_name, is_async_callable

from probescore_adapters import ProbeScorer, ProbeSignal
from probescore_adapters.trl import ProbeReward

REWARD = ProbeSignal("cheating", mode="reward", weight=-0.5)
ROLLOUT = {"prompts": ["sort 1 2 3 4 5 cache 0 2 4 4 8 answer"], "completion_ids": [[9, 9, 11, 11, 15, 2]]}


def asked(reward: ProbeReward) -> list[float]:
    import asyncio

    return asyncio.run(reward(**ROLLOUT))


def asked_in_a_child(reward: ProbeReward, answers: Any) -> None:
    answers.put(asked(reward))


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_child_gets_what_the_parent_got_before(method: str, address: str) -> None:
    reward = ProbeReward(ProbeScorer(REWARD, address))
    expected = asked(reward)
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    child = context.Process(target=asked_in_a_child, args=(reward, answers))
    child.start()
    assert answers.get(timeout=120) == expected
    child.join()
    assert asked(reward) == expected


def test_it_is_an_async_function_with_a_name_to_every_version(address: str) -> None:
    import inspect

    for reward in (ProbeReward(ProbeScorer(REWARD, address)), pickle.loads(pickle.dumps(ProbeReward(ProbeScorer(REWARD, address))))):
        assert inspect.iscoroutinefunction(reward)  # as TRL 0.27 to 1.10 ask
        assert is_async_callable(reward)  # as TRL 1.16 asks
        assert reward.__name__ == get_callable_name(reward) == "probe_reward"


@pytest.mark.parametrize("kind", ["PlainGRPO", "ProbedGRPO"])
def test_two_ranks_get_their_scores_and_count_as_one_job(
    kind: str, policy: SortingPolicy, own_server: RunningServer, tmp_path: Path
) -> None:
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests}:{tests.parents[1]}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(tests / "rank_of_trl.py"), kind, str(policy.folder), own_server.address, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr

    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["generated"] != ranks[1]["generated"]
    # rewards are gathered: each rank sees those of both, its own in its place
    count = ranks[0]["count"]
    scores = [policy.scores(rank["generated"]).reshape(-1, count) for rank in ranks]
    expected = np.concatenate(scores, axis=1).ravel()
    for rank in ranks:
        found = np.array(rank["column"])
        unremoved = np.isfinite(found)
        assert unremoved.mean() > 0.5
        assert np.abs(found + 0.5 * expected)[unremoved].max() <= TOLERANCE * expected.std()
    assert np.array_equal(ranks[0]["column"], ranks[1]["column"], equal_nan=True)
    assert ranks[0]["means"] == pytest.approx(np.concatenate(scores, axis=1).mean(axis=1).tolist(), rel=1e-3)

    jobs = {event["job"] for event in own_server.events() if "job" in event}
    assert len(jobs) == 1
    assert jobs != {""}
