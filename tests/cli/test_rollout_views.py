"""What people are shown is what was scored: the right tokens, the right numbers, and the threshold that holds for them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from views import answer, loaded_probe, probe_scores, scored_probe, threshold

from probescore import Completion, CompletionStatus, ProbeScores, Reduction, ScoreUnit, Span, UnmetCondition
from probescore_server.cli.report.views import ColourScale, rollout_views, series_of

CHEATING = scored_probe()
(PLAIN,) = series_of([CHEATING], [])


def view(completion: Completion, scores: ProbeScores, texts: list[str] | None = None, series=PLAIN):
    (shown,) = rollout_views("group 1", completion, answer(completion, texts, cheating=scores), [series])
    return shown


# ------------------------------------------------------------------------------------------------------------------------ series


def test_each_label_of_a_probe_can_be_chosen():
    series = series_of([scored_probe("mood", ["calm", "angry"]), CHEATING], [])

    assert [entry.name for entry in series] == ["mood · calm", "mood · angry", "cheating"]
    assert [entry.label for entry in series] == [0, 1, 0]


def test_two_versions_of_a_probe_are_told_apart():
    series = series_of([scored_probe(version="1"), scored_probe(version="2")], [])

    assert [entry.name for entry in series] == ["cheating@1", "cheating@2"]


@pytest.mark.parametrize(
    ("calibration", "holds"),
    [
        (threshold(2.0), True),
        (threshold(2.0, label="score"), True),
        (threshold(2.0, reduction="max"), False),
        (threshold(2.0, reduction=None), False),
        (threshold(2.0, label="other"), False),
    ],
)
def test_a_threshold_counts_only_for_its_own_reduction_and_label(calibration, holds):
    (series,) = series_of([CHEATING], [loaded_probe(CHEATING, calibration)])

    assert series.calibration == (calibration if holds else None)


def test_a_probe_that_pools_by_itself_has_a_threshold_without_a_reduction():
    pools = scored_probe(reductions=())

    (series,) = series_of([pools], [loaded_probe(pools, threshold(2.0, reduction=None))])

    assert series.centre == 2.0


def test_a_threshold_of_another_version_does_not_count():
    (series,) = series_of([CHEATING], [loaded_probe(dataclasses.replace(CHEATING, version="2"), threshold(2.0))])

    assert series.calibration is None


@pytest.mark.parametrize(("unit", "centre"), [(ScoreUnit.LOGIT, 0.0), (ScoreUnit.PROBABILITY, 0.5), (ScoreUnit.VALUE, 0.0)])
def test_without_a_threshold_the_scale_is_centred_on_its_unit(unit, centre):
    (series,) = series_of([scored_probe(unit=unit)], [])

    assert series.centre == centre


# ------------------------------------------------------------------------------------------------------------------------- views


def test_tokens_stand_with_their_own_text_id_and_score():
    shown = view(Completion([7, 8]), probe_scores([0.5], [-1.0, 2.0]), ["a", "\x1b"])

    assert [(token.id, token.text) for token in shown.tokens] == [(7, "a"), (8, "⟨1B⟩")]
    assert [(token.id, token.text) for token in shown.context] == [(1, "<p>"), (2, " q")]
    assert shown.scores["cheating"].tokens.tolist() == [-1.0, 2.0]
    assert shown.scores["cheating"].value == 0.5


def test_without_texts_the_ids_are_shown():
    assert [token.text for token in view(Completion([7, 8]), probe_scores([0.5], [0, 0])).tokens] == ["[7]", "[8]"]


def test_a_token_without_a_text_of_its_own_can_still_be_seen():
    assert view(Completion([7]), probe_scores([0.5], [0]), [""]).tokens[0].text == "·"


def test_masked_tokens_are_marked():
    assert [token.counts for token in view(Completion([7, 8], mask=[1, 0]), probe_scores([0.5], [0, 0])).tokens] == [True, False]


def test_spans_have_their_own_numbers_and_may_be_empty():
    shown = view(Completion([7, 8], spans=(Span("a", 0, 1), Span("b\x00", 1, 1))), probe_scores([0.5, 0.25, None], [0, 0]))

    assert shown.scores["cheating"].reduced == {"": (0.5,), "a": (0.25,), "b⟨00⟩": (None,)}
    assert [span.name for span in shown.spans] == ["a", "b⟨00⟩"]


def test_a_follow_up_is_shown_after_what_it_follows():
    completion = Completion([7], follow_ups=(Completion([8, 9]),))
    scores = {"cheating": probe_scores([0.5], [0.0])}
    scored = answer(completion, **scores)
    scored = dataclasses.replace(
        scored, follow_ups=(dataclasses.replace(answer(Completion([8, 9]), cheating=probe_scores([1.5], [1, 2])), prompt_ids=None),)
    )

    shown = rollout_views("group 1", completion, scored, [PLAIN])

    assert [entry.title for entry in shown] == ["group 1", "group 1 · follow-up 1"]
    assert [token.id for token in shown[1].context] == [1, 2, 7]
    assert shown[1].scores["cheating"].value == 1.5


def test_scores_of_a_probes_own_follow_up_are_not_put_on_the_completions_tokens():
    shown = view(Completion([7, 8]), probe_scores([0.5], [1.0, 2.0, 3.0]))

    assert shown.scores["cheating"].tokens is None
    assert shown.scores["cheating"].value == 0.5


def test_a_completion_that_could_not_be_scored_says_why():
    completion = Completion([7], id="x")
    scored = dataclasses.replace(answer(completion), status=CompletionStatus.NON_FINITE, status_message="NaN in resid_post.1")

    (shown,) = rollout_views("group 1", completion, scored, [PLAIN])

    assert (shown.title, shown.problem, shown.scores) == ("group 1 · x", "NaN in resid_post.1", {})


@pytest.mark.parametrize(("value", "flagged"), [(2.0, True), (1.99, False), (None, None)])
def test_a_rollout_is_flagged_from_the_threshold_on(value, flagged):
    (series,) = series_of([CHEATING], [loaded_probe(CHEATING, threshold(2.0))])

    assert view(Completion([7]), probe_scores([value], [0]), series=series).scores["cheating"].flagged is flagged


def test_a_rollout_unlike_those_of_its_threshold_says_so_and_of_no_other():
    (series,) = series_of([CHEATING], [loaded_probe(CHEATING, threshold(2.0))])
    mean, other = Reduction.parse("mean"), Reduction.parse("max")
    unmet = (UnmetCondition("prompt_shape", mean), UnmetCondition("prompt_length", other), UnmetCondition("scope", mean, "other"))

    def outside(value, of):
        scores = dataclasses.replace(probe_scores([value], [0]), unmet=of)
        return view(Completion([7]), scores, series=series).scores["cheating"].outside

    assert outside(2.5, unmet) == ("prompt shape",)
    # without a score there is nothing that a threshold could be wrong about
    assert outside(None, unmet) == ()


def test_without_a_threshold_nothing_is_flagged():
    assert view(Completion([7]), probe_scores([9.0], [0])).scores["cheating"].flagged is None


# ------------------------------------------------------------------------------------------------------------------------- scale


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30), st.floats(-100, 100))
def test_the_scale_is_monotonic_and_bounded_with_its_centre_at_the_threshold(scores, centre):
    (series,) = series_of([CHEATING], [loaded_probe(CHEATING, threshold(centre))])
    scale = ColourScale.of(series, [view(Completion(list(range(len(scores)))), probe_scores([scores[0]], scores), series=series)])

    positions = [scale.position(score) for score in sorted(scores)]

    assert positions == sorted(positions)
    assert all(-1 <= position <= 1 for position in positions)
    assert scale.position(centre) == 0


def test_one_outlier_does_not_pale_the_others():
    scores = [1.0] * 99 + [1000.0]

    scale = ColourScale.of(PLAIN, [view(Completion(list(range(100))), probe_scores([1.0], scores))])

    assert scale.position(1.0) > 0.9


def test_nothing_to_scale_is_still_a_scale():
    assert ColourScale.of(PLAIN, []).position(np.nan) == 0
