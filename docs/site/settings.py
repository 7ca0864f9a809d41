"""The settings of the server, from the class that declares them."""

from __future__ import annotations

from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from probescore_server.cli.serve import PANELS, default_of
from probescore_server.settings import ENVIRONMENT_PREFIX, ServerSettings


def write() -> str:
    """A table for each group of settings, in the order of ``probescore serve --help``."""
    return "\n\n".join(_table(panel, names) for panel, names in PANELS.items())


def _table(panel: str, names: tuple[str, ...]) -> str:
    head = "| setting, flag, variable | default | values | what it is |\n|---|---|---|---|\n"
    return f"## {panel}\n\n" + head + "\n".join(_row(name, ServerSettings.model_fields[name]) for name in names)


def _row(name: str, field: FieldInfo) -> str:
    flag = "--" + name.replace("_", "-")
    names = f'<span id="{name}"></span>**`{name}`**<br>`{flag}`<br>`{ENVIRONMENT_PREFIX}{name.upper()}`'
    examples = " For example " + " or ".join(f"`{example}`" for example in field.examples) + "." if field.examples else ""
    return f"| {names} | {default_of(field)} | {_values(field)} | {_plain(field.description or '')}{examples} |"


def _values(field: FieldInfo) -> str:
    """What a setting may be: its words, or its type with its bounds."""
    kind = field.annotation
    if get_origin(kind) is Literal:
        return ", ".join(f"`{word}`" for word in get_args(kind))
    if kind is bool:
        return "`true`, `false`"
    if get_origin(kind) is tuple:
        return "list of words"
    if kind not in (int, float):
        return "text"
    bounds = {name: getattr(bound, name) for bound in field.metadata for name in ("ge", "le") if hasattr(bound, name)}
    return f"{'integer' if kind is int else 'number'}, {bounds['ge']:,} to {bounds['le']:,}"


def _plain(text: str) -> str:
    """A description for which Markdown has no other reading."""
    return text.replace("*", r"\*").replace("|", r"\|").replace("[", r"\[").replace("_", r"\_")
