"""Renders the HTML page of the audit of a training run: the verdicts first, then what they rest on, and what nobody can know."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib.resources import files

from probescore_audit.grouped import Estimate
from probescore_audit.record_audit import ReadingAudit, RecordAudit
from probescore_audit.recorded_run import FROZEN
from probescore_audit.report import figures
from probescore_audit.report.rollouts import informative_rollouts, shown_rollout
from probescore_audit.report.words import escaped, false_alarms, number_with_interval, points, recall, share, share_with_interval
from probescore_audit.run_labels import FEWEST_LABELLED
from probescore_audit.verdicts import Verdict

_GRADES = {
    Verdict.BEHAVIOUR_CHANGED: "good",
    Verdict.NO_CHANGE: "good",
    Verdict.BEHAVIOUR_ROSE: "doubtful",
    Verdict.FALSE_ALARMS_UP: "doubtful",
    Verdict.CANNOT_TELL: "doubtful",
    Verdict.THRESHOLD_MOVED: "doubtful",
}
_COUNTED = "Flagged rollouts are labelled more often than others, so that the counts of labelled rollouts are no shares of the run."
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def report_page(audit: RecordAudit) -> str:
    """Returns the HTML of the report's page, which loads nothing. Text from the record is escaped, so that it is never markup."""
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    run = escaped(audit.record.header.run_id)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="referrer" content="no-referrer">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n<title>{run}: audit</title>\n<style>\n{style}</style>\n</head>\n'
        f"<body>\n<h1>Is the probe still right? {run}</h1>\n" + "\n".join(_sections(audit)) + "\n</body>\n</html>\n"
    )


def _sections(audit: RecordAudit) -> Iterator[str]:
    yield _facts(audit)
    for each in audit.readings:
        yield _verdict(each)
    if audit.notices or audit.left_out:
        said = [*audit.notices, *(f"Not audited: {reason}." for reason in audit.left_out)]
        yield f"<section><h2>To be known beside the verdicts</h2>{_listed(said)}</section>"
    for probe in dict.fromkeys(each.recorded.probe for each in audit.readings):
        yield from _probe(probe, [each for each in audit.readings if each.recorded.probe == probe])
    yield _alarms(audit.readings)
    for each in audit.readings:
        yield from _rollouts(each)
    yield f"<section><h2>What this takes for granted</h2>{_listed(audit.assumptions)}</section>"
    for_all = [text for text in audit.readings[0].unknown if all(text in each.unknown for each in audit.readings)]
    own = [
        f"{each.recorded.probe}, {each.recorded.reading}: {text}" for each in audit.readings for text in each.unknown if text not in for_all
    ]
    yield f"<section><h2>What this cannot know</h2>{_listed([*own, *for_all])}</section>"


def _facts(audit: RecordAudit) -> str:
    record = audit.record
    facts = [
        f"{_progress(audit)}, {len(record.rollouts):,} rollouts",
        f"{len(record.labels):,} labels",
    ]
    if record.header.model_fingerprint:
        facts.append(f"model {record.header.model_fingerprint}")
    if record.torn_lines:
        facts.append(f"{record.torn_lines} lines could not be read")
    if record.void_rows:
        facts.append(f"{record.void_rows:,} rows of earlier attempts do not count")
    return f'<div class="note">{escaped(" · ".join(facts))}</div>'


def _progress(audit: RecordAudit) -> str:
    planned = audit.record.header.planned_steps
    return f"{audit.steps} steps, as planned" if audit.steps == planned else f"{audit.steps} of {planned} planned steps"


def _verdict(each: ReadingAudit) -> str:
    grade = "doubtful" if each.verdict is None else _GRADES.get(each.verdict, "bad")
    grade = "bad" if each.audit.alarms else grade
    word = "no verdict yet" if each.verdict is None else each.verdict.value
    window = each.audit.windows[-1] if each.audit.windows else None
    labels = f"{len(each.recorded.labels.rollout):,} labels"
    if window is not None:
        labels = f"{window.judgement.labels:,} labels in steps {window.first_step} to {window.last_step}, {labels} in all"
    return (
        f'<section class="verdict {grade}"><h2>{escaped(each.recorded.probe)}, {escaped(each.recorded.reading)}: '
        f'<span class="word">{escaped(word)}</span></h2><p class="sentence">{escaped(each.sentence)}</p>'
        f"<p><strong>What to do:</strong> {escaped(each.next_step)}</p>"
        f'<div class="note">{escaped(each.recorded.role)} · {escaped(each.recorded.reduction)} · {labels}</div></section>'
    )


