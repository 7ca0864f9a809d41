"""Implements ``probescore score``, which scores a text or a file of rollouts and shows coloured tokens, a page, or lines of JSON."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from probescore import (
    Completion,
    Limits,
    ProbeInfo,
    StreamWindow,
    Text,
)
from probescore_server.cli.common.connection import DEFAULT_ADDRESS, Address, Wait, connected
from probescore_server.cli.common.failures import FAILED, one_line_failures, say
from probescore_server.cli.common.interruption import interruptible
from probescore_server.cli.common.progress import RolloutProgress
from probescore_server.cli.common.streams import leave_stdout
from probescore_server.cli.report.writers import InOrderWriter, JsonLinesWriter, PageWriter, ResultWriter, TerminalWriter
from probescore_server.cli.rollout_lines import LabelledGroup, read_rollout_file

HELP = """
Score a text, or rollouts, and show them coloured by score.

SOURCE is a text (with --prompt before it), a file of rollouts, or - for rollouts on standard input. Each line is one JSON object:

  {"prompt": PROMPT, "completions": \\[COMPLETION, …]}  or  {"prompt": PROMPT, "completion": COMPLETION}

  PROMPT is "text", \\[token ids], or \\[{"role": "user", "content": "…"}, …]

  COMPLETION is "text", \\[token ids], or {"text" or "ids": …, "id": "…", "mask": \\[0, 1, …], "spans": {"name": \\[start, end]},
  "follow_ups": \\[COMPLETION, …], "label": LABEL}

  A "label" beside the prompt, or one in each completion, is carried into --html and --json.

Results are printed in the order of the input as they arrive; after Ctrl-C, those that have arrived are kept.

Token ids are taken verbatim. Texts are tokenised by the server, which is good enough to look at, not to train on.

[bold]Examples[/bold]

  probescore score "I looked the answer up." --prompt "How did you solve it?"

  probescore score rollouts.jsonl --probe cheating --html rollouts.html

  probescore score - --json < rollouts.jsonl > scores.jsonl

  probescore score rollouts.jsonl --reading frozen --reading policy --html rollouts.html

[bold]Exit codes[/bold]: 0 if everything was scored, 1 if something could not be, 2 for wrong input, 130 after Ctrl-C.
"""


def register(app: typer.Typer) -> None:
    """Adds the command ``score`` to the command line."""
    app.command("score", help=HELP)(_score)


def _score(
    source: Annotated[str, typer.Argument(help="A text, the name of a file of rollouts, or - for standard input.", show_default=False)],
    address: Address = DEFAULT_ADDRESS,
    prompt: Annotated[str, typer.Option("--prompt", help="The prompt before the text.", show_default=False)] = "",
    probe: Annotated[
        list[str] | None,
        typer.Option("--probe", "-p", help="A probe to score with; repeat for several. The default is all.", metavar="NAME"),
    ] = None,
    reduction: Annotated[
        list[str] | None,
        typer.Option(
            "--reduction",
            "-r",
            help="A reduction: mean, max, topk_mean(8)… Repeat for several. The default is each probe's own.",
            metavar="NAME",
        ),
    ] = None,
    reading: Annotated[
        list[str] | None,
        typer.Option(
            "--reading",
            help="Whose activations the probes read: frozen, or the name of a loaded reading. Repeat for several. The default is frozen.",
            metavar="NAME",
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write all rollouts to one self-contained HTML page.", metavar="FILE")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each completion, with all scores, and nothing else.")
    ] = False,
    show: Annotated[int, typer.Option("--show", help="The most rollouts to print.", min=0, metavar="N")] = 10,
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
            printed: ResultWriter = JsonLinesWriter() if as_json else TerminalWriter(loaded, show)
            # the page comes first: if standard output is closed early, all results are still on the page
            results = InOrderWriter(groups, [printed] if html is None else [PageWriter(html, loaded, total, quiet=as_json), printed])
            stream = client.score_stream(
                groups,
                probes=probe or (),
                reductions=reduction or (),
                token_scores="all",
                return_token_ids=True,
                return_token_texts=True,
                readings=reading or (),
                window=_window(client.get_server_info().limits, loaded, max(1, len(reading or ()))),
            )
            try:
                with RolloutProgress(total) as progress:
                    for scored in stream:
                        with interruption.held_back(), progress.aside():
                            try:
                                results.add(scored)
                            except BrokenPipeError:
                                leave_stdout()  # the reader of standard output has left
                                results.outputs.remove(printed)
                                if html is None:
                                    raise
                        progress.advance()
            finally:
                # also after Ctrl-C or if the server went away: what was scored is kept
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


def _window(limits: Limits, loaded: Sequence[ProbeInfo], readings: int) -> StreamWindow:
    """Returns the limits on the tokens that the command ``probescore score`` has sent to the server and that are not scored yet. An RPC
    contains so few tokens that the number of scores in its response stays within the server's limit.

    Each token has one score for each label of each probe on each reading, and there are far fewer reduced scores. In the window a token
    counts once for each reading.
    """
    usual = StreamWindow()
    labels = sum(len(probe.labels) for probe in loaded)
    most = limits.max_request_values // (2 * labels) if limits.max_request_values and labels else usual.tokens_per_call
    return replace(usual, tokens_per_call=max(1, min(usual.tokens_per_call, most)))


def _check_can_be_written(path: Path) -> None:
    """Checks that an output file can be written, before anything is scored; raises ``OSError`` if it cannot."""
    problem = 0
    if path.is_dir():
        problem = errno.EISDIR
    elif not path.parent.is_dir():
        problem = errno.ENOENT
    elif not os.access(path.parent, os.W_OK):
        problem = errno.EACCES
    if problem:
        raise OSError(problem, os.strerror(problem), str(path))
