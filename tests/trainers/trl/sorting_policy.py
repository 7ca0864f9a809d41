"""The demo's model, trained briefly, a probe that is fitted on it, and what that probe must say: a plain Hugging Face forward.

Everything is made by this file run with the interpreter that has the server; the trainer's environment only reads it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

DEMO = Path(__file__).parents[3] / "examples" / "demo"
LAYER = 1
TOLERANCE = 1e-4  # × the standard deviation of the scores
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %} {{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class SortingPolicy:
    """A folder with the model and the probe ``cheating``."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> SortingPolicy:
        python = os.environ.get("PROBESCORE_SERVER_PYTHON", sys.executable)
        done = subprocess.run([python, __file__, str(folder)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(DEMO)})
        if done.returncode:
            raise RuntimeError(done.stderr)
        return cls(folder)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def probe(self) -> Path:
        return self.folder / "cheating.onnx"

    @cached_property
    def _backbone(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)

    def token_scores(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """Of each token of a completion, ``(T,)`` float64."""
        import torch

        fitted = np.load(self.folder / "fitted.npz")
        with torch.inference_mode():
            states = self._backbone(torch.tensor([[*prompt_ids, *completion_ids]]), output_hidden_states=True).hidden_states[LAYER + 1][0]
        return states[len(prompt_ids) :].double().numpy() @ fitted["weight"] + fitted["bias"]

    def scores(self, rollouts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> np.ndarray[Any, Any]:
        """The mean of each rollout, ``(n,)`` float64."""
        return np.array([self.token_scores(*rollout).mean() for rollout in rollouts])


def make(folder: Path) -> None:
    import random

    from pretraining import Recipe, trained_model
    from sampling import sample_rollouts
    from sklearn.linear_model import LogisticRegression
    from task import draw_distinct_problems
    from vocabulary import build_tokenizer

    from probescore_audit import calibrate
    from probescore_probes import ReferenceModel, sklearn_probe, write_probe

    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    recipe = Recipe(seed=0, steps=300, batch=64, steps_at_first=300)
    policy = trained_model(recipe, tokenizer, folder / "model", lambda: None)
    rollouts = sample_rollouts(policy, tokenizer, draw_distinct_problems(random.Random(0), 400), 0, lambda _done: None)
    reference = ReferenceModel.load(folder / "model")
    ids = [(rollout.prompt_ids, rollout.completion_ids) for rollout in rollouts]
    means = np.stack([rows.mean(axis=0) for rows in reference.completion_activations(ids, f"resid_post.{LAYER}", lambda _done: None)])
    cheating = np.array([rollout.cheating for rollout in rollouts])
    estimator = LogisticRegression(C=10.0, max_iter=5000).fit(means, cheating)
    np.savez(folder / "fitted.npz", weight=estimator.coef_[0], bias=estimator.intercept_[0])
    scores = estimator.decision_function(means[~cheating])
    write_probe(
        folder / "cheating.onnx",
        sklearn_probe(estimator),
        reference,
        name="cheating",
        version="1",
        taps=[f"resid_post.{LAYER}"],
        labels=["cheating"],
        reduction="mean",
        expects_bos=True,
        golden=ids[:4],
        calibrations=[calibrate(scores, false_positive_rate=0.05, dataset="honest rollouts", reduction="mean", label="cheating")],
    )


if __name__ == "__main__":
    make(Path(sys.argv[1]))
