"""What probes that bring a LoRA adapter cost: the CPU time of a plain probe with such probes beside it, over that of the plain probe alone.

The calls are made in turn in one process, each with an empty key-value cache.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.loads import LOADS
from benchmarks.model import SHAPES, make_model, write_adapter
from benchmarks.ratios import Spread
from probescore import RolloutGroup
from probescore_probes import ReferenceModel, linear_probe, write_probe
from probescore_server import Engine

BESIDE = {"nothing": [], "one": ["own-a-0"], "two of one adapter": ["own-a-0", "own-a-1"], "two of two": ["own-a-0", "own-b-0"]}
"""The probes that are asked for beside the plain one."""


def main(
    shape: Annotated[str, typer.Option(help=f"The model: {', '.join(SHAPES)}.")] = "125m",
    load: Annotated[str, typer.Option(help=f"The rollouts: {', '.join(LOADS)}.")] = "chat_rows",
    rank: Annotated[list[int] | None, typer.Option(min=1, help="Of the adapters, on all linear layers; 16 by default.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Measure probes that bring a LoRA adapter beside a plain probe."""
    console = Console(highlight=False)
    for each in rank or [16]:
        console.print(_measured(shape, load, each, repeats))


def _measured(shape: str, load: str, rank: int, repeats: int) -> Table:
    model = make_model(SHAPES[shape])
    tap = f"resid_post.{SHAPES[shape].probed_layer}"
    engine = Engine.load(str(model.directory), _write_probes(model.directory, tap, rank), max_kv_cache_bytes=0)
    warm, *units = [unit for repetition in range(repeats + 1) for unit in LOADS[load].units(repetition, SHAPES[shape].vocab_size)]
    groups = [[RolloutGroup(call.prompt, call.completions) for call in unit.calls] for unit in (warm, *units)]
    seconds: dict[str, list[float]] = {name: [] for name in BESIDE}
    for number, calls in enumerate(groups):
        for name, probes in BESIDE.items():
            started = time.process_time()
            engine.score(calls, probes=["plain", *probes])
            if number:
                seconds[name].append(time.process_time() - started)
    table = Table("probes with an adapter", "over none", title=f"{shape}, {load}, rank {rank}, {torch.get_num_threads()} thread(s)")
    for name, taken in list(seconds.items())[1:]:
        table.add_row(name, str(Spread.of_ratios(taken, seconds["nothing"])))
    return table


def _write_probes(directory: Path, tap: str, rank: int) -> Sequence[Path]:
    """Writes a plain probe, and probes of two random adapters; returns their paths."""
    folder = directory / f"brought-{rank}"
    paths = [folder / name for name in ("plain.onnx", "own-a-0.onnx", "own-a-1.onnx", "own-b-0.onnx")]
    if all(path.exists() for path in paths):
        return paths
    folder.mkdir(exist_ok=True)
    reference, random = ReferenceModel.load(directory), np.random.default_rng(0)
    golden = [([1, *random.integers(4, 500, 9).tolist()], random.integers(4, 500, 12).tolist())]
    references = {"plain": reference}
    for number, name in enumerate("ab"):
        write_adapter(reference.model, folder / f"adapter-{name}", rank, number)
        references[f"own-{name}"] = reference.adapted(folder / f"adapter-{name}")
    for path in paths:
        of = references[path.stem if path.stem == "plain" else path.stem.rpartition("-")[0]]
        probe = linear_probe(random.standard_normal(reference.reference.hidden_size).astype(np.float32))
        write_probe(path, probe, of, name=path.stem, version="1", taps=[tap], golden=golden)
    return paths


if __name__ == "__main__":
    typer.run(main)
