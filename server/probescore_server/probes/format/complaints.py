"""What pydantic says against a value, in our terms: the field, what was found, what was expected."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from pydantic import ValidationError

Complaint = tuple[str, str, str]


def first_complaint(error: ValidationError, content: object) -> Complaint:
    """The first of an error's complaints.

    Args:
        error: of one model.
        content: what was validated, to look a field up that a check of the whole names.

    Returns:
        Field, found, expected. The field is empty if the whole could not be read.
    """
    first = error.errors(include_url=False)[0]
    expected = re.sub(r"^(Value error, |(Input|String|List|Tuple) should (be |have )?)", "", first["msg"])
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    match first["type"]:
        case "json_invalid":
            return "", expected, "JSON"
        case "missing":
            return field, "nothing", "a value"
        case "extra_forbidden":
            return field, _shown(first["input"]), "no such field"
        case _ if field:
            return field, _shown(first["input"]), expected
        case _:
            field, _, expected = expected.partition(": ")
            return field, _shown(_looked_up(content, field)), expected


def _looked_up(content: object, field: str) -> object:
    for part in re.findall(r"\w+", field):
        content = content[int(part)] if isinstance(content, list) else content.get(part) if isinstance(content, Mapping) else None
    return content


def _shown(value: object) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= 100 else shown[:97] + "…"
