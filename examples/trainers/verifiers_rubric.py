"""An environment of verifiers before 0.4: sums, a reward for the right one, and a penalty for cheating on the way to it.

The environment says which probe: ``PROBESCORE_ADDRESS=scorer:50051 PROBESCORE_SIGNALS='[{"probe": "cheating", "mode": "penalty"}]'``.
"""

from __future__ import annotations

import verifiers as vf
from datasets import Dataset

from probescore_adapters.environment import scorer_from_environment
from probescore_adapters.verifiers_legacy import ProbeRubric


def right(completion: list[dict[str, str]], answer: str) -> float:
    return float(answer in str(completion[-1]["content"]))


def load_environment() -> vf.Environment:
    rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(10) for b in range(10)]
    return vf.SingleTurnEnv(dataset=Dataset.from_list(rows), rubric=ProbeRubric(scorer_from_environment(), funcs=[right]))
