"""Each of the twelve warnings fires on made rollouts that have its fault, with the number in its text; on clean ones none does."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_rollouts import labelled, told_by_length
from models import BOS, tiny_model
from transformers import AutoModelForCausalLM

from probescore.types import Completion, Text
from probescore_probes import ReferenceModel
from probescore_probes.fitting import cross_validation, pooling_kinds
from probescore_probes.fitting.labelled_rollouts import LabelledRollout, Passage
from probescore_probes.fitting.options import FitOptions
from probescore_probes.fitting.pipeline import fit_probe

TAPS = ("resid_pre.0", "resid_post.0", "resid_post.1")
PROMPT, COMPLETION = np.arange(10, 18), np.arange(30, 38)
SPECIAL = 20
"""A word whose embedding is large in one model."""


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling_kinds, "_STEPS", 20)
        patch.setattr(cross_validation, "REPEATS", 1)
        yield


# ------------------------------------------------------------------------------------------------------------------------ made rollouts


@functools.cache
def small() -> ReferenceModel:
    return ReferenceModel.load(tiny_model(layers=2))


@functools.cache
def permutations(count: int, seed: int) -> tuple[list[tuple[list[int], list[int]]], np.ndarray]:
    """Rollouts of the same words in other orders, which no bag of words tells apart, with their mean activations after a block."""
    random = np.random.default_rng(seed)
    drawn = [sorted({tuple(random.permutation(words).tolist()) for _ in range(count + count // 4)}) for words in (PROMPT, COMPLETION)]
    prompts, completions = ([list(order[place]) for place in random.permutation(len(order))[:count]] for order in drawn)
    rollouts = [([BOS, *prompt], completion) for prompt, completion in zip(prompts, completions, strict=True)]
    return rollouts, np.stack([rows.mean(axis=0) for rows in small().completion_activations(rollouts, TAPS[1])])


@functools.cache
def direction(rank: int) -> np.ndarray:
    """The direction in which mean activations vary the most, or the next ones: random directions find the first, and not the twelfth."""
    _, means = permutations(400, 7)
    deviation = means.std(axis=0)
    _, vectors = np.linalg.eigh(np.cov((means / deviation).T))
    return vectors[:, -rank] / deviation


def told_by_order(count: int = 240, seed: int = 0, *, rank: int = 12, negatives: float = 0.0, name: str = "") -> list[LabelledRollout]:
    """The label is the side of a hyperplane through the mean activation: the highest sixth, and a sixth that begins at a given quantile."""
    rollouts, means = permutations(3 * count, seed)
    order, half = np.argsort(means @ direction(rank)), count // 2
    start = int(negatives * len(order))
    chosen = sorted([*((index, False) for index in order[start : start + half]), *((index, True) for index in order[-half:])])
    return [
        LabelledRollout(
            rollouts[index][0],
            Completion(rollouts[index][1]),
            None,
            f"line {place}",
            f"problem {place}",
            slice=name or "ab"[place % 2],
            passages=(Passage(0, len(COMPLETION), positive),),  # so that what is appended does not count
        )
        for place, (index, positive) in enumerate(chosen)
    ]


def is_positive(rollout: LabelledRollout) -> bool:
    return rollout.passages[0].positive


def flipped(rollouts: list[LabelledRollout]) -> list[LabelledRollout]:
    return [replace(each, passages=(replace(each.passages[0], positive=not is_positive(each)),)) for each in rollouts]


def answers(true: np.ndarray, false: np.ndarray) -> list[LabelledRollout]:
    """A true and a false answer of one word to each question; the two are one group."""
    random = np.random.default_rng(3)
    questions = [[BOS, *random.permutation(PROMPT).tolist()] for _ in true]
    return [
        LabelledRollout(question, Completion([4 + int(values[index])]), positive, f"line {index}", f"subject {index}")
        for values, positive in ((true, False), (false, True))
        for index, question in enumerate(questions)
    ]


def false_answers_at_random() -> list[LabelledRollout]:
    """D1: common answers are mostly true."""
    random, chances = np.random.default_rng(0), 1 / np.arange(1, 41)
    return answers(random.choice(40, 120, p=chances / chances.sum()), random.integers(0, 40, 120))


def deranged_answers() -> list[LabelledRollout]:
    """D2: each answer stands once on either side, in two groups."""
    return answers(np.arange(85), np.roll(np.arange(85), 1))


def told_by_log_probability() -> list[LabelledRollout]:
    rollouts, _ = permutations(720, 0)
    ids = torch.tensor([[*prompt, *completion] for prompt, completion in rollouts])
    with torch.inference_mode():
        known = small().model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    order = np.argsort(known[:, -len(COMPLETION) :].sum(-1).numpy())
    chosen = [*((index, True) for index in order[:120]), *((index, False) for index in order[-120:])]
    return [
        LabelledRollout(rollouts[index][0], Completion(rollouts[index][1]), positive, f"line {place}", str(place))
        for place, (index, positive) in enumerate(chosen)
    ]


def changed(rollouts: list[LabelledRollout] | None = None, **changes) -> list[LabelledRollout]:
    """Rollouts with other attributes; a function makes them of the place and the rollout."""
    return [
        replace(each, **{name: value(place, each) if callable(value) else value for name, value in changes.items()})
        for place, each in enumerate(rollouts or told_by_order())
    ]


def unreadable() -> list[LabelledRollout]:
    """Labels drawn at random."""
    labels = np.random.default_rng(1).permutation(np.arange(240) % 2 == 0)
    return changed(passages=lambda place, each: (replace(each.passages[0], positive=bool(labels[place])),))


def as_text(rollout: LabelledRollout) -> Text:
    return Text(" ".join(f"w{token}" for token in rollout.prompt[1:]), add_special_tokens=True)


def pairs_of_one_prompt() -> list[LabelledRollout]:
    rollouts = told_by_order()
    sides = [[each for each in rollouts if is_positive(each) is side] for side in (True, False)]
    return [
        replace(each, prompt=pair[0].prompt, group=f"pair {place}") for place, pair in enumerate(zip(*sides, strict=True)) for each in pair
    ]


def after_the_special_word() -> list[LabelledRollout]:
    return [
        replace(each, prompt=[], completion=Completion([SPECIAL, *each.completion.tokens]), passages=(Passage(0, 9, is_positive(each)),))
        for each in told_by_order()
    ]


@functools.cache
def model_with_a_sink(folder: str) -> str:
    """The tiny model, but that one word's embedding is 300 times as large."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(layers=2))
    with torch.no_grad():
        model.get_input_embeddings().weight[SPECIAL] *= 300
    model.save_pretrained(folder)
    small().tokenizer.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------------------------------------ warnings


