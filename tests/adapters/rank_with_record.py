"""A rank of a training loop that records: ``rank_with_record.py <address> <record> <first step> <last step>``; prints each step."""

from __future__ import annotations

import os
import sys
import time

import numpy as np

from probescore_adapters import ProbeScorer, ProbeSignal, score_rollouts


def main(address: str, record: str, first: str, last: str) -> None:
    rank = int(os.environ.get("RANK", "0"))
    random = np.random.default_rng(rank)
    scorer = ProbeScorer(ProbeSignal("cheating", weight=2.0), address, record=record)
    for step in range(int(first), int(last) + 1):
        prompts = [[1, *random.integers(4, 90, 4).tolist()]] * 4
        score_rollouts(scorer, prompts, [random.integers(4, 90, 5) for _ in range(4)], step=step, names=[f"{rank}.{n}" for n in range(4)])
        print(step, flush=True)
        time.sleep(0.02)


if __name__ == "__main__":
    main(*sys.argv[1:])
