"""Writes the rollouts of a view to a file: lines of JSON, Parquet, or a page that needs nothing else."""

from __future__ import annotations

import html
import importlib
import io
import json
import re
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from probescore_audit.report.words import escaped
from probescore_review.columns import ProbeReading, probe_readings
from probescore_review.index import Index
from probescore_review.queries import Queries
from probescore_review.rollout import Rollouts

MOST_OF_PAGE = 500
"""Most rollouts of a page, which is to be read."""
MOST_OF_PARQUET = 200_000
_AT_ONCE = 200
_PAGE_LETTERS = 20_000
_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
article { border-top: 1px solid #8886; padding: .8rem 0; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, monospace; margin: .4rem 0; }
.facts { opacity: .8; margin: .2rem 0; } .prompt { opacity: .75; }
span[data-s] { background: rgb(220 80 40 / calc(var(--s) * 60%)); } span[data-b] { background: rgb(60 120 220 / calc(var(--s) * 40%)); }
"""


class Export:
    """Writes a run's rollouts for others.

    Args:
        index: the index of the record.
        queries: reads rows of the table.
        rollouts: reads single rollouts.
    """

    def __init__(self, index: Index, queries: Queries, rollouts: Rollouts) -> None:
        self._index = index
        self._queries = queries
        self._rollouts = rollouts

    def lines(self, numbers: array[int]) -> Iterator[bytes]:
        """Yields a line of JSON for each rollout: its row, every score, texts and labels."""
        for row in self._whole(numbers):
            yield json.dumps(row).encode() + b"\n"

    def parquet(self, numbers: array[int]) -> bytes:
        """Returns the rollouts as a Parquet file, a row each; scores of other reductions, and labels, are JSON in a column each.

        Raises:
            ValueError: there are too many, or pyarrow is not installed.
        """
        if len(numbers) > MOST_OF_PARQUET:
            raise ValueError(f"parquet: {len(numbers):,} rollouts; filter to at most {MOST_OF_PARQUET:,}, or take jsonl")
        try:
            arrow, files = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise ValueError("parquet: needs pyarrow: pip install pyarrow; or take jsonl") from None
        target = io.BytesIO()
        rows = [
            {name: json.dumps(value) if name in ("scores", "labels") else _whole_text(value) for name, value in row.items()}
            for row in self._whole(numbers)
        ]
        files.write_table(arrow.Table.from_pylist(rows), target)
        return target.getvalue()

    def page(self, numbers: array[int], title: str) -> bytes:
        """Returns a page with the first rollouts, their tokens coloured by the first probe: without scripts, and loading nothing."""
        first = next(iter(probe_readings(self._index)), None)
        shown = numbers[:MOST_OF_PAGE]
        note = f"{len(numbers):,} rollouts" + (f", of which the first {MOST_OF_PAGE} are here" if len(numbers) > len(shown) else "")
        body = "".join(self._article(row, first) for row in self._rows(shown))
        policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
            f'<meta name="viewport" content="width=device-width"><title>{escaped(title)}</title><style>{_STYLE}</style></head>'
            f"<body><main><h1>{escaped(title)}</h1><p>{note}</p>{body}</main></body></html>"
        ).encode("utf-8", "replace")

    def _rows(self, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        for first in range(0, len(numbers), _AT_ONCE):
            yield from self._queries.shown(numbers[first : first + _AT_ONCE])

    def _whole(self, numbers: array[int]) -> Iterator[dict[str, Any]]:
        for row in self._rows(numbers):
            try:
                long_parts = self._rollouts.texts(row["rollout"])
                labels = self._rollouts.labels(row["step"], row["name"])
            except KeyError:  # training has gone back behind it meanwhile
                continue
            yield {name: value for name, value in row.items() if name != "snippet"} | long_parts | {"labels": labels}

    def _article(self, row: dict[str, Any], first: ProbeReading | None) -> str:
        try:
            found = self._rollouts.found(row["rollout"])
        except KeyError:
            return ""
        facts = [
            f"{name} {row[name]:.4g}" if isinstance(row[name], float) else f"{name} {row[name]}"
            for name in row
            if name not in ("rollout", "name", "snippet", "group", "labelled_by", "tokens") and row[name] is not None
        ]
        prompt = f'<pre class="prompt">{escaped(found["prompt"][:_PAGE_LETTERS])}</pre>' if found["prompt"] else ""
        return (
            f"<article><h2><bdi>{escaped(row['rollout'])}</bdi></h2><p class='facts'><bdi>{escaped(', '.join(facts))}</bdi></p>{prompt}"
            f"<pre>{_coloured(found, first)}</pre></article>"
        )


def file_name(run: str, view: str, ending: str) -> str:
    """Returns a name for an export of letters, digits and hyphens."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{run}-{view or 'rollouts'}").strip("-.")[:100] + f".{ending}"


def _coloured(found: dict[str, Any], first: ProbeReading | None) -> str:
    tokens = (found["tokens"] or [])[:2000]
    key = "" if first is None else f"{first.probe}:{first.reading}"
    scores = [each["scores"].get(key) for each in tokens]
    known = [value for value in scores if value is not None]
    if first is None or not known:
        return escaped((found["completion"] or "")[:_PAGE_LETTERS])
    middle = first.threshold if first.threshold is not None else 0.0
    reach = max(abs(value - middle) for value in known) or 1.0
    parts, letters = [], 0
    for token, value in zip(tokens, scores, strict=True):
        text = escaped(token["text"][: _PAGE_LETTERS - letters])
        letters += len(token["text"])
        if value is None:
            parts.append(text)
        else:
            side = "data-s" if value >= middle else "data-b"
            parts.append(f'<span {side} style="--s:{abs(value - middle) / reach:.2f}" title="{html.escape(f"{value:.3g}")}">{text}</span>')
        if letters >= _PAGE_LETTERS:
            parts.append(" …")
            break
    return "".join(parts)


def _whole_text(value: object) -> object:
    """Returns a text without halves of characters, which Parquet cannot hold."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
