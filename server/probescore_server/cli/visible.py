"""Text that others wrote, made safe to show: tokens, ids, and what a probe file says of itself can hold anything."""

from __future__ import annotations

import unicodedata

_MARKED = {"\n": "↵\n", "\t": "⇥\t"}
# Cc: what terminals obey; Cf: zero-width and bidirectional; Co, Cn, Cs: no shape; Zl, Zp: line breaks to a browser
_SPELT_OUT = frozenset(("Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp"))


def visible(text: str) -> str:
    """Spells out control characters, bidirectional overrides and whatever else has no shape; line breaks and tabs are marked and kept."""
    return "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
    if character in _MARKED:
        return _MARKED[character]
    return f"⟨{ord(character):02X}⟩" if unicodedata.category(character) in _SPELT_OUT else character
