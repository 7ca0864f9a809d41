"""What value types say of themselves."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probescore.types import OutputPer, ProbeInfo, ScoredProbe, ScoreUnit, Usage, named_probe, version_order


def test_a_total_is_the_sum_of_every_number() -> None:
    one = Usage(*range(1, 1 + len(fields(Usage))))
    assert Usage.total([one, Usage(), one]) == Usage(*(2 * getattr(one, each.name) for each in fields(Usage)))
    assert Usage.total([]) == Usage()


def test_the_tokens_of_an_answer_are_those_that_reading_each_rollout_by_itself_would_compute() -> None:
    assert Usage(tokens_computed=1, tokens_shared=10, tokens_cached=100, queue_seconds=1000).tokens == 111


def test_a_probe_is_known_by_its_name_and_version() -> None:
    scored = ScoredProbe("cheating", "2", "", "", ScoreUnit.LOGIT, OutputPer.TOKEN, (), ())
    loaded = ProbeInfo("cheating", "2", "", "", "", (), ScoreUnit.LOGIT, OutputPer.TOKEN, (), None, (), (), "")
    assert scored.key == loaded.key == "cheating@2"


@pytest.mark.parametrize(
    "ascending",
    [
        ("1", "2", "9", "10", "100"),
        ("1", "1.1", "1.9", "1.10", "1.10.1", "2"),
        ("2026-01-31", "2026-02-01", "2026-10-01"),
        ("v1", "v2", "v10", "v10b"),
        ("01", "1", "02"),
    ],
)
def test_numbers_in_versions_compare_as_numbers(ascending: tuple[str, ...]) -> None:
    for lower, higher in combinations(ascending, 2):
        assert version_order(lower) < version_order(higher)


@given(st.lists(st.from_regex(r"[0-9A-Za-z][0-9A-Za-z._+-]{0,5}", fullmatch=True), unique=True, max_size=8))
def test_any_two_versions_have_an_order(versions: list[str]) -> None:
    assert all(version_order(one) != version_order(other) for one, other in combinations(versions, 2))
    assert sorted(versions, key=version_order) == sorted(sorted(versions), key=version_order)


def test_a_bare_name_means_the_highest_version_whose_file_is_there() -> None:
    one = ProbeInfo("cheating", "9", "", "", "", (), ScoreUnit.LOGIT, OutputPer.TOKEN, (), None, (), (), "")
    probes = [one, replace(one, version="10"), replace(one, version="11", retired=True), replace(one, name="mood", version="12")]
    meant = [named_probe(name, probes) for name in ("cheating", "cheating@9", "cheating@11", "mood", "nobody", "mood@1")]
    assert [probe and probe.key for probe in meant] == ["cheating@10", "cheating@9", "cheating@11", "mood@12", None, None]
    assert named_probe("cheating", probes[2:]) is None
