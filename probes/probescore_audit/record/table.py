"""Gives the rollouts of a training run's record as a table of columns."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probescore.types.shown import shown_table
from probescore_audit.record.rows import RolloutRow

_SHOWN_ROWS = 20
_NUMBERS = ("tokens", "task_reward", "total_reward", "policy_logprob")


@dataclass(frozen=True, eq=False)
class RolloutTable:
    """Table of the rollouts of a training run, in the order of the training steps, as columns of one length.

    Attributes:
        step: training step, ``(n,)`` int64, ascending.
        rollout: name of the rollout, ``(n,)``.
        prompt: name of the prompt, ``(n,)``.
        numbers: the columns ``tokens``, ``task_reward``, ``total_reward`` and ``policy_logprob``, ``(n,)`` float64 each; NaN where a
            rollout has none.
        scores: the columns of scores, keyed by the probe's key, the reading (which model's activations the probe read) and the reduction,
            ``(n,)`` float64 each; NaN where a rollout has none.
    """

    step: NDArray[np.int64]
    rollout: NDArray[np.str_]
    prompt: NDArray[np.str_]
    numbers: Mapping[str, NDArray[np.float64]]
    scores: Mapping[tuple[str, str, str], NDArray[np.float64]]

    @classmethod
    def of(cls, rows: Sequence[RolloutRow]) -> RolloutTable:
        """Makes a table of columns from the recorded rows of rollouts, which must be in the order of their training steps."""
        scores: dict[tuple[str, str, str], NDArray[np.float64]] = {}
        for index, row in enumerate(rows):
            for probe, readings in row.scores.items():
                for reading, reductions in readings.items():
                    for reduction, score in reductions.items():
                        key = (probe, reading, reduction)
                        if key not in scores:
                            scores[key] = np.full(len(rows), np.nan)
                        scores[key][index] = score
        numbers = {
            name: np.array([np.nan if (value := getattr(row, name)) is None else value for row in rows], np.float64) for name in _NUMBERS
        }
        return cls(
            step=np.array([row.step for row in rows], np.int64),
            rollout=np.array([row.rollout for row in rows], np.str_),
            prompt=np.array([row.prompt for row in rows], np.str_),
            numbers=numbers,
            scores=scores,
        )

    def __len__(self) -> int:
        return len(self.step)

    def _repr_html_(self) -> str:
        """Returns what a notebook shows: the first rows, and how many there are."""
        named = self.columns()
        rows = zip(*(column[:_SHOWN_ROWS].tolist() for column in named.values()), strict=True)
        return shown_table(
            list(named), rows, f"{len(self):,} rollouts" + (f", of which the first {_SHOWN_ROWS}" if len(self) > _SHOWN_ROWS else "")
        )

    def columns(self) -> dict[str, NDArray[Any]]:
        """Returns the columns of a table of rollouts by name, in a dictionary that ``pandas.DataFrame`` and ``polars.DataFrame`` take.

        The columns of scores are named ``probe/reading/reduction``, where the reading says which model's activations the probe read.
        """
        named = {"/".join(key): column for key, column in self.scores.items()}
        return {"step": self.step, "rollout": self.rollout, "prompt": self.prompt, **self.numbers, **named}

    def to_pandas(self) -> Any:  # noqa: ANN401 - pandas need not be installed
        """Returns a table of rollouts as a ``pandas.DataFrame``, with the columns of ``columns``; raises ``ImportError`` if pandas is not
        installed.
        """
        return importlib.import_module("pandas").DataFrame(self.columns())

    def to_polars(self) -> Any:  # noqa: ANN401 - polars need not be installed
        """Returns a table of rollouts as a ``polars.DataFrame``, with the columns of ``columns``; raises ``ImportError`` if polars is not
        installed.
        """
        return importlib.import_module("polars").DataFrame(self.columns())
