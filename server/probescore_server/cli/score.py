"""``probescore score``: from a text or a file of rollouts to coloured tokens, a page, or lines of JSON."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import typer
from numpy.typing import NDArray

from probescore import (
    Completion,
    CompletionScores,
    CompletionStatus,
    Limits,
    ProbeInfo,
    ScoringInfo,
    StreamedCompletion,
    StreamWindow,
    Text,
)
from probescore.types import score_keys
from probescore_server.cli.connection import DEFAULT_ADDRESS, Address, Wait, connected
from probescore_server.cli.console import new_console
from probescore_server.cli.failures import FAILED, one_line_failures, say
from probescore_server.cli.interruption import interruptible
from probescore_server.cli.page import write_page
from probescore_server.cli.progress import Progress
from probescore_server.cli.rollout_lines import Label, LabelledGroup, read_rollout_file
from probescore_server.cli.rollout_views import RolloutView, rollout_views, series_of
from probescore_server.cli.streams import leave_stdout
from probescore_server.cli.terminal import RolloutPrinter
from probescore_server.cli.visible import visible_json

HELP = """
Score a text, or rollouts, and show them coloured by score.

SOURCE is a text (with --prompt before it), the name of a file of rollouts, or - for such lines on standard input. One JSON object a line:

  {"prompt": PROMPT, "completions": \\[COMPLETION, …]}  or  {"prompt": PROMPT, "completion": COMPLETION}

  PROMPT is "text", \\[token ids], or \\[{"role": "user", "content": "…"}, …]

  COMPLETION is "text", \\[token ids], or {"text" or "ids": …, "id": "…", "mask": \\[0, 1, …], "spans": {"name": \\[start, end]},
  "follow_ups": \\[COMPLETION, …], "label": LABEL}

  A "label" beside the prompt, or one in each completion, is carried into --html and --json.

Results are printed in the order of the input as they come; Ctrl-C keeps what has come.

Token ids are taken verbatim. Texts are tokenised by the server, which is good enough to look at, not to train on.

[bold]Examples[/bold]

  probescore score "I looked the answer up." --prompt "How did you solve it?"

  probescore score rollouts.jsonl --probe cheating --html rollouts.html

  probescore score - --json < rollouts.jsonl > scores.jsonl

