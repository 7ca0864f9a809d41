"""``probescore score``: from a text or a file of rollouts to coloured tokens, a page, or lines of JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from probescore import Completion, CompletionScores, ProbeClient, ProbeInfo, RolloutGroup, ScoringInfo, StreamedCompletion, Text
from probescore.types import TokenIds, score_keys
from probescore_server.cli.connection import DEFAULT_ADDRESS, Address, Wait, connected
from probescore_server.cli.failures import one_line_failures
from probescore_server.cli.page import write_page
from probescore_server.cli.rollout_lines import read_rollout_lines
from probescore_server.cli.rollout_views import RolloutView, Series, rollout_views, series_of
from probescore_server.cli.terminal import print_rollouts

HELP = """
Score a text, or rollouts, and show them coloured by score.

SOURCE is a text (with --prompt before it), the name of a file of rollouts, or - for such lines on standard input. One JSON object a line:

  {"prompt": PROMPT, "completions": \\[COMPLETION, …]}  or  {"prompt": PROMPT, "completion": COMPLETION}

  PROMPT is "text", \\[token ids], or \\[{"role": "user", "content": "…"}, …]

  COMPLETION is "text", \\[token ids], or {"text" or "ids": …, "id": "…", "mask": \\[0, 1, …], "spans": {"name": \\[start, end]},
  "follow_ups": \\[COMPLETION, …]}

Token ids are taken verbatim. Texts are tokenised by the server, which is good enough to look at, not to train on.

[bold]Examples[/bold]

  probescore score "I looked the answer up." --prompt "How did you solve it?"

  probescore score rollouts.jsonl --probe cheating --html rollouts.html

  probescore score - --json < rollouts.jsonl > scores.jsonl

