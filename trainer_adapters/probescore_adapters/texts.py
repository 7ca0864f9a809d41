"""Gets the texts of prompts and completions, and compares whether two tokenizers decode the same token ids to the same text."""

from __future__ import annotations

from collections.abc import Sequence

from probescore import Chat, Text


def is_text_of(text: str, pieces: Sequence[str]) -> bool:
    """Returns whether a text is the concatenation of the texts of some tokens, with special tokens left out.

    Which tokens are special is not known here, so that any token may be left out as a whole; but every part of the text must come from a
    token. White space is ignored, since tokenizers clean it up. Replacement characters (bytes that were not valid text) are ignored too.

    Args:
        text: text that one tokenizer decoded, without special tokens.
        pieces: texts that the other tokenizer decoded, one for each token.
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
    """Returns the positions at which a piece occurs in a text, as an integer whose bit ``i`` is 1 if the piece occurs at position ``i``."""
    places, at = 0, text.find(piece)
    while at >= 0:
        places |= 1 << at
        at = text.find(piece, at + 1)
    return places


def _compared(text: str) -> str:
    return "".join(text.replace("\ufffd", "").split())


def text_of(part: object) -> str | None:
    """Returns the text of a prompt or completion, of a chat with the roles; ``None`` if it is token ids."""
    if isinstance(part, str):
        return part
    if isinstance(part, Text):
        return part.text
    if isinstance(part, Chat):
        return "\n\n".join(f"{message.role}: {message.content}" for message in part.messages)
    return None
