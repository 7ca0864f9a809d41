"""Statements as questions that a user asks and a model answers: where the first numbers about probes of truth were measured."""

from __future__ import annotations

import re

FORMS = (
    (r"The (.+) is(?: the)?", r"What is the \1?"),
    (r"(.+) is a country in", r"Which continent is \1 in?"),
    (r"(.+) is (not )?a city in", r"Which country is the city of \1 \2in?"),
    (r"(\d+ \+ \d+) =", r"What is \1?"),
    (r"(\d+) is (larger|smaller) than", r"Which number is \1 \2 than?"),
)


def question(stem: str) -> str:
    """The question to which the rest of a statement is the answer: of ``The capital of France is``, ``What is the capital of France?``"""
    for statement, asked in FORMS:
        if re.fullmatch(statement, stem):
            return re.sub(statement, asked, stem)
    raise ValueError(f"{stem!r}: no statement of a topic begins so")