[bold]Exit codes[/bold]: 0 if everything was scored, 1 if something could not be, 2 for wrong input, 130 after Ctrl-C.
"""


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
        total = sum(len(group.completions) for group in groups)
        if not total:
            raise ValueError("there are no rollouts to score")
        if html is not None:
            _check_can_be_written(html)
        with connected(address, wait) as client, interruptible() as interruption:
            loaded = client.list_probes()
            printed: _Output = _Lines() if as_json else _Shown(loaded, show)
            # the page first: what a reader who leaves does not take is on it
            results = _InOrder(groups, [printed] if html is None else [_Page(html, loaded, total, quiet=as_json), printed])
            stream = client.score_stream(
                groups,
                probes=probe or (),
                reductions=reduction or (),
                token_scores="all",
                return_token_ids=True,
                return_token_texts=True,
                window=_window(client.get_server_info().limits, loaded),
            )
            try:
                with Progress(total) as progress:
                    for scored in stream:
                        with interruption.held_back(), progress.aside():
                            try:
                                results.add(scored)
                            except BrokenPipeError:
                                leave_stdout()  # nobody reads any more
                                results.outputs.remove(printed)
                                if html is None:
                                    raise
                        progress.advance()
            finally:
                # also after Ctrl-C, and where the server went away: what was scored is kept
                with interruption.held_back():
                    results.close()
                if 0 < results.received < total and printed in results.outputs:
                    say(f"{results.received} of {total} rollouts came back before the end; they are kept")
    if results.unscored:
        say(f"{results.unscored} of {results.views} rollouts could not be scored")
        raise typer.Exit(FAILED)


def _groups(source: str, prompt: str, special_tokens: bool) -> list[LabelledGroup]:
    if source == "-" or source.endswith(".jsonl") or Path(source).is_file():
        return read_rollout_file(source, add_special_tokens=special_tokens)
    return [LabelledGroup(Text(prompt, special_tokens), [Completion(source)], labels=(None,))]


def _window(limits: Limits, loaded: Sequence[ProbeInfo]) -> StreamWindow:
    """As many tokens in a call as there may be scores for: each has one for each label, and there are far fewer reduced ones."""
    usual = StreamWindow()
    labels = sum(len(probe.labels) for probe in loaded)
    most = limits.max_request_values // (2 * labels) if limits.max_request_values and labels else usual.tokens_per_call
    return replace(usual, tokens_per_call=max(1, min(usual.tokens_per_call, most)))


def _check_can_be_written(path: Path) -> None:
    """Before anything is scored; raises ``OSError`` if not."""
    problem = 0
    if path.is_dir():
        problem = errno.EISDIR
    elif not path.parent.is_dir():
        problem = errno.ENOENT
    elif not os.access(path.parent, os.W_OK):
        problem = errno.EACCES
    if problem:
        raise OSError(problem, os.strerror(problem), str(path))


class _Scored:
    """One completion that came back: where it stood in the input, and what the input says of it."""

    def __init__(self, groups: Sequence[LabelledGroup], streamed: StreamedCompletion) -> None:
        self.group, self.index = streamed.group_index, streamed.completion_index
        self.of_group = len(groups[self.group].completions)
        completion = groups[self.group].completions[self.index]
        self.completion = completion if isinstance(completion, Completion) else Completion(completion)
        self.label: Label = groups[self.group].labels[self.index]
        self.scores: CompletionScores = streamed.scores
        self.info: ScoringInfo = streamed.info

    def shown(self, loaded: Sequence[ProbeInfo]) -> list[RolloutView]:
        """The completion as people see it, and its follow-ups."""
        title = f"group {self.group + 1}" + (f", completion {self.index + 1}" if self.of_group > 1 else "")
        label = "" if self.label is None else self.label if isinstance(self.label, str) else json.dumps(self.label)
        return rollout_views(title, self.completion, self.scores, series_of(self.info.probes, loaded), label)


class _Output(Protocol):
    """What becomes of results."""

    def add(self, scored: _Scored) -> None:
        """Takes one; they come in the order of the input."""

    def close(self) -> None:
        """There are no more."""


class _InOrder:
    """Hands results on in the order of the input, each as soon as all before it are there; at the end also those after a gap.

    Attributes:
        outputs: who gets them.
        received: results so far.
        views: rollouts and follow-ups among those handed on.
        unscored: of these, how many have no scores.
    """

    def __init__(self, groups: Sequence[LabelledGroup], outputs: list[_Output]) -> None:
        self.outputs = outputs
        self._groups = groups
        self._places = [(group, index) for group, entry in enumerate(groups) for index in range(len(entry.completions))]
        self._next = 0
        self._waiting: dict[tuple[int, int], _Scored] = {}
        self.received = self.views = self.unscored = 0

    def add(self, streamed: StreamedCompletion) -> None:
        scored = _Scored(self._groups, streamed)
        self.received += 1
        self._waiting[scored.group, scored.index] = scored
        while self._next < len(self._places) and (ready := self._waiting.pop(self._places[self._next], None)) is not None:
            self._next += 1
            self._hand_on(ready)

    def close(self) -> None:
        for place in sorted(self._waiting):
            self._hand_on(self._waiting[place])
        self._waiting.clear()
        for output in self.outputs:
            output.close()

    def _hand_on(self, scored: _Scored) -> None:
        statuses = [answer.status is CompletionStatus.OK for answer in _with_follow_ups(scored.scores)]
        self.views += len(statuses)
        self.unscored += statuses.count(False)
        for output in self.outputs:
            output.add(scored)


def _with_follow_ups(scored: CompletionScores) -> list[CompletionScores]:
    return [scored, *(inner for follow_up in scored.follow_ups for inner in _with_follow_ups(follow_up))]


class _Lines:
    """JSON, one object a line, complete as soon as it is written; an absent number is ``null``."""

    def add(self, scored: _Scored) -> None:
        content = {"group": scored.group, "completion": scored.index, "label": scored.label} | _as_json(scored.scores, scored.info)
        # JSON can say every text in every encoding
        can_say = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
        typer.echo(visible_json(json.dumps(content, ensure_ascii=not can_say, allow_nan=False)))

    def close(self) -> None:
        pass


class _Shown:
    """The first rollouts on the terminal, and how many more there are."""

    def __init__(self, loaded: Sequence[ProbeInfo], most: int) -> None:
        self._loaded = loaded
        self._most = most
        self._console = new_console()
        self._printer: RolloutPrinter | None = None
        self._views = 0

    def add(self, scored: _Scored) -> None:
        views = scored.shown(self._loaded)
        printer = self._printer = self._printer or RolloutPrinter(self._console, series_of(scored.info.probes, self._loaded))
        for view in views[: max(0, self._most - self._views)]:
            printer.print(view, scale_of=views)
        self._views += len(views)

    def close(self) -> None:
        if self._printer is not None:
            self._printer.print_legend()
        if self._views > self._most:
            more = self._views - self._most
            self._console.print(f"… and {more} more: --show {self._views}, --html FILE or --json shows them")


class _Page:
    """All rollouts on one page, written when there are no more."""

    def __init__(self, path: Path, loaded: Sequence[ProbeInfo], total: int, *, quiet: bool) -> None:
        self._path = path
        self._loaded = loaded
        self._total = total
        self._quiet = quiet
        self._completions = 0
        self._views: list[RolloutView] = []
        self._info: ScoringInfo | None = None

    def add(self, scored: _Scored) -> None:
        self._completions += 1
        self._views += scored.shown(self._loaded)
        self._info = self._info or scored.info

    def close(self) -> None:
        if self._info is None:
            return
        title = f"{len(self._views)} scored rollouts"
        if self._completions < self._total:
            title += f", of {self._completions} completions out of {self._total}"
        write_page(self._path, self._views, series_of(self._info.probes, self._loaded), self._info, title=title)
        if not self._quiet:
            new_console().print(f"wrote {self._path}", soft_wrap=True, markup=False)


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