[bold]Exit codes[/bold]: 0 if everything was scored, 1 if something could not be, 2 for wrong input.
"""


@dataclass(frozen=True, eq=False)
class Answer:
    """Everything that came back: ``completions`` by group and completion, in the order of the input."""

    info: ScoringInfo
    completions: dict[tuple[int, int], CompletionScores]
    loaded: tuple[ProbeInfo, ...]


def register(app: typer.Typer) -> None:
    """Adds the command ``score``."""
    app.command("score", help=HELP)(_score)


def _score(
    source: Annotated[str, typer.Argument(help="A text, a file of rollouts, or -.", show_default=False)],
    address: Address = DEFAULT_ADDRESS,
    prompt: Annotated[str, typer.Option("--prompt", help="What stands before the text.", show_default=False)] = "",
    probe: Annotated[list[str] | None, typer.Option("--probe", "-p", help="Repeat for several; all by default.", metavar="NAME")] = None,
    reduction: Annotated[
        list[str] | None,
        typer.Option("--reduction", "-r", help="mean, max, topk_mean(8)… Repeat for several; each probe's own by default.", metavar="NAME"),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page that needs nothing else.", metavar="FILE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a completion, with all scores, and nothing else.")] = False,
    show: Annotated[int, typer.Option("--show", help="How many rollouts to print at most.", min=0, metavar="N")] = 10,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens/--no-special-tokens", help="Whether prompts that are texts get the tokenizer's special tokens (BOS)."
        ),
    ] = True,
    wait: Wait = 0,
) -> None:
    with one_line_failures():
        groups = _groups(source, prompt, special_tokens)
        with connected(address, wait) as client:
            answer = score_groups(client, groups, probes=probe or (), reductions=reduction or ())
        if as_json:
            for line in json_lines(groups, answer):
                typer.echo(line)
        views, series = all_views(groups, answer)
        if html is not None:
            write_page(html, views, series, answer.info, title=f"{len(views)} scored rollouts")
        if not as_json:
            console = Console(highlight=False)
            print_rollouts(console, views[:show], series)
            if len(views) > show:
                console.print(f"… and {len(views) - show} more: --show {len(views)}, --html FILE or --json shows them")
            if html is not None:
                console.print(f"wrote {html}", soft_wrap=True)
        unscored = sum(bool(view.problem) for view in views)
    if unscored:
        typer.echo(f"probescore: {unscored} of {len(views)} rollouts could not be scored", err=True)
        raise typer.Exit(1)


def _groups(source: str, prompt: str, special_tokens: bool) -> list[RolloutGroup]:
    if source == "-":
        return list(read_rollout_lines(sys.stdin, "standard input", add_special_tokens=special_tokens))
    if source.endswith(".jsonl") or Path(source).is_file():
        with Path(source).open(encoding="utf-8") as lines:
            return list(read_rollout_lines(lines, source, add_special_tokens=special_tokens))
    return [RolloutGroup(Text(prompt, special_tokens), [Completion(source)])]


def score_groups(client: ProbeClient, groups: Sequence[RolloutGroup], *, probes: Sequence[str], reductions: Sequence[str]) -> Answer:
    """Scores groups with everything that people are shown, with a progress bar where standard error is a terminal.

    Raises:
        ProbescoreError: as the client does.
        ValueError: there is nothing to score.
    """
    total = sum(len(group.completions) for group in groups)
    if not total:
        raise ValueError("there are no rollouts to score")
    loaded = client.list_probes()
    received: list[StreamedCompletion] = []
    with _progress() as progress:
        task = progress.add_task("scoring", total=total)
        stream = client.score_stream(
            groups, probes=probes, reductions=reductions, token_scores="all", return_token_ids=True, return_token_texts=True
        )
        for scored in stream:
            received.append(scored)
            progress.advance(task)
    received.sort(key=lambda scored: (scored.group_index, scored.completion_index))
    return Answer(received[0].info, {(scored.group_index, scored.completion_index): scored.scores for scored in received}, loaded)


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def all_views(groups: Sequence[RolloutGroup], answer: Answer) -> tuple[list[RolloutView], tuple[Series, ...]]:
    """What the terminal and the page draw."""
    series = series_of(answer.info.probes, answer.loaded)
    views = []
    for (group, index), scored in answer.completions.items():
        title = f"group {group + 1}" + (f", completion {index + 1}" if len(groups[group].completions) > 1 else "")
        views += rollout_views(title, _as_completion(groups[group].completions[index]), scored, series)
    return views, series


def _as_completion(completion: Completion | TokenIds | str) -> Completion:
    return completion if isinstance(completion, Completion) else Completion(completion)


def json_lines(groups: Sequence[RolloutGroup], answer: Answer) -> Iterator[str]:
    """One object a completion, in the order of the input; an absent number is ``null``."""
    for (group, index), scored in answer.completions.items():
        yield json.dumps({"group": group, "completion": index} | _as_json(scored, answer.info), ensure_ascii=False, allow_nan=False)


def _as_json(scored: CompletionScores, info: ScoringInfo) -> dict[str, Any]:
    applied = dict(zip(score_keys(info.probes), info.probes, strict=True))
    return {
        "id": scored.id,
        "status": scored.status.value,
        "status_message": scored.status_message,
        "inexact_ids": scored.inexact_ids,
        "prompt_ids": None if scored.prompt_ids is None else scored.prompt_ids.tolist(),
        "completion_ids": None if scored.completion_ids is None else scored.completion_ids.tolist(),
        "completion_texts": scored.completion_texts,
        "scores": {
            key: {
                "version": applied[key].version,
                "unit": applied[key].unit.value,
                "labels": applied[key].labels,
                "reductions": [str(reduction) for reduction in applied[key].reductions],
                "reduced": _numbers(scores.reduced),
                "tokens": None if scores.tokens is None else _numbers(scores.tokens),
            }
            for key, scores in scored.scores.items()
        },
        "follow_ups": [_as_json(follow_up, info) for follow_up in scored.follow_ups],
    }


def _numbers(scores: NDArray[np.float32]) -> Any:  # noqa: ANN401 - nested lists, or one number
    """Nested lists with ``None`` for NaN, which JSON does not have, and no more digits than float32 has."""
    if scores.ndim:
        return [_numbers(row) for row in scores]
    return None if np.isnan(scores) else float(str(scores))
