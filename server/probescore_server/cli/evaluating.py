"""Implements ``probescore probes evaluate``, which measures the quality of probes by the scores that are served for labelled rollouts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import one_line_failures, say
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
from probescore_server.cli.tables import safe
from probescore_server.files import write_atomically
from probescore_server.hub_probes import local_file

if TYPE_CHECKING:
    from probescore_audit import Estimate, Quality

HELP = """
Say how well probes do on labelled rollouts, as they are served.

PROBE is a probe file with --model, which is then loaded in this process, or the name of a loaded probe with --server. DATA is a file as
'probescore probes fit' reads it; lines of split train or calibration are left out.

AUROC, and recall and false positives at each of the probe's thresholds, all with 95% intervals, for all rollouts and for each slice.
Rollouts of one group are no independent draws: intervals draw whole groups, which are those that the data name, or the rollouts of one
prompt.

[bold]Examples[/bold]

  probescore probes evaluate cheating.onnx held_out.jsonl --model ./model

  probescore probes evaluate cheating mood held_out.jsonl --server localhost:50051 --json quality.json

  probescore probes evaluate cheating.onnx held_out.jsonl --model ./model --write cheating-2.onnx --version 2

[bold]Exit codes[/bold]: 0 if everything was judged, 1 if it could not be scored, 2 for wrong input.
"""


def register(probes: typer.Typer) -> None:
    """Adds the command ``probes evaluate`` to the commands under ``probes``."""
    probes.command("evaluate", help=HELP)(_evaluate)


def _evaluate(
    probes: Annotated[list[str], typer.Argument(help="Probe files, or loaded probes.", show_default=False, metavar="PROBE")],
    data: Data,
    model: Model = "",
    server: Server = "",
    as_json: Annotated[
        Path | None, typer.Option("--json", help="A file for every number, as JSON.", show_default=False, metavar="FILE")
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(
            "--write", help="A file for a new version of the probe that holds this evaluation.", show_default=False, metavar="FILE"
        ),
    ] = None,
    version: Annotated[str, typer.Option("--version", help="The version of what --write writes.", show_default=False)] = "",
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
        from probescore_audit import evaluate

        check_source(model, server)
        _check_write(probes, model, write, version)
        rollouts = read_held_out(data, ("test", "ood"), positive=positive, special_tokens=special_tokens)
        judged = judged_rollouts(
            probes,
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
        found = {
            each.probe.key: evaluate(
                each.scores,
                judged.positive,
                judged.groups,
                slices=judged.slices,
                thresholds=[threshold.threshold for threshold in each.thresholds],
                seed=seed,
            )
            for each in judged.probes
        }
        for each in judged.probes:
            new_console().print(quality_table(each, found[each.probe.key], judged.dtype))
            if not each.thresholds:
                say(f"{each.probe.key} has no threshold for these scores; probescore probes calibrate finds one")
        if as_json is not None:
            write_atomically(as_json, (json.dumps(_numbers(judged, found, data), indent=2) + "\n").encode())
        if write is not None:
            _write(probes[0], write, version, found[judged.probes[0].probe.key], data)


def _check_write(probes: list[str], model: str, write: Path | None, version: str) -> None:
    if (write is not None) != bool(version):
        raise ValueError("--write and --version: give both or neither; new content takes a new version")
    if write is not None and (not model or len(probes) > 1):
        raise ValueError("--write: takes one probe file, and --model")


def quality_table(judged: Judged, qualities: tuple[Quality, ...], dtype: str) -> Table:
    """Returns a table of a probe's quality, with a row for all rollouts and one for each slice, and with two columns for each threshold."""
    how = f"{judged.reduction or 'its own pooling'}{f', {judged.label}' if len(judged.probe.labels) > 1 else ''}, {dtype}"
    table = Table(
        title=safe(f"{judged.probe.key} ({how})"),
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
    )
    for column in ("rollouts", "positive", "negative", "groups", "AUROC"):
        table.add_column(column)
    for threshold in judged.thresholds:
        table.add_column(f"recall at {threshold.threshold:.4g}")
        table.add_column(f"false positives (stated {threshold.false_positive_rate:.1%})")
    for quality in qualities:
        shares = [share(each) for flagged in quality.thresholds for each in (flagged.recall, flagged.false_positives)]
        counts = (f"{count:,}" for count in (quality.positives, quality.negatives, quality.groups))
        table.add_row(safe(quality.slice) or "all", *counts, number(quality.auroc), *shares)
    return table


def number(estimate: Estimate) -> str:
    """Formats a number with its interval, such as ``0.939 (0.924 to 0.951)``."""
    return "unknown" if math.isnan(estimate.value) else f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def share(estimate: Estimate) -> str:
    """Formats a share with its interval, such as ``1.2% (0.4% to 2.3%)``."""
    return "unknown" if math.isnan(estimate.value) else f"{estimate.value:.1%} ({estimate.low:.1%} to {estimate.high:.1%})"


def json_estimate(estimate: Estimate) -> dict[str, float | None]:
    """Returns a number and the ends of its interval as JSON values, each ``null`` if there were no data to estimate it from."""
    return {name: None if math.isnan(value) else value for name, value in vars(estimate).items()}


def _numbers(judged: JudgedRollouts, found: dict[str, tuple[Quality, ...]], data: str) -> dict[str, Any]:
    return {
        "data": data,
        "data_sha256": data_digest(data),
        "dtype": judged.dtype,
        "probes": [
            {
                "probe": each.probe.key,
                "graph_sha256": each.probe.graph_sha256,
                "manifest_sha256": each.probe.manifest_sha256,
                "unit": each.probe.unit.value,
                "reduction": None if each.reduction is None else str(each.reduction),
                "label": each.label,
                "results": [
                    {
                        "slice": quality.slice,
                        "positives": quality.positives,
                        "negatives": quality.negatives,
                        "groups": quality.groups,
                        "auroc": json_estimate(quality.auroc),
                        "thresholds": [
                            {
                                "threshold": flagged.threshold,
                                "stated_false_positive_rate": stated.false_positive_rate,
                                "recall": json_estimate(flagged.recall),
                                "false_positives": json_estimate(flagged.false_positives),
                            }
                            for flagged, stated in zip(quality.thresholds, each.thresholds, strict=True)
                        ],
                    }
                    for quality in found[each.probe.key]
                ],
            }
            for each in judged.probes
        ],
    }


def _write(file: str, target: Path, version: str, qualities: tuple[Quality, ...], data: str) -> None:
    from probescore_server.probes.format.manifest import Evaluation
    from probescore_server.probes.format.new_version import write_new_version
    from probescore_server.probes.format.probe_file import read_probe_file

    digest, name = data_digest(data), Path(data).name
    measured = tuple(
        Evaluation(
            metric="auroc",
            value=quality.auroc.value,
            low=quality.auroc.low,
            high=quality.auroc.high,
            dataset=f"{name}, {quality.slice}" if quality.slice else name,
            dataset_sha256=digest,
            positives=quality.positives,
            negatives=quality.negatives,
        )
        for quality in qualities
        if not math.isnan(quality.auroc.value)
    )
    if not measured:
        raise ValueError("--write: there is no AUROC to write; give rollouts with the behaviour and some without")
    probe = read_probe_file(local_file(file, say))
    written = write_new_version(target, probe, version=version, evaluations=(*probe.manifest.evaluations, *measured))
    new_console().print(f"wrote {written.manifest.key} to {target}", soft_wrap=True, markup=False)
