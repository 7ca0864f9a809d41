"""What the service adds to one small call, and what it holds after many."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.empty_call import EmptyCall
from benchmarks.model import SHAPES, make_model
from benchmarks.ratios import Spread
from benchmarks.serving import Serving
from probescore import ProbeClient, RolloutGroup
from probescore_server import Engine

ROUND_CALLS = 200
PROMPT_TOKENS, COMPLETION_TOKENS = 32, 32


def print_latency(console: Console, rounds: int) -> None:
    """One rollout of 64 tokens on a tiny model, with its probe's mean: in process and through a server, in turn. With all processes on one
    core, where nothing but the work counts, and on all cores, where they run side by side and wake each other up. Beside it, what a call
    costs in which nothing is done.
    """
    # as the worker; more would go on spinning for work while the server is measured
    torch.set_num_threads(1)
    model = make_model(SHAPES["tiny"])
    random = np.random.default_rng(0)
    engine = Engine.load(str(model.directory), model.probes)
    every = os.sched_getaffinity(0)
    with Serving(model.directory, model.probes) as serving, ProbeClient(serving.address) as client, EmptyCall() as empty_call:
        medians: dict[int, list[dict[str, float]]] = {1: [], len(every): []}
        for _ in track(range(rounds + 1), "rounds", transient=True):  # the first is a warm-up
            for cores in medians:
                _pin([os.getpid(), *serving.pids(), *empty_call.pids()], set(sorted(every)[-cores:]))
                medians[cores].append(
                    _medians_in_turn(engine.score, client.score, empty_call, lambda: [_rollouts(random, model.shape.vocab_size)])
                )
    console.print(
        f"one rollout of {PROMPT_TOKENS + COMPLETION_TOKENS} tokens, tiny model; p50 of {ROUND_CALLS} calls, median of {rounds} rounds"
    )
    for cores, (_, *taken) in medians.items():
        engine_took, server_took, empty = (Spread.of([each[way] for each in taken]) for way in ("engine", "server", "empty call"))
        added = Spread.of([each["server"] - each["engine"] for each in taken])
        console.print(
            f"  {cores} core{'s' * (cores > 1)}, ms: engine {engine_took}, server {server_took}, added {added}; an empty call {empty}",
            soft_wrap=True,
        )


def _medians_in_turn(
    engine: Callable[[list[RolloutGroup]], object],
    server: Callable[[list[RolloutGroup]], object],
    empty_call: EmptyCall,
    rollouts: Callable[[], list[RolloutGroup]],
) -> dict[str, float]:
    """Milliseconds of a call, each way. Every call comes after one of the engine, since code that has not run for a while takes longer."""
    taken: dict[str, list[float]] = {"engine": [], "server": [], "empty call": []}
    for _ in range(ROUND_CALLS):
        taken["engine"].append(_seconds(engine, rollouts()))
        taken["server"].append(_seconds(server, rollouts()))
        taken["engine"].append(_seconds(engine, rollouts()))
        taken["empty call"].append(empty_call.seconds(taken["engine"][-1]))
    return {way: 1000 * float(np.median(seconds)) for way, seconds in taken.items()}


def _seconds(score: Callable[[list[RolloutGroup]], object], groups: list[RolloutGroup]) -> float:
    started = time.perf_counter()
    score(groups)
    return time.perf_counter() - started


def _pin(pids: list[int], cores: set[int]) -> None:
    for task in [task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()]:
        os.sched_setaffinity(int(task.name), cores)


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
