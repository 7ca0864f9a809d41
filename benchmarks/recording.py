"""What the record of a run costs a step of training, and how long a long one takes to be read."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.model import SHAPES, make_model
from benchmarks.ratios import Spread
from benchmarks.serving import Serving
from probescore_adapters import ProbeScorer, ProbeSignal, RecordOptions, Rollout
from probescore_audit.record import RecordedProbe, RecordWriter, RolloutRow, RunHeader, read_record

PROMPTS, EACH, PROMPT_TOKENS, COMPLETION_TOKENS = 8, 16, 32, 64
READ_STEPS, READ_ROLLOUTS = 300, 512


def print_recording(console: Console, shape: str, steps: int) -> None:
    """Steps of 128 rollouts, scored by two probes on a server, with and without a record, in turn: the processor's time of the trainer's
    process, beside the time that it waits for the scores. Training itself, which comes to this, is left out.
    """
    model = make_model(SHAPES[shape], probes=2)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, Serving(model.directory, model.probes) as serving:
        names = [path.stem for path in map(Path, model.probes)]
        signals = [ProbeSignal(name, mode="reward", threshold=0.0) for name in names]
        ways = {
            "no record": None,
            "record": RecordOptions(Path(folder) / "plain"),
            "record with labels": RecordOptions(Path(folder) / "labels", checker=lambda rollout: bool(rollout.completion[0] % 2)),
            "record with texts, ids and token scores": RecordOptions(Path(folder) / "all", texts=True, ids=True, token_scores=True),
        }
        scorers = {way: ProbeScorer(signals, serving.address, record=options) for way, options in ways.items()}
        took: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for step in track(range(steps + 1), "steps", transient=True):  # the first is a warm-up
            for way, scorer in scorers.items():
                rollouts = _rollouts(random, model.shape.vocab_size)
                started = time.perf_counter(), time.process_time()
                scorer.score(rollouts, np.zeros(len(rollouts)), step=step)
                took[way].append((time.perf_counter() - started[0], time.process_time() - started[1]))
        sizes = {way: sum(path.stat().st_size for path in Path(folder, name).iterdir()) for way, name in _FOLDERS.items()}
    console.print(
        f"a step of {PROMPTS * EACH} rollouts of {PROMPT_TOKENS} + {COMPLETION_TOKENS} tokens, {shape} model, 2 probes, {steps} steps"
    )
    waits, plain = ([each[index] for each in took["no record"][1:]] for index in (0, 1))
    for way in ways:
        busy = [each[1] for each in took[way][1:]]
        added = Spread.of([1000 * (one - other) for one, other in zip(busy, plain, strict=True)])
        share = Spread.of([100 * (one - other) / wait for one, other, wait in zip(busy, plain, waits, strict=True)])
        size = f", {sizes[way] / (steps + 1) / 1e6:.2f} MB" if way in sizes else ""
        console.print(f"  {way}: adds {added} ms of processor time, {share} % of the wait for scores{size}", soft_wrap=True)
    _print_reading(console)


_FOLDERS = {"record": "plain", "record with labels": "labels", "record with texts, ids and token scores": "all"}


def _print_reading(console: Console) -> None:
    scores = np.random.default_rng(0).standard_normal((READ_ROLLOUTS, 4)).tolist()
    probe = RecordedProbe(key="cheating@1", thresholds={"mean": 0.5})
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        with RecordWriter(folder, RunHeader(run_id="read", planned_steps=READ_STEPS, probes=(probe,))) as writer:
            for step in range(READ_STEPS):
                writer.append(
                    RolloutRow(
                        step=step,
                        rollout=f"0123456789ab.{number}",
                        prompt=f"{number // 16:016x}",
                        scores={"cheating@1": {"frozen": {"mean": a, "max": b}, "policy": {"mean": c, "max": d}}},
                        tokens=64,
                        task_reward=1.0,
                        total_reward=0.5,
                        policy_logprob=-12.25,
                        text_sha256=f"sha256:{number:064x}",
                    )
                    for number, (a, b, c, d) in enumerate(scores)
                )
        wrote, started = time.process_time() - started, time.process_time()
        size = writer.path.stat().st_size
        table = read_record(folder).table()
        read = time.process_time() - started
    console.print(
        f"{len(table):,} rollouts with 4 scores, {size / 1e6:.0f} MB: written in {wrote:.1f} s of processor time, and read into a table in "
        f"{read:.1f} s",
        soft_wrap=True,
    )


def _rollouts(random: np.random.Generator, vocab_size: int) -> list[Rollout]:
    prompts = random.integers(4, vocab_size, (PROMPTS, PROMPT_TOKENS))
    return [Rollout(prompt, random.integers(4, vocab_size, COMPLETION_TOKENS)) for prompt in prompts for _ in range(EACH)]
