"""One retry loop keeps the budget and the deadline, whatever fails and however; on a clock of the test's own, and against real sockets."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from scripted_server import BlockingAsyncClient, Service, group, queue_full, serving, unavailable

from probescore import (
    AsyncProbeClient,
    DeadlineExceededError,
    OverloadedError,
    ProbeClient,
    ProbescoreError,
    TransientError,
    UnavailableError,
)
from probescore._retries import Attempts, retry

# ------------------------------------------------------------------------------------------------------- on a clock of the test's own


class World:
    """A server on a clock that only pauses and attempts move: attempts that start before ``back_at`` fail.

    Args:
        seed: of everything that happens.
        budget: the client's.
        slow: the longest that an attempt may take before it fails, as a share of the budget.
        back_at: seconds after the first failure from which on attempts succeed.
        hints: whether the server asks for pauses.
    """

    def __init__(self, seed: int, budget: float, *, slow: float, back_at: float, hints: bool) -> None:
        self.random = random.Random(seed)
        self.budget, self.slow, self.hints = budget, slow, hints
        self.now = self.random.uniform(0, 1e6)
        self.healthy = self.random.uniform(0, 50)
        self.back_at = back_at
        self.began = 0.0
        self.starts: list[float] = []
        self.asked_too_much = False

    def clock(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds

    def attempt(self, _: float) -> float:
        self.starts.append(self.now)
        if len(self.starts) == 1:  # what was computed before the worker died is no outage
            self.now += self.healthy
            self.began = self.now
        elif self.now >= self.began + self.back_at:
            return self.now - self.began
        else:
            self.now += self.random.uniform(0, self.slow * self.budget)
        asked = None
        if self.hints and self.random.random() < 0.7:
            asked = self.random.choice([0.0, 0.001, 0.1 * self.budget, self.random.uniform(0, self.budget), 4 * self.budget])
            self.asked_too_much = asked > self.began + self.budget - self.now
        raise self.random.choice([UnavailableError, OverloadedError])("away", "UNAVAILABLE", retry_seconds=asked)


@pytest.mark.parametrize("seed", range(200))
def test_the_budget_holds_over_any_schedule_of_failures_and_pushbacks(seed: int) -> None:
    budget = random.Random(seed).choice([0.5, 2.0, 30.0, 120.0])
    world = World(seed, budget, slow=0.09, back_at=1e9, hints=True)
    attempts = Attempts(1e4, budget, clock=world.clock, uniform=world.random.random)

    with pytest.raises(TransientError) as raised:
        retry(world.attempt, attempts, world.wait)

    spent = world.now - world.began
    assert spent <= budget * 1.1
    assert "restart_budget" in str(raised.value)
    # and it was used to its end, unless the server asked for more than was left: there was no time for another attempt
    assert world.asked_too_much or spent >= budget


@pytest.mark.parametrize("seed", range(200))
def test_who_comes_back_within_the_budget_is_met(seed: int) -> None:
    budget = random.Random(seed).choice([0.5, 2.0, 30.0, 120.0])
    back_at = random.Random(-seed).uniform(0, budget * 0.999)
    world = World(seed, budget, slow=0.001, back_at=back_at, hints=False)

    assert retry(world.attempt, Attempts(1e4, budget, clock=world.clock, uniform=world.random.random), world.wait) <= budget * 1.01


@pytest.mark.parametrize("seed", range(200))
def test_no_attempt_starts_after_the_deadline_and_none_gives_up_long_before_it(seed: int) -> None:
    timeout = random.Random(seed).uniform(0.5, 100)
    world = World(seed, 1000.0, slow=0.0, back_at=1e9, hints=seed % 2 == 0)
    world.healthy = 0
    attempts = Attempts(timeout, 1000.0, clock=world.clock, uniform=world.random.random)

    with pytest.raises(TransientError, match="timeout"):
        retry(world.attempt, attempts, world.wait)

    last = world.starts[-1] - world.began
    assert last < timeout
    assert world.hints or last >= timeout - 0.05


def test_a_pause_longer_than_what_remains_is_an_error_that_names_both() -> None:
    attempts = Attempts(timeout=1000, restart_budget=2)
    with pytest.raises(OverloadedError) as raised:
        attempts.pause(OverloadedError("5 tokens are waiting", "RESOURCE_EXHAUSTED", "QUEUE_FULL", retry_seconds=8))
    assert str(raised.value) == (
        "5 tokens are waiting; the server asks for a pause of 8 s, and of the client's restart_budget of 2 s 2 s are left"
    )
    assert (raised.value.code, raised.value.reason, raised.value.retry_seconds) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL", 8)

    with pytest.raises(OverloadedError, match=r"a pause of 8 s, and of the call's timeout of 5 s \S+ s are left"):
        Attempts(timeout=5, restart_budget=100).pause(OverloadedError("", retry_seconds=8))


def test_a_thousand_failures_are_no_more_than_the_last() -> None:
    attempts = Attempts(timeout=1e6, restart_budget=1e6)
    assert max(attempts.pause(UnavailableError("")) for _ in range(2000)) <= 6.25


def test_a_server_that_asks_for_no_pause_is_not_asked_without_one() -> None:
    attempts = Attempts(timeout=1e6, restart_budget=1e6)
    assert sum(attempts.pause(UnavailableError("", retry_seconds=0)) for _ in range(100)) > 5


def test_every_failed_attempt_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    attempts = Attempts(timeout=1000, restart_budget=500)
    with caplog.at_level(logging.INFO, "probescore"):
        for _ in range(3):
            attempts.pause(UnavailableError("gone\x1b[2J", "UNAVAILABLE", retry_seconds=7))
    assert [(record.name, record.levelno) for record in caplog.records] == [
        ("probescore", logging.WARNING),
        ("probescore", logging.INFO),
        ("probescore", logging.INFO),
    ]
    for number, record in enumerate(caplog.records, 1):
        said = record.getMessage()
        assert f"attempt {number} in a row failed with UNAVAILABLE" in said
        assert "starts in" in said
        assert "\x1b" not in said


# ------------------------------------------------------------------------------------------------------------------- on real sockets

CALLS: dict[str, Callable[[Any], Any]] = {
    "score": lambda client: client.score([group([1])]),
    "score_stream": lambda client: list(client.score_stream([group([1])])),
    "get_server_info": lambda client: client.get_server_info(),
    "list_probes": lambda client: client.list_probes(),
    "sleep": lambda client: client.sleep(),
    "wake": lambda client: client.wake(),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_pushback_beyond_the_budget_ends_every_call_at_once(client_class: Any, address: str, service: Service, call: str) -> None:
    service.script = [queue_full(retry_seconds=3)] * 9
    with client_class(address, timeout=60, restart_budget=0.5) as client:
        began = time.monotonic()
        with pytest.raises(OverloadedError, match=r"a pause of 3 s, and of the client's restart_budget of 0.5 s"):
            CALLS[call](client)
        assert time.monotonic() - began < 2.5  # without the pause
    assert len(service.requests) == 1


@pytest.mark.parametrize("call", CALLS)
def test_every_call_keeps_the_budget_when_nobody_answers(client_class: Any, call: str) -> None:
    with serving(Service()) as address:
        pass
    with client_class(address, timeout=60, restart_budget=1) as client:
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="restart_budget of 1 s is spent"):
            CALLS[call](client)
        spent = time.monotonic() - began
    assert 0.9 < spent < 2.5  # the machine may be busy; the tests above have a clock of their own


@pytest.mark.parametrize("call", CALLS)
def test_every_call_asks_as_often_as_the_loop_says_and_no_oftener(client_class: Any, address: str, service: Service, call: str) -> None:
    # gRPC's own retries, under ours, would ask several times for each attempt
    service.script = [unavailable(0.05)] * 4
    with client_class(address, timeout=60, restart_budget=30) as client:
        CALLS[call](client)
    assert len(service.requests) == 5


@contextmanager
def black_hole() -> Iterator[str]:
    """Where connections are taken by the kernel and never answered."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_a_connection_that_never_stands_is_given_up_within_the_budget(client_class: Any) -> None:
    with black_hole() as address, client_class(address, timeout=60, restart_budget=1) as client:
        began = time.monotonic()
        with pytest.raises((UnavailableError, DeadlineExceededError)):
            client.score([group([1])])
        assert time.monotonic() - began < 7  # two connections of 2 s at most, which a budget of 40 s and more does not notice


