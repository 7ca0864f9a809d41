"""The model and the probe of the trainers' tests, and what that probe must say: a plain Hugging Face forward of one rollout at a time.

``Probed.make`` and ``Probed.scores`` run this file with the interpreter that has the server, so that a trainer's environment needs neither
torch nor the server.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

LAYER = 1
THRESHOLD = -0.5
TOLERANCE = 1e-4  # × the standard deviation of the scores

# as in ``models``, which needs torch
BOS, EOS, FIRST_WORD, VOCAB_SIZE = 1, 2, 4, 96

Ids = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Probed:
    """A tiny model and ``cheating``, a linear probe of it with a calibrated threshold."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Probed:
        _run("make", folder)
        return cls(folder)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def probe(self) -> Path:
        return self.folder / "cheating.onnx"

    def scores(self, rollouts: Sequence[Ids]) -> list[np.ndarray[Any, Any]]:
        """A score for each token of each completion, ``(T,)`` float64."""
        asked = json.dumps([[list(map(int, prompt)), list(map(int, completion))] for prompt, completion in rollouts])
        return [np.array(scores) for scores in json.loads(_run("scores", self.folder, asked))]


def random_rollouts(count: int, seed: int = 0, prompts: int = 2) -> list[Ids]:
    """Prompt and completion ids; of `count` rollouts `prompts` are different in the prompt."""
    random = np.random.default_rng(seed)
    starts = [[BOS, *random.integers(FIRST_WORD, VOCAB_SIZE, random.integers(3, 9)).tolist()] for _ in range(prompts)]
    lengths = random.integers(2, 12, count)
    return [(starts[i % prompts], [*random.integers(FIRST_WORD, VOCAB_SIZE, lengths[i]).tolist(), EOS]) for i in range(count)]


@functools.cache
def _run(command: str, folder: Path, stdin: str = "") -> str:
    python = os.environ.get("PROBESCORE_SERVER_PYTHON", sys.executable)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, __file__, command, str(folder)], input=stdin, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def _make(folder: Path) -> None:
    import shutil

    from models import HIDDEN_SIZE, tiny_model

    from probescore_audit import calibrate
    from probescore_probes import ReferenceModel, linear_probe, write_probe

    shutil.copytree(tiny_model(), folder / "model")
    random = np.random.default_rng(0)
    weight = random.standard_normal(HIDDEN_SIZE) / 8
    np.save(folder / "weight.npy", weight)
    calibration = calibrate(random.standard_normal(100), false_positive_rate=0.05, dataset="honest rollouts")
    golden = [([BOS, *random.integers(4, VOCAB_SIZE, 5)], random.integers(4, VOCAB_SIZE, 7)) for _ in range(2)]
    write_probe(
        folder / "cheating.onnx",
        linear_probe(weight),
        ReferenceModel.load(folder / "model"),
        name="cheating",
        version="1",
        taps=[f"resid_post.{LAYER}"],
        golden=golden,
        calibrations=[replace(calibration, threshold=THRESHOLD)],
    )


def _scores(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    weight = torch.from_numpy(np.load(folder / "weight.npy"))
    found = []
    for prompt, completion in json.load(sys.stdin):
        with torch.inference_mode():
            states = model(torch.tensor([prompt + completion]), output_hidden_states=True).hidden_states[LAYER + 1][0]
        found.append((states[len(prompt) :].double() @ weight).tolist())
    print(json.dumps(found))


if __name__ == "__main__":
    {"make": _make, "scores": _scores}[sys.argv[1]](Path(sys.argv[2]))
