"""Reads anchors: texts with a known label that are scored again and again while a model is trained.

On the frozen model their scores must not change; where they do, server, model or probe is another. On the policy they show how far its
representations have moved. ``probescore anchors make`` writes a file of them, with a line of JSON for each:

    {"prompt": "text" | [ids] | [messages], "completion": {"id": "name", "text": "…" or "ids": [ids], "mask": [0, 1, …]}, "label": true}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from probescore import Chat, Text
from probescore_adapters.rollouts import Prompt, Rollout


@dataclass(frozen=True, eq=False)
class Anchor:
    """Text with a known label that is scored again and again.

    Attributes:
        name: name of the text, unique in its file.
        positive: whether the text has the behaviour.
        rollout: prompt and completion.
        text_sha256: digest of prompt and completion as the file has them.
    """

    name: str
    positive: bool
    rollout: Rollout
    text_sha256: str


def read_anchors(path: Union[str, os.PathLike[str]]) -> tuple[Anchor, ...]:
    """Reads a file of anchors (texts with a known label that are scored again and again), as ``probescore anchors make`` writes it.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is no anchor, a name comes twice, or one of the two labels is missing; the message names file and line.
    """
    file = Path(path)
    found: dict[str, Anchor] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            anchor = _anchor(json.loads(line))
        except (ValueError, RecursionError) as error:
            problem = "no JSON" if isinstance(error, (json.JSONDecodeError, RecursionError)) else error
            raise ValueError(f"{file.name}:{number}: {problem}") from None
        if anchor.name in found:
            raise ValueError(f"{file.name}:{number}: completion.id: {anchor.name!r} comes twice; give each anchor a name of its own")
        found[anchor.name] = anchor
    if len({anchor.positive for anchor in found.values()}) < 2:
        raise ValueError(f"{file.name}: {len(found)} anchors, not of both labels; make them with 'probescore anchors make'")
    return tuple(found.values())


def _anchor(line: object) -> Anchor:
    completion = line.get("completion") if isinstance(line, Mapping) else None
    if not isinstance(line, Mapping) or not isinstance(completion, Mapping):
        raise ValueError("no anchor; give an object with prompt, completion and label")
    name, positive = completion.get("id"), line.get("label")
    if not isinstance(name, str) or not name:
        raise ValueError(f"completion.id: {name!r:.60}; give the anchor a name")
    if not isinstance(positive, bool):
        raise ValueError(f"label: {positive!r:.60}; give true or false")
    if ("text" in completion) == ("ids" in completion):
        raise ValueError("completion: give either text or ids")
    content = completion["text"] if "text" in completion else completion["ids"]
    if not isinstance(content, str if "text" in completion else list):
        raise ValueError(f"completion: {content!r:.60}; give text as text, and ids as a list")
    rollout = Rollout(_prompt(line.get("prompt"), line.get("add_special_tokens", True)), content, completion.get("mask"))
    return Anchor(name, positive, rollout.checked("{}"), anchor_digest(line))


def anchor_digest(line: Mapping[str, Any]) -> str:
    """Returns the digest of an anchor's texts or token ids, as ``sha256:…``; the name and the label are not part of it."""
    completion = {name: value for name, value in line["completion"].items() if name != "id"}
    written = json.dumps([line.get("prompt"), line.get("add_special_tokens", True), completion], sort_keys=True)
    return f"sha256:{hashlib.sha256(written.encode()).hexdigest()}"


def _prompt(given: Any, add_special_tokens: object) -> Prompt:  # noqa: ANN401 - of any JSON type
    if isinstance(given, str):
        if not isinstance(add_special_tokens, bool):
            raise ValueError(f"add_special_tokens: {add_special_tokens!r:.60}; give true or false")
        return Text(given, add_special_tokens)
    if not isinstance(given, list):
        raise ValueError(f"prompt: {given!r:.60}; give text, a list of token ids, or a list of messages")
    if given and all(isinstance(entry, Mapping) for entry in given):
        if not all(isinstance(entry.get(key), str) for entry in given for key in ("role", "content")):
            raise ValueError("prompt: a message without role or content; give both as text")
        return Chat.of(given)
    return given
