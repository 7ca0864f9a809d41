"""Time against the tokens of a batch. Rollouts are of one length, so that attention costs the same for every token."""

from __future__ import annotations

import time

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.model import SHAPES, make_model
from probescore_server import Engine
from probescore_server.rollouts import CheckedRollout, Continuation, ResolvedOptions

ROLLOUT_TOKENS = 250
BATCH_TOKENS = (1_000, 3_000, 10_000, 30_000, 100_000)


def print_scaling(console: Console, shape: str, repeats: int) -> None:
    """CPU seconds of batches of 1,000 to 100,000 tokens, each one batch of the engine, and the exponent fitted to their medians."""
    torch.set_num_threads(1)
    model = make_model(SHAPES[shape])
    engine = Engine.load(str(model.directory), model.probes, max_kv_cache_bytes=0)
    options = ResolvedOptions(probes=tuple(probe.key for probe in engine.info.probes))
    random = np.random.default_rng(0)
    nothing = np.zeros(0, np.int32)

    def seconds(tokens: int) -> float:
        ids = random.integers(model.shape.vocab_size, size=(tokens // ROLLOUT_TOKENS, ROLLOUT_TOKENS), dtype=np.int32)
        batch = [CheckedRollout(nothing, Continuation(row), options) for row in ids]
        started = time.process_time()
        engine.score_rollouts(batch)
        return time.process_time() - started

    seconds(BATCH_TOKENS[0])
    medians = {}
    for tokens in track(BATCH_TOKENS, "batches", transient=True):
        medians[tokens] = float(np.median([seconds(tokens) for _ in range(repeats)]))
    table = Table("tokens", "CPU s", "µs a token", title=f"one batch, {shape}, rollouts of {ROLLOUT_TOKENS} tokens", title_justify="left")
    for tokens, taken in medians.items():
        table.add_row(f"{tokens:,}", f"{taken:.3f}", f"{1e6 * taken / tokens:.1f}")
    console.print(table)
    exponent = np.polyfit(np.log(list(medians)), np.log(list(medians.values())), 1)[0]
    console.print(f"  time grows as tokens to the power of {exponent:.3f}")
