"""Converts the audit of a training run into JSON values; a number that is not known becomes null."""

from __future__ import annotations

import math
from dataclasses import asdict
from enum import Enum
from typing import Any

from probescore_audit.record_audit import ReadingAudit, RecordAudit


def numbers_of(audit: RecordAudit) -> dict[str, Any]:
    """Returns every number and sentence of the audit of a training run as JSON values."""
    record = audit.record
    return {
        "run": record.header.run_id,
        "planned_steps": record.header.planned_steps,
        "last_step": audit.last_step,
        "rollouts": len(record.rollouts),
        "labels": len(record.labels),
        "torn_lines": record.torn_lines,
        "void_rows": record.void_rows,
        "model_fingerprint": record.header.model_fingerprint,
        "alpha": record.header.alpha,
        "readings": [_reading(each) for each in audit.readings],
        "left_out": list(audit.left_out),
        "notices": list(audit.notices),
        "assumptions": list(audit.assumptions),
    }


def _reading(each: ReadingAudit) -> dict[str, Any]:
    recorded, counts = each.recorded, each.reference.counts
    return {
        "probe": recorded.probe,
        "role": recorded.role,
        "reading": recorded.reading,
        "reduction": recorded.reduction,
        "threshold": recorded.run.threshold,
        "verdict": None if each.verdict is None else each.verdict.value,
        "sentence": each.sentence,
        "next_step": each.next_step,
        "labels": len(recorded.labels.rollout),
        "unlabelled_steps": each.audit.unlabelled_steps,
        "reference": _plain(asdict(counts)),
        "bounds": _plain(asdict(each.audit.bounds)),
        "alarms": [_plain(asdict(alarm)) for alarm in each.audit.alarms],
        "windows": [
            {"first_step": window.first_step, "last_step": window.last_step, **_plain(asdict(window.judgement))}
            for window in each.audit.windows
        ],
        "refit": None if each.refit is None else _plain(asdict(each.refit)),
        "companions": [_plain(asdict(companion)) for companion in each.companions],
        "anchors": [_plain(asdict(scoring)) for scoring in each.anchors],
        "further_labels": [_plain(asdict(planned)) for planned in each.further],
        "unknown": list(each.unknown),
    }


def _plain(value: Any) -> Any:  # noqa: ANN401 - whatever a value object holds
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