def fitted(folder, rollouts, other=None, model=None, **options):
    asked = FitOptions(**{"name": "made", "taps": TAPS, "pools": ("mean",), "other_dtype": "", **options})
    far = told_by_order(60, 5, name="far") if other is None else other
    return fit_probe(rollouts, model or tiny_model(layers=2), folder / "made.onnx", asked, out_of_distribution=far)


def test_clean_rollouts_give_no_warning(tmp_path):
    result = fitted(tmp_path, told_by_order())
    assert result.warnings == ()
    assert result.verdict.grade == "sound"


CASES = {
    "1: false answers at random": (false_answers_at_random, {}, r"bag of words of completions: AUROC \.[67]\d\d \["),
    "1: deranged answers": (deranged_answers, {}, r"bag of words of completions: AUROC \.[01]\d\d \[.* An inverted leak"),
    "2: length": (lambda: labelled(told_by_length(160)), {}, r"length: AUROC 1\.000 \["),
    "2: log P": (told_by_log_probability, {}, r"−log P of the tokens: AUROC 1\.000 \["),
    "2: random directions": (lambda: told_by_order(rank=1), {}, r"best of 20 random directions: AUROC \.9\d\d \["),
    "3: no groups": (lambda: changed(group=None), {}, r"240 groups were derived from equal prompts"),
    "3: shared texts": (
        lambda: changed(prompt=lambda place, _: told_by_order()[place % 9].prompt),
        {},
        r"^9 prompts and 0 completions stand both in",
    ),
    "4: few groups": (lambda: changed(group=lambda place, _: str(place % 30)), {}, r"^30 groups; fewer than 40"),
    "4: few negatives": (told_by_order, {"false_positive_rate": 0.01}, r"^2\d negatives to calibrate on; .* 0\.01 takes at least 100"),
    "5: nothing else": (told_by_order, {"other": []}, r"^0 sets"),
    "6: flagged more": (
        told_by_order,
        {"other": lambda: told_by_order(60, 5, negatives=0.6, name="near")},
        r"flags \d+\.\d% \[.*\] of its 30 negatives, against \d+\.\d%",
    ),
    "7: inverted": (
        told_by_order,
        {"other": lambda: flipped(told_by_order(60, 5, name="negated"))},
        r"AUROC \.0\d\d \[.*\] on 60 rollouts: the probe reads something else",
    ),
    "8: position 0": (
        after_the_special_word,
        {"model": model_with_a_sink, "other": []},
        r"in 100% of examples, with \d+ × the median norm",
    ),
    "9: forms": (
        lambda: changed(prompt=lambda place, each: as_text(each) if place % 3 == 0 else each.prompt),
        {},
        r"^160 ids, 80 text with special tokens\.",
    ),
    "9: BOS mixed": (
        lambda: changed(prompt=lambda place, each: each.prompt[place % 4 == 0 :]),
        {},
        r"^180 examples begin with BOS and 60 do not",
    ),
    "9: without BOS": (lambda: changed(prompt=lambda _, each: each.prompt[1:]), {"other": []}, r"^240 examples, none with BOS"),
    "10: text appended": (
        lambda: changed(told_by_order(rank=3), positive=lambda _, each: is_positive(each), passages=()),
        {},
        r"^AUROC .* scores shift by [+-]\d+\.\d\d σ\. False alarms \d+\.\d% \(before \d+\.\d%\)",
    ),
    "11: the model does not know": (pairs_of_one_prompt, {}, r"it tells 5\d% of 120 pairs of one prompt apart"),
    "12: a gap": (unreadable, {}, r"on what was held out: a gap of 0\.\d\d"),
    "12: the edge": (told_by_order, {"taps": ("resid_post.0", "attn_out.1", "resid_post.1")}, r"the first of 3 that were swept"),
}


IN_EVERY_RUN = ("1: deranged answers", "3: shared texts", "7: inverted")  # each is a whole fit; the others are for the sweep


@pytest.mark.parametrize("case", [case if case in IN_EVERY_RUN else pytest.param(case, marks=pytest.mark.sweep) for case in CASES])
def test_a_warning_fires_on_rollouts_with_its_fault_and_says_its_number(case, tmp_path):
    make, changes, says = CASES[case]
    changes = {**changes, **{name: changes[name]() for name in ("other",) if callable(changes.get(name))}}
    if "model" in changes:
        changes["model"] = changes["model"](str(tmp_path / "model"))
    number = int(case.split(":")[0])
    found = fitted(tmp_path, make(), **changes).warnings
    texts = [warning.text for warning in found if warning.number == number]
    assert any(re.search(says, text) for text in texts), found
