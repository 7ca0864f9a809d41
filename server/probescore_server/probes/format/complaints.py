"""Restates pydantic's validation errors in probescore's terms: the wrong field, the value found in it, and the value expected."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from pydantic import ValidationError

Complaint = tuple[str, str, str]


def first_complaint(error: ValidationError, content: object) -> Complaint:
    """Returns the first problem that a pydantic validation error lists.

    Args:
        error: the error that pydantic raised when it validated a value against one pydantic model.
        content: the value that was validated; a check of the whole model names a field, which is looked up here.

    Returns:
        Three texts: the field, the value found there and the value expected. The field is empty if the content is not of the model's kind
            at all, such as text that is not JSON.
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
