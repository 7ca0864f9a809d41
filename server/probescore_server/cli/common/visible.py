"""Makes text safe to show on a terminal or a page: tokens, ids and descriptions in probe files can contain any character."""

from __future__ import annotations

import unicodedata

_MARKED = {"\n": "↵\n", "\t": "⇥\t"}
# Cc: control characters of terminals; Cf: zero-width and bidirectional; Co, Cn, Cs: no shape; Zl, Zp: line breaks in a browser
_SPELT_OUT = frozenset(("Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp"))


def visible(text: str) -> str:
    """Replaces control characters, bidirectional overrides and other invisible characters of a text by their code points, such as ``⟨1B⟩``;
    line breaks and tabs are kept, each after a visible mark.
    """
    return "".join(_MARKED.get(character) or _spelt_out(character) for character in text)


def spelt_out(text: str) -> str:
    """Replaces invisible characters of a text by their code points, such as ``⟨1B⟩``, but leaves line breaks and tabs as they are, since
    the text is already laid out.
    """
    return text if text.isprintable() else "".join(character if character in _MARKED else _spelt_out(character) for character in text)


def one_line(message: object) -> str:
    """Returns a message as a single line, with invisible characters replaced by their code points, such as ``⟨1B⟩``."""
    return visible(" ".join(str(message).split("\n")))


def visible_json(written: str) -> str:
    """Returns a JSON text with its invisible characters written as JSON escapes, so that a terminal does not interpret them; the values
    that the text stands for do not change.
    """
    return written if written.isprintable() else "".join(map(_json_character, written))


def _spelt_out(character: str) -> str:
    return f"⟨{ord(character):02X}⟩" if unicodedata.category(character) in _SPELT_OUT else character


def _json_character(character: str) -> str:
    if unicodedata.category(character) not in _SPELT_OUT:
        return character
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))
