"""Whether two tokenizers read the same ids alike, by the texts that they make of them."""

from __future__ import annotations

from collections.abc import Sequence


def is_text_of(text: str, pieces: Sequence[str]) -> bool:
    """Whether a text is what some tokens say, one after the other, special tokens left out.

    Which tokens are special is not known here, so that any may be left out whole; but all of the text must be there. White space does not
    count, which tokenizers clean up, nor does what was no character.

    Args:
        text: by one tokenizer, without special tokens.
        pieces: by another, one for each token.
    """
    wanted = _compared(text)
    reached = {0}
    for piece in map(_compared, pieces):
        reached |= {place + len(piece) for place in reached if wanted.startswith(piece, place)}
    return len(wanted) in reached


def _compared(text: str) -> str:
    return "".join(text.replace("\ufffd", "").split())
