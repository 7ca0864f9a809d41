"""A real training run that is audited as it goes: what is found is in the trainer's own logs, and an alarm can end it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from sorting_policy import SortingPolicy
from training import PlainGRPO, digits_in_order, new_trainer
from transformers import TrainerCallback

from probescore_adapters.trl_audit import AuditCallback
from probescore_audit import LiveAudit, ProbeAlarm

EVADED = Path(__file__).parents[3] / "examples/audit/evaded"
ALARM = "audit/cheating@1/policy/alarm"


class Reported(TrainerCallback):
    """Keeps what a trainer reports; waits at one step until the audit that was started has ended, as a slow step would."""

    def __init__(self, audit: LiveAudit, wait_at: int) -> None:
        self.logs: list[dict[str, Any]] = []
        self._audit, self._wait_at = audit, wait_at

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        end = time.monotonic() + 120
        while state.global_step == self._wait_at and self._audit.running:
            assert time.monotonic() < end
            time.sleep(0.1)
            self._audit.step(0)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def audited(policy: SortingPolicy, folder: Path, **options: Any) -> tuple[Any, Reported]:
    audit = LiveAudit(EVADED, every=2, **options)
    reported = Reported(audit, 3)
    trainer = new_trainer(PlainGRPO, policy, folder, [digits_in_order], callbacks=[reported], max_steps=5)
    AuditCallback(audit).attach(trainer)
    return trainer, reported


def test_what_the_audit_finds_is_in_the_trainers_logs(policy: SortingPolicy, tmp_path: Path) -> None:
    trainer, reported = audited(policy, tmp_path)
    trainer.train()
    assert trainer.state.global_step == 5
    for logs in (trainer.state.log_history, reported.logs):
        with_it = [log for log in logs if ALARM in log]
        assert 0 < len(with_it) < len(logs)
        assert {log[ALARM] for log in with_it} == {1.0}
        assert {log["audit/step"] for log in with_it} == {79.0}


def test_an_alarm_ends_the_run_if_that_is_wanted(policy: SortingPolicy, tmp_path: Path) -> None:
    trainer, _ = audited(policy, tmp_path, on_alarm="raise")
    with pytest.raises(ProbeAlarm, match="alarm at step 12"):
        trainer.train()
    assert trainer.state.global_step < 5
