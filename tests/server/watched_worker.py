"""A worker process with a real engine, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from probescore.types import RolloutGroup
from probescore_server.registry.folder import ProbeFolder
from probescore_server.rollouts import CheckedRollout, EngineInfo
from probescore_server.settings import ServerSettings
from probescore_server.spool import Spool
from probescore_server.validation.options import resolve_options
from probescore_server.validation.rollouts import resolve_rollouts
from probescore_server.workers.handle import PinnedContent, WorkerHandle
from probescore_server.workers.messages import WorkerSpec


class Watched:
    """A worker and a way to wait for its changes."""

    def __init__(self, pinned: PinnedContent | None = None, **settings: object) -> None:
        self._changed = asyncio.Event()
        chosen = ServerSettings(**{"log_format": "json", "worker_restart_seconds": 0.0, **settings})
        self.spool = Spool()
        files = ProbeFolder(chosen.probes).read(self.spool).files.values()
        self.worker = WorkerHandle(WorkerSpec(chosen, "cpu", threads=1, probes=tuple(files)), self._changed.set, pinned)
        self.task = asyncio.create_task(self.worker.run())

    @property
    def pid(self) -> int | None:
        """Of its process; ``None`` while there is none."""
        return self.worker._running.process.pid if self.worker._running is not None else None

    async def until(self, **state: bool) -> None:
        """Waits until some of its properties are what they should be: ``until(ready=True)``."""
        while any(getattr(self.worker, name) is not value for name, value in state.items()):
            self._changed.clear()
            waiting = asyncio.create_task(self._changed.wait())
            await asyncio.wait([waiting, self.task], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if self.task.done():
                self.task.result()

    async def until_failed_to_start(self) -> None:
        """Waits until an attempt to start again has failed."""
        while not self.worker.failed_starts:
            self._changed.clear()
            await self._changed.wait()


@asynccontextmanager
async def running(pinned: PinnedContent | None = None, **settings: object) -> AsyncIterator[Watched]:
    watched = Watched(pinned, **settings)
    try:
        await watched.until(ready=True)
        yield watched
    finally:
        watched.task.cancel()
        await asyncio.gather(watched.task, return_exceptions=True)


def rollouts_of(info: EngineInfo, *groups: RolloutGroup) -> list[CheckedRollout]:
    return [rollout for group in resolve_rollouts(groups, info, resolve_options(info)) for rollout in group]
