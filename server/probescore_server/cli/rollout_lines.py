"""Reads rollouts from lines of JSON, the input of ``probescore score FILE`` and ``probescore activations FILE``.

Each line is one JSON object. ``docs/reference/rollout-lines.md`` describes every field.

    {"prompt": PROMPT, "completions": [COMPLETION, …], "label": LABEL or [LABEL, …]}    a rollout group
    {"prompt": PROMPT, "completion": COMPLETION, "label": LABEL}                        a group of one

    PROMPT      "text" | [ids] | [{"role": "user", "content": "…"}, …]
    COMPLETION  "text" | [ids] | {"text": "…" or "ids": [ids], "mask": [0, 1, …], "spans": {"name": [start, end]},
                                  "follow_ups": [COMPLETION, …], "id": "…", "label": LABEL}
    LABEL       text, a number, true, false or null

Unknown keys are ignored at the top, where datasets keep columns of their own, and refused inside a completion, where a misspelt ``mask``
would change scores. Keys that change scores inside a completion are refused at the top.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from probescore.types import Chat, Completion, RolloutGroup, Span, Text

UNDECODABLE = "surrogateescape"
"""Name of the error handler for decoding the lines of a file. The handler lets bytes that are not UTF-8 pass, so that the later error about
these bytes can name the line.
"""

Label: TypeAlias = str | int | float | bool | None

_COMPLETION_KEYS = ("text", "ids", "mask", "spans", "follow_ups", "id", "label")
_CHANGES_SCORES = ("mask", "spans", "follow_ups")


class LineError(ValueError):
    """Exception raised when a line of the input is not a valid rollout; the message names the source, the line, the field and the fault."""


@dataclass(frozen=True, eq=False)
class LabelledGroup(RolloutGroup):
    """Rollout group (a prompt with its completions) with the labels that one line of a JSON lines file gives to the completions.

    Attributes:
        labels: one label for each completion; ``None`` = not labelled. Labels are not sent to a server.
    """

    labels: tuple[Label, ...] = ()


def read_rollout_file(name: str, *, add_special_tokens: bool) -> list[LabelledGroup]:
    """Reads every rollout group (a prompt with its completions) of a file of JSON lines; the name ``-`` stands for standard input.

    Raises:
        LineError: a line is not a rollout.
        OSError: the file cannot be read.
    """
    with opened_lines(name) as lines:
        source = "standard input" if name == "-" else name
        return list(read_rollout_lines(lines, source, add_special_tokens=add_special_tokens))


def opened_lines(name: str) -> TextIO:
    """Opens a file of lines of JSON as UTF-8, with or without a byte order mark, whatever the terminal's encoding; ``-`` is standard input.

    Raises:
        OSError: the file cannot be read.
    """
    if name == "-":
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", errors=UNDECODABLE)
    return Path(name).open(encoding="utf-8-sig", errors=UNDECODABLE)


def read_rollout_lines(lines: Iterable[str], source: str, *, add_special_tokens: bool) -> Iterator[LabelledGroup]:
    """Reads rollout groups (each a prompt with its completions) from lines of JSON, and skips empty lines.

    Args:
        lines: lines in the format of ``docs/reference/rollout-lines.md``, decoded from UTF-8 with the error handler ``UNDECODABLE``.
        source: name of the file, for messages.
        add_special_tokens: whether prompts given as text get the tokenizer's special tokens (BOS).

    Raises:
        LineError: a line is not a rollout.
    """
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield rollout_group(parsed_line(line), add_special_tokens)
            except LineError as error:
                raise LineError(f"{source}:{number}: {error}") from None


def parsed_line(line: str) -> object:
    """Returns the JSON value of one line of a file.

    Raises:
        LineError: the line is not JSON in UTF-8.
    """
    try:
        line.encode()
    except UnicodeEncodeError:
        raise LineError("not UTF-8") from None
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LineError(f"not JSON: {error}") from None


def rollout_group(content: object, add_special_tokens: bool) -> LabelledGroup:
    """Converts the JSON value of one line to a rollout group (a prompt with its completions), with the labels of the
    completions.

    Raises:
        LineError: the value is not a rollout group; the message names the field at fault.
    """
    if not isinstance(content, dict):
        raise LineError(f"expected an object with prompt and completions, got {_shown(content)}")
    if "prompt" not in content:
        raise LineError('prompt: missing; write "" for an empty one')
    if ("completions" in content) == ("completion" in content):
        raise LineError("completions: give either completions (a list) or completion (one)")
    for key in _CHANGES_SCORES:
        if key in content:
            raise LineError(f'{key}: belongs into the completion that it is about: "completion": {{"ids": […], "{key}": …}}')
    completions = content["completions"] if "completions" in content else [content["completion"]]
    if not isinstance(completions, list) or not completions:
        raise LineError(f"completions: expected a list of at least one, got {_shown(completions)}")
    read = [
        _completion(entry, f"completions[{index}]" if "completions" in content else "completion") for index, entry in enumerate(completions)
    ]
    return LabelledGroup(_prompt(content["prompt"], add_special_tokens), read, labels=tuple(_labels(content, completions)))


def _labels(content: dict[str, Any], completions: list[object]) -> Iterator[Label]:
    """Yields the label of each completion of one JSON line: the completion's own label if it has one, else the label that the line gives
    it.
    """
    whole = content.get("label")
    if isinstance(whole, list) and "completions" in content:
        if len(whole) != len(completions):
            raise LineError(f"label: expected one for each of {len(completions)} completions, got {len(whole)}")
        of_line = [_label(entry, f"label[{index}]") for index, entry in enumerate(whole)]
    else:
        of_line = [_label(whole, "label")] * len(completions)
    for index, completion in enumerate(completions):
        if isinstance(completion, dict) and "label" in completion:
            yield _label(completion["label"], f"completions[{index}].label" if "completions" in content else "completion.label")
        else:
            yield of_line[index]


def _label(content: object, field: str) -> Label:
    if isinstance(content, float) and not math.isfinite(content):
        raise LineError(f"{field}: expected a finite number, got {content}")
    if content is not None and not isinstance(content, str | int | float | bool):
        raise LineError(f"{field}: expected text, a number, true, false or null, got {_shown(content)}")
    return content


def _prompt(content: object, add_special_tokens: bool) -> Text | Chat | list[int]:
    if isinstance(content, str):
        return Text(content, add_special_tokens)
    if isinstance(content, list) and content and all(isinstance(message, dict) for message in content):
        for index, message in enumerate(content):
            if not all(isinstance(message.get(key), str) for key in ("role", "content")):
                raise LineError(f"prompt[{index}]: expected role and content as text, got {_shown(message)}")
        return Chat.of(content)
    return _ids(content, "prompt", "text, a list of token ids or a list of messages")


def _completion(content: object, field: str, *, is_follow_up: bool = False) -> Completion:
    if isinstance(content, str):
        return Completion(content)
    if not isinstance(content, dict):
        return Completion(_ids(content, field, "text, a list of token ids or an object"))
    if is_follow_up and "label" in content:
        raise LineError(f"{field}.label: a label is about a completion, not about a follow-up to it")
    unknown = [key for key in content if key not in _COMPLETION_KEYS]
    if unknown:
        raise LineError(f"{field}: unknown key {unknown[0]!r}; known: {', '.join(_COMPLETION_KEYS)}")
    if ("text" in content) == ("ids" in content):
        raise LineError(f"{field}: give either text or ids")
    name = content.get("id", "")
    if not isinstance(name, str):
        raise LineError(f"{field}.id: expected text, got {_shown(name)}")
    follow_ups = content.get("follow_ups", [])
    if not isinstance(follow_ups, list):
        raise LineError(f"{field}.follow_ups: expected a list, got {_shown(follow_ups)}")
    return Completion(
        _text(content["text"], f"{field}.text") if "text" in content else _ids(content["ids"], f"{field}.ids", "a list of token ids"),
        mask=None if content.get("mask") is None else _mask(content["mask"], f"{field}.mask"),
        spans=_spans(content.get("spans", {}), f"{field}.spans"),
        follow_ups=tuple(_completion(entry, f"{field}.follow_ups[{index}]", is_follow_up=True) for index, entry in enumerate(follow_ups)),
        id=name,
    )


def _text(content: object, field: str) -> str:
    if not isinstance(content, str):
        raise LineError(f"{field}: expected text, got {_shown(content)}")
    return content


def _ids(content: object, field: str, expected: str) -> list[int]:
    if not isinstance(content, list):
        raise LineError(f"{field}: expected {expected}, got {_shown(content)}")
    for index, entry in enumerate(content):
        if not _is_natural(entry):
            raise LineError(f"{field}[{index}]: expected a token id (an integer from 0 to 2147483647), got {_shown(entry)}")
    return content


def _mask(content: object, field: str) -> list[bool]:
    if not isinstance(content, list):
        raise LineError(f"{field}: expected a list of 0 and 1, got {_shown(content)}")
    for index, entry in enumerate(content):
        if entry not in (0, 1):
            raise LineError(f"{field}[{index}]: expected 0 or 1, got {_shown(entry)}")
    return [bool(entry) for entry in content]


def _spans(content: object, field: str) -> tuple[Span, ...]:
    if not isinstance(content, dict):
        raise LineError(f'{field}: expected an object like {{"name": [start, end]}}, got {_shown(content)}')
    for name, bounds in content.items():
        if not (isinstance(bounds, list) and len(bounds) == 2 and all(map(_is_natural, bounds))):
            raise LineError(f"{field}.{name}: expected [start, end], got {_shown(bounds)}")
    return tuple(Span(name, start, end) for name, (start, end) in content.items())


def _is_natural(content: Any) -> bool:  # noqa: ANN401 - a value of any JSON type
    return isinstance(content, int) and not isinstance(content, bool) and 0 <= content < 2**31


def _shown(content: object) -> str:
    shown = json.dumps(content, ensure_ascii=False, default=repr)  # a table may hold bytes or dates
    return shown if len(shown) <= 60 else shown[:57] + "…"
