"""Implements ``probescore labels``, whose commands choose rollouts of a training run to label, and add labels to the run's record."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import one_line_failures, say
from probescore_server.cli.common.visible import visible_json
from probescore_server.cli.judging import register as register_judge
from probescore_server.cli.label_lines import label_lines
from probescore_server.files import write_atomically

PLAN_HELP = """
Choose which rollouts of a training run to label, and write a line of JSON for each, to be filled in.

Of each step that has no labels yet: half of them drawn at random, a quarter among the flagged rollouts, a quarter among those that come
nearest below the threshold. With --more, further rollouts of the last labelled steps, where the audit could not tell.

Fill in "label" with "yes" (the behaviour is there), "no" or "unsure", and give the lines to 'probescore labels add'. Leave the other fields
as they are: estimates weigh by them. Scores are left out, so that nobody labels by them. Label all of a plan, in any order.

[bold]Examples[/bold]

  probescore labels plan runs/sort-7 --per-step 32 -o to_label.jsonl

  probescore labels plan runs/sort-7 --more 128 -o more.jsonl

[bold]Exit codes[/bold]: 0 if there is a plan, 2 for wrong input.
"""

ADD_HELP = """
Add labels to the record of a training run.

FILE has lines as 'probescore labels plan' writes them, with "label" filled in; - is standard input. Lines without a label are passed over.
Nothing is added unless every line is right.

A label of a rollout that is in no plan has no "inclusion", the probability with which the rollout was chosen: it is kept, and estimates
leave it out.

[bold]Examples[/bold]

  probescore labels add runs/sort-7 to_label.jsonl --source person --labeller ann

  probescore labels add runs/sort-7 again.jsonl --source judge --labeller gpt-x --labeller-version prompt-3 --second

[bold]Exit codes[/bold]: 0 if the labels were added, 2 for wrong input.
"""

EXPORT_HELP = """
Write the labelled rollouts of a training run as lines that 'probescore probes fit', 'calibrate' and 'compare' read.

A line has a split, which depends on its prompt alone: half of the prompts are to fit on, a quarter to calibrate on, a quarter to test on.
For calibration only labels of rollouts that were drawn at random are taken. The record must have token ids or texts.

[bold]Examples[/bold]

  probescore labels export runs/sort-7 -o labelled.jsonl

  probescore probes fit labelled.jsonl --model ./model -o cheating-2.onnx --probe-version 2

