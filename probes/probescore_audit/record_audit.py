"""Audits every probe of a training run's record, under every reading (which model's activations the probe read), and says what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from probescore_audit import advice
from probescore_audit.companions import Companion, companions_of
from probescore_audit.record import Record
from probescore_audit.recorded_labels import PlannedLabel, label_design, plan_further
from probescore_audit.recorded_refit import Refit, recorded_refit
from probescore_audit.recorded_run import (
    AnchorScoring,
    RecordedReference,
    RecordedRun,
    read_run,
    recorded_anchors,
    recorded_reference,
)
from probescore_audit.run_audit import WINDOW_LABELS, RunAudit, audit_run
from probescore_audit.verdicts import Verdict


@dataclass(frozen=True, eq=False)
class ReadingAudit:
    """Value object with the audit of one probe under one reading (which model's activations the probe read) over a training run.

    Attributes:
        recorded: the scores and labels.
        reference: the labelled rollouts of the model before training.
        audit: estimates, alarms and judgements.
        anchors: how the anchors (texts with a known label that are scored again and again) scored, by step.
        refit: what fresh probes can tell of the last window, from recorded activations; ``None`` if too few are recorded.
        companions: how well held-out probes and baselines tell the same rollouts apart in the last window.
        further: rollouts that are to be labelled, if there is no verdict and a reasonable number of labels would probably help; else empty.
        sentence: the verdict of the last window in one sentence.
        next_step: what to do next.
        unknown: what the audit cannot know.
    """

    recorded: RecordedRun
    reference: RecordedReference
    audit: RunAudit
    anchors: tuple[AnchorScoring, ...]
    refit: Refit | None
    companions: tuple[Companion, ...]
    further: tuple[PlannedLabel, ...]
    sentence: str
    next_step: str
    unknown: tuple[str, ...]

    @property
    def verdict(self) -> Verdict | None:
        """Returns the verdict of the last window of training steps; ``None`` if the run has too few labels."""
        return None if self.audit.final is None else self.audit.final.verdict


@dataclass(frozen=True, eq=False)
class RecordAudit:
    """Value object with the audit of a training run from its record.

    Attributes:
        record: the record.
        readings: the audits of each probe under each reading (which model's activations the probe read), those with an alarm first, then
            those of a probe that sees less than before.
        left_out: why a probe or reading of the record could not be audited, for each such one.
        notices: what else must be known: what readings say together, anchors that moved, labellers who err.
        assumptions: what the audit takes for granted.
    """

    record: Record
    readings: tuple[ReadingAudit, ...]
    left_out: tuple[str, ...]
    notices: tuple[str, ...]
    assumptions: tuple[str, ...]

    @property
    def steps(self) -> int:
        """Returns the number of training steps from the first one of the record to the last one, whether trainers count from 0 or 1."""
        return _steps(self.record)

    @property
    def last_step(self) -> int:
        """Returns the last training step of the record; −1 if there is none."""
        return self.record.rollouts[-1].step if self.record.rollouts else -1


def audit_record(
    record: Record, *, probes: Sequence[str] = (), readings: Sequence[str] = (), window_labels: int = WINDOW_LABELS, seed: int = 0
) -> RecordAudit:
    """Audits the probes of a training run from the run's record.

    Args:
        record: the record of the run, as ``read_record`` returns it.
        probes: keys of the probes to audit, ``name@version``; all that have a threshold by default.
        readings: readings (which model's activations the probes read) to audit; all that are recorded by default.
        window_labels: number of labels of a window, at least.
        seed: seed of the draws from posteriors.

    Raises:
        ValueError: the record has no such probe or reading, or nothing that can be audited.
    """
    table = record.table()
    described = {probe.key for probe in record.header.probes}
    recorded = list(dict.fromkeys(key[:2] for key in table.scores))
    for probe in probes:
        if probe not in described:
            raise ValueError(f"probe: {probe!r}; the record has {', '.join(sorted(described)) or 'none'}")
    for reading in readings:
        if reading not in {key[1] for key in recorded}:
            raise ValueError(f"reading: {reading!r}; the record has {', '.join(sorted({key[1] for key in recorded})) or 'none'}")
    wanted = [(probe, reading) for probe, reading in recorded if (not probes or probe in probes) and (not readings or reading in readings)]
    found: list[tuple[RecordedRun, RecordedReference]] = []
    left_out: list[str] = []
    for probe, reading in wanted:
        try:
            run = read_run(record, table, probe, reading=reading)
        except ValueError as error:
            left_out.append(f"{probe}, {reading}: {error}")
            continue
        reference = recorded_reference(record, probe, reading=reading, reduction=run.reduction)
        if reference is None:
            left_out.append(f"{probe}, {reading}: {_NO_REFERENCE}")
        else:
            found.append((run, reference))
    if not found:
        raise ValueError("; ".join(left_out) or "the record has no scores yet")
    design = label_design(record, table)
    judged = [(run, reference, _audited(record, run, reference, len(found), window_labels, seed)) for run, reference in found]
    audits = tuple(
        _described(record, run, reference, audit, companions_of(run, audit, judged), design, window_labels, seed)
        for run, reference, audit in judged
    )
    pairs = [(each.recorded, each.audit) for each in audits]
    return RecordAudit(
        record=record,
        readings=tuple(sorted(audits, key=lambda each: (not each.audit.alarms, each.verdict not in advice.WEAKER))),
        left_out=tuple(left_out),
        notices=(
            *advice.between_readings(pairs),
            *advice.held_out_probes(pairs),
            *(text for each in audits for text in advice.moved_anchors(each.recorded, each.anchors)),
            *advice.unused_probes(record),
            *advice.labeller_doubts(record, [run for run, _ in pairs]),
        ),
        assumptions=advice.assumptions(record),
    )


_NO_REFERENCE = (
    "the record has no reference to compare with; write labelled rollouts of the model before training as ReferenceRow, of both classes, "
    "and some of them drawn at random"
)


def _steps(record: Record) -> int:
    return record.rollouts[-1].step - record.rollouts[0].step + 1 if record.rollouts else 0


def _audited(record: Record, recorded: RecordedRun, reference: RecordedReference, audits: int, window_labels: int, seed: int) -> RunAudit:
    return audit_run(
        recorded.run,
        recorded.labels,
        reference.counts,
        planned_steps=record.header.planned_steps,
        alpha=record.header.alpha,
        audits=audits,
        window_labels=window_labels,
        seed=seed,
    )


def _described(
    record: Record,
    recorded: RecordedRun,
    reference: RecordedReference,
    audit: RunAudit,
    companions: tuple[Companion, ...],
    design: RecordedRun | None,
    window_labels: int,
    seed: int,
) -> ReadingAudit:
    final = audit.final
    refit = recorded_refit(record, recorded, audit.windows[-1].first_step, seed=seed) if audit.windows else None
    undecided = final is not None and final.verdict is Verdict.CANNOT_TELL
    further = plan_further(design, final.more_labels, window_labels) if design and undecided and final and final.more_labels else ()
    return ReadingAudit(
        recorded=recorded,
        reference=reference,
        audit=audit,
        anchors=recorded_anchors(record, recorded.probe, reading=recorded.reading, reduction=recorded.reduction),
        refit=refit,
        companions=companions,
        further=further,
        sentence=advice.without_verdict(len(recorded.labels.rollout))
        if final is None
        else final.sentence + advice.of_a_refit(final, refit, reference.counts.auroc),
        next_step=advice.next_step(recorded, audit, ended=_steps(record) >= record.header.planned_steps),
        unknown=advice.unknown(record, recorded, audit),
    )
