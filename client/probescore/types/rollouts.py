"""Defines what a request scores: rollout groups, with prompts and completions as token ids, text or chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Union

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Scope(str, Enum):
    """Enumeration of the parts of a rollout whose tokens can be scored: the completion, the prompt, or both."""

    COMPLETION = "completion"
    PROMPT = "prompt"
    ALL = "all"


@dataclass(frozen=True)
class Text:
    """A prompt as text, which the server tokenises; the scores are then flagged ``inexact_ids``.

    Attributes:
        text: the prompt's text.
        add_special_tokens: whether the tokenizer adds its special tokens, such as BOS. The server refuses a text that starts with BOS
            already if the tokenizer would add a second BOS.
    """

    text: str
    add_special_tokens: bool = False


@dataclass(frozen=True)
class ChatMessage:
    """One message of a conversation; ``role`` is the author's role by the name that the model's chat template uses, such as ``"user"``."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """A conversation that serves as a prompt, without the completion; the server renders the conversation with the model's chat
    template.
    """

    messages: tuple[ChatMessage, ...]

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, str]]) -> Chat:
        """Makes a conversation from a list of dictionaries ``{"role": …, "content": …}``."""
        return cls(tuple(ChatMessage(message["role"], message["content"]) for message in messages))


@dataclass(frozen=True)
class Span:
    """A named half-open range ``[start, end)`` of a completion's tokens, which a server scores separately; indices count from the
    completion's first token.
    """

    name: str
    start: int
    end: int


TokenIds = Union[NDArray[np.integer[Any]], Sequence[int]]
"""Token ids as an array ``(T,)`` of integers, which are used unchanged."""


@dataclass(frozen=True, eq=False)
class Completion:
    """A completion to score: the tokens that follow a prompt.

    Attributes:
        tokens: token ids ``(T,)``, used unchanged, EOS included; or a ``str`` that the server tokenises without adding special tokens.
        mask: ``(T,)`` of 0 and 1, 1 = the token counts in reductions; ``None`` = all tokens count.
        spans: named parts of the completion that are scored separately, under the mask. Names must be unique.
        follow_ups: token ids appended to the finished completion, such as a question about it. The model reads each follow-up as a fork of
            this completion, without recomputing the completion. A follow-up may have follow-ups of its own.
        id: a name chosen by the caller, which comes back with the scores.
    """

    tokens: TokenIds | str
    mask: ArrayLike | None = None
    spans: tuple[Span, ...] = ()
    follow_ups: tuple[Completion, ...] = ()
    id: str = ""


@dataclass(frozen=True, eq=False)
class RolloutGroup:
    """A prompt and its completions; the server computes the prompt once for all its completions.

    Attributes:
        prompt: token ids ``(P,)``, used unchanged (no BOS is added), a ``str``, a ``Text`` or a ``Chat``.
        completions: the completions, each as a ``Completion`` or as its tokens only.
    """

    prompt: TokenIds | str | Text | Chat
    completions: Sequence[Completion | TokenIds | str]
