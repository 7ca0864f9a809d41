"""Implements ``probescore probes fit``, which fits a probe to labelled rollouts and writes its file and a report on its quality."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import FAILED, one_line_failures, say
from probescore_server.cli.labelled_lines import read_labelled_file
from probescore_server.cli.steps import CheckSteps
from probescore_server.cli.tables import safe

if TYPE_CHECKING:
    from probescore_probes.fitting.labelled_rollouts import LabelledRollout
    from probescore_probes.fitting.results import FitResult

HELP = """
Fit a probe to labelled rollouts, serve it, and say what it is worth.

DATA holds rollouts as 'probescore score' reads them, each with a "label":
true or false, 1 or 0, or text with --positive. A line may also have "group"
(what belongs together, such as the rollouts of one problem), "split" (train,
calibration, test, ood), "slice" (judged apart) and "weight"; a completion
"span_labels": \\[\\[start, end, label], …] in characters of a text or tokens
of ids, and "token_labels". Parquet files, and folders that save_to_disk of
Hugging Face's datasets wrote, have the same as columns.

Layer, pooling and penalty are chosen by grouped cross-validation. The file is
written, loaded by the engine as a server loads it, and every number is of the
scores that it gives then.

[bold]Kinds[/bold], and when to take which

  logistic                to start with; the report shows the next four too

  difference-of-means     for topics far from those of the data

  lda                     for few rollouts and correlated activations

  mean-of-sigmoids        where several layers tell, and none best

  mlp                     for thousands of rollouts

  attention               where a few tokens tell, anywhere

  rolling-max             where ten tokens in a row tell, in a long rollout

  exponential-smoothing   the same, from several layers, token by token

  softmax-pooling         the same, for passages of any length

  sae-feature             a feature of a sparse autoencoder: --sae FOLDER

[bold]Examples[/bold]

  probescore probes fit rollouts.jsonl -m ./model -o cheating.onnx
      --report cheating.html

  probescore probes fit train.jsonl -m ./model -o cheating.onnx
      --ood other_tasks.jsonl --fpr 0.01 --strict

