"""Readings of several replicas, each with a worker process of its own, which share one table in this process: whatever a replica misses, it
never takes a name for another version than the table says.

``tests/deploy/test_ray_readings.py`` has the same behind Ray's proxy.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from read_twice import Served
from written_adapters import WrittenAdapter

from probescore.types import LoadedReading, Reading
from probescore_server.errors import (
    CoreError,
    FailedPrecondition,
    InvalidRequest,
    LimitExceeded,
    ReadingIncomplete,
    WorkerUnavailable,
)
from probescore_server.front.scoring_core import ScoringCore
from probescore_server.registry import reading_table
from probescore_server.registry.reading_table import LoadOrder, ReadingTable, SharedNames
from probescore_server.registry.shared_readings import SharedReadings
from probescore_server.settings import ServerSettings

pytestmark = pytest.mark.asyncio(loop_scope="module")

MAX_READINGS = 2
SECONDS = 300.0  # a busy machine imports torch for a minute


@dataclass
class Members:
    """The replicas that a table reaches; some may be left out, as those are that have just been started."""

    reached: list[SharedReadings] = field(default_factory=list)

    async def each(self, method: str, *arguments: object) -> list[Any]:
        """Calls a method of each."""
        outcomes = await asyncio.gather(*(getattr(each, method)(*arguments) for each in self.reached), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, CoreError):
                raise outcome
        return outcomes


class Line:
    """The way of a replica to the table, which can be cut, and which can lead to another table."""

    def __init__(self, table: ReadingTable) -> None:
        self.table = table
        self.is_cut = False

    def __getattr__(self, method: str) -> Any:
        async def ask(*arguments: object) -> Any:
            if self.is_cut:
                raise WorkerUnavailable("the line is cut", 0.1)
            return await getattr(self.table, method)(*arguments)

        return ask


class Replica:
    """A scoring server without a port."""

    def __init__(self, settings: ServerSettings, table: ReadingTable) -> None:
        self.line = Line(table)
        self.core = ScoringCore(settings, ("cpu",), lambda: None, partial(SharedReadings, self.line))
        self._running = asyncio.create_task(self.core.run())
        self._following: asyncio.Task[None] | None = None

    @property
    def readings(self) -> SharedReadings:
        """Its registry."""
        assert isinstance(self.core.readings, SharedReadings)
        return self.core.readings

    async def join(self) -> None:
        """Waits for the worker, and loads what there is."""
        await self.until_up()
        await self.readings.join()
        self._following = asyncio.create_task(self.readings.run())

    async def until_up(self) -> None:
        """Waits for the worker."""
        await until(lambda: self.core.workers[0].up or self._running.done())

    async def stop(self) -> None:
        """Ends it."""
        for task in (self._following, self._running):
            if task is not None:
                task.cancel()
        await asyncio.gather(self._running, return_exceptions=True)

    async def meaning(self, *names: str) -> tuple[Reading, ...]:
        """What names mean to a call that comes now."""
        info = self.core.registry.info
        assert info is not None
        with self.readings.pinning() as pin:
            await pin.resolve(names, info)
            assert [each.name for each in pin.wanted] == [each.name for each in pin.described] == list(names)
            assert all(wanted.id in ("", described.id) for wanted, described in zip(pin.wanted, pin.described, strict=True))
            return pin.described

    async def load(self, name: str, path: str, **options: Any) -> LoadedReading:
        """Loads a reading through this replica."""
        return await self.readings.load(name, path, **{"step": None, "expected_id": "", "in_place": False, **options})


@dataclass
class Group:
    """Two replicas, and those that a test starts besides."""

    settings: ServerSettings
    members: Members
    table: ReadingTable
    first: Replica
    second: Replica

    async def start(self) -> Replica:
        """Starts a further one, which the table does not reach yet."""
        replica = Replica(self.settings, self.table)
        await replica.join()
        return replica


@pytest.fixture(scope="module")
def root(llama: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("readings")
    for seed in range(3):
        WrittenAdapter.random(llama.model, ["q_proj"], seed=seed).write(root / f"step-{seed}")
    return root


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started(llama: Served, root: Path) -> AsyncIterator[Group]:
    settings = ServerSettings(
        model=str(llama.model),
        probes=(str(llama.probe("middle")),),
        devices=("cpu",),
        threads_per_worker=1,
        admin=True,
        readings_root=root,
        max_readings=MAX_READINGS,
        drain_seconds=0.5,
        worker_restart_seconds=0.05,
    )
    members = Members()
    table = ReadingTable(MAX_READINGS, members)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading_table, "LONGEST_POLL_SECONDS", 0.2)  # here a table that is replaced goes on to answer
        group = Group(settings, members, table, Replica(settings, table), Replica(settings, table))
        for replica in (group.first, group.second):
            await replica.join()
            members.reached.append(replica.readings)
        yield group
        for replica in (group.first, group.second):
            await replica.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def group(started: Group) -> AsyncIterator[Group]:
    yield started
    started.members.reached = [started.first.readings, started.second.readings]
    for replica in (started.first, started.second):
        replica.line.is_cut = False
        replica.line.table = started.table
    for name in (await started.table.current(started.first.readings._names)).named:
        await started.first.readings.unload(name)


async def outcome_of(call: Awaitable[Any], seconds: float = 0.5) -> Any:
    """What a call returns or raises; or that it waits."""
    try:
        return await asyncio.wait_for(call, seconds)
    except (CoreError, TimeoutError) as error:
        return error


async def until(holds: Callable[[], bool]) -> None:
    """Waits until something holds."""
    async with asyncio.timeout(SECONDS):
        while not holds():  # noqa: ASYNC110 - nobody says when
            await asyncio.sleep(0.01)


async def id_of(replica: Replica, name: str) -> str:
    (reading,) = await asyncio.wait_for(replica.meaning(name), SECONDS)
    return reading.id


# -------------------------------------------------------------------------------------------------------------------------- names


async def test_a_name_means_the_same_in_all_and_then_nothing(group: Group) -> None:
    first = await group.first.load("policy", "step-0", step=1)
    assert (first.reading.name, first.reading.step, first.replaced) == ("policy", 1, None)
    second = await group.second.load("policy", "step-1", step=2)
    assert second.replaced == first.reading
    for replica in (group.first, group.second):
        assert await replica.meaning("policy") == (second.reading,)
        assert [*await replica.meaning("frozen", "policy")][1] == second.reading
        with pytest.raises(InvalidRequest, match=r"readings\[2\]: 'policy' appears twice"):
            await replica.meaning("policy", "frozen", "policy")
        with pytest.raises(InvalidRequest, match=r"readings\[1\]: unknown reading 'other'; loaded: frozen, policy"):
            await replica.meaning("policy", "other")
        assert len(replica.core.workers[0].readings) == 1  # the version before is freed
    assert await group.first.readings.unload("policy") == second.reading
    for replica in (group.first, group.second):
        with pytest.raises(InvalidRequest, match="unknown reading 'policy'; loaded: frozen"):
            await replica.meaning("policy")
        assert not replica.core.workers[0].readings


async def test_names_are_bounded_and_a_replacement_is_not_one_more(group: Group) -> None:
    for name in ("one", "two"):
        await group.first.load(name, "step-0")
    with pytest.raises(LimitExceeded, match="max_readings is 2"):
        await group.second.load("three", "step-0")
    await group.second.load("two", "step-1")


# ---------------------------------------------------------------------------------------------------------------------- what is missed


async def test_a_replica_that_a_load_did_not_reach_never_takes_the_version_before(group: Group) -> None:
    before = (await group.first.load("policy", "step-0")).reading
    late = await group.start()
    try:
        assert await late.meaning("policy") == (before,)
        late._following.cancel()  # it hears nothing from now on
        await asyncio.sleep(0)
        loaded = (await group.first.load("policy", "step-1")).reading
        outcome = await outcome_of(late.meaning("policy"))
        assert isinstance(outcome, TimeoutError | WorkerUnavailable), outcome
        late._following = asyncio.create_task(late.readings.run())
        assert await id_of(late, "policy") == loaded.id
        assert await late.meaning("frozen")
    finally:
        await late.stop()


async def test_a_replica_that_cannot_reach_the_table_refuses_names_but_the_frozen_one(group: Group) -> None:
    await group.first.load("policy", "step-0")
    group.second.line.is_cut = True
    with pytest.raises(WorkerUnavailable):
        await group.second.meaning("policy")
    with pytest.raises(WorkerUnavailable):
        await group.second.load("policy", "step-1")
    assert await group.second.meaning("frozen")


async def test_a_table_that_takes_the_place_of_another_begins_with_what_was_seen_last(group: Group) -> None:
    loaded = (await group.first.load("policy", "step-0")).reading
    group.first.line.table = group.second.line.table = ReadingTable(MAX_READINGS, group.members)
    for replica in (group.second, group.first):
        assert await replica.meaning("policy") == (loaded,)
    assert (await group.second.load("policy", "step-1")).replaced == loaded
    assert await id_of(group.first, "policy") == await id_of(group.second, "policy") != loaded.id
    await group.second.readings.unload("policy")


# ------------------------------------------------------------------------------------------------------------------------ failures


async def test_what_one_replica_cannot_load_none_takes(group: Group, root: Path, tmp_path: Path) -> None:
    before = (await group.first.load("policy", "step-0")).reading
    hold = group.second.readings.hold

    async def torn(*arguments: Any) -> LoadedReading:
        whole = shutil.copytree(root / "step-1", tmp_path / "whole", dirs_exist_ok=True)
        file = root / "step-1" / "adapter_model.safetensors"
        await asyncio.sleep(0.5)  # the other replica has it
        file.write_bytes(file.read_bytes()[:-50])
        try:
            return await hold(*arguments)
        finally:
            shutil.copytree(whole, root / "step-1", dirs_exist_ok=True)

    group.second.readings.hold = torn  # type: ignore[method-assign]
    try:
        for in_place in (False, True):
            with pytest.raises(ReadingIncomplete):
                await group.first.load("policy", "step-1", in_place=in_place)
            for replica in (group.first, group.second):
                if in_place:
                    with pytest.raises(InvalidRequest, match="unknown reading"):
                        await replica.meaning("policy")
                else:
                    assert await replica.meaning("policy") == (before,)
                held = 0 if in_place else 1
                await until(lambda: len(replica.core.workers[0].readings) == held)  # noqa: B023 - called at once
    finally:
        del group.second.readings.hold


async def test_a_version_that_a_replica_loses_while_another_loads_it_is_taken_by_none(group: Group) -> None:
    before = (await group.first.load("policy", "step-0")).reading
    hold = group.second.readings.hold

    async def lost(revision: int, key: str, order: LoadOrder) -> LoadedReading:
        loaded = await hold(revision, key, order)
        await group.table.lose(SharedNames(), key)  # as a replica does whose worker was started again without it
        return loaded

    group.second.readings.hold = lost  # type: ignore[method-assign]
    try:
        with pytest.raises(WorkerUnavailable):
            await group.first.load("policy", "step-1")
    finally:
        del group.second.readings.hold
    for replica in (group.first, group.second):
        assert await replica.meaning("policy") == (before,)


async def test_what_one_replica_has_lost_is_lost_for_all(group: Group, root: Path) -> None:
    shutil.copytree(root / "step-2", root / "gone")
    await group.first.load("policy", "gone")
    shutil.rmtree(root / "gone")
    group.second.core.workers[0]._running.process.kill()
    await until(lambda: not group.first.readings._names.named)
    await group.second.until_up()
    for replica in (group.first, group.second):
        with pytest.raises(FailedPrecondition, match="the reading 'policy' was lost"):
            await replica.meaning("policy")
        with pytest.raises(FailedPrecondition, match="the reading 'policy' was lost"):
            await replica.readings.unload("policy")
    loaded = (await group.first.load("policy", "step-0")).reading
    assert await group.second.meaning("policy") == (loaded,)


# --------------------------------------------------------------------------------------------------------------------- in place


async def test_in_place_holds_calls_of_every_replica_and_waits_for_those_before(group: Group) -> None:
    before = (await group.first.load("policy", "step-0")).reading
    info = group.second.core.registry.info
    assert info is not None
    with group.second.readings.pinning() as pin:
        await pin.resolve(["policy"], info)
        with pytest.raises(FailedPrecondition, match="still read 'policy'") as refused:
            await group.first.load("policy", "step-1", in_place=True)
        assert refused.value.reason == "READING_IN_USE"
        for replica in (group.first, group.second):
            assert await id_of(replica, "policy") == before.id
        loading = asyncio.create_task(group.first.load("policy", "step-1", in_place=True))
        await asyncio.sleep(0.1)
        waiting = [asyncio.create_task(id_of(replica, "policy")) for replica in (group.first, group.second)]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in waiting)
        assert await group.second.meaning("frozen")
    loaded = await loading
    assert loaded.replaced == before
    assert await asyncio.gather(*waiting) == [loaded.reading.id] * 2


async def test_a_load_that_is_given_up_runs_on(group: Group) -> None:
    loading = asyncio.create_task(group.first.load("policy", "step-1"))
    await asyncio.sleep(0.05)
    loading.cancel()
    await until(lambda: "policy" in group.second.readings._names.named)
    assert await id_of(group.first, "policy") == await id_of(group.second, "policy")
