"""Probes are swapped again and again while clients score and one trains: no call fails, no answer is mixed, and no memory stays.

``make swaps`` does so a hundred times, while TRL trains beside the clients; ten times here, where a client that never lets go of its
version stands for the trainer.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from calls import TIMEOUT, eventually, scrape
from live_folder import PROMPT, Versions, random_completions, served
from running_server import RunningServer, start_server

from probescore import ProbeClient, RolloutGroup, ScoreResult

SWAPS = int(os.environ.get("PROBESCORE_SWAPS", "10"))
TRAINER_PYTHON = os.environ.get("PROBESCORE_TRAINER_PYTHON", "")
"""Of the environment that has TRL; "" = no trainer takes part."""
CLIENTS = 8
# What Python's and the system's allocators may keep of a hundred loads, of the front and of a worker.
FRONT_BYTES, WORKER_BYTES = 8 << 20, 24 << 20


@dataclass
class Loop:
    """One client that scores until it is told to stop, and checks each answer against the version that the answer names."""

    address: str
    versions: Versions
    pool: list[list[int]]
    expected: Callable[[str], np.ndarray]
    pin_for: Callable[[], int] | None
    seed: int
    stopped: threading.Event
    calls: int = 0
    seconds: list[float] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    failure: BaseException | None = None

    def run(self) -> None:
        random = np.random.default_rng(self.seed)
        try:
            with ProbeClient(self.address, timeout=TIMEOUT, restart_budget=0, job=f"job-{self.seed}") as client:
                name, left = "swap", 0
                while not self.stopped.is_set():
                    if self.pin_for is not None and left == 0:
                        (name,) = (key for key in client.get_server_info().probes if key.startswith("swap@"))
                        left = self.pin_for()
                    left -= 1
                    chosen = random.choice(len(self.pool), 4)
                    started = time.perf_counter()
                    result = client.score([RolloutGroup(PROMPT, [self.pool[index] for index in chosen])], probes=[name], token_scores="all")
                    self.seconds.append(time.perf_counter() - started)
                    self.check(result, name, chosen)
                    self.calls += 1
        except BaseException as error:
            self.failure = error

    def check(self, result: ScoreResult, name: str, chosen: np.ndarray) -> None:
        (probe,) = result.info.probes
        assert name in (probe.name, probe.key)
        self.seen.add(probe.key)
        found = [one.scores["swap"].reduced.item() for one in result.groups[0].completions]
        np.testing.assert_allclose(found, self.expected(probe.key)[chosen], rtol=1e-4, atol=1e-4)
        for one in result.groups[0].completions:
            assert one.scores["swap"].tokens is not None
            np.testing.assert_allclose(one.scores["swap"].tokens.mean(), one.scores["swap"].reduced.item(), rtol=1e-4, atol=1e-4)


class GRPORun:
    """TRL's trainer with the probe in its reward, in a process and an environment of its own, from when it has scored its first batches."""

    WEIGHT = -0.05
    SECONDS = 300.0

    def __init__(self, folder: Path, model: Path, address: str, reads: str) -> None:
        self._folder, self._log = folder, (folder / "log").open("w")
        script = Path(__file__).parents[1] / "trainers" / "trl" / "train_through_swaps.py"
        command = [TRAINER_PYTHON, str(script), str(model), address, str(folder), reads]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        eventually(lambda: len(self.batches()) >= 3 or self._process.poll() is not None, seconds=self.SECONDS)
        self.check_runs()

    def check_runs(self) -> None:
        assert self._process.poll() is None, (self._folder / "log").read_text()[-3000:]

    def batches(self) -> list[dict[str, Any]]:
        """What it has scored: the version that scored it, the rollouts, and the rewards."""
        written = self._folder / "batches.jsonl"
        return [json.loads(line) for line in written.read_text().splitlines()] if written.exists() else []

    def end(self) -> list[float]:
        """Lets it finish its step; returns the norm of each step's gradients."""
        (self._folder / "stop").touch()
        code = self._process.wait(self.SECONDS)
        assert code == 0, (self._folder / "log").read_text()[-3000:]
        norms: list[float] = json.loads((self._folder / "gradients.json").read_text())
        return norms

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def check(self, versions: Versions) -> list[str]:
        """Compares the rewards of each batch with what the version gives that it names; returns these versions in order."""
        named = []
        for batch in self.batches():
            key = batch["probe"]
            for (prompt, completion), reward in zip(batch["rollouts"], batch["rewards"], strict=True):
                expected = versions.expected(key, [completion], prompt).item()
                np.testing.assert_allclose(reward / self.WEIGHT, expected, rtol=1e-4, atol=1e-4)
            named.append(key)
        return named


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Versions:
    folder = tmp_path_factory.mktemp("swaps") / "probes"
    folder.mkdir()
    versions = Versions(folder)
    versions.put("swap@0", at="swap.onnx")
    versions.put("beside@1")
    return versions


def processes(server: RunningServer) -> dict[str, psutil.Process]:
    front = psutil.Process(server.pid)
    workers = [child for child in front.children() if "spawn_main" in " ".join(child.cmdline())]
    return {"front": front, **{f"worker {number}": worker for number, worker in enumerate(workers)}}


def memory(server: RunningServer) -> dict[str, int]:
    return {name: process.memory_info().rss for name, process in processes(server).items()}


def versions_shown(server: RunningServer) -> set[str]:
    """Of ``swap``, by the metrics."""
    return {sample.split('version="')[1].split('"')[0] for sample in scrape(server) if 'probe="swap"' in sample}


