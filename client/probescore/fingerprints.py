"""Computes fingerprints (digests) of tokenizers. Equal fingerprints show, before anything is sent, that a trainer and a server use the same
tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from typing import Protocol


class Tokenizer(Protocol):
    """Interface (Protocol) of a tokenizer: the method that tokenizers of ``transformers`` and ``tokenizers.Tokenizer`` have in common."""

    def get_vocab(self) -> dict[str, int]:
        """Returns a tokenizer's vocabulary: a dictionary from the text of every token, added tokens included, to its id."""
        ...


def tokenizer_fingerprint(
    tokenizer: Tokenizer, *, bos_token: str | None = None, eos_token: str | None = None, unk_token: str | None = None
) -> str:
    """Computes a digest of everything that determines the meaning of token ids: the vocabulary with its added tokens, and which tokens are
    BOS, EOS and UNK.

    The padding token is left out, since trainers set the padding token to an existing token. The chat template and the settings of padding
    and truncation are left out too. A token that was added to the vocabulary does count.

    Args:
        tokenizer: a slow or fast tokenizer of ``transformers``, or a ``tokenizers.Tokenizer``.
        bos_token: text of the BOS token; only for a ``tokenizers.Tokenizer``, which does not store it. ``None`` if there is no BOS token.
        eos_token: text of the EOS token, under the same rule.
        unk_token: text of the UNK token, under the same rule.

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
