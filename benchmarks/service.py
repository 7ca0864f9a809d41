"""What the service adds to one small call, and what it holds after many."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.model import SHAPES, make_model
from benchmarks.ratios import Spread
from benchmarks.serving import Serving
from probescore import ProbeClient, RolloutGroup
from probescore_server import Engine

ROUND_CALLS = 200
PROMPT_TOKENS, COMPLETION_TOKENS = 32, 32


def print_latency(console: Console, rounds: int) -> None:
    """One rollout of 64 tokens on a tiny model, with its probe's mean: in process and through a server, in turn."""
    # as the worker; more would go on spinning for work while the server is measured
    torch.set_num_threads(1)
    model = make_model(SHAPES["tiny"])
    random = np.random.default_rng(0)
    engine = Engine.load(str(model.directory), model.probes)
    with Serving(model.directory, model.probes) as serving, ProbeClient(serving.address) as client:
        ways: dict[str, Callable[[list[RolloutGroup]], object]] = {"engine": engine.score, "server": client.score}
        medians: dict[str, list[float]] = {way: [] for way in ways}
        for _ in track(range(rounds + 1), "rounds", transient=True):  # the first is a warm-up
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(ROUND_CALLS):
                rollouts = [_rollouts(random, model.shape.vocab_size)]
                for way, score in ways.items():
                    started = time.perf_counter()
                    score(rollouts)
                    seconds[way].append(time.perf_counter() - started)
            for way, taken in seconds.items():
                medians[way].append(1000 * float(np.median(taken)))
    added = [server - engine for server, engine in zip(medians["server"][1:], medians["engine"][1:], strict=True)]
    console.print(
        f"one rollout of {PROMPT_TOKENS + COMPLETION_TOKENS} tokens, tiny model; p50 of {ROUND_CALLS} calls, median of {rounds} rounds"
    )
    for way, taken in medians.items():
        console.print(f"  {way}: {Spread.of(taken[1:])} ms")
    console.print(f"  added by the service: {Spread.of(added)} ms")


def print_memory(console: Console, requests: int, kv_cache_bytes: int) -> None:
    """Memory of the front and of the worker that is their own (no mapped files), over many calls of many lengths."""
    model = make_model(SHAPES["small"])
    random = np.random.default_rng(0)
    table = Table("requests", "front MB", "worker MB", title=f"kv_cache_bytes {kv_cache_bytes / 1e6:,.0f} MB", title_justify="left")
    with Serving(model.directory, model.probes, kv_cache_bytes=kv_cache_bytes) as serving, ProbeClient(serving.address) as client:
        held: list[tuple[int, list[float]]] = [(0, _own_megabytes(serving.pids()))]
        for number in track(range(1, requests + 1), "requests", transient=True):
            prompt = random.integers(model.shape.vocab_size, size=int(random.integers(4, 256)))
            completions = [random.integers(model.shape.vocab_size, size=int(random.integers(1, 128))) for _ in range(2)]
            client.score([RolloutGroup(prompt, completions)], timeout=600)
            if number % (requests // 10) == 0:
                held.append((number, _own_megabytes(serving.pids())))
    for number, (front, *workers) in held:
        table.add_row(f"{number:,}", f"{front:,.1f}", f"{sum(workers):,.1f}")
    console.print(table)
    second_half = [(number, sum(own)) for number, own in held if number >= requests / 2]
    slope = np.polyfit([number for number, _ in second_half], [megabytes for _, megabytes in second_half], 1)[0]
    console.print(f"  in the second half: {1000 * slope:+.2f} MB per 1,000 requests")


def _rollouts(random: np.random.Generator, vocab_size: int) -> RolloutGroup:
    return RolloutGroup(random.integers(vocab_size, size=PROMPT_TOKENS), [random.integers(vocab_size, size=COMPLETION_TOKENS)])


def _own_megabytes(pids: list[int]) -> list[float]:
    """Anonymous resident memory of each process; multiprocessing's small tracker is left out."""
    found = []
    for pid in pids:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        (anonymous,) = (int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
        found.append(anonymous * 1024 / 1e6)
    return found
