"""Every command of ``probescore`` with its options, from the command line itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import typer
from rich.text import Text

from probescore_server.cli.app import app


def write() -> str:
    """A section for each command, in the order of ``probescore --help``."""
    return "\n\n".join(_section(path, command) for path, command in commands())


def commands() -> Iterator[tuple[str, Any]]:
    """Every command, by what is typed to reach it."""
    return _below("probescore", typer.main.get_command(app))


def _below(path: str, command: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - a command of the click that typer brings
    subcommands = getattr(command, "commands", {})
    if not subcommands:
        yield path, command
    for name, subcommand in subcommands.items():
        yield from _below(f"{path} {name}", subcommand)


def _section(path: str, command: Any) -> str:  # noqa: ANN401
    context = typer.Context(command, info_name=path)
    shown = [(parameter, record) for parameter in command.get_params(context) if (record := parameter.get_help_record(context))]
    parts = [f"## {path}", f"```text\n{' '.join([path, *command.collect_usage_pieces(context)])}\n```", _prose(command.help or "")]
    for panel, rows in groupby(shown, key=lambda row: getattr(row[0], "rich_help_panel", None)):
        if panel:
            parts.append(f"**{panel}**")
        parts.append("| | |\n|---|---|\n" + "\n".join(_row(*row) for row in rows))
    return "\n\n".join(parts)


def _row(parameter: Any, record: tuple[str, str]) -> str:  # noqa: ANN401
    names, text = record
    written = parameter.help or ""
    # variable and default stand behind it, in brackets that are no markup
    facts = text.removeprefix(written).strip()
    meaning = Text.from_markup(re.sub(r"\[(/?)dim\]", lambda tag: "]" if tag[1] else r"\[", written)).plain
    return f"| `{names}` | {_escape(f'{meaning} {facts}'.strip())} |"


def _prose(text: str) -> str:
    """Help as Markdown: lines that are set in are code."""
    paragraphs = [Text.from_markup(re.sub(r"\[/?bold\]", "**", paragraph)).plain for paragraph in text.strip().split("\n\n")]
    blocks = [(is_code, list(group)) for is_code, group in groupby(paragraphs, key=lambda paragraph: paragraph.startswith("  "))]
    return "\n\n".join(_code(group) if is_code else "\n\n".join(map(_escape_words, group)) for is_code, group in blocks)


def _code(paragraphs: list[str]) -> str:
    lines = [line.removeprefix("  ") for paragraph in paragraphs for line in paragraph.splitlines()]
    return "```{ .text .wrap }\n" + "\n".join(lines) + "\n```"


def _escape(text: str) -> str:
    return re.sub(r"([*|\[\]_<>{}])", r"\\\1", text)


def _escape_words(text: str) -> str:
    return re.sub(r"([|\[\]_<>{}])", r"\\\1", text)
