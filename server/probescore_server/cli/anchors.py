"""Implements ``probescore anchors``, whose commands choose anchors, texts with a known label that are scored again and again during a
training run, and score them for the run's record.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from probescore.types import FROZEN
from probescore_adapters.anchors import Anchor, anchor_digest, read_anchors
from probescore_server.cli.common.connection import DEFAULT_ADDRESS, Address, Wait, connected, split_addresses
from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import one_line_failures, say
from probescore_server.cli.labelled_lines import is_positive, without_labels
from probescore_server.cli.labelled_tables import is_table, read_rows
from probescore_server.cli.rollout_lines import LineError, opened_lines, parsed_line, rollout_group
from probescore_server.files import write_atomically

if TYPE_CHECKING:
    from probescore import ProbeClient
    from probescore.types import ServerInfo
    from probescore_adapters import PooledActivations
    from probescore_audit.record import ActivationRow, AnchorRow, Record

MAKE_HELP = """
Choose anchors from labelled rollouts: as many with the behaviour as without it, drawn at random, of as many prompts as possible.

DATA is a file as 'probescore probes fit' reads it. Rollouts of split train are left out, since the probe was fitted on them, and so are
those whose label is of a part of the completion. The same data and seed give the same anchors.

[bold]Example[/bold]

  probescore anchors make labelled.jsonl -o anchors.jsonl

[bold]Exit codes[/bold]: 0 if they are written, 2 for wrong input, such as too few rollouts of a class.
"""

SCORE_HELP = """
Score the anchors with the probes of a run's record, and add the scores to the record.

A trainer does it by itself with RecordOptions(anchors="anchors.jsonl", anchors_every=20). On the frozen model the scores must be the same
at every step; 'probescore audit' says if they are not. On other readings they show how far training has moved what the probes read.

With --activations their pooled activations are added, too, on the same readings, so that the audit can fit a fresh probe on them. The
server must allow that tap (serve --allow-activations).

[bold]Examples[/bold]

  probescore anchors score runs/sort-7 anchors.jsonl --step 40 --reading frozen --reading policy -a scorer:50051

  probescore anchors score runs/sort-7 anchors.jsonl --step 40 --activations resid_post.14 -a scorer:50051