[bold]Exit codes[/bold]: 0 if they are written, 2 for wrong input.
"""

Run = Annotated[Path, typer.Argument(help="The folder of a run's record.", show_default=False, metavar="RUN")]


def register(app: typer.Typer) -> None:
    """Adds the commands under ``labels`` to the command line."""
    labels = typer.Typer(help="Choose rollouts of a training run to label, and add labels.", no_args_is_help=True, rich_markup_mode="rich")
    labels.command("plan", help=PLAN_HELP)(_plan)
    labels.command("add", help=ADD_HELP)(_add)
    labels.command("export", help=EXPORT_HELP)(_export)
    register_judge(labels)
    app.add_typer(labels, name="labels")


def _plan(
    run: Run,
    per_step: Annotated[
        int | None, typer.Option("--per-step", help="Labels a step.  [dim]\\[default: 32][/dim]", show_default=False)
    ] = None,
    more: Annotated[int | None, typer.Option("--more", help="Further labels of the last steps.", show_default=False, metavar="N")] = None,
    probe: Annotated[str, typer.Option("--probe", help="The probe by whose scores labels are shared out.", show_default=False)] = "",
    reading: Annotated[str, typer.Option("--reading", help="The reading of these scores.", show_default=False)] = "",
    first_step: Annotated[int, typer.Option("--first-step", help="The first step to plan for.", min=0)] = 0,
    last_step: Annotated[int | None, typer.Option("--last-step", help="The last step to plan for.", min=0, show_default=False)] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file for the plan.", show_default=False, metavar="FILE")] = None,
) -> None:
    with one_line_failures("audit"):
        from probescore_audit import plan_further, plan_recorded
        from probescore_audit.record import read_record
        from probescore_audit.recorded_labels import label_design

        if more is not None and (per_step is not None or first_step or last_step is not None or probe or reading):
            raise ValueError("--more: the steps, the probe and the reading are those of the labels that there are; leave the others out")
        record = read_record(run)
        if more is None:
            planned = plan_recorded(
                record, 32 if per_step is None else per_step, probe=probe, reading=reading, first_step=first_step, last_step=last_step
            )
        else:
            design = label_design(record, record.table())
            if design is None:
                raise ValueError("--more: no labels of the record name the stratum that they were drawn from; plan each step first")
            planned = plan_further(design, more)
        rows = {(row.step, row.rollout): row for row in record.rollouts}
        lines = [json.dumps(_line(vars(each), vars(rows[each.step, each.rollout])), ensure_ascii=False) for each in planned]
        if output is not None:
            write_atomically(output, "".join(f"{line}\n" for line in lines).encode())
        else:
            for line in lines:
                typer.echo(visible_json(line))
        steps = {each.step for each in planned}
        say(f"{len(lines)} rollouts to label, of {len(steps)} steps" if lines else "nothing to label: every step has labels")


def _line(planned: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in planned.items() if value is not None}
    shown = {name: row[name] for name in ("text_sha256", "prompt_text", "completion_text") if row[name] is not None}
    return {"label": None, **known, **shown}


def _add(
    run: Run,
    file: Annotated[str, typer.Argument(help="A file of labels, or - for standard input.", show_default=False, metavar="FILE")],
    source: Annotated[str, typer.Option("--source", help="What gave the labels: person, judge, checker, …")] = "person",
    labeller: Annotated[str, typer.Option("--labeller", help="Who gave them: a name, or a judge's model.", show_default=False)] = "",
    labeller_version: Annotated[
        str, typer.Option("--labeller-version", help="The labeller's version, such as that of a prompt.", show_default=False)
    ] = "",
    second: Annotated[bool, typer.Option("--second", help="They are second judgements: a rollout is positive if all say so.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="They take the place of labels that there are.")] = False,
) -> None:
    with one_line_failures("audit"):
        from probescore_audit import label_rows
        from probescore_audit.record import RecordWriter, read_record

        if second and replace:
            raise ValueError("--second and --replace: give one of them")
        again: Literal["refuse", "second", "replace"] = "second" if second else "replace" if replace else "refuse"
        record = read_record(run)
        answers = list(label_lines(file))
        rows = label_rows(record, answers, source=source, labeller=labeller, labeller_version=labeller_version, again=again)
        if not rows:
            raise ValueError(f'{file}: none of its {len(answers)} lines has a label; fill in "label"')
        with RecordWriter(run, record.header.anew(), on_error="raise") as writer:
            writer.append(rows)
        labelled = len({(row.step, row.rollout) for row in rows})
        new_console().print(f"added labels of {labelled:,} rollouts; {len(answers) - labelled:,} lines have none", soft_wrap=True)
        outside = sum(row.inclusion is None and not row.second and row.retracts is None for row in rows)
        if outside:
            say(f"{outside} labels have no inclusion, since no plan chose their rollouts; estimates leave them out")


def _export(
    run: Run,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.", show_default=False, metavar="FILE")],
) -> None:
    with one_line_failures("audit"):
        from probescore_audit import lines_to_fit
        from probescore_audit.record import read_record

        lines = lines_to_fit(read_record(run))
        write_atomically(output, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
        splits = Counter(line["split"] for line in lines)
        positives = sum(line["completion"]["label"] for line in lines)
        counts = ", ".join(f"{splits[name]:,} {name}" for name in ("train", "calibration", "test"))
        new_console().print(f"wrote {len(lines):,} rollouts, {positives:,} with the behaviour: {counts}", soft_wrap=True)
