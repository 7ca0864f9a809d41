"""Finds the texts and chats of a request, and limits their length. They must be tokenised before the request's rollouts can be checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from probescore.types import Chat, Completion, RolloutGroup, Text, TokenIds
from probescore_server.errors import LimitExceeded


@dataclass(frozen=True, slots=True)
class PendingText:
    """Value object with a text or chat of a request that must be tokenised before the request can be checked.

    Attributes:
        field: the path of the text or chat in the request, such as ``groups[0].prompt`` or ``groups[2].completions[0].follow_ups[1]``.
        content: a ``str`` for the text of a completion or follow-up (token ids appended to a completion); a ``Text`` or a ``Chat`` for a
            prompt.
    """

    field: str
    content: str | Text | Chat

    @property
    def bytes(self) -> int:
        """Counts the UTF-8 bytes of a text that must be tokenised or, for a chat, of the roles and contents of all messages."""
        match self.content:
            case str():
                return utf8_bytes(self.content)
            case Text():
                return utf8_bytes(self.content.text)
            case Chat():
                return sum(utf8_bytes(message.role) + utf8_bytes(message.content) for message in self.content.messages)


def utf8_bytes(text: str) -> int:
    """Counts the bytes of a text in UTF-8; returns 0 for a value that is not a string.

    An unpaired surrogate is counted, not refused. The tokenizer later refuses both such a text and a value that is not a string.
    """
    if not isinstance(text, str):
        return 0
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def pending_texts(groups: Sequence[RolloutGroup]) -> list[PendingText]:
    """Returns each prompt, completion and follow-up (text that continues a completion) of a request that is given as text or chat instead
    of token ids, in the request's order.
    """
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
    """Value object with the limits on rendering one chat by the model's chat template.

    Attributes:
        max_bytes: the largest number of UTF-8 bytes of the rendered text.
        max_seconds: the largest number of seconds that rendering may take.
    """

    max_bytes: int
    max_seconds: float


def check_texts(
    texts: Sequence[PendingText], *, max_rollout_tokens: int, max_request_tokens: int, max_text_bytes_per_token: int, max_chat_messages: int
) -> None:
    """Refuses texts of a request that are too long, before they are tokenised. The limits are in bytes, computed from the limits on tokens.

    Args:
        texts: all texts and chats of the request.
        max_rollout_tokens: the largest number of tokens of one rollout.
        max_request_tokens: the largest number of tokens of the request.
        max_text_bytes_per_token: the factor from a limit on tokens to a limit on UTF-8 bytes. One text is limited by
            ``max_rollout_tokens``, all texts together by ``max_request_tokens``.
        max_chat_messages: the largest number of messages of one chat.

    Raises:
        LimitExceeded: a text or chat is too long; the error names the text's path, ``groups`` for all texts together, or
            ``groups[i].prompt.chat.messages``.
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
    """Refuses a text that is too long to be tokenised. The text is one that the client sent or that a chat template rendered.

    Args:
        size: number of UTF-8 bytes of the text.
        field: path of the text in the request.
        most: the largest number of UTF-8 bytes that is allowed.

    Raises:
        LimitExceeded: ``size`` is larger than ``most``; the error names ``field``.
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
    """Returns a completion of a request as a ``Completion``, which is made here if the request gives only token ids or a text."""
    return completion if isinstance(completion, Completion) else Completion(completion)
