"""An environment of verifiers, for prime-rl too: sums, a reward for the right one, and a penalty for cheating on the way to it.

The environment says which probe: ``PROBESCORE_ADDRESS=scorer:50051 PROBESCORE_SIGNALS='[{"probe": "cheating", "mode": "penalty"}]'``.
``python verifiers_task.py trace.json`` scores a recorded trace once more.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import verifiers.v1 as vf

from probescore_adapters.verifiers import probe_reward


class SumData(vf.TaskData):
    answer: str


class SumTask(vf.Task[SumData]):
    @vf.reward
    async def right(self, trace: vf.WireTrace) -> float:
        return float(self.data.answer in str(trace.last_message.content))

    @vf.reward(weight=1.0)
    async def probe(self, trace: vf.WireTrace) -> float:
        """What the signals add: a penalty is below 0. Records their metrics, too."""
        return await probe_reward(trace)


class Sums(vf.Taskset[SumTask]):
    def load(self) -> Iterable[SumTask]:
        for a in range(10):
            for b in range(10):
                yield SumTask(SumData(prompt=f"What is {a} + {b}?", answer=str(a + b)), self.config.task)


async def score(recorded: str) -> None:
    trace = vf.WireTrace.model_validate_json(recorded)
    await SumTask(SumData.model_validate(trace.task.data.model_dump())).score(trace)
    rewards = {name: reward.value for name, reward in trace.rewards.items() if reward is not None}
    print(json.dumps({"rewards": rewards, "metrics": trace.metrics}))


if __name__ == "__main__":
    asyncio.run(score(Path(sys.argv[1]).read_text()))
