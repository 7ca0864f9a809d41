"""A tokenizer's fingerprint: the same for the same tokens, another for others."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from probescore import tokenizer_fingerprint

tokenizers = pytest.importorskip("tokenizers")

VOCABULARY = {"<s>": 0, "</s>": 1, "<unk>": 2, "Ġthe": 3, "é": 4}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def tokenizer(**vocabulary: int) -> Any:
    return tokenizers.Tokenizer(tokenizers.models.WordLevel({**VOCABULARY, **vocabulary}, unk_token="<unk>"))


def fast(**special: str) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer(), **{**SPECIAL, **special})


def test_the_formula_is_the_documented_one() -> None:
    content = '{"bos":"<s>","eos":"</s>","unk":"<unk>","vocab":[["<s>",0],["</s>",1],["<unk>",2],["\\u0120the",3],["\\u00e9",4]]}'

    assert tokenizer_fingerprint(tokenizer(), **SPECIAL) == "sha256:" + hashlib.sha256(content.encode()).hexdigest()


def test_the_order_in_which_a_vocabulary_is_given_does_not_count() -> None:
    backwards = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(reversed(VOCABULARY.items())), unk_token="<unk>"))
    assert tokenizer_fingerprint(backwards) == tokenizer_fingerprint(tokenizer())


def test_another_token_or_id_or_added_token_counts() -> None:
    added = tokenizer()
    added.add_tokens(["<tool>"])

    fingerprints = {tokenizer_fingerprint(entry) for entry in (tokenizer(), tokenizer(new=5), tokenizer(new=6), tokenizer(other=5), added)}

    assert len(fingerprints) == 5


@pytest.mark.parametrize("name", SPECIAL)
def test_which_tokens_are_special_counts(name: str) -> None:
    plain = tokenizer_fingerprint(tokenizer(), **SPECIAL)
    assert tokenizer_fingerprint(tokenizer(), **{**SPECIAL, name: "é"}) != plain
    assert tokenizer_fingerprint(tokenizer(), **{**SPECIAL, name: None}) != plain


def test_a_tokenizer_of_transformers_has_the_fingerprint_of_the_one_inside() -> None:
    assert tokenizer_fingerprint(fast()) == tokenizer_fingerprint(tokenizer(), **SPECIAL)


def test_what_trainers_change_does_not_count() -> None:
    trained = fast()
    trained.pad_token = trained.eos_token
    trained.padding_side = "left"
    trained.model_max_length = 7
    trained.chat_template = "{{ messages }}"

    assert tokenizer_fingerprint(trained) == tokenizer_fingerprint(fast())


def test_what_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a tokenizer with get_vocab\(\), got str"):
        tokenizer_fingerprint("gpt2")
