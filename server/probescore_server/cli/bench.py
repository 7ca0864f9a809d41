"""Implements ``probescore bench``, which measures a running server with a load of random token ids."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from probescore import ProbeClient, RolloutGroup, ServerInfo, Usage
from probescore_server.cli.common.connection import DEFAULT_ADDRESS, Address, Wait, connected
from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import one_line_failures
from probescore_server.cli.tables import facts_table, safe

CALL_SECONDS = 3600.0
"""Deadline of an RPC in seconds; the deadline is so long that only a server that hangs misses it."""


def register(app: typer.Typer) -> None:
    """Adds the command ``bench`` to the command line."""
    app.command("bench")(_bench)


@dataclass(frozen=True)
class BenchLoad:
    """Value object with the load that ``probescore bench`` sends to a server.

    Attributes:
        calls: number of RPCs in all, after one RPC for warming up that is not counted.
        concurrency: number of RPCs that are under way at a time, each over a connection of its own.
        groups: number of rollout groups (prompts with their completions) in an RPC.
        completions: number of completions in a group.
        prompt_tokens: average length of a prompt in tokens; lengths are uniformly distributed between half of the average and one and a
            half times the average.
        completion_tokens: average length of a completion in tokens, with lengths distributed in the same way.
        seed: seed of the random ids and lengths.
        first_id: token id with which every prompt begins; ``None`` = a random one.
    """

    calls: int
    concurrency: int
    groups: int
    completions: int
    prompt_tokens: int
    completion_tokens: int
    seed: int
    first_id: int | None

    def call(self, number: int, vocab_size: int) -> list[RolloutGroup]:
        """Returns the random rollout groups (prompts with their completions) that the RPC with a given number sends. Equal seeds and
        numbers give equal groups.
        """
        random = np.random.default_rng([self.seed, number + 1])

        def ids(average: int) -> np.ndarray:
            return random.integers(vocab_size, size=max(1, int(random.integers(average // 2, average + average // 2 + 1))))

        groups = [
            RolloutGroup(ids(self.prompt_tokens), [ids(self.completion_tokens) for _ in range(self.completions)])
            for _ in range(self.groups)
        ]
        if self.first_id is not None:
            groups = [RolloutGroup(np.concatenate([[self.first_id], group.prompt]), group.completions) for group in groups]
        return groups


@dataclass(frozen=True)
class BenchResult:
    """Measurements of one run of ``probescore bench``, which sends random rollouts to a server.

    Attributes:
        seconds: seconds from the start of the first RPC to the end of the last RPC.
        latencies: seconds that each RPC took, in ascending order.
        usage: counts of the server's work (tokens and seconds), summed over all RPCs.
    """

    seconds: float
    latencies: tuple[float, ...]
    usage: Usage

    def percentile(self, percent: float) -> float:
        """Returns a percentile (given as a number from 0 to 100) of the seconds that the RPCs of a benchmark took."""
        return float(np.percentile(self.latencies, percent))


def _bench(
    address: Address = DEFAULT_ADDRESS,
    wait: Wait = 0,
    calls: Annotated[int, typer.Option(min=1, help="Number of calls to make.")] = 16,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Number of calls that are under way at a time.")] = 4,
    groups: Annotated[int, typer.Option(min=1, help="Number of rollout groups in a call.")] = 1,
    completions: Annotated[int, typer.Option(min=1, help="Number of completions in a group.")] = 8,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Average tokens of a prompt; lengths are from half of it to 1.5 times it.")
    ] = 400,
    completion_tokens: Annotated[int, typer.Option(min=1, help="Average tokens of a completion; lengths vary likewise.")] = 400,
    probe: Annotated[list[str] | None, typer.Option(help="A probe to score with; repeat for several. The default is all.")] = None,
    token_scores: Annotated[bool, typer.Option("--token-scores", help="Also ask for the scores of every token.")] = False,
    first_id: Annotated[int | None, typer.Option(min=0, help="Begin every prompt with this id, where a probe expects BOS.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random ids and lengths.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Send random rollouts to a server, and show the time and the tokens that they take."""
    load = BenchLoad(calls, concurrency, groups, completions, prompt_tokens, completion_tokens, seed, first_id)
    with one_line_failures(), ExitStack() as stack:
        clients = [stack.enter_context(connected(address, wait)) for _ in range(concurrency)]
        info = clients[0].get_server_info()
        with new_console(stderr=True).status(f"{calls} calls, {concurrency} at a time"):
            result = run(load, clients, info, probe or (), token_scores=token_scores)
    if as_json:
        typer.echo(json.dumps(_numbers(load, result)))
    else:
        new_console().print(_table(load, result, info))


def run(load: BenchLoad, clients: Sequence[ProbeClient], info: ServerInfo, probes: Sequence[str], *, token_scores: bool) -> BenchResult:
    """Sends a load of random rollouts to a server from several concurrent clients; client *i* makes, one after the other, the RPCs whose
    number modulo the number of clients is *i*.

    Raises:
        ProbescoreError: an RPC failed.
    """
    vocab_size = info.model.vocab_size

    def ask(client: ProbeClient, number: int) -> tuple[float, Usage]:
        rollouts = load.call(number, vocab_size)
        started = time.perf_counter()
        answer = client.score(rollouts, probes=probes, token_scores=token_scores, timeout=CALL_SECONDS)
        return time.perf_counter() - started, answer.info.usage

    def ask_in_turn(index: int) -> list[tuple[float, Usage]]:
        return [ask(clients[index], number) for number in range(index, load.calls, len(clients))]

    ask(clients[0], -1)
    with ThreadPoolExecutor(len(clients)) as threads:
        started = time.perf_counter()
        answers = [answer for part in threads.map(ask_in_turn, range(len(clients))) for answer in part]
        seconds = time.perf_counter() - started
    return BenchResult(seconds, tuple(sorted(latency for latency, _ in answers)), Usage.total(usage for _, usage in answers))


def _numbers(load: BenchLoad, result: BenchResult) -> dict[str, object]:
    return {
        "load": asdict(load),
        "seconds": result.seconds,
        "calls_per_second": load.calls / result.seconds,
        "tokens_per_second": result.usage.tokens / result.seconds,
        "latency_seconds": {f"p{percent}": result.percentile(percent) for percent in (50, 90, 99)},
        **asdict(result.usage),
    }


def _table(load: BenchLoad, result: BenchResult, info: ServerInfo) -> Table:
    usage = result.usage
    workers = ", ".join(f"{worker.device} ({worker.dtype}, {worker.execution_path})" for worker in info.workers)
    table = facts_table(f"{load.calls} calls of {load.groups} × {load.completions} rollouts, {load.concurrency} at a time")
    table.add_row("workers", safe(workers))
    table.add_row("throughput", f"{load.calls / result.seconds:,.2f} calls/s, {result.usage.tokens / result.seconds:,.0f} tokens/s")
    table.add_row("latency", ", ".join(f"p{percent} {result.percentile(percent):.3f} s" for percent in (50, 90, 99)))
    table.add_row("tokens", f"{usage.tokens_computed:,} computed, {usage.tokens_shared:,} shared, {usage.tokens_cached:,} cached")
    table.add_row("a call", f"{usage.queue_seconds / load.calls:.3f} s queued, {usage.compute_seconds / load.calls:.3f} s in batches")
    return table
