"""What the tests of a live folder of probes share: versions of one probe that differ in their scores, and what each must give."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from models import BOS, HIDDEN_SIZE, VOCAB_SIZE, tiny_model

from probescore import ProbeClient, RolloutGroup
from probescore_probes.exporting import linear_probe
from probescore_probes.reference import ReferenceModel
from probescore_probes.writing import write_probe
from probescore_server import Engine

TAP = "resid_post.2"
PROMPT = [BOS, 5, 6, 7]


@dataclass
class Versions:
    """Writes versions of probes, each with a direction of its own, and knows the score that each gives.

    The scores are computed without a probe: the mean of the activations that the engine reads at the tap, times the direction.
    """

    folder: Path
    model: Path = field(default_factory=tiny_model)
    written: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._reference = ReferenceModel.load(self.model)
        self._engine = Engine.load(str(self.model), taps=[TAP])
        self._store = self.folder.with_name(self.folder.name + "-store")
        self._store.mkdir()

    def make(self, key: str, *, tap: str = TAP, **said: Any) -> Path:
        """Writes a probe file beside the folder; each key is written once."""
        if key not in self.written:
            name, version = key.split("@")
            golden = [(PROMPT[:3], [8, 9, 10]), ([BOS], [11, 12])]
            path = self._store / f"{key}-{tap}.onnx"
            write_probe(
                path, linear_probe(self.direction(key)), self._reference, name=name, version=version, taps=[tap], golden=golden, **said
            )
            self.written[key] = path
        return self.written[key]

    def put(self, key: str, at: str = "", **said: Any) -> Path:
        """Puts a probe into the folder as writers should: under another name, and then renamed."""
        return put(self.make(key, **said), self.folder / (at or f"{key}.onnx"))

    @staticmethod
    def direction(key: str) -> np.ndarray:
        seed = int.from_bytes(key.encode()[-8:], "little")
        return np.random.default_rng(seed).standard_normal(HIDDEN_SIZE).astype(np.float32)

    def expected(self, key: str, completions: Sequence[Sequence[int]], prompt: Sequence[int] = PROMPT) -> np.ndarray:
        """``(completions,)``: what exactly this version gives."""
        read = self._engine.activations([RolloutGroup(list(prompt), [list(each) for each in completions])], [TAP], pool="mean")
        return np.stack([each.pooled[TAP][0, 0] for each in read]) @ self.direction(key)


def put(source: Path, target: Path) -> Path:
    """Copies a file into the folder of a server in one step."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, partial)
    return partial.replace(target)


def served(client: ProbeClient) -> tuple[set[str], set[str]]:
    info = client.get_server_info()
    return set(info.probes), set(info.retired_probes)


def random_completions(random: np.random.Generator, count: int) -> list[list[int]]:
    return [random.integers(4, VOCAB_SIZE, random.integers(1, 12)).tolist() for _ in range(count)]
