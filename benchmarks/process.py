"""A variant as the run sees it: a process that scores units when it is told to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.loads import Unit
from benchmarks.variants import Job

PACKAGES = ("client", "server", "probes")


def environment_of(checkout: Path | None) -> dict[str, str]:
    """The environment variables of a process that runs the packages of a checkout; ``None`` = those of this process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if checkout is not None:
        environment["PYTHONPATH"] = os.pathsep.join(str((checkout / package).resolve()) for package in PACKAGES)
    return environment


class VariantFailed(Exception):
    """A variant could not be loaded, or could not score; says why."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """One unit, scored once.

    Attributes:
        scores: as ``Scored.scores``.
        peak_bytes: largest so far, above the weights.
        facts: whatever else the variant says.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    scores: NDArray[np.float32] | None
    facts: dict[str, Any]


class VariantProcess:
    """A context manager that ends the process.

    Args:
        job: what it loads.
        python: of its environment.
        checkout: directory of another version of the packages, which is measured in place of this one; ``None`` = this one.

    Raises:
        VariantFailed: it could not be loaded.
    """

    def __init__(self, job: Job, python: str = sys.executable, checkout: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="probescore-benchmark-")
        self._unit, self._scores = Path(self._folder.name, "unit.npz"), Path(self._folder.name, "scores.npz")
        self._log = Path(self._folder.name, "log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.worker", job.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**environment_of(checkout), "OMP_NUM_THREADS": str(job.threads)},
            )
        try:
            self._answer()
        except VariantFailed:
            self.close()
            raise

    def warm_up(self, unit: Unit) -> dict[str, Any]:
        """Lets it find its best settings; says what they are, and ``weights_bytes``."""
        return self._ask("warm_up", unit)

    def score(self, unit: Unit) -> Measurement:
        """Scores a unit, after what comes earlier."""
        if unit.earlier:
            self._ask("remember", unit)
        self._scores.unlink(missing_ok=True)
        facts = self._ask("score", unit)
        scores = np.load(self._scores)["scores"] if self._scores.exists() else None
        measured = (facts.pop(name) for name in ("wall_seconds", "cpu_seconds", "peak_bytes"))
        return Measurement(*measured, scores, facts)

    def _ask(self, what: str, unit: Unit) -> dict[str, Any]:
        unit.save(self._unit)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, "unit": str(self._unit), "scores": str(self._scores)}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; why is found where its answer would be
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            said = [line for line in self._log.read_text().splitlines() if line.strip()]
            raise VariantFailed(said[-1].strip() if said else f"exit code {self._process.returncode}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends it and what it has started."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
