"""Implements ``probescore probes import``, which converts a probe file of another library into a probe file of probescore."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probescore.types import Chat, Completion, RolloutGroup, Text
from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import one_line_failures, say
from probescore_server.cli.rollout_lines import UNDECODABLE, read_rollout_lines
from probescore_server.cli.tables import facts_table, safe

if TYPE_CHECKING:
    from probescore_probes import ReferenceModel
    from probescore_probes.importing import AuthorScores
    from probescore_server.backbone.tokenizer import TextEncoder

_SCORES = ("token_scores", "score")


def register(probes: typer.Typer) -> None:
    """Adds the command ``probes import`` to the commands under ``probes``."""
    probes.command("import")(_import)


def _import(
    file: Annotated[Path, typer.Argument(help="What another library wrote: a file, or a folder.", show_default=False, metavar="FILE")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="What it was fitted on: a directory, or an id on the hub.", show_default=False)
    ],
    name: Annotated[str, typer.Option("--name", "-n", help="Name of the new probe.", show_default=False)],
    version: Annotated[str, typer.Option("--version", help="Its version.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the probe file.", show_default=False)],
    format: Annotated[str | None, typer.Option("--format", "-f", help="Where the content does not show it.", show_default=False)] = None,
    tap: Annotated[
        list[str] | None,
        typer.Option("--tap", help="resid_post.6, hidden_states\\[7], blocks.6.hook_resid_post, …; once for each.", show_default=False),
    ] = None,
    author_scores: Annotated[
        Path | None, typer.Option("--author-scores", help="Rollouts with the scores of the author's code, as JSONL.", show_default=False)
    ] = None,
    golden: Annotated[Path | None, typer.Option("--golden", help="Rollouts for golden vectors, as JSONL.", show_default=False)] = None,
    reduction: Annotated[
        str | None, typer.Option("--reduction", help="From scores of tokens to one of a rollout.", show_default=False)
    ] = None,
    unit: Annotated[str | None, typer.Option("--unit", help="logit, probability or value.", show_default=False)] = None,
    label: Annotated[list[str] | None, typer.Option("--label", help="Name of a column; once for each.", show_default=False)] = None,
    heads: Annotated[int | None, typer.Option("--heads", help="Of an attention probe.", show_default=False)] = None,
    feature: Annotated[
        list[int] | None, typer.Option("--feature", help="Of a sparse autoencoder; once for each.", show_default=False)
    ] = None,
    sees_prompt: Annotated[bool, typer.Option("--sees-prompt", help="A probe of several tokens reads the prompt's too.")] = False,
    trust_pickle: Annotated[bool, typer.Option("--trust-pickle", help="Let the file run its code here, now.")] = False,
    add_special_tokens: Annotated[bool, typer.Option("--add-special-tokens", help="Begin prompts given as text with BOS.")] = False,
    description: Annotated[str, typer.Option("--description", help="For people.")] = "",
    author: Annotated[str, typer.Option("--author", help="For people.")] = "",
    license: Annotated[str, typer.Option("--license", help="Its SPDX name.")] = "",
    revision: Annotated[str, typer.Option("--revision", help="Of the model on the hub.", show_default=False)] = "",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda:0.")] = "cpu",
) -> None:
    """Import a probe that another library wrote, and compare it with its author's scores."""
    console = new_console()
    with one_line_failures(extra="probes"):
        from transformers.utils import logging

        from probescore_probes import ReferenceModel
        from probescore_probes.importing import import_probe

        logging.disable_progress_bar()  # of every file of weights
        with console.status(""), _saying_what_runs():
            reference = ReferenceModel.load(model, revision=revision, device=device)
            try:
                made = import_probe(
                    file,
                    reference,
                    name=name,
                    version=version,
                    output=output,
                    format=format,
                    taps=tap or (),
                    author_scores=list(_scored(author_scores, reference, add_special_tokens)) if author_scores else (),
                    golden=[pair for pair, _ in _rollouts(golden, reference, add_special_tokens)] if golden else (),
                    reduction=reduction,
                    unit=unit,
                    labels=label or (),
                    heads=heads,
                    features=feature or (),
                    sees_prompt=sees_prompt,
                    trust_pickle=trust_pickle,
                    description=description,
                    author=author,
                    license=license,
                )
            except TypeError as error:  # of numbers in a file that are none
                raise ValueError(str(error)) from error
        manifest = made.probe.manifest
        table = facts_table(safe(f"{manifest.key}, imported as {made.format}"))
        table.add_row("reads", safe(", ".join(map(str, manifest.taps))))
        table.add_row("gives", safe(f"{manifest.output.unit.value} per {manifest.output.per.value}: {', '.join(manifest.output.labels)}"))
        for index, note in enumerate(made.notes):
            mark = ("[green]✓[/green] " if made.agrees else "[yellow]![/yellow] ") if index == 0 else ""
            table.add_row("" if index else "author's scores", f"{mark}{safe(note)}")
        table.add_row("written", safe(str(output)))
        console.print(table)


