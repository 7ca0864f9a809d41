"""Text that others wrote can neither command a terminal, nor reorder a line, nor hide."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probescore_server.cli.common.visible import visible


@given(st.text())
def test_no_character_that_commands_or_hides_is_left(text):
    shown = visible(text)

    assert {unicodedata.category(character) for character in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"} <= {"Cc"}
    assert {character for character in shown if unicodedata.category(character) == "Cc"} <= {"\n", "\t"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain naïve 日本語", "plain naïve 日本語"),
        ("\x1b[31m", "⟨1B⟩[31m"),
        ("\x9b31m", "⟨9B⟩31m"),
        ("a\u202eb", "a⟨202E⟩b"),
        ("a\u200bb", "a⟨200B⟩b"),
        ("\r\n", "⟨0D⟩↵\n"),
        ("\t", "⇥\t"),
    ],
)
def test_what_is_shown(text, shown):
    assert visible(text) == shown
