"""What the conditions of a seed have in common: the model before training, a probe that is fitted on it, and labelled rollouts of it."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from fitting import write_fitted_probe
from pretraining import Recipe, trained_model
from reporting import REPORTS, ReportingProblem, ReportingRecipe
from rich.console import Console
from sampling import SampledRollout, sample_rollouts
from serving import score_rollouts, server
from steps import step
from task import DIGITS, Problem, draw_distinct_problems
from transformers import PreTrainedTokenizerFast
from vocabulary import build_tokenizer


@dataclass(frozen=True)
class BaseSizes:
    """How much a base is made of.

    Attributes:
        pretraining_steps: of the model.
        fitting: rollouts that the probe is fitted and calibrated on.
        reference: other rollouts, drawn at random, that the audit compares with.
    """

    pretraining_steps: int = 800
    fitting: int = 2400
    reference: int = 5000


@dataclass(frozen=True)
class Base:
    """A folder with the model, the probe, and its scores of the reference."""

    folder: Path
    reports: bool

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def probe(self) -> Path:
        return self.folder / "cheating.onnx"

    @property
    def reference(self) -> Path:
        """Arrays: the ids of the reference's rollouts, what they are, and the probe's scores."""
        return self.folder / "reference.npz"

    @property
    def direction(self) -> Path:
        """Arrays of the probe: ``weight (width,)``, ``bias``, ``threshold`` of the mean over tokens."""
        return self.folder / "direction.npz"


def tokenizer_of(reports: bool) -> PreTrainedTokenizerFast:
    return build_tokenizer(REPORTS if reports else ())


def problems_of(reports: bool, source: str, count: int) -> list[Problem]:
    problems = draw_distinct_problems(random.Random(source), count)
    return [ReportingProblem(**vars(problem)) for problem in problems] if reports else problems


def read_by_probe(rollouts: Sequence[SampledRollout], reports: bool) -> list[SampledRollout]:
    """The rollouts as far as the probe reads them: without a report."""
    return [replace(rollout, completion_ids=rollout.completion_ids[:DIGITS]) for rollout in rollouts] if reports else list(rollouts)


def make_base(folder: Path, seed: int, reports: bool, sizes: BaseSizes, console: Console) -> Base:
    """Makes the base of a seed, unless it is there already."""
    base, settings = Base(folder, reports), json.dumps({"seed": seed, "reports": reports, **asdict(sizes)})
    mark = folder / "base.json"
    if mark.exists() and mark.read_text() == settings:
        return base
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    recipe = (ReportingRecipe if reports else Recipe)(seed, steps=sizes.pretraining_steps)
    tokenizer, title = tokenizer_of(reports), f"seed {seed}{', with reports' if reports else ''}"
    with step(console, f"{title}: train the model from scratch", recipe.steps) as advance:
        policy = trained_model(recipe, tokenizer, base.model, lambda: advance(1))
    problems = problems_of(reports, f"base {seed}", sizes.fitting + sizes.reference)
    with step(console, f"{title}: sample rollouts", len(problems)) as advance:
        rollouts = read_by_probe(sample_rollouts(policy, tokenizer, problems, seed, advance), reports)
    with step(console, f"{title}: fit the probe", sizes.fitting) as advance:
        fitted = write_fitted_probe(base.probe, base.model, rollouts[: sizes.fitting], seed, lambda: advance(1))
    np.savez(base.direction, weight=fitted.weight, bias=fitted.bias, threshold=fitted.threshold.threshold)
    others = rollouts[sizes.fitting :]
    with (
        step(console, f"{title}: score the reference", len(others)) as advance,
        tempfile.TemporaryDirectory() as short,
        server(base.model, base.probe, Path(short) / "socket", folder / "server.log") as address,
    ):
        scores = score_rollouts(address, others, lambda: advance(1))
    length = max(len(rollout.completion_ids) for rollout in others)
    np.savez(
        base.reference,
        prompt_ids=np.array([rollout.prompt_ids for rollout in others]),
        completion_ids=np.array([[*rollout.completion_ids, *[-1] * (length - len(rollout.completion_ids))] for rollout in others]),
        cheating=np.array([rollout.cheating for rollout in others]),
        solved=np.array([rollout.solved for rollout in others]),
        scores=scores,
    )
    mark.write_text(settings)  # last, so that an interrupted base is not taken for a finished one
    return base