[bold]Exit codes[/bold]: 0 if all were scored and added, 1 if the server cannot score them, 2 for wrong input.
"""

ANCHOR_SECONDS = 600.0
"""Seconds that reading the activations of all anchors may take."""
_OF_ROLLOUT = "rollout"  # in place of a reduction, for a probe that scores rollouts


def register(app: typer.Typer) -> None:
    """Adds the commands under ``anchors`` to the command line."""
    anchors = typer.Typer(
        help="Choose texts with a known label, and score them again during a training run.", no_args_is_help=True, rich_markup_mode="rich"
    )
    anchors.command("make", help=MAKE_HELP)(_make)
    anchors.command("score", help=SCORE_HELP)(_score)
    app.add_typer(anchors, name="anchors")


def _make(
    data: Annotated[str, typer.Argument(help="A file of labelled rollouts, or -.", show_default=False, metavar="DATA")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A file for the anchors.", show_default=False, metavar="FILE")],
    per_class: Annotated[int, typer.Option("--per-class", help="Anchors of each of the two classes.", min=2, metavar="N")] = 128,
    positive: Annotated[
        str | None, typer.Option("--positive", help="The label that stands for the behaviour.", show_default=False, metavar="LABEL")
    ] = None,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens/--no-special-tokens", help="Whether prompts that are texts get the tokenizer's special tokens (BOS)."
        ),
    ] = True,
    seed: Annotated[int, typer.Option("--seed", help="The seed of the draw.")] = 0,
) -> None:
    with one_line_failures("data"):
        candidates = list(_candidates(data, positive, special_tokens))
        chosen = [*_drawn(candidates, True, per_class, seed), *_drawn(candidates, False, per_class, seed)]
        lines = "".join(f"{json.dumps(each.line, ensure_ascii=False)}\n" for each in chosen)
        write_atomically(output, lines.encode("utf-8", "surrogateescape"))
        prompts = len({each.group for each in chosen})
        new_console().print(f"wrote {len(chosen):,} anchors, {per_class:,} of each class, of {prompts:,} prompts", soft_wrap=True)


@dataclass(frozen=True, eq=False)
class _Candidate:
    """Value object with a labelled rollout that may become an anchor.

    Attributes:
        line: the rollout as the file of anchors has it.
        group: the group that the data name, or else the prompt.
    """

    line: dict[str, Any]
    group: str


def _candidates(data: str, positive: str | None, special_tokens: bool) -> Iterator[_Candidate]:
    seen: set[str] = set()
    for where, content in _contents(data, positive):
        try:
            plain, _ = without_labels(content)
            group = rollout_group(plain, special_tokens)
            assert isinstance(content, dict)  # noqa: S101 - else rollout_group had refused it
            if content.get("split") == "train":
                continue
            completions = content["completions"] if "completions" in content else [content["completion"]]
            for index, (completion, label) in enumerate(zip(completions, group.labels, strict=True)):
                if label is None:
                    continue
                line = _line(content["prompt"], completion, special_tokens)
                name = anchor_digest(line).removeprefix("sha256:")[:16]
                if name in seen:
                    continue
                seen.add(name)
                line["completion"]["id"] = name
                line["label"] = is_positive(label, f"completions[{index}].label" if "completions" in content else "label", positive)
                yield _Candidate(line, str(content.get("group", json.dumps(content["prompt"], sort_keys=True))))
        except LineError as error:
            raise LineError(f"{where}: {error}") from None


def _contents(data: str, positive: str | None) -> Iterator[tuple[str, object]]:
    """Yields the lines or rows of a file of labelled rollouts, each with its place."""
    if is_table(data):
        for row in read_rows(data, names_of_label=positive is not None):
            yield row.where, row.content
        return
    with opened_lines(data) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{'standard input' if data == '-' else data}:{number}"
                try:
                    yield where, parsed_line(line)
                except LineError as error:
                    raise LineError(f"{where}: {error}") from None


def _line(prompt: object, completion: object, special_tokens: bool) -> dict[str, Any]:
    if isinstance(completion, dict):
        kept = {name: completion[name] for name in ("text", "ids", "mask") if completion.get(name) is not None}
    else:
        kept = {"text" if isinstance(completion, str) else "ids": completion}
    added = {} if special_tokens or not isinstance(prompt, str) else {"add_special_tokens": False}
    return {"prompt": prompt, **added, "completion": kept}


def _drawn(candidates: Sequence[_Candidate], positive: bool, count: int, seed: int) -> list[_Candidate]:
    """Draws rollouts of one class at random, a second one of a group only if there are no other groups left."""
    of_class = [each for each in candidates if each.line["label"] is positive]
    if len(of_class) < count:
        kind = "with" if positive else "without"
        raise ValueError(f"--per-class: {count}; the data have {len(of_class)} rollouts {kind} the behaviour that can be anchors")
    random.Random(seed).shuffle(of_class)  # noqa: S311 - a draw, not a secret
    before: Counter[str] = Counter()
    ranks = []
    for each in of_class:
        ranks.append(before[each.group])
        before[each.group] += 1
    return [of_class[index] for index in sorted(range(len(of_class)), key=lambda index: (ranks[index], index))[:count]]


def _score(
    run: Annotated[Path, typer.Argument(help="The folder of a run's record.", show_default=False, metavar="RUN")],
    anchors: Annotated[Path, typer.Argument(help="A file of anchors.", show_default=False, metavar="ANCHORS")],
    step: Annotated[int, typer.Option("--step", help="The training step that it is.", min=0, metavar="N", show_default=False)],
    address: Address = DEFAULT_ADDRESS,
    reading: Annotated[
        list[str] | None,
        typer.Option("--reading", help="A reading; repeat for several. The default is all that the record has.", metavar="NAME"),
    ] = None,
    activations: Annotated[
        str, typer.Option("--activations", help="Add activations, too, of this tap: resid_post.14.", show_default=False, metavar="TAP")
    ] = "",
    pool: Annotated[str, typer.Option("--pool", help="How they are pooled: mean, last or max.")] = "mean",
    wait: Wait = 0,
) -> None:
    with one_line_failures("audit"):
        from probescore_audit.record import RecordWriter, read_record

        record = read_record(run, texts=False)
        texts, wanted = read_anchors(anchors), _wanted(activations, pool)
        readings = list(dict.fromkeys(reading or _recorded_readings(record)))
        with connected(address, wait) as client:  # else a scorer would wait for the server to come back
            server = client.get_server_info()
            rows = _scored(record, texts, step, address, readings)
            added: list[ActivationRow] = []
            if wanted is not None:
                added = _activations(client, server, wanted, record.header.run_id, texts, step, rows, readings)
        with RecordWriter(run, record.header.anew(), on_error="raise") as writer:
            writer.append([*rows, *added])
        what = f"the scores of {len(rows):,} anchors" + (f" and {len(added):,} activations" if added else "")
        new_console().print(f"added {what} at step {step}, on {', '.join(readings)}", soft_wrap=True)


def _activations(
    client: ProbeClient,
    server: ServerInfo,
    wanted: PooledActivations,
    run_id: str,
    anchors: Sequence[Anchor],
    step: int,
    scored: Sequence[AnchorRow],
    readings: Sequence[str],
) -> list[ActivationRow]:
    """Reads the activations of anchors on those versions of the readings that have scored them.

    Raises:
        ValueError: the server gives no such activations, or a reading was replaced meanwhile.
        ProbescoreError: the server does not answer.
    """
    from probescore_adapters.recorded_activations import ActivationReader, TextToRead

    reader = ActivationReader(wanted, run_id)
    reader.check_once(server, "--activations")
    texts = [
        TextToRead(step, anchor.name, True, anchor.rollout, {name: (row.reading_ids or {}).get(name, "") for name in readings})
        for anchor, row in zip(anchors, scored, strict=True)
    ]
    rows: list[ActivationRow] = []
    reading = reader.read(texts, server.model.fingerprint, rows)
    try:
        request = next(reading)
        while True:
            request = reading.send(request.answers(client))
    except StopIteration:
        pass  # all readings were read
    if missing := len(texts) * len(readings) - len(rows):
        raise ValueError(f"--activations: {missing} are missing; was a reading replaced meanwhile, or does no token of an anchor count?")
    return rows


def _wanted(tap: str, pool: str) -> PooledActivations | None:
    from probescore_adapters import PooledActivations

    try:
        return PooledActivations(tap, pool, ANCHOR_SECONDS) if tap else None
    except ValueError as error:
        raise ValueError(f"--{'pool' if '.pool' in str(error) else 'activations'}{str(error)[str(error).index(':') :]}") from None


def _recorded_readings(record: Record) -> list[str]:
    found = {reading: None for row in record.rollouts[-1:] for readings in row.scores.values() for reading in readings}
    return [FROZEN, *(name for name in found if name != FROZEN)]


def _scored(record: Record, anchors: Sequence[Anchor], step: int, address: str, readings: Sequence[str]) -> list[AnchorRow]:
    """Scores anchors with every probe of a record that has thresholds, by the reductions of these.

    Raises:
        ValueError: the record has no probe that can be scored here, or an anchor cannot be scored.
        ProbescoreError: the server does not answer, or lacks a probe or a reading.
    """
    from probescore_adapters import Policy, ProbeScorer, ProbeSignal
    from probescore_audit.record import AnchorRow

    places: dict[str, tuple[str, str, str]] = {}
    signals = []
    for probe in record.header.probes:
        name, _, label = probe.key.partition("/")
        if "/" in label:
            say(f"{probe.key}: a function of the trainer says which of its tokens count; only the trainer can score it")
            continue
        for on in readings:
            for reduction in probe.thresholds_on(on):
                if "/" in reduction:
                    continue
                place = f"{probe.key} {on} {reduction}"
                places[place] = probe.key, on, reduction
                of_signal = None if reduction == _OF_ROLLOUT else reduction
                signals.append(ProbeSignal(name, mode="monitor", label=label, reduction=of_signal, reading=on, name=place))
    if not signals:
        raise ValueError("the record names no probe with a threshold; nothing can be scored")
    scorer = ProbeScorer(signals, split_addresses(address), policy=Policy(timeout=120))
    try:
        outcome = scorer.score([anchor.rollout for anchor in anchors], step=step)
    finally:
        scorer.close()
    for name, reason in outcome.missing_readings.items():
        raise ValueError(f"--reading: {name}: {reason}")
    for place, values in outcome.values.items():
        if not np.isfinite(values).all():
            index = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f"the anchor {anchors[index].name} has no score by {place}; leave it out of the file")
    rows = []
    for index, anchor in enumerate(anchors):
        scores: dict[str, dict[str, dict[str, float]]] = {}
        for place, (key, on, reduction) in places.items():
            scores.setdefault(key, {}).setdefault(on, {})[reduction] = float(outcome.values[place][index])
        ids = {name: each.id for name, each in outcome.readings.items() if name != FROZEN}
        rows.append(
            AnchorRow(
                step=step,
                anchor=anchor.name,
                positive=anchor.positive,
                scores=scores,
                text_sha256=anchor.text_sha256,
                reading_ids=ids or None,
            )
        )
    return rows
