"""Text to ids and back: no BOS unasked, never twice; a completion is never put through a template."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import BOS, UNK, VOCAB_SIZE, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from probescore.types import Chat, ChatMessage, Text
from probescore_server.backbone.time_limit import TimeLimitExceeded, time_limit
from probescore_server.backbone.tokenizer import TextEncoder
from probescore_server.errors import InvalidRequest, LimitExceeded
from probescore_server.validation.texts import ChatLimits

ENCODER = TextEncoder(tiny_tokenizer())
USER, ASSISTANT = VOCAB_SIZE - 2, VOCAB_SIZE - 1


def byte_level() -> TextEncoder:
    """A tokenizer of one token per byte, as byte-level BPE falls back to."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TextEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def test_bos_is_never_added_unasked() -> None:
    assert ENCODER.encode_prompt("w7 w8", "prompt").tolist() == [7, 8]
    assert ENCODER.encode_prompt(Text("w7 w8"), "prompt").tolist() == [7, 8]
    assert ENCODER.encode_completion("w7 w8", "completion").tolist() == [7, 8]


def test_special_tokens_are_added_to_a_prompt_if_asked_for() -> None:
    assert ENCODER.encode_prompt(Text("w7", add_special_tokens=True), "prompt").tolist() == [BOS, 7]


def test_bos_twice_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"BOS \(1\) twice") as caught:
        ENCODER.encode_prompt(Text("<s> w7", add_special_tokens=True), "groups[3].prompt")
    assert caught.value.field == "groups[3].prompt"
    assert ENCODER.encode_prompt(Text("<s> w7"), "prompt").tolist() == [BOS, 7]


def test_chat_is_rendered_up_to_the_completion() -> None:
    chat = Chat((ChatMessage("user", "w7"), ChatMessage("assistant", "w8"), ChatMessage("user", "w9")))
    assert ENCODER.encode_prompt(chat, "prompt").tolist() == [BOS, USER, 7, ASSISTANT, 8, USER, 9, ASSISTANT]


def test_template_that_writes_bos_is_not_given_another() -> None:
    encoder = TextEncoder(tiny_tokenizer())
    encoder._tokenizer.chat_template = "<s> <s> w7"  # type: ignore[union-attr]
    with pytest.raises(InvalidRequest, match="twice"):
        encoder.encode_prompt(Chat((ChatMessage("user", "hi"),)), "prompt")


def test_template_that_refuses_is_the_callers_error() -> None:
    encoder = TextEncoder(tiny_tokenizer())
    encoder._tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"  # type: ignore[union-attr]
    with pytest.raises(InvalidRequest, match="refuses the messages: roles must alternate"):
        encoder.encode_prompt(Chat((ChatMessage("user", "hi"),)), "prompt")


def test_chat_without_messages_or_template_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="at least one message"):
        ENCODER.encode_prompt(Chat(()), "prompt")
    with pytest.raises(InvalidRequest, match="without a chat template"):
        byte_level().encode_prompt(Chat((ChatMessage("user", "hi"),)), "prompt")


def test_without_a_tokenizer_texts_are_refused() -> None:
    encoder = TextEncoder(None)
    for refuse in (lambda: encoder.encode_completion("a", "f"), lambda: encoder.encode_prompt("a", "f")):
        with pytest.raises(InvalidRequest, match="f: the model came without a tokenizer"):
            refuse()
    with pytest.raises(InvalidRequest, match="without a chat template"):
        encoder.encode_prompt(Chat((ChatMessage("user", "hi"),)), "f")
    assert encoder.special_ids.dtype == np.int32


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="not valid Unicode"):
        ENCODER.encode_completion("\ud800", "completion")


def test_empty_text_is_no_ids() -> None:
    assert ENCODER.encode_completion("", "completion").shape == (0,)


def test_pieces_of_words_keep_the_space_before_them() -> None:
    assert ENCODER.decode_tokens([7, 8, BOS]) == ["w7", " w8", " <s>"]
    assert ENCODER.decode_tokens([]) == []
    assert TextEncoder(tiny_tokenizer()).encode_completion("what", "c").tolist() == [UNK]


