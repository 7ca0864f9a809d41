"""Activations at every block: what reading them costs beside padded Hugging Face, and what storing a million tokens takes."""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, Qwen3Config, Qwen3Model

from benchmarks.loads import LOADS, Unit
from benchmarks.model import SHAPES, make_model
from benchmarks.ratios import Spread
from probescore import RolloutGroup
from probescore_server import Engine
from probescore_server.activation_store.reading import StoredActivations
from probescore_server.activation_store.writing import StorePlan

READ_LOADS = ("one_prompt", "chat_rows", "statements", "statement_pairs")
BATCH_SIZES = (4, 8, 16, 32)
TAPS = "resid_post.*"
STORED_TAPS = ("resid_pre.0", "mlp_out.0", "resid_post.0")
BOUND = 1e-4

Read = Callable[[Unit], NDArray[np.float32]]
"""From a load to the mean and the last of every completion's activations, ``(taps, completions, 2, hidden_size)``."""


def print_reading(console: Console, shape: str, names: Sequence[str], repeats: int) -> bool:
    """Reads mean and last of every block's output on some loads, with the engine and with padded batches of Hugging Face in turn, and
    prints the ratio of their CPU times, of one thread each. Returns whether their numbers agree.
    """
    torch.set_num_threads(1)  # several wait for each other on a busy machine, and waiting counts as time of the processor
    model = make_model(SHAPES[shape])
    engine = Engine.load(str(model.directory), taps=TAPS)
    plain = AutoModel.from_pretrained(model.directory, dtype=torch.float32, attn_implementation="sdpa").eval()
    agreeing = True
    for name in names:
        units = [unit for repetition in range(repeats + 1) for unit in LOADS[name].units(repetition, SHAPES[shape].vocab_size)]
        warm, *timed = units
        sizes = sorted({min(size, sum(len(call.completions) for call in warm.calls)) for size in BATCH_SIZES})
        batch = min(sizes, key=lambda size: _seconds(_padded(plain, size), warm)[0])
        _seconds(_engine(engine), warm)
        ours, theirs, worst = [], [], 0.0
        for unit in timed:
            own_seconds, own = _seconds(_engine(engine), unit)
            their_seconds, other = _seconds(_padded(plain, batch), unit)
            ours.append(own_seconds)
            theirs.append(their_seconds)
            worst = max(worst, float(np.abs(own - other).max() / other.std()))
        tokens = sum(unit.real_tokens for unit in timed)
        speeds = [f"{tokens / sum(seconds):,.0f}" for seconds in (ours, theirs)]
        # a table a load, so that a run that is ended early has told what it knows
        table = Table("mean and last of every block", "engine over padded", "engine tok/s", "padded tok/s", "batch", "largest Δ / σ")
        table.add_row(name, str(Spread.of_ratios(theirs, ours)), *speeds, str(batch), f"{worst:.0e}")
        console.print(table)
        agreeing = agreeing and worst <= BOUND
    return agreeing


def _seconds(read: Read, unit: Unit) -> tuple[float, NDArray[np.float32]]:
    """Of the processor, over all threads."""
    started = time.process_time()
    found = read(unit)
    return time.process_time() - started, found


def _engine(engine: Engine) -> Read:
    def read(unit: Unit) -> NDArray[np.float32]:
        groups = [RolloutGroup(call.prompt, call.completions) for call in unit.calls]
        found = [*engine.activations(groups, TAPS, pool=("mean", "last"))]
        return np.stack([[one.pooled[str(tap)][0] for one in found] for tap in engine.info.taps])

    return read


def _padded(model: torch.nn.Module, batch_size: int) -> Read:
    outputs: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    @torch.inference_mode()
    def read(unit: Unit) -> NDArray[np.float32]:
        asked = [(torch.from_numpy(ids), len(call.prompt)) for call in unit.calls for ids in call.sequences()]
        pooled = []
        # The last of the hidden states is after the final norm, so the blocks themselves are read.
        hooks = [block.register_forward_hook(keep) for block in model.layers]  # type: ignore[union-attr]
        for start in range(0, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            ids = pad_sequence([sequence for sequence, _ in batch], batch_first=True)
            mask = pad_sequence([torch.ones_like(sequence) for sequence, _ in batch], batch_first=True)
            model(input_ids=ids, attention_mask=mask, use_cache=False)
            for row, (sequence, prompt) in enumerate(batch):
                own = [output[row, prompt : len(sequence)] for output in outputs]
                pooled.append(torch.stack([torch.stack([rows.mean(0), rows[-1]]) for rows in own]))
            outputs.clear()
        for hook in hooks:
            hook.remove()
        return torch.stack(pooled, dim=1).numpy()

    return read


@dataclass(frozen=True)
class StoredRun:
    """What storing activations took.

    Attributes:
        stored_bytes: of all files.
        peak_bytes: the process's largest resident memory, from its start.
    """

    tokens: int
    stored_bytes: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def store_many(directory: Path, tokens: int, *, hidden_size: int = 4096, dtype: str = "bfloat16") -> StoredRun:
    """Stores every token's activations at three taps of a made model, wide and of one thin block, and removes the files again.

    Args:
        directory: where the model and the files are kept meanwhile; it must not exist.
        tokens: of all completions together.
        hidden_size: of the model.
        dtype: that numbers are stored in.
    """
    directory.mkdir(parents=True)
    try:
        config = Qwen3Config(
            vocab_size=512,
            hidden_size=hidden_size,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=32,
        )
        torch.manual_seed(0)
        Qwen3Model(config).save_pretrained(directory / "model")
        engine = Engine.load(str(directory / "model"), taps=STORED_TAPS)
        random = np.random.default_rng(0)
        per_completion = 500
        groups = [
            RolloutGroup(random.integers(512, size=100), [random.integers(512, size=per_completion) for _ in range(4)])
            for _ in range(tokens // (4 * per_completion))
        ]
        plan = StorePlan.make(engine, groups, taps=STORED_TAPS, pool="tokens", dtype=dtype)
        started, cpu = time.monotonic(), time.process_time()
        plan.write(directory / "activations")
        seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu
        stored = StoredActivations(directory / "activations")
        counted = sum(rollout.tokens for rollout in stored.rollouts)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return StoredRun(counted, plan.bytes, seconds, cpu_seconds, peak)
    finally:
        shutil.rmtree(directory)


def print_store(console: Console, directory: Path, tokens: int) -> None:
    """Stores so many tokens at three taps of width 4,096, and prints what it took."""
    run = store_many(directory, tokens)
    stored, gibibytes = f"{run.stored_bytes / 1e9:.1f} GB", f"{run.peak_bytes / 2**30:.2f} GiB"
    times = f"{run.seconds:,.0f} s, of which {run.cpu_seconds:,.0f} s of CPU time"
    console.print(f"{run.tokens:,} tokens × 3 taps × 4,096: {stored} in {times}; peak memory {gibibytes}")