def versions_served(admin: ProbeClient) -> set[str]:
    """Of ``swap``, the current one and those that are kept."""
    current, retired = served(admin)
    return {key.split("@")[1] for key in current | retired if key.startswith("swap@")}


def descriptors(server: RunningServer) -> int:
    return len(list(Path(f"/proc/{server.pid}/fd").iterdir()))


@pytest.fixture(params=["pinned", "following"])
def pin_for(request: pytest.FixtureRequest) -> Iterator[tuple[Callable[[], int] | None, dict[str, float]]]:
    if request.param == "pinned":
        random = np.random.default_rng(0)
        # a step of a trainer on a busy machine may take longer than a call
        seconds = 20.0 if TRAINER_PYTHON else 3.0
        yield lambda: int(random.integers(1, 30)), {"max_retired_versions": 1000, "probe_pin_seconds": seconds}
    else:
        yield None, {"max_retired_versions": 2, "probe_pin_seconds": 3600.0}


@pytest.mark.timeout(1800)
def test_swaps_fail_no_call_mix_no_answer_and_keep_no_memory(
    versions: Versions, pin_for: tuple[Callable[[], int] | None, dict[str, float]], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pinned, settings = pin_for
    name = request.node.callspec.id
    base = 1000 * (pinned is None)
    random = np.random.default_rng(1)
    pool = random_completions(random, 64)
    known: dict[str, np.ndarray] = {}

    def expected(key: str) -> np.ndarray:
        if key not in known:
            known[key] = versions.expected(key, pool)
        return known[key]

    for swap in range(SWAPS + 6):
        versions.make(f"swap@{base + swap}")
        expected(f"swap@{base + swap}")
    versions.put(f"swap@{base}", at="swap.onnx")
    devices = "cpu,cpu" if SWAPS >= 100 else "cpu"
    with (
        start_server(versions.model, [versions.folder], admin=True, devices=devices, **settings) as server,
        ProbeClient(server.address, timeout=TIMEOUT) as admin,
        ExitStack() as running,
    ):
        stopped = threading.Event()
        grpo = running.enter_context(closing(GRPORun(tmp_path, versions.model, server.address, name))) if TRAINER_PYTHON else None
        # one client pins once, for the whole run
        trainer = Loop(server.address, versions, pool, expected, None if pinned is None else lambda: 10**9, 100, stopped)
        loops = [Loop(server.address, versions, pool, expected, pinned, seed, stopped) for seed in range(CLIENTS)] + [trainer]
        threads = [threading.Thread(target=loop.run) for loop in loops]
        for thread in threads:
            thread.start()
        reloads: list[float] = []

        def swap_to(number: int) -> None:
            # in place, and beside and then without the old one, in turn
            versions.put(f"swap@{base + number}", at="swap.onnx")
            reloaded = admin.reload_probes()
            assert reloaded.added == (f"swap@{base + number}",)
            assert not reloaded.refused
            reloads.append(reloaded.seconds)
            time.sleep(0.05)

        try:
            eventually(lambda: all(loop.calls >= 3 or loop.failure for loop in loops))
            for number in range(1, 6):
                swap_to(number)
            time.sleep(1.0)
            before, files = memory(server), descriptors(server)
            quiet = [seconds for loop in loops for seconds in loop.seconds]
            for loop in loops:
                loop.seconds.clear()
            for number in range(6, SWAPS + 6):
                swap_to(number)
                assert not [loop.failure for loop in loops if loop.failure]
                if grpo is not None:
                    grpo.check_runs()
            busy = [seconds for loop in loops for seconds in loop.seconds]
            if pinned is not None:  # what nobody has named for a while is dropped, and what the trainer names is there
                for loop in loops[:-1]:
                    loop.pin_for = lambda: 10**9
                eventually(lambda: len(served(admin)[1]) <= CLIENTS + 1 + (grpo is not None))
            time.sleep(1.0)
            after = memory(server)
            norms = [] if grpo is None else grpo.end()
        finally:
            stopped.set()
            for thread in threads:
                thread.join()
        for loop in loops:
            if loop.failure:
                raise loop.failure
        grown = {process: after[process] - before[process] for process in after}
        seen = set.union(*(loop.seen for loop in loops))
        milliseconds = {
            when: " / ".join(f"{1000 * np.quantile(seconds, share):.1f}" for share in (0.5, 0.99, 1))
            for when, seconds in (("first", quiet), ("later", busy))
        }
        print(f"{name}: {SWAPS} swaps, {sum(loop.calls for loop in loops)} calls, {len(seen)} versions seen")
        print(f"a reload: {np.median(reloads):.3f} s (median), {max(reloads):.3f} s (max); a call (p50/p99/max ms): {milliseconds}")
        print("MiB before:", {process: round(size / 2**20) for process, size in before.items()})
        print("MiB more:", {process: round(size / 2**20, 1) for process, size in grown.items()})
        if pinned is not None:
            assert trainer.seen == {f"swap@{base}"}
        if grpo is not None:
            named = grpo.check(versions)
            print(f"TRL: {len(norms)} steps, {len(named)} batches of rewards by {len(set(named))} versions")
            assert np.isfinite(norms).all()
            numbers = [int(key.split("@")[1]) for key in named]
            assert numbers == sorted(numbers)
            assert set(numbers) == {base} if pinned is not None else len(set(numbers)) > SWAPS / 4
        assert len(seen) > SWAPS / 2
        assert grown.pop("front") <= FRONT_BYTES
        assert all(bytes_ <= WORKER_BYTES for bytes_ in grown.values())
        assert descriptors(server) <= files + 8
        eventually(lambda: versions_shown(server) == versions_served(admin))  # a pin may run out between the two readings
        assert not server.events("worker died")
