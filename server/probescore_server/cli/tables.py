"""Lays out probes as tables for people: the probes of a server, and the manifest of one probe file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from probescore import CalibratedRollouts, Calibration, ProbeInfo, Reading, ReadingKind
from probescore_server.cli.common.visible import visible

if TYPE_CHECKING:
    from probescore_server.probes.format.manifest import CalibrationConditions, CalibrationRecord, Evaluation, Manifest


def safe(text: str) -> str:
    """Returns text from outside, such as a probe's description, with control characters spelt out and rich's markup escaped."""
    return escape(visible(text))


def facts_table(title: str) -> Table:
    """Returns an empty table for the terminal, with a title and two columns, for names and values."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def probes_table(probes: Sequence[ProbeInfo]) -> Table:
    """Returns a table with one row for each probe: its name, taps (places in the model that it reads), output, default reduction and
    thresholds.
    """
    table = Table(
        title="Probes", title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim"
    )
    for column in ("probe", "reads", "gives", "reduction", "threshold"):
        table.add_column(column, overflow="fold")
    if not probes:
        table.add_row("none: the server has no probe files, and can score nothing")
    for probe in probes:
        table.add_row(
            "\n".join([safe(probe.key), *_notes(probe)]),
            safe(", ".join(map(str, probe.taps))),
            safe(f"{probe.unit.value} per {probe.output_per.value}" + (f": {', '.join(probe.labels)}" if len(probe.labels) > 1 else "")),
            str(probe.default_reduction or "pools by itself"),
            "\n".join(map(_threshold, probe.calibrations)) or "none",
        )
    return table


def _notes(probe: ProbeInfo) -> Iterator[str]:
    if probe.retired:
        yield "[yellow]retired: served by its full name alone[/yellow]"
    if probe.description:
        yield f"[dim]{safe(probe.description)}[/dim]"
    for name in probe.accepted_mismatches:
        yield f"[red]served though {safe(name)} does not match[/red]"


def _threshold(calibration: Calibration) -> str:
    label = f"{calibration.label}: " if calibration.label else ""
    shown = safe(f"{label}{calibration.threshold:.4g} at {calibration.false_positive_rate:.1%} false positives")
    return shown if calibration.conditions is None else f"{shown}\n[dim]{safe(_found_on(calibration.conditions))}[/dim]"


def _found_on(negatives: CalibratedRollouts) -> str:
    shapes = f" ({', '.join(negatives.prompt_shapes)})" if negatives.prompt_shapes else ""
    return (
        f"for prompts of {_range(negatives.shortest_prompt, negatives.longest_prompt)} tokens{shapes}, completions of "
        f"{_range(negatives.shortest_completion, negatives.longest_completion)}"
    )


def readings_table(readings: Sequence[Reading]) -> Table:
    """Returns a table with one row for each reading of a server: its name, kind, training step, what it changes, and its id."""
    table = Table(
        title="Readings", title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim"
    )
    for column in ("reading", "kind", "step", "changes", "id"):
        table.add_column(column, overflow="fold")
    if not readings:
        table.add_row("none but the frozen model's: the server's setting readings_root is off")
    for reading in readings:
        step = "" if reading.step is None else str(reading.step)
        table.add_row(safe(reading.name), reading.kind.value, step, reading_changes(reading), safe(reading.id))
    return table


def reading_changes(reading: Reading) -> str:
    """Returns in words what a reading changes of the frozen model, as far as probes can see it."""
    if reading.kind is ReadingKind.FROZEN:
        return "nothing"
    layers, unseen = reading.changed_layers, f"; {reading.unseen_tensors:,} tensors are seen by no probe" if reading.unseen_tensors else ""
    if not layers:
        return f"nothing that a probe sees{unseen}"
    is_range = len(layers) > 2 and layers == tuple(range(layers[0], layers[-1] + 1))
    return f"block{'s' if len(layers) > 1 else ''} {f'{layers[0]} to {layers[-1]}' if is_range else ', '.join(map(str, layers))}{unseen}"


