"""One client in several threads, processes and loops."""

from __future__ import annotations

import asyncio
import functools
import gc
import math
import multiprocessing
import os
import pickle
import socket
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from scripted_server import Service, group, serving

from probescore import AsyncProbeClient, ProbeClient, ProbescoreError, _process_forks


@pytest.fixture(scope="module")
def address() -> Any:
    """A server in a process of its own: a process that forks must not have one."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_until_closed, args=(theirs,), daemon=True)
    process.start()
    yield ours.recv()
    ours.send("stop")
    process.join(20)


def serve_until_closed(connection: Any) -> None:
    with serving(Service()) as where:
        connection.send(where)
        connection.recv()


def value(client: ProbeClient, number: int) -> float:
    return float(client.score([group([number])]).values("sum")[0])


async def async_value(client: AsyncProbeClient, number: int) -> float:
    return float((await client.score([group([number])])).values("sum")[0])


def in_a_fork(work: Callable[[], float]) -> str:
    """What ``work`` gives, or how it fails, in a forked child."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what is tested
        child = os.fork()
    if child == 0:
        try:
            os.write(write, repr(work()).encode())
        except BaseException as error:
            os.write(write, repr(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        written = pipe.read()
    os.waitpid(child, 0)
    return written


def sync_fork(address: str) -> list[Any]:
    with ProbeClient(address, timeout=20) as client:
        return [value(client, 1), in_a_fork(lambda: value(client, 2)), value(client, 3)]


def async_fork(address: str) -> list[Any]:
    client = AsyncProbeClient(address, timeout=20)
    before = asyncio.run(async_value(client, 1))
    return [before, in_a_fork(lambda: asyncio.run(async_value(client, 2))), asyncio.run(async_value(client, 3))]


def mixed_fork(address: str) -> list[Any]:
    client = AsyncProbeClient(address, timeout=20)
    before = asyncio.run(async_value(client, 1))
    return [before, in_a_fork(lambda: value(ProbeClient(address, timeout=20), 2)), asyncio.run(async_value(client, 3))]


def fork_inside_a_loop(address: str) -> list[Any]:
    client = AsyncProbeClient(address, timeout=20)

    async def fork() -> str:
        await async_value(client, 1)
        with ThreadPoolExecutor(1) as thread:  # the child has no running loop of its own yet
            return thread.submit(in_a_fork, lambda: asyncio.run(async_value(client, 2))).result()

    return [asyncio.run(fork())]


def fork_during_another_threads_call(kind: str, address: str) -> list[Any]:
    with socket.socket() as silent, ProbeClient(address, timeout=20) as client:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        waiting = ProbeClient(f"127.0.0.1:{silent.getsockname()[1]}", timeout=60)

        def wait() -> None:
            with suppress(ProbescoreError, RuntimeError):
                waiting.list_probes() if kind == "call" else list(waiting.score_stream([group([1])]))

        thread = threading.Thread(target=wait)
        thread.start()
        while not _process_forks._under_way:
            time.sleep(0.01)
        found = [in_a_fork(lambda: value(client, 1)), in_a_fork(lambda: asyncio.run(async_value(AsyncProbeClient(address), 1)))]
        waiting.close()
        thread.join()
        return found


def closed_just_before(address: str) -> list[Any]:
    """Whether gRPC is at work when a fork comes, however slow the machine is."""
    _process_forks.REST_SECONDS = 60.0
    found = []
    client = AsyncProbeClient(address, timeout=20)
    for number in range(10):
        asyncio.run(async_value(client, number))
        _process_forks._prepare()
        found.append(_process_forks._at_work())
        with ProbeClient(address, timeout=20) as other:
            value(other, number)
        _process_forks._prepare()
        found.append(_process_forks._at_work())
    return found


def in_a_fresh_process(work: Callable[[str], list[Any]], address: str) -> list[Any]:
    """Runs where no other test has left a thread of gRPC behind."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply_async(work, (address,)).get(100)


def test_threads_share_a_client(address: str) -> None:
    with ProbeClient(address) as client, ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda number: value(client, number), range(64))) == list(range(64))


def test_threads_that_start_together_share_one_channel(address: str) -> None:
    together = threading.Barrier(8)
    with ProbeClient(address) as client, ThreadPoolExecutor(8) as threads:

        def stub(_: int) -> Any:
            together.wait()
            return client._stub()

        assert len(set(threads.map(stub, range(8)))) == 1


@pytest.mark.parametrize("work", [sync_fork, async_fork, mixed_fork])
def test_a_client_can_be_used_after_a_fork(work: Any, address: str) -> None:
    assert in_a_fresh_process(work, address) == [1, "2.0", 3]


def test_a_fork_that_grpc_does_not_survive_is_an_error_instead_of_a_hang(address: str) -> None:
    [found] = in_a_fresh_process(fork_inside_a_loop, address)

    assert found.startswith("RuntimeError('this process was forked while an AsyncProbeClient was open")


@pytest.mark.parametrize("kind", ["call", "stream"])
def test_a_fork_during_another_threads_call_is_an_error_in_the_child_instead_of_a_hang(
    kind: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPC_ENABLE_FORK_SUPPORT", "0")  # which may end such a child by itself, before it comes to anything of ours
    found = in_a_fresh_process(functools.partial(fork_during_another_threads_call, kind), address)

    assert len(found) == 2
    assert all(one.startswith("RuntimeError('this process was forked while another thread was in a call") for one in found)


@pytest.mark.skipif(not _process_forks._THREADS.exists(), reason="threads cannot be seen here")
def test_a_fork_finds_grpc_at_rest_after_the_last_channel_has_ended(address: str) -> None:
    assert in_a_fresh_process(closed_just_before, address) == [False] * 20


@pytest.mark.parametrize(("threads", "seconds"), [(lambda: True, 0.5), (lambda: False, 0.01)])
def test_a_fork_waits_no_longer_than_its_limit_and_only_for_what_has_just_ended(
    threads: Any, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0

    def sleep(step: float) -> None:
        nonlocal now
        now += step

    monkeypatch.setattr(_process_forks, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    monkeypatch.setattr(_process_forks, "_at_work", threads)
    monkeypatch.setattr(_process_forks, "_ended_at", -math.inf)
    _process_forks._prepare()
    assert now == 1000.0
    _process_forks.channel_ended()
    _process_forks._prepare()
    _process_forks._prepare()
    assert now == pytest.approx(1000 + seconds, abs=0.002)


def test_a_moment_without_threads_of_grpc_is_not_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [True, False, True, False, False, False, False, True, *[False] * 9]
    monkeypatch.setattr(_process_forks, "_at_work", lambda: seen.pop(0))
    _process_forks.channel_ended()

    _process_forks._prepare()

    assert seen == [False] * 4


@pytest.mark.parametrize("kind", [ProbeClient, AsyncProbeClient])
def test_a_client_can_be_pickled_also_after_use(kind: Any, address: str) -> None:
    client = kind([address], timeout=20, restart_budget=3, job="run", metadata={"a": "b"})
    if kind is ProbeClient:
        value(client, 1)
    else:
        asyncio.run(async_value(client, 1))

    copied = pickle.loads(pickle.dumps(client))

    assert copied._settings == client._settings
    assert repr(copied) == f"{kind.__name__}({address})"
    if kind is ProbeClient:
        with copied:
            assert value(copied, 2) == 2
        client.close()
    else:
        assert asyncio.run(async_value(copied, 2)) == 2


def test_a_client_with_credentials_says_that_it_cannot_be_pickled(address: str) -> None:
    client = ProbeClient(address, credentials=grpc.ssl_channel_credentials())
    with pytest.raises(TypeError, match="make it in the process that uses it"):
        pickle.dumps(client)


def test_an_async_client_made_without_a_loop_is_used_in_one_after_the_other(address: str) -> None:
    client = AsyncProbeClient(address)

    assert [asyncio.run(async_value(client, number)) for number in range(5)] == [0, 1, 2, 3, 4]

    # and keeps only the last of their channels
    gc.collect()
    assert len(client._channels) == 1


def test_an_async_client_is_used_in_loops_of_several_threads_at_once(address: str) -> None:
    client = AsyncProbeClient(address)

    async def several(start: int) -> list[float]:
        return list(await asyncio.gather(*(async_value(client, number) for number in range(start, start + 10))))

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda start: asyncio.run(several(start)), [0, 10, 20]))

    assert found == [list(map(float, range(start, start + 10))) for start in (0, 10, 20)]


async def test_tasks_that_start_together_share_one_channel(address: str) -> None:
    async with AsyncProbeClient(address) as client:
        stubs = await asyncio.gather(*(client._stub() for _ in range(8)))
        assert len(set(stubs)) == 1


async def test_a_cancelled_task_cancels_its_call() -> None:
    started, ended = threading.Event(), threading.Event()
    release = threading.Event()

    class Watching(Service):
        def Score(self, request: Any, context: Any) -> Any:
            context.add_callback(ended.set)
            started.set()
            release.wait(20)
            return super().Score(request, context)

    with serving(Watching()) as where:
        async with AsyncProbeClient(where) as client:
            task = asyncio.create_task(client.score([group([1])]))
            assert await asyncio.to_thread(started.wait, 20)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(ended.wait, 20)
        release.set()


async def test_a_closed_async_client_refuses_calls(address: str) -> None:
    client = AsyncProbeClient(address)
    async with client:
        await async_value(client, 1)
    with pytest.raises(RuntimeError, match="closed"):
        await async_value(client, 1)
