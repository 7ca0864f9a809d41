"""Colours where there are colours, the same as plain text where there are none, and never a command to the terminal."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console
from views import answer, loaded_probe, probe_scores, scored_probe, threshold

from probescore import Completion, Reduction, UnmetCondition
from probescore_server.cli.report.terminal import print_rollouts
from probescore_server.cli.report.views import rollout_views, series_of

PROBE = scored_probe()
SERIES = series_of([PROBE], [loaded_probe(PROBE, threshold(2.0))])


def printed(completion: Completion, scores, texts, *, colours: bool, **console) -> str:
    output = io.StringIO()
    views = rollout_views("group 1", completion, answer(completion, texts, cheating=scores), SERIES)
    print_rollouts(
        Console(file=output, force_terminal=colours, color_system="truecolor" if colours else None, width=160, highlight=False, **console),
        views,
        SERIES,
    )
    return output.getvalue()


def test_plain_text_has_every_number_and_no_escape():
    text = printed(Completion([5, 6], mask=[1, 0]), probe_scores([2.5], [3.0, 1.0]), ["Hi", " there"], colours=False)

    assert "Hi[3.00]" in text
    assert "there[1.00 masked]" in text
    assert "mean 2.500" in text
    assert "● flagged" in text
    assert "threshold 2.000" in text
    assert "\x1b" not in text


def test_a_rollout_unlike_those_of_the_threshold_is_marked():
    unmet = (UnmetCondition("completion_length", Reduction.parse("mean")), UnmetCondition("prompt_shape", Reduction.parse("mean")))
    scores = replace(probe_scores([2.5], [3.0, 1.0]), unmet=unmet)
    text = printed(Completion([5, 6]), scores, ["Hi", " there"], colours=False)
    assert "threshold 2.000  not found on such rollouts: completion length, prompt shape" in text


def test_tokens_above_and_below_the_threshold_have_different_backgrounds():
    text = printed(Completion([5, 6, 7]), probe_scores([1.0], [9.0, -5.0, 2.0]), ["up", "down", "even"], colours=True)

    assert "48;2;204;58;12mup" in text
    assert "48;2;24;98;200mdown" in text
    assert "even" in text.split("\n")[3].rsplit("\x1b[0m", 1)[-1]
    assert "centre = threshold at 5% false positives (3.0% to 8.0%, 400 negatives)" in text


def test_masked_tokens_are_struck_through_and_have_no_colour():
    text = printed(Completion([5], mask=[0]), probe_scores([None], [9.0]), ["out"], colours=True)

    assert "\x1b[2;9mout" in text
    assert "absent" in text


def test_no_color_is_respected():
    text = printed(Completion([5]), probe_scores([1.0], [9.0]), ["up"], colours=True, no_color=True)

    assert "48;2" not in text
    assert "up[9.00]" in text


@pytest.mark.parametrize("colours", [True, False])
def test_a_token_cannot_command_the_terminal_or_use_markup(colours):
    text = printed(Completion([5, 6]), probe_scores([1.0], [9.0, 9.0]), ["\x1b]0;title\x07", "[red]x[/red]"], colours=colours)

    assert "⟨1B⟩]0;title⟨07⟩" in text
    assert "[red]x[/red]" in text


def test_a_long_prompt_is_shown_from_its_end():
    completion = Completion([5])
    scored = answer(completion, ["x"], cheating=probe_scores([1.0], [0.0]))
    (view,) = rollout_views("group 1", completion, scored, SERIES)
    output = io.StringIO()
    long = type(view)(view.title, view.context * 300 + view.tokens, view.tokens, "", True, (), view.scores)

    print_rollouts(Console(file=output, width=60), [long], SERIES)

    assert "… 401 tokens …  q<p> q" in output.getvalue()
    assert "<p> qx\n" in output.getvalue()
    assert "ids from text" in output.getvalue()


def test_a_rollout_that_could_not_be_scored_says_so():
    output = io.StringIO()
    (view,) = rollout_views("group 1", Completion([5]), answer(Completion([5]), cheating=probe_scores([1.0], [0.0])), SERIES)

    print_rollouts(Console(file=output, width=60), [type(view)(view.title, (), view.tokens, "NaN", False)], SERIES)

    assert "not scored: NaN" in output.getvalue()


def test_a_prompt_stands_once_above_its_completions():
    output = io.StringIO()
    views = [
        view
        for completion in (Completion([5]), Completion([6]))
        for view in rollout_views("group 1", completion, answer(completion, ["x"], cheating=probe_scores([1.0], [0.0])), SERIES)
    ]

    print_rollouts(Console(file=output, width=60), views, SERIES)

    assert output.getvalue().count("<p> q") == 1
