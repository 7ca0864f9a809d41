"""Sets beside the verdict on a probe how well other things tell the same labelled rollouts apart: probes that the trainer never sees, and
numbers that need no probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from probescore_audit.grouped import Estimate, grouped_auroc
from probescore_audit.record import RolloutRow
from probescore_audit.recorded_run import RecordedReference, RecordedRun
from probescore_audit.run_audit import RunAudit

HELD_OUT = ("held_out", "refit")
"""Roles of probes whose scores the trainer never sees."""
_UNKNOWN = Estimate(np.nan, np.nan, np.nan)


@dataclass(frozen=True)
class Companion:
    """Value object with how well something other than a probe tells the rollouts with the behaviour apart in the probe's last window of
    training steps.

    Attributes:
        name: key of another probe, or what is measured without a probe.
        kind: ``"held out"``, ``"refit"`` or ``"baseline"``.
        before: AUROC before training; NaN if it is not known.
        auroc: AUROC in the window, approximate; of a baseline the better of both directions.
    """

    name: str
    kind: str
    before: Estimate
    auroc: Estimate


def companions_of(
    recorded: RecordedRun, audit: RunAudit, others: Sequence[tuple[RecordedRun, RecordedReference, RunAudit]]
) -> tuple[Companion, ...]:
    """Returns what stands beside the verdict on a probe: the held-out probes on the same reading (which model's activations a probe reads),
    and baselines.

    Args:
        recorded: the probe's scores and labels.
        audit: the probe's audit.
        others: scores, reference and audit of every probe of the run.
    """
    if not audit.windows:
        return ()
    found = [
        Companion(other.probe, other.role.replace("_", " "), reference.counts.auroc, theirs.windows[-1].judgement.auroc)
        for other, reference, theirs in others
        if other.role in HELD_OUT and other.reading == recorded.reading and other.probe != recorded.probe and theirs.windows
    ]
    return (*found, *_baselines(recorded, audit.windows[-1].first_step))


def _baselines(recorded: RecordedRun, first_step: int) -> Iterator[Companion]:
    labels = recorded.labels
    recent = np.flatnonzero(recorded.run.step[labels.rollout] >= first_step)
    rows = [recorded.rollouts[index] for index in labels.rollout[recent].tolist()]
    for name, number in _NUMBERS.items():
        values = np.array([np.nan if (value := number(row)) is None else value for row in rows], np.float64)
        known = np.isfinite(values)
        some = recent[known]
        if not len(some) or not 0 < labels.positive[some].sum() < len(some) or not np.ptp(values[known]):
            continue
        found = grouped_auroc(
            values[known],
            labels.positive[some],
            [f"{row.step} {row.prompt}" for row, counts in zip(rows, known, strict=True) if counts],
            weights=1 / labels.inclusion[some],
        )
        yield Companion(name, "baseline", _UNKNOWN, found if found.value >= 0.5 else found.reversed)


def _logprob_per_token(row: RolloutRow) -> float | None:
    return None if row.policy_logprob is None or not row.tokens else row.policy_logprob / row.tokens


_NUMBERS: dict[str, Callable[[RolloutRow], float | None]] = {
    "log-probability of a token": _logprob_per_token,
    "number of tokens": lambda row: row.tokens,
}
