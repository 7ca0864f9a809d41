"""A reading is replaced again and again while clients score: no call fails, no answer is of two versions or of another than it says, and no
memory stays.

``make swaps`` does so a hundred times; eight times here.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
from calls import eventually, total
from read_twice import BOUND, GROUPS, Served
from running_server import RunningServer, start_server
from served_readings import ReadingsClient, numbers, of
from written_adapters import WrittenAdapter

SWAPS = int(os.environ.get("PROBESCORE_SWAPS", "8"))
WARM_UP = 3
CLIENTS = 8
FORMS = {"low rank": {}, "merged": {"use_dora": True}}
# What Python's and the system's allocators may keep of a hundred loads, of the front and of a worker.
FRONT_BYTES, WORKER_BYTES = 8 << 20, 24 << 20


@dataclass
class Scorer:
    """One client that scores until it is told to stop, by turns in one piece and in several, on both readings and on one."""

    address: RunningServer
    expected: dict[str, np.ndarray]
    frozen: np.ndarray
    bound: float
    seed: int
    stopped: threading.Event
    calls: int = 0
    seen: set[str] = field(default_factory=set)
    worst: float = 0.0
    failure: BaseException | None = None

    def run(self) -> None:
        random = np.random.default_rng(self.seed)
        try:
            with ReadingsClient.of(self.address) as client:
                while not self.stopped.is_set():
                    names = [("frozen", "policy"), ("policy",)][random.integers(2)]
                    if random.integers(2):
                        result = client.score(*names)
                        found = {name: of(result, name) for name in names}
                        ids = {result.info.readings[-1].id}
                    else:
                        pieces = sorted(client.stream(*names), key=lambda piece: (piece.group_index, piece.completion_index))
                        found = {name: numbers([piece.scores for piece in pieces], name) for name in names}
                        ids = {piece.info.readings[-1].id for piece in pieces}
                    (own,) = ids
                    self.seen.add(own)
                    for name, scores in found.items():
                        right = self.frozen if name == "frozen" else self.expected[own]
                        self.worst = max(self.worst, float(np.abs(scores - right).max()))
                        np.testing.assert_allclose(scores, right, rtol=0, atol=self.bound)
                    self.calls += 1
        except BaseException as error:
            self.failure = error


def memory(server: RunningServer) -> dict[str, int]:
    front = psutil.Process(server.pid)
    workers = [child for child in front.children() if "spawn_main" in " ".join(child.cmdline())]
    return {"front": front.memory_info().rss} | {f"worker {number}": each.memory_info().rss for number, each in enumerate(workers)}


@pytest.mark.timeout(1800)
def test_swaps_of_a_reading_fail_no_call_mix_no_answer_and_keep_no_memory(llama: Served, tmp_path: Path) -> None:
    swaps = SWAPS + WARM_UP
    engine = llama.engine("middle")
    frozen = of(engine.score(GROUPS, token_scores="all"), "frozen")
    expected: dict[str, np.ndarray] = {}
    ids = []
    for step in range(swaps):
        form = [*FORMS.values()][step % 2]
        loaded = engine.load_reading("policy", WrittenAdapter.random(llama.model, seed=step, **form).write(tmp_path / f"step-{step}"))
        ids.append(loaded.reading.id)
        expected[loaded.reading.id] = of(engine.score(GROUPS, token_scores="all", readings=["policy"]), "policy")
    bound = BOUND * float(frozen.std())
    closest = min(
        float(np.abs(one - other).max())
        for index, one in enumerate(expected.values())
        for other in [frozen, *list(expected.values())[:index]]
    )
    assert closest > 100 * bound  # else an answer of another version would pass
    devices = "cpu,cpu" if SWAPS >= 100 else "cpu"
    with (
        start_server(llama.model, [llama.probe("middle")], admin=True, readings_root=tmp_path, devices=devices) as server,
        ReadingsClient.of(server) as trainer,
    ):
        eventually(lambda: all(worker.ready for worker in trainer.info().workers), 240.0)
        trainer.load("policy", "step-0", step=0)
        stopped = threading.Event()
        scorers = [Scorer(server, expected, frozen, bound, seed, stopped) for seed in range(CLIENTS)]
        threads = [threading.Thread(target=scorer.run) for scorer in scorers]
        for thread in threads:
            thread.start()
        seconds: list[float] = []

        def swap_to(step: int) -> None:
            started = time.perf_counter()
            loaded = trainer.load("policy", f"step-{step}", step=step, in_place=step % 4 == 3)
            seconds.append(time.perf_counter() - started)
            assert loaded.replaced is not None
            assert (loaded.replaced.id, loaded.replaced.step) == (ids[step - 1], step - 1)
            assert (loaded.reading.id, loaded.reading.step) == (ids[step], step)
            result = trainer.score("frozen", "policy")  # what follows a load is of that load
            assert result.info.readings[1] == loaded.reading
            np.testing.assert_allclose(of(result, "policy"), expected[ids[step]], rtol=0, atol=bound)
            assert not [scorer.failure for scorer in scorers if scorer.failure]

        try:
            eventually(lambda: all(scorer.calls >= 2 or scorer.failure for scorer in scorers))
            for step in range(1, WARM_UP):
                swap_to(step)
            before = memory(server)
            for step in range(WARM_UP, swaps):
                swap_to(step)
            time.sleep(1.0)
            after = memory(server)
        finally:
            stopped.set()
            for thread in threads:
                thread.join()
        for scorer in scorers:
            if scorer.failure:
                raise scorer.failure
        seen = set.union(*(scorer.seen for scorer in scorers))
        grown = {process: after[process] - before[process] for process in after}
        worst = max(scorer.worst for scorer in scorers)
        print(f"{SWAPS} swaps, {sum(scorer.calls for scorer in scorers)} calls, {len(seen)} versions seen, none failed, none mixed")
        print(f"a load: {np.median(seconds):.3f} s (median), {max(seconds):.3f} s (max)")
        print(f"largest error {worst:.2e}; two versions differ by {closest:.2e} at least")
        print("MiB before:", {process: round(size / 2**20) for process, size in before.items()})
        print("MiB more:", {process: round(size / 2**20, 1) for process, size in grown.items()})
        assert len(seen) > SWAPS / 2
        assert grown.pop("front") <= FRONT_BYTES
        assert all(bytes_ <= WORKER_BYTES for bytes_ in grown.values())
        assert total(server, "probescore_readings") == 1
        assert total(server, "probescore_reading_loads_total", 'outcome="loaded"') == swaps
        assert total(server, "probescore_reading_rollouts_total", 'kind="adapter"') > 0
        assert not server.events("worker died")
        assert not server.events("reading lost")
