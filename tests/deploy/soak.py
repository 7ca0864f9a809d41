"""Steady load on a server for a long time, what its processes hold meanwhile, and whether that grows.

python tests/deploy/soak.py --address HOST:PORT --pid PID_OF_THE_FRONT --minutes 30     (with tests/ on PYTHONPATH)
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import psutil
from models import BOS, VOCAB_SIZE
from scipy.stats import theilslopes

from probescore import DeadlineExceededError, ProbeClient, RolloutGroup

CALLERS = 4
CALLS_PER_SECOND = 20.0
GIVEN_UP = 0.3
"""The share of calls whose deadline passes before they can be answered."""
# Caches and pools fill first.
WARM_UP = 1 / 3
# Of what is held. Less than this is noise of the allocators, which hand memory back in large pieces. For half an hour: in ten minutes pools
# still fill, and the test may fail for that.
MAX_GROWTH_PER_HOUR = 0.02


@dataclass
class Held:
    """What one process held over time. `bytes`: memory of its own, without mapped files."""

    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def sample(self, process: psutil.Process, seconds: float) -> None:
        memory = process.memory_info()
        self.seconds.append(seconds)
        self.bytes.append(memory.rss - memory.shared)
        self.descriptors.append(process.num_fds())

    def warm(self) -> slice:
        return slice(int(WARM_UP * len(self.seconds)), None)

    def growth_per_hour(self) -> tuple[float, float, float]:
        """Bytes per hour once it is warm: the median slope between two samples (Theil and Sen), and its 95% interval."""
        slope, _, low, high = theilslopes(self.bytes[self.warm()], self.seconds[self.warm()])
        return 3600 * float(slope), 3600 * float(low), 3600 * float(high)

    def leaks_memory(self) -> bool:
        """Whether it surely grows by more than the allocators' noise."""
        return self.growth_per_hour()[1] > MAX_GROWTH_PER_HOUR * float(np.median(self.bytes[self.warm()]))

    def leaks_descriptors(self) -> bool:
        """Whether there are more at the end than there ever were while it warmed up and once more as many callers."""
        warm = self.warm().start
        return min(self.descriptors[-10:]) > max(self.descriptors[: max(1, warm)]) + CALLERS


class SoakLoad:
    """Calls of all lengths at a steady pace, some of which are given up, from the start of a ``with`` block to its end.

    Attributes:
        answered, given_up: calls.
        failures: what else happened, in words.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._stopping = threading.Event()
        self._callers = [threading.Thread(target=self._call, args=(seed,), daemon=True) for seed in range(CALLERS)]
        self.answered = 0
        self.given_up = 0
        self.failures: list[str] = []

    def __enter__(self) -> SoakLoad:
        for caller in self._callers:
            caller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for caller in self._callers:
            caller.join(60)

    def _call(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        # a client of its own, so that connections come and go
        while not self._stopping.is_set():
            with ProbeClient(self._address) as client:
                for _ in range(200):
                    began = time.monotonic()
                    self._one(client, random)
                    if self._stopping.wait(max(0.0, CALLERS / CALLS_PER_SECOND - (time.monotonic() - began))):
                        return

    def _one(self, client: ProbeClient, random: np.random.Generator) -> None:
        def ids(count: int) -> list[int]:
            return [int(value) for value in random.integers(4, VOCAB_SIZE, count)]

        group = RolloutGroup([BOS, *ids(random.integers(1, 100))], [ids(random.integers(1, 200)) for _ in range(random.integers(1, 5))])
        give_up = random.random() < GIVEN_UP
        try:
            client.score([group], timeout=0.004 if give_up else 60.0, token_scores="all" if random.random() < 0.5 else ())
            self.answered += 1
        except DeadlineExceededError:
            self.given_up += 1
            if not give_up:
                self.failures.append("a call took a minute")
        except Exception as error:
            self.failures.append(f"{type(error).__name__}: {error}")


@dataclass
class Soak:
    """What came of it."""

    load: SoakLoad
    held: dict[str, Held]

    def report(self) -> Iterator[str]:
        """A table for people."""
        yield f"{self.load.answered} calls answered, {self.load.given_up} given up, {len(self.load.failures)} failed"
        for name, held in self.held.items():
            warm = held.bytes[held.warm()]
            slope, low, high = (value / 1e6 for value in held.growth_per_hour())
            yield (
                f"{name}: {held.bytes[0] / 1e6:.1f} MB at the start, {warm[0] / 1e6:.1f} warm, {held.bytes[-1] / 1e6:.1f} at the end; "
                f"{slope:+.2f} MB per hour ({low:+.2f} to {high:+.2f}); descriptors {held.descriptors[0]} to {held.descriptors[-1]}"
            )


def soak(address: str, processes: dict[str, psutil.Process], *, minutes: float, say: Callable[[str], None] = lambda line: None) -> Soak:
    """Loads a server and watches its processes.

    Args:
        address: of the server.
        processes: by name.
        minutes: how long.
        say: is told now and then how it goes.
    """
    held = {name: Held() for name in processes}
    began, every = time.monotonic(), min(5.0, 60 * minutes / 60)
    with SoakLoad(address) as load:
        while (passed := time.monotonic() - began) < 60 * minutes:
            for name, process in processes.items():
                held[name].sample(process, passed)
            if len(held[name].seconds) % 24 == 1:
                say(f"{passed / 60:.1f} min: " + ", ".join(f"{each} {own.bytes[-1] / 1e6:.1f} MB" for each, own in held.items()))
            time.sleep(every)
    return Soak(load, held)


def processes_of(front: psutil.Process) -> dict[str, psutil.Process]:
    """The front and its worker; between them and a container's first process is only what passes signals on."""

    def is_front(process: psutil.Process) -> bool:
        return "probescore" in " ".join(process.cmdline()) and "tini" not in process.name()

    family = [front, *front.children(recursive=True)]
    serving = next(process for process in family if is_front(process))
    worker = max(serving.children(), key=lambda process: process.memory_info().rss)
    return {"front": serving, "worker": worker}


def main(arguments: Sequence[str] | None = None) -> None:
    """As a command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    done = soak(given.address, processes_of(psutil.Process(given.pid)), minutes=given.minutes, say=lambda line: print(line, flush=True))
    print("\n".join(done.report()))
    if given.json:
        given.json.write_text(json.dumps({name: asdict(held) for name, held in done.held.items()}))


if __name__ == "__main__":
    main()
