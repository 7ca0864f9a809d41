"""What a run says: tables for people, ``build/bench.json`` for programs."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.compare import BOUND, Comparison
from benchmarks.ratios import Spread
from benchmarks.variants import VARIANTS

RESULTS = Path("build/bench.json")
CIRCUMSTANCES = Path("build/bench_info.json")


def results(comparisons: Iterable[Comparison]) -> dict[str, dict[str, dict[str, Any]]]:
    """By load and variant. ``over_a``: A's time over the variant's. ``over_floor``: the variant's time over the floor's. A number that is
    not there is ``None``."""
    return {comparison.load.name: {name: _result(comparison, name) for name in comparison.records} for comparison in comparisons}


def _result(comparison: Comparison, name: str) -> dict[str, Any]:
    record = comparison.records[name]
    return {
        "over_a": _spread(comparison.over(name, "a")),
        "over_floor": _spread(comparison.over("floor", name)),
        "tokens_per_second": comparison.tokens_per_second(name),
        "peak_rss_bytes": record.peak_bytes,
        "max_abs_diff": _finite(record.largest_difference),
        "max_error_over_std": _finite(record.largest_error),
        "error_percentiles": {key: _finite(error) for key, error in record.error_percentiles.items()},
        "cpu_seconds": record.cpu_seconds,
        "wall_seconds": record.wall_seconds,
        "tokens_computed": record.tokens_computed,
        "over_engine": _spread(comparison.over("engine", name)),
        "beside": {"what": comparison.load.beside, **(_spread(comparison.beside(name)) or {})},
        "chosen": comparison.chosen[name],
    }


def _spread(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else {"median": spread.median, "min": spread.min, "max": spread.max}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def circumstances(options: Mapping[str, Any], missing: Mapping[str, str]) -> dict[str, Any]:
    """When, on what, with which options, and why a variant is not there."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "options": dict(options),
        "missing": dict(missing),
    }


def _processor() -> str:
    known = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return known[0] if known else platform.processor()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def print_comparison(console: Console, comparison: Comparison, title: str) -> None:
    """One table a load, and the lines that only ours have."""
    load, tokens = comparison.load, comparison.tokens
    unique = median(comparison.records["floor"].tokens_computed) if "floor" in comparison.records else 0
    shared = f", {1 - unique / tokens['real']:.0%} shared" if unique else ""
    console.print(
        f"[bold]{load.name}[/bold]: {load.groups} × {load.completions}, {tokens['real']:,} tokens, "
        f"{1 - tokens['real'] / tokens['padded']:.0%} padding{shared}; {title}"
    )
    # 80 columns wide, as terminals are; what the names mean comes below
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in ("× over A", "× the floor", "CPU s", "wall s", "tok/s", "MB", "Δ/std"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, record in comparison.records.items():
        table.add_row(
            name,
            str(comparison.over(name, "a") or "–"),
            str(comparison.over("floor", name) or "–"),
            f"{median(record.cpu_seconds):.2f}",
            f"{median(record.wall_seconds):.2f}",
            f"{comparison.tokens_per_second(name):,.0f}",
            f"{record.peak_bytes / 1e6:,.0f}",
            f"{record.largest_error:.0e}" if record.errors else "–",
        )
    console.print(table)
    for line in _remarks(comparison):
        console.print(f"  {line}")
    console.print()


def _remarks(comparison: Comparison) -> Iterable[str]:
    records = comparison.records
    for name, record in records.items():
        size = comparison.chosen[name].get("batch_size", 1)
        batches = f", batches of {size}" if size > 1 else ""
        what = VARIANTS[name].title.rpartition(": ")[2]
        yield f"{name}: {what}{batches}; {median(record.tokens_computed):,.0f} tokens computed"
    for name in ("engine", "server"):
        if name in records and (beside := comparison.beside(name)):
            yield f"{name}: {comparison.load.beside}: {beside}"
        if name in records and comparison.load.kind == "second_epoch":
            computed = median(records[name].tokens_computed)
            yield f"{name}: {computed:,.0f} tokens computed, {comparison.tokens['completion']:,} in completions"
    if (over := comparison.over("engine", "b")) is not None:
        yield f"engine over B: {over}"
    if (over := comparison.over("engine", "server")) is not None:
        yield f"the server's front and worker over the engine: {over}"


def print_agreement(console: Console, comparison: Comparison, dtype: str) -> bool:
    """Whether all agree; in less than float32 how far they are off, and True."""
    name = comparison.load.name
    if dtype != "float32":
        for variant, record in comparison.records.items():
            if record.errors:
                percentiles = ", ".join(f"{key} {error:.1e}" for key, error in record.error_percentiles.items())
                console.print(f"{name}: {variant} in {dtype}, from float32, over the scores' standard deviation: {percentiles}")
        return True
    for variant in comparison.disagreeing():
        error = comparison.records[variant].largest_error
        console.print(f"[red]{name}: {variant} does not agree with A: {error:.1e} × the scores' standard deviation, bound {BOUND:g}[/red]")
    return not comparison.disagreeing()