# ------------------------------------------------------------------------------------------------------------------- ended from outside


def failing_for_long(service: Service) -> None:
    service.script = [unavailable(20)]


@pytest.mark.parametrize("call", ["score", "score_stream", "wake"])
def test_a_pause_ends_when_another_thread_closes_the_client(address: str, service: Service, call: str) -> None:
    failing_for_long(service)
    client = ProbeClient(address, timeout=100, restart_budget=50)
    threading.Timer(0.5, client.close).start()

    began = time.monotonic()
    with pytest.raises(RuntimeError, match="the client is closed"):
        CALLS[call](client)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("call", ["score", "score_stream", "wake"])
async def test_a_pause_ends_when_another_task_closes_the_client(address: str, service: Service, call: str) -> None:
    failing_for_long(service)
    client = AsyncProbeClient(address, timeout=100, restart_budget=50)

    async def work() -> None:
        if call == "score_stream":
            async for _ in client.score_stream([group([1])]):
                pass
        else:
            await CALLS[call](client)

    task = asyncio.create_task(work())
    await asyncio.sleep(0.5)
    began = time.monotonic()
    await client.close()
    with pytest.raises(RuntimeError, match="the client is closed"):
        await task
    assert time.monotonic() - began < 5


async def test_a_pause_ends_when_its_task_is_cancelled(address: str, service: Service) -> None:
    failing_for_long(service)
    async with AsyncProbeClient(address, timeout=100, restart_budget=50) as client:
        task = asyncio.create_task(client.score([group([1])]))
        await asyncio.sleep(0.5)
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("call", ["score", "wake"])
def test_a_call_under_way_ends_when_another_thread_closes_the_client(address: str, service: Service, call: str) -> None:
    release = threading.Event()
    service.script = [lambda _: release.wait(20)]
    client = ProbeClient(address, timeout=100, restart_budget=50)
    threading.Timer(0.5, client.close).start()
    try:
        with pytest.raises(RuntimeError, match="the client is closed"):
            CALLS[call](client)
    finally:
        release.set()


def test_a_deadline_holds_over_all_attempts_together(client_class: Any, address: str, service: Service) -> None:
    service.script = [unavailable(0.05)] * 1000
    with client_class(address, restart_budget=100) as client:
        began = time.monotonic()
        with pytest.raises((TransientError, DeadlineExceededError)) as raised:
            client.score([group([1])], timeout=1)
        assert 0.8 < time.monotonic() - began < 2.5
    assert isinstance(raised.value, ProbescoreError)
    assert issubclass(client_class, (ProbeClient, BlockingAsyncClient))
