"""Texts and chats of a request, which must be tokenised before its rollouts can be checked, and how long they may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from probescore.types import Chat, Completion, RolloutGroup, Text, TokenIds
from probescore_server.errors import LimitExceeded


@dataclass(frozen=True, slots=True)
class PendingText:
    """Something to tokenise before its request can be checked.

    Attributes:
        field: where it stands in the request: ``groups[0].prompt``, ``groups[2].completions[0].follow_ups[1]``.
        content: a ``str`` is a completion's text; a prompt is a ``Text`` or a ``Chat``.
    """

    field: str
    content: str | Text | Chat

    @property
    def bytes(self) -> int:
        """Its UTF-8 bytes; of a chat, those of all roles and contents."""
        match self.content:
            case str():
                return utf8_bytes(self.content)
            case Text():
                return utf8_bytes(self.content.text)
            case Chat():
                return sum(utf8_bytes(message.role) + utf8_bytes(message.content) for message in self.content.messages)


def utf8_bytes(text: str) -> int:
    """How many bytes it takes. What is no text, or half a surrogate pair, is for the tokenizer to refuse."""
    if not isinstance(text, str):
        return 0
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def pending_texts(groups: Sequence[RolloutGroup]) -> list[PendingText]:
    """Everything in a request that came as text or chat, in the request's order; empty for a request of ids."""
    texts: list[PendingText] = []
    for i, group in enumerate(groups):
        match group.prompt:
            case str():
                texts.append(PendingText(f"groups[{i}].prompt", Text(group.prompt)))
            case Text() | Chat():
                texts.append(PendingText(f"groups[{i}].prompt", group.prompt))
        for j, completion in enumerate(group.completions):
            texts.extend(_continuation_texts(as_completion(completion), f"groups[{i}].completions[{j}]"))
    return texts


@dataclass(frozen=True)
class ChatLimits:
    """What rendering a chat may take: how long its text may become, in UTF-8 bytes, and how many seconds."""

    max_bytes: int
    max_seconds: float


def check_texts(
    texts: Sequence[PendingText], *, max_rollout_tokens: int, max_request_tokens: int, max_text_bytes_per_token: int, max_chat_messages: int
) -> None:
    """Refuses texts that are too long to be tokenised for what they could become.

    Raises:
        LimitExceeded: naming the text, ``groups`` for all together, or ``groups[i].prompt.chat.messages``.
    """
    total = 0
    for text in texts:
        if isinstance(text.content, Chat) and (count := len(text.content.messages)) > max_chat_messages:
            field = f"{text.field}.chat.messages"
            raise LimitExceeded(field, count, "messages", "max_chat_messages", max_chat_messages, "send the prompt as token ids or text")
        total += (size := text.bytes)
        check_text_bytes(size, text.field, max_text_bytes_per_token * max_rollout_tokens)
    if total > (most := max_text_bytes_per_token * max_request_tokens):
        limit = "max_text_bytes_per_token × max_request_tokens"
        raise LimitExceeded("groups", total, "bytes of text", limit, most, "send it in several requests, or as token ids", "TOO_LONG")


def check_text_bytes(size: int, field: str, most: int) -> None:
    """Refuses a text, as it came or as a template rendered it, that is too long to be tokenised.

    Raises:
        LimitExceeded: naming ``field``.
    """
    if size > most:
        limit = "max_text_bytes_per_token × max_rollout_tokens"
        raise LimitExceeded(field, size, "bytes of text", limit, most, "send a shorter text, or token ids", "TOO_LONG")


def _continuation_texts(completion: Completion, path: str) -> Iterator[PendingText]:
    if isinstance(completion.tokens, str):
        yield PendingText(path, completion.tokens)
    for index, follow_up in enumerate(completion.follow_ups):
        yield from _continuation_texts(follow_up, f"{path}.follow_ups[{index}]")


def as_completion(completion: Completion | TokenIds | str) -> Completion:
    """A completion that may have come as its tokens alone."""
    return completion if isinstance(completion, Completion) else Completion(completion)