[bold]Exit codes[/bold]: 0 if the probe is written, 1 if it cannot be, or with --strict
if there are warnings, 2 for wrong input.
"""


def register(probes: typer.Typer) -> None:
    """Adds the command ``probes fit`` to the commands under ``probes``."""
    probes.command("fit", help=HELP)(_fit)


def _fit(
    data: Annotated[str, typer.Argument(help="A file or folder of labelled rollouts; - is standard input.", show_default=False)],
    model: Annotated[str, typer.Option("--model", "-m", help="A directory, or an id on the Hugging Face hub.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The probe file to write.", show_default=False, metavar="FILE")],
    report: Annotated[
        Path | None, typer.Option("--report", help="An HTML page of everything; its numbers go into a .json beside it.", metavar="FILE")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if there is any warning.")] = False,
    kind: Annotated[str, typer.Option("--kind", help="One of the kinds above.", metavar="KIND")] = "logistic",
    sae: Annotated[
        Path | None,
        typer.Option("--sae", help="For sae-feature: a folder of SAELens, with cfg.json and sae_weights.safetensors.", metavar="FOLDER"),
    ] = None,
    feature: Annotated[
        int | None, typer.Option("--feature", help="For sae-feature: its index; the one that tells best by default.", metavar="N")
    ] = None,
    taps: Annotated[str, typer.Option("--taps", help="Names or patterns, with commas.", metavar="TAPS")] = "resid_post.*",
    pool: Annotated[str, typer.Option("--pool", help="Of mean and last, with commas.", metavar="POOLS")] = "mean,last",
    fpr: Annotated[float, typer.Option("--fpr", help="False-positive rate of the threshold.")] = 0.05,
    ood: Annotated[
        list[str] | None, typer.Option("--ood", help="Labelled rollouts of other data, to judge by. Repeat for several.", metavar="FILE")
    ] = None,
    positive: Annotated[
        str | None, typer.Option("--positive", help="The label that stands for the behaviour.", show_default=False, metavar="LABEL")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Of the probe; that of the file by default.", show_default=False)] = "",
    probe_version: Annotated[str, typer.Option("--probe-version", help="Of the probe; it never stands for other bytes.")] = "1",
    description: Annotated[str, typer.Option("--description", help="For people.", show_default=False)] = "",
    dtype: Annotated[str, typer.Option("--dtype", help="What it is served in: float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda:0.")] = "cpu",
    revision: Annotated[str, typer.Option("--revision", help="Branch, tag or commit on the hub.", show_default=False)] = "",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings.")] = False,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens/--no-special-tokens", help="Whether prompts that are texts get the tokenizer's special tokens (BOS)."
        ),
    ] = True,
    seed: Annotated[int, typer.Option("--seed", help="Of splits, folds and intervals.")] = 0,
) -> None:
    with one_line_failures("server,probes"):
        from probescore_probes.fitting.options import FitOptions
        from probescore_probes.fitting.pipeline import fit_probe
        from probescore_probes.fitting.report import check_writable, write_report

        options = FitOptions(
            name=name or output.stem,
            version=probe_version,
            label=positive or "positive",
            description=description,
            kind=kind,
            taps=_listed(taps),
            pools=_listed(pool),
            autoencoder=sae,
            feature=feature,
            false_positive_rate=fpr,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            other_dtype="bfloat16" if dtype == "float32" else "float32",
            seed=seed,
        )
        rollouts = _read(data, positive, special_tokens)
        _check_positive(rollouts, positive)
        outside = [rollout for file in ood or [] for rollout in _read(file, positive, special_tokens, of=Path(file).stem)]
        if report is not None:
            check_writable(report)
        console = new_console()
        with CheckSteps(console) as steps:
            result = fit_probe(rollouts, model, output, options, out_of_distribution=outside, report=steps.begin)
        if report is not None:
            write_report(report, result)
    _say(result, output, report)
    if strict and result.warnings:
        say(f"{len(result.warnings)} warnings, and --strict")
        raise typer.Exit(FAILED)


def _read(file: str, positive: str | None, special_tokens: bool, of: str = "") -> list[LabelledRollout]:
    """Reads the labelled rollouts of a file, and puts those that name no slice into a given slice, a named part of the data."""
    from dataclasses import replace

    rollouts = read_labelled_file(file, positive=positive, add_special_tokens=special_tokens)
    if not rollouts:
        raise ValueError(f"{file}: there are no labelled rollouts in it")
    return [replace(rollout, slice=rollout.slice or of) for rollout in rollouts]


def _check_positive(rollouts: list[LabelledRollout], positive: str | None) -> None:
    """Checks that some label is the one that stands for the behaviour: a misspelt one would make every rollout a negative."""
    if positive is not None and not any(
        rollout.positive or any(part.positive for part in rollout.passages) or True in (rollout.token_labels or ()) for rollout in rollouts
    ):
        raise ValueError(
            f"--positive: {positive!r} is the label of none of {len(rollouts)} rollouts; labels are compared as text, such as true"
        )


def _say(result: FitResult, output: Path, report: Path | None) -> None:
    console = new_console()
    colour = {"useless": "red", "doubtful": "yellow", "sound": "green"}[result.verdict.grade]
    console.print(f"[bold {colour}]{safe(result.verdict.text)}[/bold {colour}]")
    for warning in result.warnings:
        console.print(f"[yellow]![/yellow] [bold]{safe(warning.title)}[/bold] ({warning.number}): {safe(warning.text)}")
    agreed, rounding = result.agreement, result.batch_rounding
    console.print(
        f"max |fitted − served| = {agreed.largest:.2g} σ over {agreed.rollouts} rollouts in {result.options.dtype}; served one at a time "
        f"they move by up to {rounding.largest:.2g} σ (p99 {rounding.p99:.2g} σ)",
        soft_wrap=True,
    )
    console.print(
        f"wrote {output}" + ("" if report is None else f", {report} and {report.with_suffix('.json')}"), soft_wrap=True, markup=False
    )


def _listed(written: str) -> tuple[str, ...]:
    return tuple(entry.strip() for entry in written.split(",") if entry.strip())
