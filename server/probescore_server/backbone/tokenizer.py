"""Converts text to token ids and back.

A prompt and its completion are tokenised separately. A BOS token (the token that begins a sequence) is added only if a prompt asks for
special tokens or by its chat template.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from probescore.types import Chat, ChatMessage, Text
from probescore_server.backbone.time_limit import TimeLimitExceeded, time_limit
from probescore_server.errors import InvalidRequest
from probescore_server.validation.texts import ChatLimits, check_text_bytes, utf8_bytes

_INCOMPLETE = "\ufffd"  # a decoder writes this for bytes that are not yet a character

_DIFFERENT_MESSAGES = ("word", "7", "Why?", "x = [1]", "Yes.")
"""Messages without common characters at their ends, so that prompts made of them agree in what a chat template adds."""

_MAX_TOKENS_PER_CHARACTER = 8
"""Limits the number of tokens that are decoded together as one character. A character of four bytes has at most four tokens, and some
decoders put a space before it. A longer run of incomplete tokens is not a character.
"""


class TextEncoder:
    """Wrapper of a model's tokenizer, also for a model without one. Several threads may use a wrapper at the same time.

    Args:
        tokenizer: the tokenizer; ``None`` if the model has none.

    Attributes:
        bos_token_id: id of the token that begins a sequence; ``None`` if there is no such token.
        special_ids: ids of those of the tokens BOS, EOS and UNK that exist; the tokenizer's fingerprint covers these special tokens.
        further_special_ids: ids of all other special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self.bos_token_id: int | None = None if tokenizer is None else tokenizer.bos_token_id
        # A tokenizer written in Python may keep state of a call in itself; those written in Rust do not, once they were called.
        self._turn: AbstractContextManager[object] = nullcontext() if getattr(tokenizer, "is_fast", True) else threading.Lock()
        if tokenizer is not None:
            tokenizer("", add_special_tokens=False, verbose=False)
        named = [] if tokenizer is None else [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
        self.special_ids: NDArray[np.int32] = np.array([token for token in named if token is not None], np.int32)
        every = [] if tokenizer is None else [int(token) for token in tokenizer.all_special_ids if token is not None]
        self.further_special_ids: frozenset[int] = frozenset(every) - {*self.special_ids.tolist()}

    def encode_prompt(self, prompt: Text | Chat | str, field: str, limits: ChatLimits | None = None) -> NDArray[np.int32]:
        """Returns the token ids ``(P,)`` int32 of a prompt.

        Args:
            prompt: a text, or a chat, which the model's chat template renders.
            field: path of the prompt in the request, for error messages.
            limits: limits on the rendering of a chat; ``None`` = no limits.

        Raises:
            InvalidRequest: there is no tokenizer or no chat template, the template refuses the messages or takes too long for them, the
                rendered text is too long, or the ids begin with BOS twice; the error names ``field``.
        """
        match prompt:
            case Chat():
                ids = self._tokenise(self._render(prompt, field, limits), field, add_special_tokens=False)
            case Text():
                ids = self._tokenise(prompt.text, field, add_special_tokens=prompt.add_special_tokens)
            case str():
                ids = self._tokenise(prompt, field, add_special_tokens=False)
        if len(ids) >= 2 and self.bos_token_id is not None and ids[0] == ids[1] == self.bos_token_id:
            raise InvalidRequest(field, f"begins with BOS ({self.bos_token_id}) twice: the text has one already", "BOS")
        return ids

    def encode_completion(self, text: str, field: str) -> NDArray[np.int32]:
        """Returns the token ids ``(T,)`` int32 of a completion's text, without special tokens and without a chat template.

        Args:
            text: the text.
            field: path of the completion in the request, for error messages.

        Raises:
            InvalidRequest: there is no tokenizer, or the text is not valid Unicode; the error names ``field``.
        """
        return self._tokenise(text, field, add_special_tokens=False)

    def generation_prompt_ids(self) -> tuple[int, ...]:
        """Returns the token ids with which the model's chat template ends every prompt; empty if there is no template.

        They are the ids in which prompts that end with different messages of a user agree.
        """
        if self._tokenizer is None or self._tokenizer.chat_template is None:
            return ()
        try:
            prompts = [self.encode_prompt(Chat((ChatMessage("user", content),)), "chat") for content in _DIFFERENT_MESSAGES]
        except InvalidRequest:  # a template may refuse a single message of a user
            return ()
        unknown = self._tokenizer.unk_token_id  # different words may be the same unknown token
        ends = zip(*(prompt[::-1].tolist() for prompt in prompts), strict=False)
        alike = takewhile(lambda ids: len(set(ids)) == 1 and ids[0] != unknown, ends)
        return tuple(ids[0] for ids in alike)[::-1]

    def decode_tokens(self, ids: Sequence[int] | NDArray[np.int32]) -> list[str]:
        """Returns the text of each token, for people; joined, the texts are the text of the whole sequence.

        A character that consists of several tokens belongs to the text of the last of these tokens. Without a tokenizer the texts are the
        ids as numbers.
        """
        tokens = [int(token) for token in ids]
        if self._tokenizer is None:
            return [f"⟨{token}⟩" for token in tokens]
        pieces: list[str] = []
        # A token is decoded after those of the piece before it, since some decoders drop the space at the start of a text.
        start = done = 0
        for index in range(len(tokens)):
            before = self._decode(tokens[start:done])
            text = self._decode(tokens[start : index + 1])
            waits = text.endswith(_INCOMPLETE) and index - done + 1 < _MAX_TOKENS_PER_CHARACTER
            if waits and index + 1 < len(tokens):
                pieces.append("")
            else:
                pieces.append(text[len(before) :])
                start, done = done, index + 1
        return pieces

    def _decode(self, tokens: list[int]) -> str:
        if self._tokenizer is None or not tokens:
            return ""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _tokenise(self, text: str, field: str, *, add_special_tokens: bool) -> NDArray[np.int32]:
        if self._tokenizer is None:
            raise InvalidRequest(field, "the model came without a tokenizer; send token ids", "NO_TOKENIZER")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(field, "not valid Unicode: it holds half of a surrogate pair") from None
        with self._turn:
            return np.array(self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"], np.int32)

    def _render(self, chat: Chat, field: str, limits: ChatLimits | None) -> str:
        if self._tokenizer is None or self._tokenizer.chat_template is None:
            raise InvalidRequest(field, "the model came without a chat template; send token ids or text", "NO_CHAT_TEMPLATE")
        if not chat.messages:
            raise InvalidRequest(field, "a chat needs at least one message")
        messages = [{"role": message.role, "content": message.content} for message in chat.messages]
        try:
            with nullcontext() if limits is None else time_limit(limits.max_seconds):
                rendered = str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except TimeLimitExceeded:
            most = 0 if limits is None else limits.max_seconds
            problem = f"the model's chat template takes longer than max_chat_seconds ({most:g}) for these messages: send token ids or text"
            raise InvalidRequest(field, problem, "LIMIT_EXCEEDED") from None
        except Exception as error:  # a template is a program of the model's author and may raise anything
            raise InvalidRequest(field, f"the model's chat template refuses the messages: {error}") from None
        if limits is not None:
            check_text_bytes(utf8_bytes(rendered), field, limits.max_bytes)
        return rendered
