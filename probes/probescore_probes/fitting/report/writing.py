"""Writes the report on a fitted probe to files: an HTML page and a JSON file beside the page."""

from __future__ import annotations

import json
from pathlib import Path

from probescore_probes.fitting.report.numbers import numbers_of
from probescore_probes.fitting.report.page import page
from probescore_probes.fitting.results import FitResult
from probescore_server.files import write_atomically


def check_writable(path: Path) -> None:
    """Checks that a report can be written to a path, before hours of fitting.

    Raises:
        ValueError: a report cannot be written there.
    """
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"report: {str(path)!r}; give a name that ends in .html, beside which its numbers go into a .json")
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"report: {str(path)!r} cannot be a file; give a place in a directory that there is")


def write_report(path: Path, result: FitResult) -> None:
    """Writes a report's HTML page, and its numbers as JSON under the same name with another ending; existing files are replaced.

    Raises:
        OSError: a file cannot be written.
    """
    write_atomically(path, page(result).encode())
    write_atomically(
        path.with_suffix(".json"), (json.dumps(numbers_of(result), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    )