def test_character_of_several_tokens_stands_with_its_last() -> None:
    encoder = byte_level()
    ids = encoder.encode_completion("aé", "completion")
    assert len(ids) == 3
    assert encoder.decode_tokens(ids) == ["a", "", "é"]
    assert encoder.decode_tokens(ids[:2]) == ["a", "\ufffd"]


@given(st.text(max_size=12))
def test_pieces_together_are_the_text(text: str) -> None:
    encoder = byte_level()
    ids = encoder.encode_completion(text, "completion")
    pieces = encoder.decode_tokens(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


# ------------------------------------------------------------------------------------------------------------------- what it may take

CHAT = Chat((ChatMessage("user", "w5 w6"),))


def with_template(template: str) -> TextEncoder:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return TextEncoder(tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i * j %}{% endfor %}{% endfor %}",
    ],
    ids=["without output", "with output", "with work"],
)
def test_a_template_that_takes_too_long_is_ended_and_the_next_is_not(template: str) -> None:
    encoder = with_template(template)
    with pytest.raises(InvalidRequest, match=r"max_chat_seconds \(0\.2\)") as refused:
        encoder.encode_prompt(CHAT, "groups[0].prompt", ChatLimits(max_bytes=1 << 30, max_seconds=0.2))
    assert (refused.value.field, refused.value.reason) == ("groups[0].prompt", "LIMIT_EXCEEDED")
    assert ENCODER.encode_prompt(CHAT, "prompt", ChatLimits(max_bytes=100, max_seconds=10)).tolist()


@pytest.mark.parametrize("spare", [0, -1])
def test_a_rendered_chat_may_be_as_long_as_a_text_and_no_longer(spare: int) -> None:
    encoder = with_template("{{ messages[0]['content'] * 10 }}")
    limits = ChatLimits(max_bytes=50 + spare, max_seconds=10)
    if spare == 0:
        assert len(encoder.encode_prompt(CHAT, "prompt", limits)) > 0
        return
    with pytest.raises(LimitExceeded, match="50 bytes of text") as refused:
        encoder.encode_prompt(CHAT, "prompt", limits)
    assert refused.value.field == "prompt"


def test_what_ends_in_time_is_not_interrupted() -> None:
    for _ in range(200):
        with time_limit(0.005):
            sum(range(100))
        with pytest.raises(KeyError), time_limit(0.005):
            raise KeyError
    deadline = time.monotonic() + 0.05
    while time.monotonic() < deadline:
        pass


def for_ever() -> None:
    while True:
        pass


def test_what_takes_too_long_is_interrupted_within_its_block() -> None:
    for _ in range(20):
        with pytest.raises(TimeLimitExceeded), time_limit(0.01):
            for_ever()


def test_tokens_that_never_make_a_character_cost_no_more_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = byte_level()
    decoded = 0
    decode = TextEncoder._decode

    def counting(self: TextEncoder, tokens: list[int]) -> str:
        nonlocal decoded
        decoded += len(tokens)
        return decode(self, tokens)

    monkeypatch.setattr(TextEncoder, "_decode", counting)
    (lone,) = set(encoder.encode_completion("\u0080", "c").tolist()[1:])  # a byte that continues a character
    count = 3000
    pieces = encoder.decode_tokens([lone] * count)
    assert len(pieces) == count
    assert "".join(pieces) == decode(encoder, [lone] * count)
    assert decoded < 40 * count


KEEPS_INTERRUPTIONS = """
import sys, time
from probescore_server.backbone.time_limit import TimeLimitExceeded, time_limit

if "traced" in sys.argv:
    sys.settrace(lambda *_: None)
for _ in range(20):
    try:
        with time_limit(0.01):
            end = time.monotonic() + 0.03
            while time.monotonic() < end:
                try:
                    for _ in range(1000):
                        pass
                except BaseException:
                    pass
    except TimeLimitExceeded:  # now and then it comes outside of the inner block
        pass
    for _ in range(1000):
        sorted("nothing arrives any more", key=lambda letter: letter)
"""


@pytest.mark.parametrize("under", ["nothing", "traced"])
def test_a_block_that_keeps_the_interruption_ends_all_the_same(under: str) -> None:
    """Given code that catches everything, then no interruption is waited for that has come already, and none comes later."""
    subprocess.run([sys.executable, "-c", KEEPS_INTERRUPTIONS, under], timeout=60, check=True)
