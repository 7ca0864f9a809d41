"""Computes fingerprints of tokenizers, which show whether a trainer's is the one that a server runs before anything is sent."""

from __future__ import annotations

import hashlib
import json
from typing import Protocol


class Tokenizer(Protocol):
    """Describes what a tokenizer of ``transformers`` and a ``tokenizers.Tokenizer`` have in common."""

    def get_vocab(self) -> dict[str, int]:
        """Returns every token and its id, added tokens included."""
        ...


def tokenizer_fingerprint(
    tokenizer: Tokenizer, *, bos_token: str | None = None, eos_token: str | None = None, unk_token: str | None = None
) -> str:
    """Computes a fingerprint of what decides which id means what: the vocabulary with its added tokens, and which tokens are BOS, EOS and
    UNK.

    The padding token is left out, since trainers set it to one that exists already; so are the chat template and the settings of
    padding and truncation. A token that was added to the vocabulary does count.

    Args:
        tokenizer: of ``transformers``, slow or fast, or a ``tokenizers.Tokenizer``.
        bos_token: only for a ``tokenizers.Tokenizer``, which does not know its own; ``None`` if there is none.
        eos_token: likewise.
        unk_token: likewise.

    Returns:
        ``"sha256:…"`` over ``{"bos": …, "eos": …, "unk": …, "vocab": [[token, id], …]}`` in ASCII JSON without spaces, the vocabulary
        sorted by id, then token.

    Raises:
        TypeError: the tokenizer has no ``get_vocab()``.
    """
    if not hasattr(tokenizer, "get_vocab"):
        raise TypeError(f"expected a tokenizer with get_vocab(), got {type(tokenizer).__name__}")
    content = {
        "bos": getattr(tokenizer, "bos_token", bos_token),
        "eos": getattr(tokenizer, "eos_token", eos_token),
        "unk": getattr(tokenizer, "unk_token", unk_token),
        "vocab": sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0])),
    }
    return "sha256:" + hashlib.sha256(json.dumps(content, separators=(",", ":")).encode("ascii")).hexdigest()
