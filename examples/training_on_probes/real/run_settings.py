"""What a run needs to know; apart from training, so that who starts a run need not load TRL."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fixed import RECIPE


@dataclass(frozen=True)
class RunSettings:
    """What a run needs to know.

    Attributes:
        condition: name of one of ``CONDITIONS``.
        seed: of the facts' halves, the prompts and the sampling.
        model, direction: folder of the model before training, and file of the probe's weights, which the condition in the loss needs.
        folder: of the run, which the server sees as well.
        address: of the server.
        steps, prompts, samples: of training, of a step, and answers to each prompt.
    """

    condition: str
    seed: int
    model: str
    direction: str
    folder: str
    address: str
    steps: int = RECIPE.steps
    prompts: int = RECIPE.prompts
    samples: int = RECIPE.samples

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1))


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that is whole: its state is written last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