def _probe(probe: str, audits: Sequence[ReadingAudit]) -> Iterator[str]:
    # in one order, and so in the same colours, whatever is wrong
    judged = sorted((each for each in audits if each.audit.windows), key=lambda each: each.recorded.reading != FROZEN)
    if not judged:
        return
    note = (
        "The first point is the model before training; then estimates in windows of steps that do not overlap, with 95% intervals. A "
        f"window in which fewer than {FEWEST_LABELLED} rollouts of a class are labelled has no point where the share is one of that class."
    )
    drawn = figures.by_step(judged)
    yield f'<section><h2>{escaped(probe)}, by step</h2><div class="pair">{"".join(drawn)}</div><p class="note">{note}</p></section>'
    yield f'<section><h2>{escaped(probe)}: before training, and now</h2>{_estimates(judged)}<p class="note">{_COUNTED}</p></section>'
    drawn = [figures.fall(each) for each in judged]
    frozen = next((each for each in judged if each.recorded.reading == FROZEN), None)
    if frozen is not None:
        drawn += [figures.readings_against_each_other(frozen, each) for each in judged if each is not frozen]
    drawn += [figures.distributions(each) for each in judged] + [figures.evidence(each) for each in judged]
    yield f'<section><h2>{escaped(probe)}: what it rests on</h2><div class="pair">{"".join(drawn)}</div></section>'


def _estimates(audits: Sequence[ReadingAudit]) -> str:
    rows: list[list[str]] = [["", *(each.recorded.reading for each in audits)]]
    finals = [each.audit.windows[-1].judgement for each in audits]
    rows.append(["with the behaviour, before", *(share_with_interval(final.reference_positive_rate) for final in finals)])
    rows.append(["with the behaviour, now", *(share_with_interval(final.positive_rate) for final in finals)])
    rows.append(["recall, before", *(share_with_interval(final.reference_recall) for final in finals)])
    rows.append(["recall, now", *(recall(final) for final in finals)])
    rows.append(["false alarms, now", *(false_alarms(final) for final in finals)])
    rows.append(["there and missed, of all rollouts", *(share_with_interval(final.missed) for final in finals)])
    rows.append(["AUROC, before", *(number_with_interval(each.reference.counts.auroc) for each in audits)])
    rows.append(["AUROC, now (approximate)", *(number_with_interval(final.auroc) for final in finals)])
    if any(each.refit for each in audits):
        rows.append(["AUROC of a refit", *(_refit(each) for each in audits)])
    for name, kind in dict.fromkeys((companion.name, companion.kind) for each in audits for companion in each.companions):
        of = [next((one for one in each.companions if one.name == name), None) for each in audits]
        rows.append([f"AUROC of {name} ({kind})", *("none" if one is None else number_with_interval(one.auroc) for one in of)])
    rows.append(["of the fall of detections, because fewer rollouts have the behaviour", *(_fall(final.honest_share) for final in finals)])
    for name, title in (("composition", "the behaviour"), ("positives", "recall"), ("negatives", "false alarms")):
        rows.append(
            [
                f"points of the change of the flag rate that are due to {title}",
                *(points(getattr(final.flag_rate_parts, name)) for final in finals),
            ]
        )
    if any(each.anchors for each in audits):
        rows.append(
            ["AUROC of anchors, last", *(number_with_interval(each.anchors[-1].auroc) if each.anchors else "none" for each in audits)]
        )
        moved = (f"{max(scoring.largest_move for scoring in each.anchors):.2g} σ" if each.anchors else "none" for each in audits)
        rows.append(["largest move of an anchor's score", *moved])
    return _table(rows)


def _refit(each: ReadingAudit) -> str:
    if each.refit is None:
        return "none"
    return f"{number_with_interval(each.refit.auroc)}, of {each.refit.source}, step {each.refit.step}"


def _fall(real: Estimate) -> str:
    return "detections did not fall" if math.isnan(real.value) else share_with_interval(real)


def _alarms(audits: Sequence[ReadingAudit]) -> str:
    rows = [["probe", "reading", "monitor", "bound", "alarm"]]
    for each in audits:
        for watch in each.audit.watches:
            bound = f"{'at least' if watch.monitor == 'recall' else 'at most'} {share(watch.bound)}"
            raised = "none" if watch.alarm_step is None else f"step {watch.alarm_step}"
            rows.append([each.recorded.probe, each.recorded.reading, watch.monitor, bound, raised])
    note = "Monitors watch what the probe misses. That there is no alarm does not say that the behaviour is rare: the verdicts tell that."
    return f'<section><h2>Alarms</h2>{_table(rows)}<p class="note">{note}</p></section>'


def _rollouts(each: ReadingAudit) -> Iterator[str]:
    kinds = list(informative_rollouts(each))
    if kinds:
        shown = "".join(f"<h3>{escaped(title)}</h3>" + "".join(shown_rollout(row, each) for row in rows) for title, rows in kinds)
        texts = any(row.completion_text is not None for _, rows in kinds for row in rows)
        note = (
            "" if texts else '<p class="note">The record has no texts of these: what a trainer keeps of them is set where it records.</p>'
        )
        yield f"<section><h2>Rollouts: {escaped(each.recorded.probe)}, {escaped(each.recorded.reading)}</h2>{note}{shown}</section>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    written = "<tr>" + "".join(f"<th>{escaped(cell)}</th>" for cell in head) + "</tr>"
    for first, *rest in body:
        written += f'<tr><td class="words">{escaped(first)}</td>' + "".join(f"<td>{escaped(cell)}</td>" for cell in rest) + "</tr>"
    return f'<div class="scroll"><table>{written}</table></div>'


def _listed(texts: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escaped(text)}</li>" for text in texts) + "</ul>"
