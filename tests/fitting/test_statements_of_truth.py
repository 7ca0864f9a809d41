"""The statements of `make truth`: no text tells which are false."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "truth"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import statements
    import topics

    yield statements, topics
    for name in ("questions", "statements", "topics"):
        sys.modules.pop(name, None)


def test_in_a_pair_each_answer_and_each_prompt_stands_once_on_either_side(modules):
    statements, topics = modules
    known = {"Paris": "France", "Bonn": "Germany", "Rome": "Italy"}
    facts = [topics.Fact(f"{city} is a city in", country) for city, country in known.items()]
    pairs = [(facts[0], facts[1]), (facts[2], facts[0])]
    for negated in (False, True):
        lines = statements.lines_of(pairs, "cities", negated=negated)
        assert {line["group"] for line in lines} == {"cities 0", "cities 1"}
        for field in ("prompt", "completion"):
            sides = Counter((line["group"], line[field], line["label"]) for line in lines)
            assert set(sides.values()) == {1}
            assert len(sides) == 2 * len({(line["group"], line[field]) for line in lines})
        true = [line for line in lines if line["prompt"].startswith("Paris") and line["completion"] == " France."]
        assert [line["label"] for line in true] == [negated, negated]
        assert ("is not a city" in true[0]["prompt"]) is negated


def test_each_statement_has_a_question(modules):
    from questions import question

    assert question("The currency of Japan is the") == "What is the currency of Japan?"
    assert question("The chemical symbol of gold is") == "What is the chemical symbol of gold?"
    assert question("Peru is a country in") == "Which continent is Peru in?"
    assert question("Paris is not a city in") == "Which country is the city of Paris not in?"
    assert question("Paris is a city in") == "Which country is the city of Paris in?"
    assert question("17 + 25 =") == "What is 17 + 25?"
    assert question("51 is larger than") == "Which number is 51 larger than?"
    with pytest.raises(ValueError, match="no statement of a topic"):
        question("Paris was")


def test_a_pair_of_sums_or_comparisons_is_true_as_it_stands_and_false_when_swapped(modules):
    import random

    _, topics = modules
    for seed in range(200):
        first, second = topics._sums(random.Random(seed))
        assert [sum(map(int, fact.stem.rstrip("= ").split("+"))) for fact in (first, second)] == [int(first.value), int(second.value)]
        assert first.value != second.value
        larger, smaller = topics._comparisons(random.Random(seed))
        of = [int(fact.stem.split()[0]) for fact in (larger, smaller)]
        assert of[0] > int(larger.value)
        assert of[0] < int(smaller.value)
        assert of[1] < int(smaller.value)
        assert of[1] > int(larger.value)
