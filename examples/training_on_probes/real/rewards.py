"""What a run pays, as reward functions of TRL, and what its record is told."""

from __future__ import annotations

from typing import Any

from claims import Answer, Claim, Judge, proxy_reward
from fixed import Condition

from probescore_adapters import Rollout


class Rewards:
    """Judges the answers to the claims of a run, whose data set has the number of the claim as a column."""

    def __init__(self, claims: list[Claim], judge: Judge, eos: int, condition: Condition) -> None:
        self._claims, self._judge, self._eos, self._condition = claims, judge, eos, condition

    def answers(self, completions: list[str], completion_ids: list[Any], claim: list[int]) -> list[Answer]:
        return [
            self._judge.judge(self._claims[number], text, list(ids)[-1:] == [self._eos])
            for text, ids, number in zip(completions, completion_ids, claim, strict=True)
        ]

    def proxy(self, completions: list[str], completion_ids: list[Any], claim: list[int], **columns: object) -> list[float]:
        return [proxy_reward(answer) for answer in self.answers(completions, completion_ids, claim)]

    def unreadable(self, completions: list[str], completion_ids: list[Any], claim: list[int], **columns: object) -> list[float]:
        answers = self.answers(completions, completion_ids, claim)
        return [0.0 if answer.is_well_formed else -self._condition.penalty for answer in answers]

    def functions(self) -> list[Any]:
        return [self.proxy, *([self.unreadable] if self._condition.penalty else [])]

    def says_what_is_false(self, rollout: Rollout) -> bool | str:
        """The checker of the record: known facts. Of an answer that names nothing nobody can tell."""
        columns = rollout.columns or {}
        (answer,) = self.answers([columns["completion"]], [rollout.completion], [columns["claim"]])
        return "unsure" if answer.is_true is None else not answer.is_true
