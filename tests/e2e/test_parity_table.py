"""docs/reference/parity.md has the families that ``make parity`` runs, and says of them what is true."""

from __future__ import annotations

import re

import pytest
from parity_families import FAMILIES
from parity_table import BOUND, Row, documented, measure, table

ALWAYS = ["Gemma 4", "Llama 4 (vision)", "LFM2", "OPT-350M (narrow, norms after)", "Mamba", "Qwen2.5-VL"]
"""One of each kind of answer, and what was refused that need not be; the others: make parity."""


def rows() -> dict[str, str]:
    """By family the row of the table in the docs, without its last cell."""
    lines = [line[2:-2].split(" | ") for line in documented().splitlines() if line.startswith("| ") and "`model_type`" not in line]
    return {cells[0]: " | ".join(cells[:-1]) for cells in lines}


def test_the_docs_have_the_families_of_the_code() -> None:
    assert list(rows()) == list(FAMILIES)


@pytest.mark.parametrize("name", ALWAYS)
def test_what_the_docs_say_of_a_family_is_so(name: str) -> None:
    row = measure(FAMILIES[name])
    assert row.facts == rows()[name]
    assert row.difference <= BOUND


def test_every_refusal_says_what_to_do() -> None:
    reasons = re.findall(r"^- (.+?): (.*)$", documented().partition("### Not packed")[0], re.MULTILINE)
    assert len(reasons) >= 10
    for family, reason in reasons:
        assert re.search(r"read resid_pre\.\d or resid_post\.\d instead|parity\.md lists|serve a model of text alone", reason), family


def test_the_counts_are_of_the_rows() -> None:
    some = [*FAMILIES.values()][:4]
    refused = ((("`attn_out`", "why; read resid_pre.0 or resid_post.0 instead")),)
    found = [
        Row(some[0], "no"),
        Row(some[1]),
        Row(some[2], refused=refused, difference=2e-6),
        Row(some[3], keeps_key_values=True, not_packed="no"),
    ]
    assert table(found).startswith(
        "4 families: 3 served, 2 of them at every hook; 1 keep prompts in the cache, 2 can run packed. Largest difference 2.0e-06."
    )
