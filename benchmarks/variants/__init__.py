"""The ways to score: what each one is, and where it is."""

from __future__ import annotations

import importlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.loads import Unit


@dataclass(frozen=True)
class Job:
    """What a variant is told.

    Attributes:
        model: directory of the model.
        probes: probe files, for ours.
        directions: the file with the same probes' weights, ``(probes, hidden_size)``, for the others.
        layer: the block whose ``resid_post`` is read.
        concurrency: clients of the server.
        loaded: directory of an adapter that is loaded beside the frozen model and not asked for, for ours in process; empty = none.
    """

    variant: str
    model: str
    probes: tuple[str, ...]
    directions: str
    layer: int
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    concurrency: int = 8
    loaded: str = ""

    def to_json(self) -> str:
        """As the command line of a process carries it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The reverse of ``to_json``."""
        return cls(**json.loads(text))


@dataclass(frozen=True, eq=False)
class Scored:
    """What a unit gave.

    Attributes:
        scores: ``(completion tokens or completions, probes)``; ``None`` from the floor.
        facts: whatever else is to be known.
    """

    scores: NDArray[np.float32] | None
    facts: dict[str, Any] = field(default_factory=dict)


class Variant(Protocol):
    """A way to score. It lives in a process of its own (``benchmarks.worker``)."""

    def warm_up(self, unit: Unit) -> dict[str, Any]:
        """Untimed, with ids that do not come again: finds its best settings, and says what it chose."""

    def score(self, unit: Unit) -> Scored:
        """Timed."""

    def remember(self, unit: Unit) -> None:
        """Untimed: scores ``unit.earlier``, if it keeps anything of it."""

    def cpu_seconds(self) -> float:
        """That its processes have used so far."""

    def pids(self) -> list[int]:
        """Of the processes whose memory counts; none = the one it is in."""

    def close(self) -> None:
        """Ends what it has started."""


class InProcess:
    """What most variants have in common: they remember nothing and are one process."""

    def remember(self, unit: Unit) -> None:
        """Nothing to remember."""

    def cpu_seconds(self) -> float:
        """Of this process."""
        return time.process_time()

    def pids(self) -> list[int]:
        """This process."""
        return []

    def close(self) -> None:
        """Nothing to end."""


@dataclass(frozen=True)
class Kind:
    """Where a variant is, and the package that needs an environment of its own, if one does."""

    module: str
    title: str
    package: str = ""

    def load(self, job: Job) -> Variant:
        """Loads its model."""
        variant: Variant = importlib.import_module(f"benchmarks.variants.{self.module}").load(job)
        return variant


VARIANTS = {
    "a": Kind("hugging_face", "A: AutoModelForCausalLM, padded"),
    "a_sorted": Kind("hugging_face", "A, sorted by length"),
    "a2": Kind("hugging_face", "A2: AutoModel, padded"),
    "b": Kind("hugging_face", "B: cut off, one at a time"),
    "transformer_lens": Kind("transformer_lens", "TransformerLens, stop_at_layer", package="transformer-lens"),
    "nnsight": Kind("nnsight", "nnsight, stopped after the block", package="nnsight"),
    "engine": Kind("engine", "probescore, in process"),
    "server": Kind("server", "probescore, through a server"),
    "floor": Kind("floor", "floor: matrix products only"),
}
OURS = ("engine", "server")


def load(job: Job) -> Variant:
    """Loads the variant that a job names."""
    return VARIANTS[job.variant].load(job)


def file_paths(paths: list[Path] | tuple[Path, ...]) -> tuple[str, ...]:
    """Absolute, as another process needs them."""
    return tuple(str(path.resolve()) for path in paths)
