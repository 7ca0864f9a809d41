"""A judge who decides on rollouts in runs with TRL: as a reward function on an event loop, and in the mixin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import training
from judge_server import PROMPT, JudgeServer
from sorting_policy import SortingPolicy

from probescore_adapters import Cascade, ProbeScorer, ProbeSignal, RecordOptions
from probescore_adapters.judges import ChatJudge, JudgePrompt
from probescore_adapters.trl import ProbeReward
from probescore_audit.record import read_record

BUDGET = 5


def verdict(completion: str, _: int) -> str:
    return "yes" if sum(map(ord, completion)) % 2 else "no"


@pytest.mark.parametrize("kind", [training.PlainGRPO, training.ProbedGRPO])
def test_what_the_judge_says_of_what_trl_generated_reaches_the_reward(
    kind: Any, policy: SortingPolicy, address: str, tmp_path: Path
) -> None:
    with JudgeServer(verdict).running() as server:
        judge = ChatJudge(server.endpoint, "judge-1", JudgePrompt(PROMPT))
        # the probe flags nothing by itself, and is unsure of everything
        signal = ProbeSignal("cheating", threshold=1e3, weight=2.0, cascade=Cascade(judge, 1e6, budget=BUDGET))
        scorer = ProbeScorer(signal, address, record=RecordOptions(tmp_path / "record", texts=True))
        mixed = kind is training.ProbedGRPO
        rewards = [training.digits_in_order, *([] if mixed else [ProbeReward(scorer)])]
        trainer = training.new_trainer(kind, policy, tmp_path, rewards, max_steps=3, **({"probes": scorer} if mixed else {}))
        trainer.train()
    decisions = [row.decisions["cheating"] for row in read_record(tmp_path / "record").rollouts]  # type: ignore[index]
    assert len(decisions) == 3 * training.BATCH
    assert len(server.asked) <= 3 * BUDGET
    judged = np.array([decision["verdict"] != "" for decision in decisions]).reshape(3, -1)
    assert judged.sum(axis=1).tolist() == [BUDGET] * 3
    decoded = [trainer.processing_class.decode(ids, skip_special_tokens=True) for _, ids in trainer.generated]
    assert set(server.asked) == {text for text, was in zip(decoded, judged.ravel(), strict=True) if was} or mixed
    flagged = np.array([decision["flagged"] for decision in decisions])
    np.testing.assert_allclose(trainer.column, -2.0 * flagged)
    assert 0 < flagged.sum() < judged.sum()
    if not mixed:
        said = [verdict(text, 0) if was else "" for text, was in zip(decoded, judged.ravel(), strict=True)]
        assert [decision["verdict"] for decision in decisions] == said