def manifest_tables(manifest: Manifest) -> Iterator[Table]:
    """Yields tables of a probe's manifest (the description in its file): the probe's identity, its computation, and its quality as stated
    by the probe's author.
    """
    yield _filled(
        manifest.key,
        {
            "description": manifest.description,
            "author": manifest.author,
            "license": manifest.license,
            "model": f"{manifest.model.id} {manifest.model.revision}".strip(),
            "": f"{manifest.model.num_hidden_layers} blocks, hidden size {manifest.model.hidden_size:,}",
            "model fingerprint": manifest.model.fingerprint,
            "tokenizer fingerprint": manifest.tokenizer_fingerprint,
            "graph digest": manifest.graph_sha256,
            "manifest digest": manifest.manifest_sha256,
        },
    )
    context = manifest.context
    yield _filled(
        "What it computes",
        {
            "reads": ", ".join(map(str, manifest.taps)),
            "of": "the model with the adapter that it brings" if manifest.adapter is not None else "",
            "depends on": {"pointwise": "each token alone", "causal": "a token and those before it", "rollout": "the whole rollout"}[
                context.kind
            ]
            + (f", {context.window} at most" if context.window else "")
            + (", the prompt's too" if context.sees_prompt else ""),
            "gives": f"{manifest.output.unit.value} per {manifest.output.per.value}: {', '.join(manifest.output.labels)}",
            "reduction": f"{manifest.reduction} of the {manifest.reduce_on.value}" if manifest.reduction else "pools by itself",
            "special tokens": "left out of the reduction" if manifest.exclude_special_tokens else "count like any other",
            "first token": {True: "must be BOS", False: "must not be BOS", None: "not checked"}[manifest.expects_bos],
            "follow-up": manifest.follow_up.text or f"{len(manifest.follow_up.token_ids)} tokens" if manifest.follow_up else "",
        },
    )
    yield _filled(
        "How well, by its author",
        {
            "method": manifest.training.method,
            "trained on": manifest.training.dataset,
            "notes": manifest.training.notes,
            "thresholds": "\n".join(map(_calibration, manifest.calibrations)) or "none: scores are not calibrated",
            "evaluations": "\n".join(map(_evaluation, manifest.evaluations)),
            "golden scores": f"{sum(len(case.scores) for case in manifest.golden.cases)} in {len(manifest.golden.cases)} rollouts",
        },
    )


def _filled(title: str, facts: dict[str, str]) -> Table:
    table = facts_table(safe(title))
    for name, fact in facts.items():
        if fact:
            table.add_row(name, safe(fact))
    return table


def _calibration(record: CalibrationRecord) -> str:
    return (
        f"{f'{record.label}: ' if record.label else ''}{record.threshold:.4g} after {record.reduction or 'its own pooling'}, for "
        f"{record.false_positive_rate:.1%} false positives ({record.false_positive_rate_low:.1%} to {record.false_positive_rate_high:.1%}) "
        f"on {record.negatives:,} negatives: {record.dataset}{_conditions(record.conditions)}"
    )


def _conditions(conditions: CalibrationConditions | None) -> str:
    if conditions is None:
        return ""
    return (
        f" ({conditions.groups:,} groups; prompts of {_range(conditions.shortest_prompt, conditions.longest_prompt)} tokens, as "
        f"{' and '.join(conditions.prompt_forms)}{_shapes(conditions)}; completions of "
        f"{_range(conditions.shortest_completion, conditions.longest_completion)}; {conditions.dtype})"
    )


def _range(least: int, most: int) -> str:
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _shapes(conditions: CalibrationConditions) -> str:
    return f" ({', '.join(shape.value for shape in conditions.prompt_shapes)})" if conditions.prompt_shapes else ""


def _evaluation(record: Evaluation) -> str:
    interval = "" if record.low is None or record.high is None else f" ({record.low:.3g} to {record.high:.3g})"
    return f"{record.metric} {record.value:.4g}{interval} on {record.dataset}"
