"""Labels rollouts of each training step for the record of the run, by a function of the user's that knows the truth."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

from probescore_adapters.record_options import Checker
from probescore_adapters.rollouts import Rollout
from probescore_adapters.step_plans import PlannedRollout
from probescore_audit.record import LabelRow

# the standard library's: a trainer's process has its own way of showing logs
logger = logging.getLogger("probescore_adapters")

_SAID = {True: "yes", False: "no", "yes": "yes", "no": "no", "unsure": "unsure", None: "unsure"}


def labels_by_checker(checker: Checker, planned: Sequence[PlannedRollout], *, on_error: Literal["log", "raise"]) -> list[LabelRow]:
    """Returns the labels that the user's checker gives to the rollouts that a plan has chosen.

    Args:
        checker: function from a rollout to whether it has the behaviour.
        planned: the rollouts.
        on_error: what happens if the checker fails: ``"log"`` = the label is ``"unsure"``, or ``"raise"`` = the error ends the run.

    Raises:
        ValueError: the checker says something else than true, false and ``"unsure"``.
    """
    return [
        LabelRow(
            step=each.recorded.row.step,
            rollout=each.recorded.row.rollout,
            label=_said(checker, each.recorded.rollout, on_error),
            source="checker",
            labeller=getattr(checker, "__qualname__", type(checker).__qualname__),
            text_sha256=each.recorded.row.text_sha256,
            inclusion=each.inclusion,
            stratum=each.stratum,
            floor=each.floor,
        )
        for each in planned
    ]


def _said(checker: Checker, rollout: Rollout, on_error: Literal["log", "raise"]) -> str:
    try:
        answer = checker(rollout)
    except Exception as error:
        if on_error == "raise":
            raise
        logger.error("record.checker: it failed, and the label is unsure: %s", error)
        return "unsure"
    if answer not in _SAID:
        raise ValueError(f"record.checker: expected True, False or 'unsure', got {answer!r}")
    return _SAID[answer]
