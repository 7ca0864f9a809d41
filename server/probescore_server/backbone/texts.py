"""Text to ids and ids to text. A prompt and its completion are tokenised apart, and no BOS is ever added unasked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from probescore.types import Chat, Text
from probescore_server.errors import InvalidRequest

_INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are not yet a character


class TextEncoder:
    """A tokenizer, or the lack of one.

    Args:
        tokenizer: ``None`` if the model came without.

    Attributes:
        bos_token_id: ``None`` if there is none.
        special_ids: of BOS, EOS and UNK, those that there are: the special tokens that a tokenizer's fingerprint tells of.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self.bos_token_id: int | None = None if tokenizer is None else tokenizer.bos_token_id
        named = [] if tokenizer is None else [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
        self.special_ids: NDArray[np.int32] = np.array([token for token in named if token is not None], np.int32)

    def encode_prompt(self, prompt: Text | Chat | str, field: str) -> NDArray[np.int32]:
        """Ids ``(P,)`` of a prompt.

        Raises:
            InvalidRequest: naming ``field``: there is no tokenizer or no chat template, the template refuses the messages, BOS comes twice.
        """
        match prompt:
            case Chat():
                ids = self._tokenise(self._render(prompt, field), field, add_special_tokens=False)
            case Text():
                ids = self._tokenise(prompt.text, field, add_special_tokens=prompt.add_special_tokens)
            case str():
                ids = self._tokenise(prompt, field, add_special_tokens=False)
        if len(ids) >= 2 and self.bos_token_id is not None and ids[0] == ids[1] == self.bos_token_id:
            raise InvalidRequest(field, f"begins with BOS ({self.bos_token_id}) twice: the text has one already", "BOS")
        return ids

    def encode_completion(self, text: str, field: str) -> NDArray[np.int32]:
        """Ids ``(T,)`` of a completion, without special tokens and never through a template.

        Raises:
            InvalidRequest: naming ``field``: there is no tokenizer.
        """
        return self._tokenise(text, field, add_special_tokens=False)

    def decode_tokens(self, ids: Sequence[int] | NDArray[np.int32]) -> list[str]:
        """The text of each token, for people; together they are the text of all.

        A character that is spread over several tokens stands with the last of them. Without a tokenizer: the ids.
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
            if text.endswith(_INCOMPLETE) and index + 1 < len(tokens):
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
        return np.array(self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"], np.int32)

    def _render(self, chat: Chat, field: str) -> str:
        if self._tokenizer is None or self._tokenizer.chat_template is None:
            raise InvalidRequest(field, "the model came without a chat template; send token ids or text", "NO_CHAT_TEMPLATE")
        if not chat.messages:
            raise InvalidRequest(field, "a chat needs at least one message")
        messages = [{"role": message.role, "content": message.content} for message in chat.messages]
        try:
            return str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # a template is a program of the model's author: it raises what it likes
            raise InvalidRequest(field, f"the model's chat template refuses the messages: {error}") from None
