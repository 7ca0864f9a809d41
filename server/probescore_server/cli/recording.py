"""Implements ``probescore record``, whose commands show what the record of a training run has, add the labelled rollouts that the run is
compared with, and delete texts.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import one_line_failures, say
from probescore_server.cli.common.visible import visible_json
from probescore_server.cli.tables import facts_table, safe

if TYPE_CHECKING:
    from probescore_audit.record import Record, RolloutRow

_LEAST_OF_CLASS = 300
_LEAST_AT_RANDOM = 512

SHOW_HELP = """
Show what the record of a training run has: steps, rollouts, labels, probes and readings; with --rollouts or --step, rollouts themselves.

RUN is the folder of the record. It can be read while the run writes it.

[bold]Examples[/bold]

  probescore record show runs/sort-7

  probescore record show runs/sort-7 --step 40 --rollouts 5

  probescore record show runs/sort-7 --json > rollouts.jsonl

[bold]Exit codes[/bold]: 0 if it could be read, 2 if it could not.
"""


REFERENCE_HELP = """
Add labelled rollouts of the model before training to the record of a run: what the audit compares the run with.

SCORED has what 'probescore score --json' printed for rollouts with labels. At least 300 of each class are needed, and at least 512 that
were drawn at random (better 2,048), since these say how frequent the behaviour was. Score them by the reductions of the run's signals, and
by max. The record need not be there yet.

Say whether the rollouts were drawn at random, with --random, or chosen for their label or score, with --chosen; add both kinds one after
the other. The same file added twice counts once.

[bold]Examples[/bold]

  probescore score base.jsonl --reduction mean --reduction max --json > scored.jsonl

  probescore record reference runs/sort-7 scored.jsonl --random

[bold]Exit codes[/bold]: 0 if they were added, 2 for wrong input.
"""

DELETE_TEXTS_HELP = """
Delete texts, token ids and scores of tokens from the record of a training run, also while the run goes on. Scores, rewards and labels stay.

[bold]Examples[/bold]

  probescore record delete-texts runs/sort-7 --before 200

  probescore record delete-texts runs/sort-7

[bold]Exit codes[/bold]: 0 if they are deleted, 2 for wrong input.
"""

Run = Annotated[Path, typer.Argument(help="The folder of a run's record.", show_default=False, metavar="RUN")]


def register(app: typer.Typer) -> None:
    """Adds the commands under ``record`` to the command line."""
    records = typer.Typer(help="Look into the record of a training run, and add to it.", no_args_is_help=True, rich_markup_mode="rich")
    records.command("show", help=SHOW_HELP)(_show)
    records.command("reference", help=REFERENCE_HELP)(_reference)
    records.command("delete-texts", help=DELETE_TEXTS_HELP)(_delete_texts)
    app.add_typer(records, name="record")


def _show(
    run: Run,
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


def _reference(
    run: Run,
    scored: Annotated[str, typer.Argument(help="A file of scored rollouts with labels, or -.", show_default=False, metavar="SCORED")],
    random: Annotated[
        bool | None,
        typer.Option("--random/--chosen", help="Whether the rollouts were drawn at random, or chosen.", show_default=False),
    ] = None,
    positive: Annotated[
        str | None, typer.Option("--positive", help="The label that stands for the behaviour.", show_default=False, metavar="LABEL")
    ] = None,
    run_id: Annotated[
        str, typer.Option("--run-id", help="The run's name, if it has no record yet; the folder's by default.", show_default=False)
    ] = "",
) -> None:
    with one_line_failures("audit"):
        from probescore_audit.record import RecordWriter, RunHeader, read_record, recorded_run_ids, reference_rows

        if random is None:
            raise ValueError("give --random, if the rollouts were drawn at random, or --chosen, if they were chosen for label or score")
        text = sys.stdin.read() if scored == "-" else Path(scored).read_text(encoding="utf-8-sig")
        rows = reference_rows(text.split("\n"), random=random, positive=positive)
        if not rows:
            raise ValueError(f"{scored}: none of its lines has a label; score rollouts with labels")
        if run.exists() and recorded_run_ids(run):
            header = read_record(run, texts=False).header.anew()
            if run_id not in ("", header.run_id):
                raise ValueError(f"--run-id: {run_id}; the record is of the run {header.run_id}; leave it out")
        else:
            header = RunHeader(run_id=run_id or run.absolute().name, planned_steps=1, started=0.0)
        with RecordWriter(run, header, on_error="raise") as writer:
            writer.append(rows)
        found = Counter(row.positive for row in rows)
        console = new_console()
        console.print(f"added {len(rows):,} rollouts, {found[True]:,} with the behaviour", soft_wrap=True)
        recorded = read_record(run, texts=False)
        for problem in _missing(recorded):
            say(problem)


def _missing(record: Record) -> Iterator[str]:
    """Yields what the rollouts before training lack for an audit: scores for a threshold, rollouts of a class, or rollouts at random."""
    scored = {(probe, reduction) for row in record.references for probe, of in row.scores.items() for reduction in of.get("frozen", {})}
    for probe in record.header.probes:
        for reduction in sorted({name.rpartition("/")[2] for name in probe.thresholds}):
            if (probe.key, reduction) not in scored:
                yield f"no scores of {probe.key} by {reduction}, for which the run has a threshold; score them with --reduction {reduction}"
    counts = Counter(row.positive for row in record.references)
    for kind, name in ((True, "with the behaviour"), (False, "without the behaviour")):
        if counts[kind] < _LEAST_OF_CLASS:
            yield f"{counts[kind]:,} rollouts {name} before training; an audit needs at least {_LEAST_OF_CLASS}"
    if (at_random := sum(row.random for row in record.references)) < _LEAST_AT_RANDOM:
        yield f"{at_random:,} rollouts drawn at random before training; an audit needs at least {_LEAST_AT_RANDOM}, better 2,048"


def _delete_texts(
    run: Run,
    before: Annotated[
        int | None, typer.Option("--before", help="Only of rollouts of steps before this one.", min=0, show_default=False, metavar="STEP")
    ] = None,
) -> None:
    with one_line_failures("audit"):
        from probescore_audit.record import delete_details, read_record, recorded_run_ids

        if not recorded_run_ids(run):
            raise FileNotFoundError(f"{run.name}: no record; give the folder that was named as `record`")
        deleted = delete_details(run, before)
        left = sum(row.completion_text is not None or row.completion_ids is not None for row in read_record(run).rollouts)
        new_console().print(f"deleted {deleted:,} files; texts or ids of {left:,} rollouts are left", soft_wrap=True)


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
