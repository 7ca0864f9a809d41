"""The process of a variant: ``python -m benchmarks.worker JOB``. It reads commands, a JSON object a line, and answers in kind.

``{"do": "warm_up" | "score" | "remember", "unit": FILE, "scores": FILE}``. Runs in any environment that has torch and numpy.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import memory
from benchmarks.loads import Unit
from benchmarks.variants import Job, Variant, load


class Timed:
    """A variant, its clocks and its memory."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self._variant: Variant = load(job)
        self._pids = self._variant.pids() or [os.getpid()]
        self._on_device = job.device != "cpu" and not self._variant.pids()
        self._weights = 0

    def warm_up(self, unit: Unit) -> dict[str, Any]:
        """Brings the weights into memory with a few tokens before they are measured."""
        self._variant.score(unit.shortened())
        self._weights = self._reset_peak()
        chosen = self._variant.warm_up(unit)
        self._reset_peak()  # what was tried and not chosen does not count
        return {**chosen, "weights_bytes": self._weights}

    def remember(self, unit: Unit) -> dict[str, Any]:
        self._variant.remember(unit)
        return {}

    def score(self, unit: Unit, scores: Path) -> dict[str, Any]:
        self._synchronize()
        wall, cpu = time.perf_counter(), self._variant.cpu_seconds()
        scored = self._variant.score(unit)
        self._synchronize()
        wall_seconds = time.perf_counter() - wall
        cpu_seconds = self._variant.cpu_seconds() - cpu
        if scored.scores is not None:
            np.savez(scores, scores=scored.scores)
        return {"wall_seconds": wall_seconds, "cpu_seconds": cpu_seconds, "peak_bytes": self._peak() - self._weights, **scored.facts}

    def close(self) -> None:
        self._variant.close()

    def _synchronize(self) -> None:
        if self._on_device:
            torch.cuda.synchronize()

    def _reset_peak(self) -> int:
        if self._on_device:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        memory.reset_peak(self._pids)
        return memory.resident_bytes(self._pids)

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self._on_device else memory.peak_bytes(self._pids)


def main() -> None:
    # what libraries print must not get between the answers
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    timed = Timed(Job.from_json(sys.argv[1]))
    answers.write('{"ready": true}\n')
    try:
        for line in sys.stdin:
            command = json.loads(line)
            unit = Unit.read(Path(command["unit"]))
            match command["do"]:
                case "warm_up":
                    answer = timed.warm_up(unit)
                case "remember":
                    answer = timed.remember(unit)
                case "score":
                    answer = timed.score(unit, Path(command["scores"]))
            answers.write(json.dumps(answer) + "\n")
    finally:
        timed.close()


if __name__ == "__main__":
    main()
