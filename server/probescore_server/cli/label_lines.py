"""Reads files of labels and of plans for labels, which have a JSON object in each line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def label_lines(file: str) -> Iterator[dict[str, Any]]:
    """Yields the lines of a file of labels as JSON objects; the name ``-`` stands for standard input.

    Raises:
        ValueError: a line is no JSON object; the message names the file and the line.
        OSError: the file cannot be read.
    """
    # only a line feed ends a line: texts may have other characters that str.splitlines takes for an end
    text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError:
            raise ValueError(f"{file}: line {number} is no JSON; give an object in each line") from None
        if not isinstance(values, dict):
            raise ValueError(f"{file}: line {number} is no JSON object; give one in each line")
        yield values
