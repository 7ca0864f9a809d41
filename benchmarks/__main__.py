"""The command line of the benchmark."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from benchmarks import report
from benchmarks.activations import READ_LOADS, print_reading, print_store
from benchmarks.compare import Comparison, Truth, compare
from benchmarks.environments import python_with
from benchmarks.loads import LOADS, Load, Unit
from benchmarks.model import SHAPES, make_model
from benchmarks.plot import save_plot
from benchmarks.process import VariantFailed, VariantProcess
from benchmarks.recording import print_recording
from benchmarks.scaling import print_scaling
from benchmarks.service import print_latency, print_memory
from benchmarks.variants import VARIANTS, Job, file_paths

PLOT = Path("build/bench.png")
DEFAULT_LOADS = ("reference", "statements", "chat_rows")
DEFAULT_VARIANTS = ("a", "b", "engine", "server", "floor")

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)
console = Console(highlight=False)
Device = Annotated[str, typer.Option(help="cpu or cuda; on cuda times are of the clock.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16; less than float32 is compared with B in float32.")]
ShapeName = Annotated[str, typer.Option("--shape", help=f"The model: {', '.join(SHAPES)}.")]
Range = Annotated[tuple[int, int] | None, typer.Option(metavar="FROM TO", help="Instead of the load's own.")]
Count = Annotated[int | None, typer.Option(min=1, help="Instead of the load's own.")]


@app.command("compare")
def compare_command(
    full: Annotated[bool, typer.Option("--full", help="Every load and every variant, and two threads beside one.")] = False,
    load: Annotated[list[str] | None, typer.Option(help=f"Repeat for several: {', '.join(LOADS)}.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help=f"Repeat for several: {', '.join(VARIANTS)}.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Of each variant.")] = 1,
    concurrency: Annotated[int, typer.Option(min=1, help="Clients of the server.")] = 8,
    shape: ShapeName = "125m",
    layer: Annotated[int | None, typer.Option(help="The block that is probed; the shape's own by default.")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    groups: Count = None,
    completions: Count = None,
    prompt_tokens: Range = None,
    completion_tokens: Range = None,
    probes: Count = None,
) -> None:
    """Compare ours with A, B and the rest on the loads. Exit code 1 if scores do not agree."""
    names = tuple(variant or (VARIANTS if full else DEFAULT_VARIANTS))
    changes = {
        "groups": groups,
        "completions": completions,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "probes": probes,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    loads = [replace(LOADS[name], **given) for name in load or (LOADS if full else DEFAULT_LOADS)]
    options = {"shape": shape, "layer": layer, "dtype": dtype, "device": device, "concurrency": concurrency}
    missing: dict[str, str] = {}
    comparisons = [_compare(one, names, repeats, threads, options, missing) for one in loads]
    beside = [_compare(loads[0], names, repeats, 2, options, missing)] if full and threads == 1 else []

    information = report.circumstances({**options, "repeats": repeats, "threads": threads}, missing)
    report.write_json(report.RESULTS, report.results(comparisons))
    report.write_json(report.CIRCUMSTANCES, {**information, "two_threads": report.results(beside)})
    machine = information["gpu"] or information["processor"]
    save_plot(PLOT, comparisons, f"{shape}, {dtype}, {threads} thread(s), {machine}, {information['date'][:10]}")
    console.print(f"{report.RESULTS}, {report.CIRCUMSTANCES} and {PLOT} written")
    agreeing = [report.print_agreement(console, comparison, dtype) for comparison in (*comparisons, *beside)]
    if not all(agreeing):
        raise typer.Exit(1)


def _compare(
    load: Load, names: tuple[str, ...], repeats: int, threads: int, options: dict[str, Any], missing: dict[str, str]
) -> Comparison:
    shape, dtype, device = SHAPES[options["shape"]], options["dtype"], options["device"]
    model = make_model(shape, dtype=dtype, probes=load.probes, layer=options["layer"])
    job = Job(
        "",
        str(model.directory.resolve()),
        file_paths(model.probes),
        str(model.directions.resolve()),
        model.layer,
        dtype,
        device,
        threads,
        options["concurrency"],
    )
    with ExitStack() as running, console.status("") as status:
        variants: dict[str, VariantProcess] = {}
        for name in names:
            status.update(f"{load.name}: loading {name}")
            try:
                package = VARIANTS[name].package
                python = python_with(package) if package else sys.executable
                variants[name] = running.enter_context(VariantProcess(replace(job, variant=name), python))
            except VariantFailed as failed:
                missing[name] = str(failed)
                console.print(f"[yellow]{load.name}: {name} is left out: {failed}[/yellow]")
        truth: Truth | None = None
        if dtype != "float32":
            exact = running.enter_context(VariantProcess(replace(job, variant="b", dtype="float32")))
            truth = _scores_of(exact)
        comparison = compare(
            load,
            variants,
            vocab_size=shape.vocab_size,
            repeats=repeats,
            by_clock=device != "cpu",
            truth=truth,
            progress=status.update,
        )
    report.print_comparison(console, comparison, f"{options['shape']}, {dtype}, {threads} thread(s), {repeats} repetitions")
    return comparison


def _scores_of(variant: VariantProcess) -> Truth:
    def truth(unit: Unit) -> NDArray[np.float32]:
        scores = variant.score(unit).scores
        if scores is None:
            raise VariantFailed("it gave no scores")
        return scores

    return truth


@app.command("latency")
def latency_command(rounds: Annotated[int, typer.Option(min=1)] = 5) -> None:
    """What the service adds to one small call."""
    print_latency(console, rounds)


@app.command("memory")
def memory_command(
    requests: Annotated[int, typer.Option(min=10)] = 10_000,
    kv_cache_bytes: Annotated[int, typer.Option(min=0, help="The server's setting.")] = 67_108_864,
) -> None:
    """What a server holds over many requests."""
    print_memory(console, requests, kv_cache_bytes)


@app.command("activations")
def activations_command(
    load: Annotated[list[str] | None, typer.Option(help=f"Repeat for several: {', '.join(LOADS)}.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    shape: ShapeName = "125m",
) -> None:
    """What reading activations costs beside padded Hugging Face. Exit code 1 if they do not agree."""
    if not print_reading(console, shape, load or READ_LOADS, repeats):
        raise typer.Exit(1)


@app.command("store")
def store_command(
    directory: Annotated[Path, typer.Argument(help="A new directory for some 25 GB of files, which are removed at the end.")],
    tokens: Annotated[int, typer.Option(min=2000)] = 1_000_000,
) -> None:
    """What storing every token's activations takes: 1M tokens × 3 taps × 4,096."""
    print_store(console, directory, tokens)


@app.command("record")
def record_command(shape: ShapeName = "small", steps: Annotated[int, typer.Option(min=1)] = 10) -> None:
    """What the record of a run costs a step of training, and how long a long one takes to be read."""
    print_recording(console, shape, steps)


@app.command("scaling")
def scaling_command(shape: ShapeName = "small", repeats: Annotated[int, typer.Option(min=1)] = 3) -> None:
    """How time grows with the tokens of a batch."""
    print_scaling(console, shape, repeats)


if __name__ == "__main__":
    app()
