"""Implements ``probescore probes calibrate``, which finds a threshold on held-out negatives and writes a new version of the probe file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import one_line_failures, say
from probescore_server.cli.evaluating import share
from probescore_server.cli.judged_rollouts import (
    Column,
    Data,
    Device,
    Dtype,
    Positive,
    ReductionName,
    Revision,
    Seed,
    SpecialTokens,
    TrustRemoteCode,
    data_digest,
    judged_rollouts,
    read_held_out,
)
from probescore_server.cli.tables import safe
from probescore_server.hub_probes import local_file

if TYPE_CHECKING:
    from probescore_audit import CalibratedThreshold, Quality
    from probescore_server.probes.format.manifest import CalibrationConditions, CalibrationRecord

HELP = """
Find the threshold at a stated false-positive rate, and write it into a new version of the probe.

DATA is a file as 'probescore probes fit' reads it. The rollouts without the behaviour are scored as a server scores them, in --dtype; those
of split train, test or ood are left out. They must not be those that the probe was fitted on.

Only the manifest of the new version differs: graph and golden scores stay as they are. It also says what the negatives were like: how
many groups, how long, in which prompt forms. The 95% interval is of as many fresh rollouts in as many other groups, which are those that
the data name, or the rollouts of one prompt.

[bold]Example[/bold]

  probescore probes calibrate cheating.onnx honest.jsonl --model ./model --false-positive-rate 0.01 -o cheating-2.onnx --version 2

[bold]Exit codes[/bold]: 0 if the file is written, 1 if it cannot be, 2 for wrong input, such as too few negatives for the rate.
"""


def register(probes: typer.Typer) -> None:
    """Adds the command ``probes calibrate`` to the commands under ``probes``."""
    probes.command("calibrate", help=HELP)(_calibrate)


def _calibrate(
    probe: Annotated[str, typer.Argument(help="A probe file.", show_default=False)],
    data: Data,
    model: Annotated[
        str, typer.Option("--model", "-m", help="The model: a directory, or an id on the Hugging Face hub.", show_default=False)
    ],
    false_positive_rate: Annotated[
        float,
        typer.Option("--false-positive-rate", help="The share of rollouts without the behaviour that may be flagged.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new version's file.", show_default=False, metavar="FILE")],
    version: Annotated[str, typer.Option("--version", help="The new version's name.", show_default=False)],
    dataset: Annotated[str, typer.Option("--dataset", help="What the negatives are, in words; the name of the file by default.")] = "",
    positive: Positive = None,
    reduction: ReductionName = None,
    label: Column = "",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    revision: Revision = "",
    trust_remote_code: TrustRemoteCode = False,
    special_tokens: SpecialTokens = True,
    seed: Seed = 0,
) -> None:
    with one_line_failures():
        from probescore_audit import calibrate_for_fresh, evaluate
        from probescore_probes.fitting.calibrated_conditions import conditions_of
        from probescore_server.probes.format.new_version import write_new_version
        from probescore_server.probes.format.probe_file import read_probe_file

        probe = local_file(probe, say)
        before = read_probe_file(probe)
        _check_version(before.manifest.version, version)
        rollouts = read_held_out(data, ("calibration",), positive=positive, special_tokens=special_tokens)
        judged = judged_rollouts(
            [probe],
            rollouts,
            model=model,
            revision=revision,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            reduction=reduction,
            label=label,
        )
        (served,) = judged.probes
        negative = ~judged.positive
        if not negative.any():
            raise ValueError(f"{data}: all {len(negative)} rollouts have the behaviour; a threshold is found on rollouts without it")
        found = calibrate_for_fresh(
            served.scores[negative],
            judged.groups[negative],
            false_positive_rate=false_positive_rate,
            dataset=dataset or Path(data).name,
            reduction=None if served.reduction is None else str(served.reduction),
            label=served.label if len(served.probe.labels) > 1 else "",
        )
        conditions = conditions_of(
            [example for example in judged.examples if not example.positive],
            judged.groups[negative],
            dtype=judged.dtype,
            bos_token_id=judged.bos_token_id,
            generation_prompt_ids=judged.generation_prompt_ids,
            dataset_sha256=data_digest(data),
        )
        qualities = evaluate(served.scores, judged.positive, judged.groups, slices=judged.slices, thresholds=[found.threshold], seed=seed)
        record = _record(found, conditions)
        kept = [each for each in before.manifest.calibrations if (each.reduction, each.label) != (record.reduction, record.label)]
        written = write_new_version(output, before, version=version, calibrations=(record, *kept))
        console = new_console()
        console.print(_table(found, qualities))
        console.print(
            f"expected of {found.negatives:,} fresh rollouts without the behaviour, in {conditions.groups:,} other groups: "
            f"{found.false_positive_rate_low:.2%} to {found.false_positive_rate_high:.2%} flagged",
            soft_wrap=True,
        )
        console.print(f"wrote {written.manifest.key} to {output}", soft_wrap=True, markup=False)


def _check_version(before: str, version: str) -> None:
    """Refuses a new version of a probe file that has the version number of the file itself, before any rollout is scored."""
    if version == before:
        raise ValueError(f"--version: {version!r} is that of the file itself; give another: a version never stands for other bytes")


def _record(found: CalibratedThreshold, conditions: CalibrationConditions) -> CalibrationRecord:
    from probescore_server.probes.format.manifest import CalibrationRecord

    return CalibrationRecord(**vars(found), conditions=conditions)


def _table(found: CalibratedThreshold, qualities: tuple[Quality, ...]) -> Table:
    table = Table(
        title=f"flagged at or above {found.threshold:.4g}",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
    )
    for column in ("rollouts", "negative", "flagged", "positive", "recall"):
        table.add_column(column)
    for quality in qualities:
        (flagged,) = quality.thresholds
        recall = share(flagged.recall) if quality.positives else ""
        table.add_row(
            safe(quality.slice) or "all", f"{quality.negatives:,}", share(flagged.false_positives), f"{quality.positives:,}", recall
        )
    return table
