"""The server as a process of its own, and the rollouts scored by it over gRPC."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sampling import SampledRollout

from probescore import DeadlineExceededError, ProbeClient, RolloutGroup, TransientError

PROBESCORE = Path(sys.executable).with_name("probescore")
START_SECONDS = 120
STOP_SECONDS = 30
PRINTED = 4


@contextmanager
def server(model: Path, probe: Path, socket: Path, log: Path, *options: str | Path) -> Iterator[str]:
    """Starts ``probescore serve`` and gives its address once it is ready to score; ends it in the end.

    ``options`` are further ones of the command. It listens on a Unix socket, so that it cannot collide with another server on this machine.
    """
    command = [PROBESCORE, "serve", "--model", model, "--probes", probe, "--unix-socket", socket, "--metrics-port", "0", *options]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            wait_until_ready(process, f"unix:{socket}", log)
            yield f"unix:{socket}"
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    with ProbeClient(address) as client:
        while process.poll() is None and time.monotonic() < end:
            try:
                client.wait_until_ready(timeout=2)
            except (TransientError, DeadlineExceededError):
                continue
            return
    sys.exit(f"probescore serve did not become ready. The end of {log}:\n{log.read_text()[-2000:]}")


def score_rollouts(address: str, rollouts: Sequence[SampledRollout], on_scored: Callable[[], None]) -> NDArray[np.float32]:
    """One score a rollout, in their order. The ids go as they were sampled."""
    scores = np.full(len(rollouts), np.nan, np.float32)
    groups = (RolloutGroup(rollout.prompt_ids, [rollout.completion_ids]) for rollout in rollouts)
    with ProbeClient(address) as client:
        for scored in client.score_stream(groups, probes="cheating"):
            scores[scored.group_index] = scored.scores["cheating"].value
            on_scored()
    return scores


def show_rollouts(address: str, rollouts: Path, page: Path) -> None:
    """Prints the first few on the terminal, coloured by score, and writes all of them into a page, by the same command that people use."""
    command = [PROBESCORE, "score", rollouts, "--address", address, "--html", page, "--show", str(PRINTED)]
    sys.stdout.flush()
    subprocess.run(command, check=True)
