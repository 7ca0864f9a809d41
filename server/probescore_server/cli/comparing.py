"""Implements ``probescore probes compare``, which compares two probes by the scores that an engine or a server gives to labelled
rollouts.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.table import Table

from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import one_line_failures
from probescore_server.cli.evaluating import json_estimate, number
from probescore_server.cli.judged_rollouts import (
    Column,
    Data,
    Device,
    Dtype,
    Judged,
    JudgedRollouts,
    Model,
    Positive,
    ReductionName,
    Revision,
    Seed,
    Server,
    SpecialTokens,
    TrustRemoteCode,
    check_source,
    data_digest,
    judged_rollouts,
    read_held_out,
)
from probescore_server.cli.tables import facts_table, safe
from probescore_server.files import write_atomically

if TYPE_CHECKING:
    from probescore_audit import Comparison, FlagAgreement

HELP = """
Compare two probes on the same labelled rollouts, as they are served.

FIRST and SECOND are probe files with --model, or names of loaded probes with --server; DATA is a file as 'probescore probes fit' reads it,
whose lines of split train or calibration are left out.

The difference of AUROC has a paired 95% interval, which draws whole groups. Flags are compared at each probe's own threshold, and those
rollouts are listed whose ranks differ most.

[bold]Example[/bold]

  probescore probes compare cheating.onnx cheating-new.onnx held_out.jsonl --model ./model

[bold]Exit codes[/bold]: 0 if the two were compared, 1 if something could not be scored, 2 for wrong input.
"""


def register(probes: typer.Typer) -> None:
    """Adds the command ``probes compare`` to the commands under ``probes``."""
    probes.command("compare", help=HELP)(_compare)


def _compare(
    first: Annotated[str, typer.Argument(help="A probe file, or a loaded probe.", show_default=False)],
    second: Annotated[str, typer.Argument(help="Another probe file, or loaded probe.", show_default=False)],
    data: Data,
    model: Model = "",
    server: Server = "",
    as_json: Annotated[
        Path | None, typer.Option("--json", help="A file for every number, as JSON.", show_default=False, metavar="FILE")
    ] = None,
    show: Annotated[int, typer.Option("--show", help="The number of rollouts to list.", min=0, metavar="N")] = 10,
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
        from probescore_audit import compare

        check_source(model, server)
        rollouts = read_held_out(data, ("test", "ood"), positive=positive, special_tokens=special_tokens)
        judged = judged_rollouts(
            [first, second],
            rollouts,
            model=model,
            server=server,
            revision=revision,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            reduction=reduction,
            label=label,
        )
        one, other = judged.probes
        thresholds = (one.thresholds[0].threshold, other.thresholds[0].threshold) if one.thresholds and other.thresholds else None
        found = compare(one.scores, other.scores, judged.positive, judged.groups, thresholds=thresholds, seed=seed)
        apart = np.argsort(-np.abs(found.rank_gaps), kind="stable")[:show]
        console = new_console()
        console.print(_facts(one, other, judged, found, thresholds))
        if len(apart):
            console.print(_most_apart(one, other, judged, [int(index) for index in apart]))
        if as_json is not None:
            content = _numbers(one, other, judged, found, thresholds, [int(index) for index in apart], data)
            write_atomically(as_json, (json.dumps(content, indent=2) + "\n").encode())


def _facts(one: Judged, other: Judged, judged: JudgedRollouts, found: Comparison, thresholds: tuple[float, float] | None) -> Table:
    positives, count = int(judged.positive.sum()), len(judged.positive)
    table = facts_table(safe(f"{one.probe.key} and {other.probe.key} ({judged.dtype})"))
    table.add_row("rollouts", f"{positives:,} positive, {count - positives:,} negative, {len(set(judged.groups.tolist())):,} groups")
    table.add_row("AUROC of the first", number(found.first))
    table.add_row("AUROC of the second", number(found.second))
    difference = found.difference
    table.add_row("difference, paired", f"{difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})")
    table.add_row("correlation", f"{_correlation(found.pearson)}, of ranks {_correlation(found.spearman)}")
    if thresholds is None or found.positives is None or found.negatives is None:
        table.add_row("flags", "not compared: a probe has no threshold for these scores")
    else:
        table.add_row("thresholds", f"{thresholds[0]:.4g} and {thresholds[1]:.4g}")
        table.add_row("flags of positives", _flags(found.positives))
        table.add_row("flags of negatives", _flags(found.negatives))
    return table


def _flags(flags: FlagAgreement) -> str:
    return (
        f"{flags.agreed:.1%} agree: {flags.both:,} both, {flags.only_first:,} the first alone, {flags.only_second:,} the second alone, "
        f"{flags.neither:,} neither"
    )


def _correlation(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.3f}"


def _most_apart(one: Judged, other: Judged, judged: JudgedRollouts, indices: list[int]) -> Table:
    table = Table(title="Furthest apart, by rank", title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("rollout", "is", safe(one.probe.key), safe(other.probe.key)):
        table.add_column(column, overflow="fold")
    for index in indices:
        is_positive = "positive" if judged.positive[index] else "negative"
        table.add_row(safe(judged.where[index]), is_positive, f"{one.scores[index]:.4g}", f"{other.scores[index]:.4g}")
    return table


def _numbers(
    one: Judged,
    other: Judged,
    judged: JudgedRollouts,
    found: Comparison,
    thresholds: tuple[float, float] | None,
    apart: list[int],
    data: str,
) -> dict[str, Any]:
    return {
        "data": data,
        "data_sha256": data_digest(data),
        "dtype": judged.dtype,
        "positives": int(judged.positive.sum()),
        "negatives": int((~judged.positive).sum()),
        "groups": len(set(judged.groups.tolist())),
        "probes": [
            {
                "probe": each.probe.key,
                "graph_sha256": each.probe.graph_sha256,
                "manifest_sha256": each.probe.manifest_sha256,
                "reduction": None if each.reduction is None else str(each.reduction),
                "label": each.label,
                "auroc": json_estimate(auroc),
                "threshold": None if thresholds is None else thresholds[index],
            }
            for index, (each, auroc) in enumerate(((one, found.first), (other, found.second)))
        ],
        "auroc_difference": json_estimate(found.difference),
        "pearson": None if math.isnan(found.pearson) else found.pearson,
        "spearman": None if math.isnan(found.spearman) else found.spearman,
        "flags_of_positives": None if found.positives is None else vars(found.positives),
        "flags_of_negatives": None if found.negatives is None else vars(found.negatives),
        "furthest_apart": [
            {
                "where": judged.where[index],
                "positive": bool(judged.positive[index]),
                "scores": [float(one.scores[index]), float(other.scores[index])],
                "rank_gap": float(found.rank_gaps[index]),
            }
            for index in apart
        ],
    }
