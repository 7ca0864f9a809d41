"""What value types say of themselves."""

from __future__ import annotations

from dataclasses import fields

from probescore.types import OutputPer, ProbeInfo, ScoredProbe, ScoreUnit, Usage


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
