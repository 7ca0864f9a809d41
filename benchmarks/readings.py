"""What a second reading costs: the CPU time of both over that of the frozen one alone, and that of the frozen one alone over what it was in
an earlier version.

Everything that is compared is measured in turn in one run, on the same rollouts.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.loads import LOADS, Unit
from benchmarks.model import FOLDER, SHAPES, BenchModel, make_model, write_adapter
from benchmarks.process import VariantProcess, environment_of
from benchmarks.ratios import Spread
from benchmarks.variants import Job, file_paths
from probescore import RolloutGroup
from probescore_server import Engine

CHECKPOINT = "checkpoint"
OF_BEFORE = FOLDER / "before"

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)
ShapeName = Annotated[str, typer.Option("--shape", help=f"The model: {', '.join(SHAPES)}.")]
LoadName = Annotated[str, typer.Option("--load", help=f"The rollouts: {', '.join(LOADS)}.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1)]


@app.command("both")
def both_command(
    shape: ShapeName = "125m",
    load: LoadName = "chat_rows",
    rank: Annotated[list[int] | None, typer.Option(min=1, help="Of the adapters; 16, 64 and 128 by default.")] = None,
    repeats: Repeats = 5,
) -> None:
    """Measure the frozen model and a policy (LoRA adapters on all linear layers, and a checkpoint) over the frozen model alone."""
    model = make_model(SHAPES[shape])
    weights = _write_weights(model, rank or [16, 64, 128])
    engine = Engine.load(str(model.directory), model.probes, max_kv_cache_bytes=0)
    for name, directory in weights.items():
        engine.load_reading(name, directory)
    asked: dict[str, tuple[str, ...]] = {"": ()}
    asked |= {f"frozen and {name}": ("frozen", name) for name in weights} | {f"{name} alone": (name,) for name in weights}
    seconds: dict[str, list[float]] = {what: [] for what in asked}
    for unit in _units(load, shape, repeats):
        groups = [RolloutGroup(call.prompt, call.completions) for call in unit.calls]
        for what, readings in asked.items():
            started = time.process_time()
            engine.score(groups, readings=readings)
            seconds[what].append(time.process_time() - started)
    table = Table("readings", "over frozen alone", title=f"{shape}, {load}, {torch.get_num_threads()} thread(s), {repeats} repetitions")
    for what, taken in [*seconds.items()][1:]:
        table.add_row(what, str(Spread.of_ratios(taken[1:], seconds[""][1:])))  # the first warms up
    Console(highlight=False).print(table)


@app.command("alone")
def alone_command(
    before: Annotated[Path, typer.Argument(help="A checkout of an earlier version.", exists=True, file_okay=False)],
    shape: ShapeName = "125m",
    load: LoadName = "chat_rows",
    repeats: Repeats = 15,
) -> None:
    """Measure the frozen model alone, with no reading and with one loaded beside it, over an earlier version of the packages."""
    made_before = f"make_model(SHAPES[{shape!r}], folder=Path({str(OF_BEFORE)!r}))"  # An earlier version does not read later probe files.
    script = f"from pathlib import Path; from benchmarks.model import SHAPES, make_model; {made_before}"
    subprocess.run([sys.executable, "-c", script], env=environment_of(before), check=True)
    model = make_model(SHAPES[shape], folder=OF_BEFORE)
    adapter = _write_weights(model, [16])["r16"]
    job = Job("engine", str(model.directory.resolve()), file_paths(model.probes), str(model.directions.resolve()), model.layer)
    loaded = replace(job, loaded=str(adapter.resolve()))
    seconds: dict[str, list[float]] = {"before": [], "now": [], "now, a reading loaded": []}
    with ExitStack() as running:
        variants = [running.enter_context(VariantProcess(of, checkout=place)) for of, place in ((job, before), (job, None), (loaded, None))]
        for number, unit in enumerate(_units(load, shape, repeats)):
            for place in range(len(variants)):  # each is first as often as the others
                turn = (number + place) % len(variants)
                [*seconds.values()][turn].append(variants[turn].score(unit).cpu_seconds)
    table = Table("frozen alone", "over before", title=f"{shape}, {load}, 1 thread, {repeats} repetitions")
    for what in ("now", "now, a reading loaded"):
        table.add_row(what, str(Spread.of_ratios(seconds[what][1:], seconds["before"][1:])))
    Console(highlight=False).print(table)


def _units(load: str, shape: str, repeats: int) -> Iterator[Unit]:
    """The units of some repetitions, after those of one that warms up."""
    for repetition in range(repeats + 1):
        yield from LOADS[load].units(repetition, SHAPES[shape].vocab_size)


def _write_weights(model: BenchModel, ranks: list[int]) -> dict[str, Path]:
    """Writes adapters of some ranks and a checkpoint of which every tensor has moved; returns their directories by name."""
    found = {f"r{rank}": model.directory.with_name(f"{model.directory.name}-r{rank}") for rank in ranks}
    found[CHECKPOINT] = model.directory.with_name(f"{model.directory.name}-moved")
    if not all(directory.exists() for directory in found.values()):
        policy: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model.directory)
        for rank in ranks:
            write_adapter(policy, found[f"r{rank}"], rank, seed=rank)
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=random))
        policy.save_pretrained(found[CHECKPOINT])
    return found


if __name__ == "__main__":
    app()
