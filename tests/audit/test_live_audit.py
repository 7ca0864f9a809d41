"""A trainer audits its run as it goes: in a process of its own, within bounds, and whatever fails costs the trainer nothing."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

import pytest
from recorded_runs import write_run

from benchmarks.simulated_runs import Change
from probescore_audit import LiveAudit, ProbeAlarm
from probescore_audit.record import RecordWriter, read_record

CHANGED = Path(__file__).parents[2] / "examples/audit/changed"
EVADED = Path(__file__).parents[2] / "examples/audit/evaded"


def finish(audit, seconds=120):
    """Steps on until the audit that runs has come to its end."""
    end = time.monotonic() + seconds
    while audit.running:
        assert time.monotonic() < end
        time.sleep(0.05)
        audit.step(0)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_verdicts_and_alarms_are_logged_and_are_metrics(caplog):
    with caplog.at_level(logging.INFO, "probescore_audit"), LiveAudit(EVADED, every=5) as audit:
        audit.step(10)
        assert audit.metrics() == {}
        finish(audit)
        found = audit.metrics()
    assert found["audit/cheating@1/policy/recall"] < 0.1
    assert found["audit/cheating@1/policy/alarm"] == 1.0
    assert found["audit/cheating@1/frozen/alarm"] == 0.0
    assert found["audit/cheating@1/frozen/positive_rate"] > 0.9
    assert found["audit/step"] == 79
    assert all(isinstance(value, float) and value == value for value in found.values())
    alarms = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("cheating@1, policy: alarm at step 12" in said for said in alarms)
    assert any("The probe is evaded" in record.getMessage() for record in caplog.records)


def test_only_every_so_many_steps_are_audited_and_never_two_at_once():
    with LiveAudit(CHANGED, every=10) as audit:
        for step in range(10):
            audit.step(step)
            assert not audit.running
        audit.step(10)
        first = audit.running
        assert first
        audit.step(20)
        audit.step(30)
        assert audit.running == first


def test_an_alarm_is_logged_once(caplog):
    with caplog.at_level(logging.WARNING, "probescore_audit"), LiveAudit(EVADED, every=1) as audit:
        for step in (1, 2):
            audit.step(step)
            finish(audit)
    assert len([1 for record in caplog.records if "alarm at step" in record.getMessage()]) == 2  # of two monitors


def test_a_step_costs_the_trainer_next_to_nothing():
    with LiveAudit(EVADED, every=1) as audit:
        spent = time.process_time()
        for step in range(1, 200):
            audit.step(step)
        assert time.process_time() - spent < 1.0
        finish(audit)


def test_an_alarm_ends_the_run_if_that_is_wanted():
    with LiveAudit(EVADED, every=1, on_alarm="raise") as audit:
        audit.step(1)
        with pytest.raises(ProbeAlarm, match="cheating@1, policy: alarm at step 12"):
            finish(audit)


def test_no_alarm_ends_no_run():
    with LiveAudit(CHANGED, every=1, on_alarm="raise") as audit:
        audit.step(1)
        finish(audit)
        assert audit.metrics()["audit/cheating@1/frozen/alarm"] == 0.0


@pytest.mark.parametrize("what", ["nothing", "no record", "no reference", "torn"])
def test_a_record_that_cannot_be_audited_is_a_line_in_the_log(what, tmp_path, caplog):
    folder = tmp_path / "run"
    if what != "nothing":
        folder.mkdir()
    if what == "no reference":
        write_run(folder, [Change()], references=False)
    if what == "torn":
        (folder / "rank00000.jsonl").write_text('{"kind": "header", "run_id": "r"')
    with caplog.at_level(logging.INFO, "probescore_audit"), LiveAudit(folder, every=1, on_alarm="raise") as audit:
        for step in (1, 2):
            audit.step(step)
            finish(audit)
        assert audit.metrics() == {}
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1  # the same reason is said once
    assert "not audited" in said[0]
    assert "Traceback" not in said[0]


def test_an_audit_that_takes_too_long_is_ended(caplog):
    with caplog.at_level(logging.WARNING, "probescore_audit"), LiveAudit(EVADED, every=1, timeout=0.01) as audit:
        audit.step(1)
        pid = audit.running
        time.sleep(0.05)
        audit.step(1)
        assert not audit.running
    assert not alive(pid)
    assert "took longer than 0.01 s" in caplog.text


def test_a_trainer_that_ends_leaves_no_process_behind():
    audit = LiveAudit(EVADED, every=1)
    audit.step(1)
    pid = audit.running
    audit.close()
    assert not alive(pid)
    audit.step(2)
    assert not audit.running


def test_at_its_end_a_run_is_audited_once_more(caplog):
    with caplog.at_level(logging.INFO, "probescore_audit"), LiveAudit(EVADED, every=1000, on_alarm="raise") as audit:
        audit.step(3)
        audit.finish()
        assert not audit.running
    assert audit.metrics()["audit/cheating@1/policy/alarm"] == 1.0
    assert "alarm at step 12" in caplog.text


def test_what_is_not_an_answer_is_said_and_breaks_nothing(tmp_path, monkeypatch, caplog):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho hello\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with LiveAudit(EVADED, every=1) as audit:
        audit.step(1)
        finish(audit)
    assert "something else" in caplog.text


def test_a_trainer_without_scipy_is_told_what_to_install(tmp_path, monkeypatch, caplog):
    (tmp_path / "scipy.py").write_text("raise ImportError('No module named scipy')")
    monkeypatch.syspath_prepend(tmp_path)
    with LiveAudit(EVADED, every=1) as audit:
        audit.step(1)
        finish(audit)
    assert "not audited: No module named scipy: pip install 'probescore[audit]'" in caplog.text


def test_a_full_disk_breaks_nothing(monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with LiveAudit(EVADED, every=1) as audit:
        audit.step(1)
        assert not audit.running
    assert "No space left" in caplog.text


def test_a_process_that_cannot_start_breaks_nothing(monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "/nothing/here")
    with LiveAudit(EVADED, every=1) as audit:
        audit.step(1)
        assert not audit.running
    assert "not audited" in caplog.text


def test_other_ranks_than_the_first_audit_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with LiveAudit(EVADED, every=1) as audit:
        audit.step(1)
        assert not audit.running


def test_a_run_that_grows_is_seen(tmp_path):
    write_run(tmp_path, [Change()] * 12)
    with LiveAudit(tmp_path, every=1) as audit:
        audit.step(1)
        finish(audit)
        assert audit.metrics()["audit/step"] == 11
        record = read_record(tmp_path)
        from dataclasses import replace

        with RecordWriter(tmp_path, record.header.anew()) as writer:
            writer.append([replace(record.rollouts[0], step=12)])
        audit.step(2)
        finish(audit)
        assert audit.metrics()["audit/step"] == 12


@pytest.mark.parametrize(
    ("options", "complaint"), [({"every": 0}, "every: 0"), ({"timeout": 0}, "timeout: 0"), ({"on_alarm": "stop"}, "on_alarm: 'stop'")]
)
def test_options_are_checked(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        LiveAudit(EVADED, **options)