@contextmanager
def _saying_what_runs() -> Iterator[None]:
    """Context manager that says on standard error, before a trusted pickle is opened, what the pickle names and may run."""
    from probescore_probes.importing import RunsCode

    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Warning | str, *where: Any, **more: Any) -> None:  # noqa: ANN401
            say(message) if isinstance(message, RunsCode) else shown(message, *where, **more)

        warnings.simplefilter("always", RunsCode)
        warnings.showwarning = show
        yield


def _scored(path: Path, reference: ReferenceModel, add_special_tokens: bool) -> Iterator[AuthorScores]:
    from probescore_probes.importing import AuthorScores

    for (prompt, completion), said in _rollouts(path, reference, add_special_tokens):
        if (_SCORES[0] in said) == (_SCORES[1] in said):
            raise ValueError(f"{said['where']}: give {' or '.join(_SCORES)}, one of the two, beside the rollout")
        yield AuthorScores(prompt, completion, said.get("token_scores"), said.get("score"))


def _rollouts(path: Path, reference: ReferenceModel, add_special_tokens: bool) -> Iterator[tuple[tuple[Any, Any], dict[str, Any]]]:
    """Yields the token ids of each rollout in a JSONL file, with the scores on its line, which the code of a probe's author gave."""
    from probescore_server.backbone.tokenizer import TextEncoder
    from probescore_server.errors import InvalidRequest

    encoder = TextEncoder(reference.tokenizer)
    with path.open(encoding="utf-8", errors=UNDECODABLE) as file:
        lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    groups = list(read_rollout_lines((line for _, line in lines), str(path), add_special_tokens=add_special_tokens))
    for (number, line), group in zip(lines, groups, strict=True):
        where = f"{path}:{number}"
        content = json.loads(line)
        try:
            prompt = encoder.encode_prompt(group.prompt, "prompt") if isinstance(group.prompt, Text | Chat | str) else group.prompt
            for index in range(len(group.completions)):
                said = {key: _of_completion(content, key, index, len(group.completions), where) for key in _SCORES if key in content}
                yield (prompt, _ids(group, index, encoder, where)), said | {"where": where}
        except InvalidRequest as error:
            raise ValueError(f"{where}: {error}") from None


def _ids(group: RolloutGroup, index: int, encoder: TextEncoder, where: str) -> Any:  # noqa: ANN401
    completion = group.completions[index]
    if not isinstance(completion, Completion):
        return completion
    if completion.mask is not None or completion.spans or completion.follow_ups:
        raise ValueError(f"{where}: a mask, spans or follow-ups; give whole completions, as the author's code scored them")
    return encoder.encode_completion(completion.tokens, "completion") if isinstance(completion.tokens, str) else completion.tokens


def _of_completion(content: dict[str, Any], key: str, index: int, completions: int, where: str) -> Any:  # noqa: ANN401
    if "completions" not in content:
        return content[key]
    if not isinstance(content[key], list) or len(content[key]) != completions:
        raise ValueError(f"{where}: {key}: give a list with one entry for each of the {completions} completions")
    return content[key][index]
