"""Audits the probes of a run of TRL, or of another trainer built on transformers, while it trains: verdicts, alarms and estimates appear in
the trainer's log.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RunAuditor(Protocol):
    """What audits a run as it trains: ``probescore_audit.LiveAudit``."""

    def step(self, step: int) -> None:
        """Tells the auditor of a training run that a training step has ended."""

    def metrics(self) -> Mapping[str, float]:
        """Returns what the last audit of a training run found, by name."""

    def finish(self) -> None:
        """Audits the training run a last time."""


class AuditCallback(TrainerCallback):
    """Callback that audits a training run every so many steps: ``AuditCallback(LiveAudit("runs/sort-7")).attach(trainer)``.

    The audit runs in a process of its own, and the trainer does not wait for it, except at the end of training, for the last one. Its
    numbers are in the trainer's logs under ``audit/``, and so in whatever the trainer reports to. With ``LiveAudit(on_alarm="raise")`` an
    alarm ends training with an error.

    Args:
        audit: the audit, ``probescore_audit.LiveAudit``.
    """

    def __init__(self, audit: RunAuditor) -> None:
        self._audit = audit

    def attach(self, trainer: Any) -> AuditCallback:  # noqa: ANN401 - of transformers
        """Adds the callback to a trainer, in front of those that report logs, so that these report the audit's numbers too; returns it.

        Given to the trainer as one of its ``callbacks`` instead, it comes after them: the numbers then are on the screen alone.
        """
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: ANN401
        """Starts an audit if one is due, and logs what the last one found."""
        del args, control, kwargs
        if state.is_world_process_zero:
            self._audit.step(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Adds the numbers of the last audit to what the trainer logs."""
        del args, control, kwargs
        if logs is not None and state.is_world_process_zero:
            found = self._audit.metrics()
            logs.update(found)
            if state.log_history:
                state.log_history[-1].update(found)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: ANN401
        """Audits the whole run."""
        del args, control, kwargs
        if state.is_world_process_zero:
            self._audit.finish()
