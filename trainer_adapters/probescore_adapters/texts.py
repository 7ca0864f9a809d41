"""Compares whether two tokenizers read the same ids alike, by the texts that they make of them."""

from __future__ import annotations

from collections.abc import Sequence


def is_text_of(text: str, pieces: Sequence[str]) -> bool:
    """Returns whether a text is what some tokens say, one after the other, special tokens left out.

    Which tokens are special is not known here, so that any may be left out whole; but all of the text must be there. White space does not
    count, which tokenizers clean up, nor does what was no character.

    Args:
        text: by one tokenizer, without special tokens.
        pieces: by another, one for each token.
    """
    wanted = _compared(text)
    # Which places can be reached, as bits, and at which a piece stands: sets would grow with the square of a text that repeats itself.
    reached, standing = 1, {"": 0}
    for piece in map(_compared, pieces):
        if piece not in standing:
            standing[piece] = _places(wanted, piece)
        reached |= (reached & standing[piece]) << len(piece)
    return bool(reached >> len(wanted) & 1)


def _places(text: str, piece: str) -> int:
    """Returns where a piece stands in a text, as bits."""
    places, at = 0, text.find(piece)
    while at >= 0:
        places |= 1 << at
        at = text.find(piece, at + 1)
    return places


def _compared(text: str) -> str:
    return "".join(text.replace("\ufffd", "").split())
