"""Reads and writes the record of a training run: its rollouts, and what probes, tasks and labellers said of them.

A record is a folder of JSON Lines files that are only appended to. Every process that writes has a file of its own, so that several ranks
write at once without locks, and whatever kills a process costs at most the line that it was writing. This package needs numpy alone.
"""

from probescore_audit.record.details import delete_details
from probescore_audit.record.reader import Record, read_record, recorded_run_ids
from probescore_audit.record.rows import (
    SCHEMA_VERSION,
    ActivationRow,
    AnchorRow,
    LabellerRow,
    LabelRow,
    PlanRow,
    RecordedProbe,
    ReferenceRow,
    RolloutRow,
    RunHeader,
)
from probescore_audit.record.scored_lines import reference_rows
from probescore_audit.record.table import RolloutTable
from probescore_audit.record.writer import RecordWriter

__all__ = [
    "SCHEMA_VERSION",
    "ActivationRow",
    "AnchorRow",
    "LabelRow",
    "LabellerRow",
    "PlanRow",
    "Record",
    "RecordWriter",
    "RecordedProbe",
    "ReferenceRow",
    "RolloutRow",
    "RolloutTable",
    "RunHeader",
    "delete_details",
    "read_record",
    "recorded_run_ids",
    "reference_rows",
]
