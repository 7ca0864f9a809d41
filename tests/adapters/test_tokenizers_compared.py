"""Ids of another vocabulary are noticed, also where a trainer shows texts and no tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import BOS, EOS, tiny_tokenizer
from running_server import RunningServer

from probescore import MismatchError, tokenizer_fingerprint
from probescore_adapters import ProbeScorer, ProbeSignal, Rollout, score_rollouts
from probescore_adapters.texts import is_text_of

RAW = ProbeSignal("cheating", mode="reward")
IDS = [[7, 8, EOS], [9, EOS], [EOS]]
TEXTS = ["w7 w8", "w9", ""]
PROMPTS = [[BOS, 5]] * 3


@given(st.lists(st.tuples(st.text(min_size=1, max_size=4), st.booleans()), max_size=8))
def test_what_is_left_of_some_pieces_is_their_text(pieces: list[tuple[str, bool]]) -> None:
    assert is_text_of("".join(piece for piece, kept in pieces if kept), [piece for piece, _ in pieces])


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("w8 w7", ["w7", " w8"]),
        ("w7 w8", ["w7", " w9"]),
        ("w7 w8 w9", ["w7", " w8"]),
        ("w7w", ["w7", "w8"]),
        ("w7", []),
    ],
)
def test_another_text_is_none(text: str, pieces: list[str]) -> None:
    assert not is_text_of(text, pieces)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("w7 w8", ["▁w7".replace("▁", " "), " w8", "</s>"]),
        ("w7w8", ["w7", "", " w8\n"]),
        ("é\ufffd", ["", "é", "\ufffd\ufffd"]),
        ("", ["</s>"]),
    ],
)
def test_white_space_special_tokens_and_halves_of_characters_do_not_count(text: str, pieces: list[str]) -> None:
    assert is_text_of(text, pieces)


def test_text_that_repeats_itself_for_long_is_compared_at_once() -> None:
    """Given what a policy that has come apart writes; sets of places would take minutes."""
    assert is_text_of("!" * 32_000, ["!"] * 32_000)
    assert not is_text_of("!" * 32_001, ["!"] * 32_000)


def test_words_of_these_tests_are_these_ids() -> None:
    assert [tiny_tokenizer().decode(ids, skip_special_tokens=True) for ids in IDS] == TEXTS


def test_texts_of_the_same_tokenizer_are_taken(served: RunningServer) -> None:
    scorer = ProbeScorer(RAW, served.address)
    found = score_rollouts(scorer, PROMPTS, IDS, texts=TEXTS)
    assert found.terms.tolist() == score_rollouts(scorer, PROMPTS, IDS).terms.tolist()


def test_texts_of_another_vocabulary_end_the_scoring(served: RunningServer) -> None:
    scorer = ProbeScorer(RAW, served.address)
    for _ in range(2):  # and the second try is no better
        with pytest.raises(MismatchError, match="the ids are of another vocabulary") as refused:
            score_rollouts(scorer, PROMPTS, IDS, texts=["w8 w9", "w10", ""])
        assert "tokenizer_fingerprint" in str(refused.value)


def test_texts_are_compared_once(served: RunningServer) -> None:
    scorer = ProbeScorer(RAW, served.address)
    before = len(served.events("scored"))
    score_rollouts(scorer, PROMPTS, IDS, texts=TEXTS)
    served.wait_for("scored", count=before + 2)  # the scores, and the texts
    before = len(served.events("scored"))
    score_rollouts(scorer, PROMPTS, IDS, texts=TEXTS)
    served.wait_for("scored", count=before + 1)
    assert len(served.events("scored")) == before + 1


def test_required_tokenizer_is_enough(served: RunningServer) -> None:
    """Given a tokenizer that is known to be the same, then nobody looks at how it writes texts."""
    scorer = ProbeScorer(RAW, served.address, tokenizer_fingerprint=tokenizer_fingerprint(tiny_tokenizer()))
    score_rollouts(scorer, PROMPTS, IDS, texts=["W8 W9", "W10", ""])


def test_rollout_that_cannot_be_scored_is_not_compared(served: RunningServer) -> None:
    scorer = ProbeScorer(RAW, served.address)
    rollouts = [Rollout(PROMPTS[0], [7, 10**6]), Rollout(PROMPTS[0], IDS[0])]
    assert scorer.score(rollouts, texts=["anything", TEXTS[0]]).unscorable.tolist() == [True, False]
