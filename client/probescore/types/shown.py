"""Shows scored rollouts in a notebook, as HTML that needs nothing else and whose texts are never markup."""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Iterable, Sequence

_SPELT_OUT = frozenset(("Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp"))
_KEPT = {"\n": "↵\n", "\t": "⇥\t"}
_MOST_TOKENS = 2000
_MOST_LETTERS = 20_000


def escaped(text: object) -> str:
    """Returns text as HTML that shows it and never is markup; invisible characters stand as their code points, such as ``⟨1B⟩``."""
    shown = "".join(
        _KEPT.get(character) or (f"⟨{ord(character):02X}⟩" if unicodedata.category(character) in _SPELT_OUT else character)
        for character in str(text)
    )
    return html.escape(shown)


def shown_text(text: object) -> str:
    """Returns text as HTML that is no markup, cut where it is very long."""
    letters = str(text)
    return escaped(letters[:_MOST_LETTERS]) + (" …" if len(letters) > _MOST_LETTERS else "")


def shown_tokens(pieces: Sequence[str], scores: Sequence[float | None], middle: float = 0.0) -> str:
    """Returns tokens as HTML, coloured by their scores: red from the middle on, blue below it; a score shows under the pointer."""
    known = [abs(score - middle) for score in scores if score is not None and math.isfinite(score)]
    reach = max(known, default=0.0) or 1.0
    parts = []
    for piece, score in zip(pieces[:_MOST_TOKENS], scores, strict=False):
        if score is None or not math.isfinite(score):
            parts.append(shown_text(piece))
            continue
        colour = "220,80,40" if score >= middle else "60,120,220"
        strength = 0.6 * abs(score - middle) / reach
        parts.append(f'<span style="background:rgba({colour},{strength:.2f})" title="{score:.4g}">{shown_text(piece)}</span>')
    rest = " …" if len(pieces) > _MOST_TOKENS else ""
    return f'<pre style="white-space:pre-wrap">{"".join(parts)}{rest}</pre>'


def shown_table(head: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> str:
    """Returns a table as HTML; numbers have four digits, and ``None`` and NaN are empty."""

    def cell(value: object) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "<td></td>"
        return f'<td style="text-align:right">{value:.4g}</td>' if isinstance(value, float) else f"<td>{shown_text(value)}</td>"

    heads = "".join(f"<th>{shown_text(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(cell(value) for value in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>" + (f"<p>{shown_text(note)}</p>" if note else "")
