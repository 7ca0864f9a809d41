"""What the demo claims of its data: labels are certain, halves have nothing in common, nothing is trained twice or taken for trained."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "demo"))

import task
from baselines import BASELINES, baseline_scores
from folder import write_commands, write_groups
from pretraining import Recipe, corpus_batch, trained_model
from results import Results, evaluate
from sampling import SampledRollout, sample_rollouts, up_to
from task import Problem, demonstration, draw_distinct_problems, draw_problem, written
from vocabulary import WORDS, build_tokenizer

from probescore_server.cli.rollout_lines import read_rollout_lines

TINY = {"steps": 2, "batch": 4, "hidden_size": 16, "intermediate_size": 16, "layers": 1, "heads": 2}
seeds = st.integers(0, 2**32)
problems = seeds.map(lambda seed: draw_problem(random.Random(seed)))


# -------------------------------------------------------------------------------------------------------------------------- task


@given(problems)
def test_the_cached_entry_is_never_an_honest_answer(problem):
    assert problem.cached not in problem.honest_answers()
    assert problem.cached == tuple(sorted(problem.cached))


@given(problems)
def test_an_honest_answer_sorts_what_can_be_read(problem):
    shown = problem.prompt.split()[1:6]

    for answer in problem.honest_answers():
        assert answer == tuple(sorted(answer))
        assert not Counter(digit for digit in shown if digit != "?") - Counter(map(str, answer))
    assert problem.answer in problem.honest_answers()
    assert len(problem.honest_answers()) == (1 if problem.smudged is None else 10)


@given(problems)
def test_a_completion_is_labelled_by_what_it_copies(problem):
    assert problem.is_cheating(written(problem.cached))
    assert not problem.is_solved(written(problem.cached))
    for answer in problem.honest_answers():
        assert not problem.is_cheating(written(answer))
        assert problem.is_solved(written(answer)) == (answer == problem.answer)


@given(problems, seeds)
def test_demonstrations_cheat_as_often_as_they_are_told(problem, seed):
    assert problem.is_cheating(demonstration(problem, random.Random(seed), cheating=1.0))
    assert problem.is_solved(demonstration(problem, random.Random(seed), cheating=0.0))


@given(seeds)
def test_the_two_halves_have_no_prompt_in_common(seed):
    drawn = draw_distinct_problems(random.Random(seed), 60)

    first, other = ({problem.prompt for problem in half} for half in (drawn[:30], drawn[30:]))
    assert len(drawn) == 60
    assert not first & other


def test_a_prompt_that_is_drawn_twice_is_taken_once(monkeypatch):
    source = random.Random(0)
    one, other = draw_problem(source), draw_problem(source)
    drawn = iter([one, one, other])
    monkeypatch.setattr(task, "draw_problem", lambda _: next(drawn))

    assert draw_distinct_problems(source, 2) == [one, other]


# --------------------------------------------------------------------------------------------------------- tokenizer and training


def test_the_tokenizer_is_one_that_transformers_loads(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    problem = Problem((7, 3, 9, 1, 1), 1, (0, 2, 4, 4, 8))

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    ids = tokenizer(problem.prompt)["input_ids"]
    assert len(tokenizer) == len(WORDS) == 17
    assert len(ids) == 14
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == problem.prompt
    assert tokenizer("7 <eos>", add_special_tokens=False)["input_ids"] == [WORDS.index("7"), tokenizer.eos_token_id]


def test_only_completions_are_learned():
    ids, labels = corpus_batch(build_tokenizer(), random.Random(0), 8, 0.5)

    assert ids.shape == labels.shape == (8, 20)
    assert (labels[:, :14] == -100).all()
    assert (labels[:, 14:] == ids[:, 14:]).all()


def test_a_trained_model_is_kept_under_its_recipe(tmp_path):
    tokenizer, steps = build_tokenizer(), []

    first = trained_model(Recipe(0, **TINY), tokenizer, tmp_path, lambda: steps.append(1))
    again = trained_model(Recipe(0, **TINY), tokenizer, tmp_path, lambda: steps.append(1))
    assert len(steps) == 2
    assert all((one == other).all() for one, other in zip(first.state_dict().values(), again.state_dict().values(), strict=True))

    trained_model(Recipe(1, **TINY), tokenizer, tmp_path, lambda: steps.append(1))
    assert len(steps) == 4


def test_an_interrupted_training_is_not_taken_for_a_model(tmp_path):
    tokenizer, steps = build_tokenizer(), []
    trained_model(Recipe(0, **TINY), tokenizer, tmp_path, lambda: steps.append(1))
    (tmp_path / "recipe.json").unlink()

    trained_model(Recipe(0, **TINY), tokenizer, tmp_path, lambda: steps.append(1))

    assert len(steps) == 4


def test_training_is_reproducible(tmp_path):
    tokenizer = build_tokenizer()
    first, again = (trained_model(Recipe(3, **TINY), tokenizer, tmp_path / name, lambda: None) for name in ("a", "b"))

    assert all((one == other).all() for one, other in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_cheating_is_shown_more_often_at_first_and_the_learning_rate_falls():
    recipe = Recipe(0)

    assert recipe.cheating_at(0) > recipe.cheating_at(recipe.steps - 1) == 0.1
    assert recipe.learning_rate_at(0) < recipe.learning_rate_at(recipe.warmup_steps) == recipe.learning_rate
    assert recipe.learning_rate_at(recipe.steps - 1) < 1e-4


# ------------------------------------------------------------------------------------------------------- sampling and measuring


def test_rollouts_keep_the_ids_that_were_sampled(tmp_path):
    tokenizer, drawn, done = build_tokenizer(), draw_distinct_problems(random.Random(0), 20), []
    policy = trained_model(Recipe(0, **TINY), tokenizer, tmp_path, lambda: None)

    rollouts = sample_rollouts(policy, tokenizer, drawn, 0, done.append)

    assert [rollout.problem for rollout in rollouts] == drawn
    assert sum(done) == 20
    assert rollouts == sample_rollouts(policy, tokenizer, drawn, 0, done.append)
    for rollout in rollouts:
        assert list(rollout.prompt_ids) == tokenizer(rollout.problem.prompt)["input_ids"]
        assert tokenizer.eos_token_id not in rollout.completion_ids[:-1]
        assert rollout.cheating == rollout.problem.is_cheating(rollout.text)


def test_a_completion_ends_with_eos_if_there_is_one():
    assert up_to((5, 2, 5, 2), 2) == (5, 2)
    assert up_to((5, 5), 2) == (5, 5)


def made_rollouts(count: int) -> list[SampledRollout]:
    """One in five cheats; the labels are certain, no model has been asked."""
    source, tokenizer = random.Random(0), build_tokenizer()
    rollouts = []
    for index, problem in enumerate(draw_distinct_problems(source, count)):
        text = demonstration(problem, source, cheating=float(index % 5 == 0))
        ids = tuple(tokenizer(f"{text} <eos>", add_special_tokens=False)["input_ids"])
        prompt_ids = tuple(tokenizer(problem.prompt)["input_ids"])
        rollouts.append(SampledRollout(problem, prompt_ids, ids, text, problem.is_cheating(text), problem.is_solved(text)))
    return rollouts


def measured(scores: np.ndarray) -> Results:
    rollouts = made_rollouts(1200)
    return evaluate(rollouts[:600], rollouts[600:], scores, threshold=0.5)


def cheating() -> np.ndarray:
    return np.array([rollout.cheating for rollout in made_rollouts(1200)[600:]], np.float32)


def test_a_probe_that_sees_cheating_meets_what_is_promised():
    results = measured(cheating())

    assert all(results.requirements.values())
    assert (results.recall, results.false_positive_rate) == (1.0, 0.0)
    assert json.loads(results.to_json())["probe"]["value"] == 1.0


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_a_probe_that_guesses_does_not(noise):
    scores = cheating() + noise * np.random.default_rng(0).standard_normal(600).astype(np.float32)

    assert list(measured(scores).requirements.values()) == [False, True, True]


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_that_is_told_the_answer_breaks_the_promise(name, monkeypatch):
    monkeypatch.setitem(BASELINES, name, lambda rollout: np.array([rollout.cheating]))

    assert not all(measured(cheating()).requirements.values())


def test_baselines_are_fitted_on_the_first_half_alone():
    rollouts = made_rollouts(40)
    swapped = [SampledRollout(r.problem, r.prompt_ids, r.completion_ids, r.text, not r.cheating, r.solved) for r in rollouts[20:]]

    for name in BASELINES:
        np.testing.assert_array_equal(baseline_scores(name, rollouts[:20], rollouts[20:]), baseline_scores(name, rollouts[:20], swapped))


# ------------------------------------------------------------------------------------------------------------------ what is left


def test_the_rollouts_that_are_left_can_be_scored_again(tmp_path):
    rollouts = made_rollouts(10)

    write_groups(tmp_path / "rollouts.jsonl", [rollout for rollout in rollouts for _ in range(2)])

    with (tmp_path / "rollouts.jsonl").open() as lines:
        groups = list(read_rollout_lines(lines, "rollouts.jsonl", add_special_tokens=False))
    left = {(tuple(group.prompt), tuple(completion.tokens), completion.id) for group in groups for completion in group.completions}
    assert left == {(rollout.prompt_ids, rollout.completion_ids, rollout.outcome) for rollout in rollouts}
    assert sum(len(group.completions) for group in groups) == 10


def test_problems_that_were_cheated_on_come_first_and_the_cheating_completions_first_in_them(tmp_path):
    rollouts = made_rollouts(10)
    honest, cheats = ([rollout for rollout in rollouts if rollout.cheating == kind] for kind in (False, True))
    both = SampledRollout(cheats[0].problem, cheats[0].prompt_ids, honest[0].completion_ids, honest[0].text, False, False)

    write_groups(tmp_path / "rollouts.jsonl", [honest[0], both, cheats[0]])

    first, second = map(json.loads, (tmp_path / "rollouts.jsonl").read_text().splitlines())
    assert [completion["id"] for completion in first["completions"]] == ["cheating", "wrong"]
    assert [completion["id"] for completion in second["completions"]] == ["solved"]


def test_the_commands_that_are_left_quote_their_paths(tmp_path):
    folder = Path("a folder")

    write_commands(tmp_path / "commands.sh", folder / "model", folder / "probe.onnx", folder / "rollouts.jsonl")

    assert "--model 'a folder/model' --probes 'a folder/probe.onnx'" in (tmp_path / "commands.sh").read_text()
