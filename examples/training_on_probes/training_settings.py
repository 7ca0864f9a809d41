"""What a run needs to know; apart from training, so that who starts a run need not have TRL."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunSettings:
    """Written as JSON.

    Attributes:
        condition: its name.
        seed: of the problems, the sampling and the labels.
        base, folder: of the model before training with the probe and the reference, and of the run.
        address: of the server.
        steps: of training.
        prompts, samples: of a step, and completions of each prompt.
        read_every: steps between two loads of the policy as a reading.
        labels: of a step, for the audit.
        evaluated: fresh problems, with one rollout each, at the end.
    """

    condition: str
    seed: int
    base: str
    folder: str
    address: str = ""
    steps: int = 80
    prompts: int = 32
    samples: int = 8
    learning_rate: float = 3e-4
    read_every: int = 4
    labels: int = 32
    evaluated: int = 2048

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1))
