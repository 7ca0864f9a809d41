"""Implements ``probescore record show``, which shows what the record of a training run has."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import one_line_failures
from probescore_server.cli.common.visible import visible_json
from probescore_server.cli.tables import facts_table, safe

if TYPE_CHECKING:
    from probescore_audit.record import Record, RolloutRow

SHOW_HELP = """
Show what the record of a training run has: steps, rollouts, labels, probes and readings; with --rollouts or --step, rollouts themselves.

RUN is the folder of the record. It can be read while the run writes it.

[bold]Examples[/bold]

  probescore record show runs/sort-7

  probescore record show runs/sort-7 --step 40 --rollouts 5

  probescore record show runs/sort-7 --json > rollouts.jsonl

[bold]Exit codes[/bold]: 0 if it could be read, 2 if it could not.
"""


def register(app: typer.Typer) -> None:
    """Adds the commands under ``record`` to the command line."""
    records = typer.Typer(help="Look into the record of a training run.", no_args_is_help=True, rich_markup_mode="rich")
    records.command("show", help=SHOW_HELP)(_show)
    records.callback()(_records)
    app.add_typer(records, name="record")


def _records() -> None:
    """Keeps ``show`` a command of its own, though it is the only one."""


def _show(
    run: Annotated[Path, typer.Argument(help="The folder of a run's record.", show_default=False, metavar="RUN")],
    step: Annotated[int | None, typer.Option("--step", help="Only rollouts of this step.", show_default=False, metavar="N")] = None,
    rollouts: Annotated[int, typer.Option("--rollouts", help="The most rollouts to show.", min=0, metavar="N")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each rollout, and nothing else.")] = False,
) -> None:
    with one_line_failures("audit"):
        from probescore_audit.record import read_record

        record = read_record(run)
        chosen = [row for row in record.rollouts if step is None or row.step == step]
        if step is not None and not chosen:
            raise ValueError(f"--step: {step}; the record has {_steps(record)}")
        labels = _labels(record)
        if as_json:
            for row in chosen[: rollouts or None]:
                typer.echo(visible_json(json.dumps(_as_object(row, labels.get((row.step, row.rollout), [])), ensure_ascii=False)))
            return
        console = new_console()
        console.print(_facts(record))
        console.print()
        console.print(_scores(record))
        if rollouts or step is not None:
            for row in chosen[: rollouts or 10]:
                console.print()
                for line in _lines(row, labels.get((row.step, row.rollout), [])):
                    console.print(line)


def _steps(record: Record) -> str:
    if not record.rollouts:
        return "no rollouts"
    return f"steps {record.rollouts[0].step} to {record.rollouts[-1].step}"


def _labels(record: Record) -> dict[tuple[int, str], list[str]]:
    found: dict[tuple[int, str], list[str]] = {}
    for label in record.labels:
        found.setdefault((label.step, label.rollout), []).append(label.label)
    return found


def _facts(record: Record) -> Table:
    header = record.header
    said, sources = (Counter(getattr(label, name) for label in record.labels) for name in ("label", "source"))
    table = facts_table(safe(header.run_id))
    table.add_row("steps", f"{_steps(record)}, {header.planned_steps} planned")
    table.add_row("rollouts", f"{len(record.rollouts):,} of {len({(row.step, row.prompt) for row in record.rollouts}):,} prompts")
    if record.labels:
        counts = ", ".join(f"{count:,} {word}" for word, count in said.most_common())
        table.add_row("labels", f"{len(record.labels):,} ({counts}), by {', '.join(map(safe, sources))}")
    else:
        table.add_row("labels", "none")
    reference = Counter(row.positive for row in record.references)
    table.add_row("before training", f"{len(record.references):,} rollouts, {reference[True]:,} with the behaviour")
    if record.anchors:
        scorings = len({row.step for row in record.anchors})
        table.add_row("anchors", f"{len({row.anchor for row in record.anchors}):,}, scored at {scorings} steps")
    texts = sum(row.completion_text is not None for row in record.rollouts)
    table.add_row("texts", f"of {texts:,} rollouts" if texts else "not kept")
    for name, value in (("model", header.model_fingerprint), ("tokenizer", header.tokenizer_fingerprint)):
        if value:
            table.add_row(name, safe(value))
    if record.void_rows:
        table.add_row("void", f"{record.void_rows:,} rows of earlier attempts, or of texts that are gone")
    if record.torn_lines:
        table.add_row("torn", f"{record.torn_lines:,} lines could not be read")
    return table


def _scores(record: Record) -> Table:
    table = Table(
        title="Scores", title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim"
    )
    for column in ("probe", "role", "reading", "reduction", "threshold", "rollouts", "flagged"):
        table.add_column(column, overflow="fold")
    described = {probe.key: probe for probe in record.header.probes}
    for (probe, reading, reduction), scores in record.table().scores.items():
        threshold = described[probe].thresholds_on(reading).get(reduction) if probe in described else None
        known = scores[scores == scores]
        flagged = "" if threshold is None or not len(known) else f"{(known >= threshold).mean():.1%}"
        role = described[probe].role if probe in described else ""
        limit = "none" if threshold is None else f"{threshold:.4g}"
        table.add_row(safe(probe), safe(role), safe(reading), safe(reduction), limit, f"{len(known):,}", flagged)
    return table


def _as_object(row: RolloutRow, labels: list[str]) -> dict[str, Any]:
    return {name: value for name, value in vars(row).items() if value is not None} | {"labels": labels}


def _lines(row: RolloutRow, labels: list[str]) -> Iterator[str]:
    said = f", labelled {', '.join(labels)}" if labels else ""
    yield f"[bold]step {row.step}, rollout {safe(row.rollout)}[/bold] of prompt {safe(row.prompt)}{said}"
    for probe, readings in row.scores.items():
        for reading, reductions in readings.items():
            numbers = ", ".join(f"{reduction} {score:.4g}" for reduction, score in reductions.items())
            yield f"  {safe(probe)} on {safe(reading)}: {safe(numbers)}"
    rewards = [f"{name} {value:.4g}" for name, value in (("task", row.task_reward), ("total", row.total_reward)) if value is not None]
    if rewards:
        yield f"  reward: {', '.join(rewards)}"
    if row.prompt_text is not None:
        yield f"  [dim]{safe(row.prompt_text)}[/dim]"
    if row.completion_text is not None:
        yield f"  {safe(row.completion_text)}"
