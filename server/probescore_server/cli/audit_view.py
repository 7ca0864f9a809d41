"""Prints the audit of a training run on a terminal: the verdicts first, then the estimates, alarms, and what nobody can know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from probescore_server.cli.tables import safe

if TYPE_CHECKING:
    from probescore_audit import ReadingAudit, RecordAudit

_COLOURS = {
    "behaviour changed": "green",
    "no change": "green",
    "behaviour rose": "yellow",
    "false alarms up": "yellow",
    "threshold moved": "yellow",
    "cannot tell": "yellow",
    "": "yellow",
}
_LISTED = 8


def print_audit(console: Console, audit: RecordAudit) -> None:
    """Prints the audit of a training run on a terminal."""
    header = audit.record.header
    console.print(
        f"[bold]{safe(header.run_id)}[/bold]  {audit.steps} of {header.planned_steps} planned steps, "
        f"{len(audit.record.rollouts):,} rollouts, {len(audit.record.labels):,} labels",
        soft_wrap=True,
    )
    if audit.record.torn_lines:
        console.print(f"[dim]{audit.record.torn_lines} lines could not be read[/dim]")
    for each in audit.readings:
        console.print()
        _print_reading(console, each)
    _print_list(console, "Also", [*audit.notices, *(f"Not audited: {reason}" for reason in audit.left_out)])
    _print_list(console, "Assumes", audit.assumptions)
    texts = dict.fromkeys(text for each in audit.readings for text in each.unknown)
    _print_list(console, "Cannot know", list(texts))


def _print_reading(console: Console, each: ReadingAudit) -> None:
    recorded = each.recorded
    word = "" if each.verdict is None else each.verdict.value
    colour = "red" if each.audit.alarms else _COLOURS.get(word, "red")
    which = f"[bold]{safe(recorded.probe)}[/bold] on [bold]{safe(recorded.reading)}[/bold]"
    how = f"{safe(recorded.role)}, {safe(recorded.reduction)}"
    console.print(f"{which} ({how}): [bold {colour}]{word or 'no verdict yet'}[/bold {colour}]")
    console.print(f"  {safe(each.sentence)}")
    console.print(f"  [bold]What to do:[/bold] {safe(each.next_step)}")
    if each.audit.final is not None:
        console.print(_estimates(each))
    for watch in each.audit.watches:
        bound = f"{'at least' if watch.monitor == 'recall' else 'at most'} {watch.bound:.1%}"
        raised = "no alarm" if watch.alarm_step is None else f"[red]alarm at step {watch.alarm_step}[/red]"
        console.print(f"  monitor of {watch.monitor} ({bound}): {raised}")
    if each.further:
        shown = ", ".join(f"{planned.step}/{planned.rollout}" for planned in each.further[:_LISTED])
        more = f" and {len(each.further) - _LISTED} more" if len(each.further) > _LISTED else ""
        console.print(f"  to label (step/rollout): {safe(shown)}{more}")


def _estimates(each: ReadingAudit) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2), header_style="dim")
    window = each.audit.windows[-1]
    for column in ("", "before training", f"steps {window.first_step} to {window.last_step}"):
        table.add_column(column)
    for row in _rows(each):
        table.add_row(*row)
    return table


def _rows(each: ReadingAudit) -> Iterator[tuple[str, str, str]]:
    from probescore_audit.report.words import false_alarms, number_with_interval, points, recall, share, share_with_interval

    final = each.audit.windows[-1].judgement
    yield "with the behaviour", share_with_interval(final.reference_positive_rate), share_with_interval(final.positive_rate)
    yield "recall", share_with_interval(final.reference_recall), recall(final)
    counts = each.reference.counts
    yield "false alarms", share(counts.flagged_negatives / counts.negatives), false_alarms(final)
    yield "there and missed, of all", "", share_with_interval(final.missed)
    yield "AUROC (approximate)", number_with_interval(counts.auroc), number_with_interval(final.auroc)
    if each.refit is not None:
        yield f"AUROC of a refit ({each.refit.source})", "", number_with_interval(each.refit.auroc)
    for other in each.companions:
        before = "" if other.before.value != other.before.value else number_with_interval(other.before)
        yield f"AUROC of {safe(other.name)} ({other.kind})", before, number_with_interval(other.auroc)
    if final.honest_share.value == final.honest_share.value:
        yield "of the fall of detections, real", "", share_with_interval(final.honest_share)
    parts = final.flag_rate_parts
    yield "change of the flag rate in points:", "", ""
    yield "  due to the behaviour", "", points(parts.composition)
    yield "  due to recall", "", points(parts.positives)
    yield "  due to false alarms", "", points(parts.negatives)
    if each.anchors:
        yield "AUROC of anchors", number_with_interval(each.anchors[0].auroc), number_with_interval(each.anchors[-1].auroc)


def _print_list(console: Console, title: str, texts: list[str] | tuple[str, ...]) -> None:
    if texts:
        console.print(f"\n[bold]{title}[/bold]")
        for text in texts:
            console.print(f"  · {safe(text)}")
