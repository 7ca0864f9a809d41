"""Implements the registry, which makes the probes that a server serves follow the probe files while the server scores.

A reload reads the files, has every worker process load and check the new probes beside the running ones, and then changes in one step which
versions the probe names in requests mean. A call (the work of one request) resolves names once, when it is admitted, to versions whose
content never changes, so that it never mixes scores from before and after a reload. Workers only hold probes; the registry alone decides
which of them a name means. So workers need not change at the same moment: during a reload, each holds the old and the new probes.

All code of this package runs on one event loop, except for the reading of files.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import structlog

from probescore.types import RefusedProbeFile, ReloadedProbes
from probescore_server.errors import CoreError, InternalFault, ProbeRefused, StartupError, WorkerLost, WorkerUnavailable
from probescore_server.registry.folder import FolderContents, ProbeFolder, Stamp
from probescore_server.registry.retirement import Retirement
from probescore_server.rollouts import EngineInfo
from probescore_server.settings import ServerSettings
from probescore_server.spool import Spool, SpooledFile
from probescore_server.workers.handle import PinnedContent, Successor, WorkerHandle

logger = structlog.get_logger(__name__)

Result = TypeVar("Result")

RETRY_SECONDS = 1.0
MAX_ATTEMPTS = 2
"""Number of times that new files are given to a worker process before they are refused because the process died each time."""


class ProbeRegistry:
    """Registry of the probes of one server, which makes the probes that are served follow the probe files.

    Args:
        settings: the server's settings.
        workers: the handles of all worker processes.
        pinned: the record of the model and probes that workers have loaded, against which later ones are checked.
        on_change: function that is called whenever ``info`` changes.
        on_reload: function that is called after every reload with its report, or with the error that ended the reload.
        changing: lock that is held while what worker processes hold is changed; ``None`` = nothing but this registry changes it.

    Attributes:
        info: a description of the model and of the probes that requests may name now; ``None`` until the first worker is ready.
    """

    def __init__(
        self,
        settings: ServerSettings,
        workers: Sequence[WorkerHandle],
        pinned: PinnedContent,
        on_change: Callable[[], None] = lambda: None,
        on_reload: Callable[[ReloadedProbes | CoreError], None] = lambda report: None,
        changing: asyncio.Lock | None = None,
    ) -> None:
        self.info: EngineInfo | None = None
        self._settings = settings
        self._workers = workers
        self._pinned = pinned
        self._on_change = on_change
        self._on_reload = on_reload
        self._folder = ProbeFolder(settings.probes)
        self._spool = Spool()
        self._files: dict[str, SpooledFile] = {}  # It holds what each path stands for: its content when it was last accepted.
        self._stamps: Mapping[str, Stamp] = {}
        self._keys: dict[str, str] = {}  # It holds the key of every content that is served.
        self._retirement = Retirement(settings.probe_pin_seconds, settings.max_retired_versions, time.monotonic)
        self._leaving: dict[str, SpooledFile] = {}  # It holds what no call may name any more, and workers serve until they are told.
        self._changing = changing or asyncio.Lock()
        self._something_retired = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    # ------------------------------------------------------------------------------------------------------------------- at the start

    def open(self) -> None:
        """Reads the probe files that the settings name; every worker process then loads them when it starts.

        Raises:
            StartupError: a file or a directory cannot be read.
        """
        contents = self._folder.read(self._spool, missing_is_refused=True)
        for refusal in contents.refused.values():
            raise refusal
        self._files, self._stamps = dict(contents.files), contents.stamps
        self._tell_workers(_once(self._files.values()))

    @property
    def is_empty(self) -> bool:
        """Returns whether the server has no probe file."""
        return not self._files

    def worker_changed(self, worker: WorkerHandle) -> None:
        """Records that a worker process has changed its state. Once the first worker is ready, requests can be checked against its model
        and probes.
        """
        if not self._changing.locked():
            self._forget_files()
        if self.info is None and worker.info is not None:
            self._keys = dict(worker.keys)
            self.info = worker.info.of_probes(set(self._keys.values()))
            self._on_change()

    async def run(self) -> None:
        """Drops retired probes (whose files are gone) when their time is over, and reloads probe files that change if the settings ask for
        this. The coroutine runs until it is cancelled.
        """
        running = [self._start(self._expire())]
        if self._settings.watch_probes:
            running.append(self._start(self._watch(self._settings.watch_probes)))
        try:
            await asyncio.gather(*running)
        finally:
            for task in list(self._tasks):
                if not task.cancelling():
                    task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._spool.close()

    # ------------------------------------------------------------------------------------------------------------------------ by calls

    @contextmanager
    def using(self) -> Iterator[Callable[[Collection[str]], None]]:
        """Context manager around a call (the work of one request). It yields a function that must be called with the keys ``name@version``
        of the call's probes as soon as their names are resolved. These probes are served until the call ends.
        """
        used: list[str] = []

        def use(keys: Collection[str]) -> None:
            used.extend(keys)
            self._retirement.begin(keys)

        try:
            yield use
        finally:
            self._retirement.end(used)
            if any(key in self._leaving and not self._retirement.in_use(key) for key in used):
                self._start(self._settle())

    # --------------------------------------------------------------------------------------------------------------------- reloading

    async def reload(self, why: str) -> ReloadedProbes:
        """Makes the probes that are served follow the probe files as they are now, and returns a report of what has changed.

        One reload runs at a time. If this coroutine is cancelled, the reload runs on. While the worker processes sleep, the reload waits.

        Args:
            why: what has asked for the reload, for the log.

        Raises:
            WorkerUnavailable: a worker process is not up, so that nothing was changed.
            InternalFault: loading failed for a reason that lies in no probe file; nothing was changed.
        """
        return await asyncio.shield(self._start(self._reload_in_turn(why)))

    async def _reload_in_turn(self, why: str) -> ReloadedProbes:
        async with self._changing:
            started = time.monotonic()
            try:
                reloaded, refused = await self._reload()
            except Exception as failure:
                error = failure if isinstance(failure, CoreError) else InternalFault.new()
                logger.error("probes not reloaded", asked_by=why, problem=str(error), exc_info=error is not failure)
                self._on_reload(error)
                raise error from None
            finally:
                self._forget_files()
            reloaded = replace(reloaded, refused=tuple(map(_shown, refused)), seconds=time.monotonic() - started)
        for each in refused:
            what = {"file": each.file, "field": each.field, "found": each.found, "expected": each.expected}
            logger.error("probe file refused", asked_by=why, **what)
        changed = {"added": reloaded.added, "retired": reloaded.retired, "dropped": reloaded.dropped}
        logger.info("probes reloaded", asked_by=why, **changed, refused=len(refused), seconds=round(reloaded.seconds, 3))
        self._on_reload(reloaded)
        return reloaded

    async def _reload(self) -> tuple[ReloadedProbes, list[ProbeRefused]]:
        await self._until_all_up()
        try:
            contents = await asyncio.to_thread(self._folder.read, self._spool)
        except StartupError as error:
            return self._report((), (), ()), [_folder_refusal(self._settings, error)]
        self._stamps = contents.stamps
        refused = dict(contents.refused)
        new = _once(file for file in contents.files.values() if file.sha256 not in self._keys)
        keys, successors = await self._proven(new, refused)
        named = [*refused.values()]
        for file in new:  # What was proven once may lie at several paths.
            if file.file in refused:
                refused |= {path: refused[file.file] for path, each in contents.files.items() if each.sha256 == file.sha256}
        try:
            return await self._change(contents, keys, refused, successors), named
        finally:
            for successor in successors.values():
                await successor.process.stop()

    async def _change(
        self,
        contents: FolderContents,
        keys: Mapping[str, str],
        refused: Mapping[str, ProbeRefused],
        successors: dict[WorkerHandle, Successor],
    ) -> ReloadedProbes:
        """Changes in one step which probe versions the names in requests mean, once every worker process holds all of these probes.

        Args:
            contents: the probe files as they were read.
            keys: the key ``name@version`` of each new file content, by digest, that all workers have accepted.
            refused: the refusals of probe files, by path.
            successors: processes, by worker, that take the places of the workers' processes; each is removed from the dictionary once it
                has done so.
        """
        known = {**self._keys, **keys}
        files = {path: file for path, file in contents.files.items() if file.sha256 in known and path not in refused}
        # A path with a refused file goes on meaning what it meant before.
        files |= {path: self._files[path] for path in refused if path in self._files}
        before = {self._keys[file.sha256]: file for file in self._files.values()}
        after = {known[file.sha256]: file for file in files.values()}
        gone = {key: file for key, file in before.items() if key not in after}
        held = _once([*after.values(), *gone.values(), *self._served_files()])
        while True:
            for worker in list(successors):
                worker.take_over(successors.pop(worker))
            await self._until_all_up()
            behind = [worker for worker in self._workers if set(worker.keys) != {file.sha256 for file in held}]
            if not behind:
                break
            for refusal in (each for answer in await self._each(behind, lambda worker: worker.hold(held)) for each in answer.refusals):
                raise WorkerUnavailable(
                    f"a worker refuses {Path(refusal.file).name}, which was accepted before: {refusal.field}", RETRY_SECONDS
                )
        # From here to the end nothing is awaited: all names change at once.
        self._keys, self._files = known, files
        self._retirement.retire((key, key.rsplit("@", 1)[0], file) for key, file in gone.items())
        self._retirement.restore(after)
        self._leaving = {key: file for key, file in self._leaving.items() if key not in after}
        expired = self._retirement.take_expired()
        self._leaving |= expired
        self._show(after)
        self._tell_workers(held)
        if self._leaving:
            self._start(self._settle())
        self._something_retired.set()
        added, retired = [key for key in after if key not in before], [key for key in gone if key not in expired]
        return self._report(added, retired, expired)

    async def _proven(
        self, new: Sequence[SpooledFile], refused: dict[str, ProbeRefused]
    ) -> tuple[dict[str, str], dict[WorkerHandle, Successor]]:
        """Has every worker process load and check new probe files beside the probes that it serves.

        Args:
            new: the new files.
            refused: receives the refusals of files, by path.

        Returns:
            The key ``name@version`` of each file content, by digest, that all workers have accepted, and the processes, by worker, that
                must take the places of the workers' processes because some probes need more of the model's layers.
        """
        keys: dict[str, str] = {}
        # Files with which a worker died or failed are tried again one by one: the others are not to blame.
        together = [[*new]] if new else []
        losses: dict[str, int] = {}
        while together:
            files = together.pop()
            held = _once([*self._served_files(), *(file for file in new if file.sha256 in keys), *files])
            try:
                answers = await self._each(self._workers, lambda worker: worker.hold(held))  # noqa: B023 - awaited here
            except (WorkerLost, InternalFault) as error:
                for file in files:
                    losses[file.file] = losses.get(file.file, 0) + 1
                    if len(files) == 1 and losses[file.file] >= MAX_ATTEMPTS:
                        how = (
                            f"a worker was lost {MAX_ATTEMPTS} times: {error.problem}"
                            if isinstance(error, WorkerLost)
                            else f"loading fails: {error}"
                        )
                        refused[file.file] = ProbeRefused(file.file, "file", f"a file with which {how}", "one that can be checked")
                    else:
                        together.append([file])
                await self._until_all_up()
                continue
            found_keys = {sha256: key for answer in answers for sha256, key in answer.keys.items()}
            for refusal in (refusal for answer in answers for refusal in answer.refusals):
                refused.setdefault(refusal.file, refusal)
            for answer in answers:
                for probe in answer.info.probes:
                    for file in files:
                        if found_keys.get(file.sha256) == probe.key and self._pinned.differs(probe):
                            refused.setdefault(file.file, _other_content(file.file, probe.key))
            keys |= {file.sha256: found_keys[file.sha256] for file in files if file.file not in refused}
        too_deep = [file for file in new if file.file in refused and refused[file.file].needs_layers]
        # A server without probes has loaded next to nothing, so that there is room for the first one.
        if too_deep and (self._settings.deeper_probes == "load" or not self._served_files()):
            return await self._deepened([file for file in new if file.sha256 in keys], keys, too_deep, refused)
        return keys, {}

    async def _deepened(
        self, accepted: Sequence[SpooledFile], keys: dict[str, str], too_deep: Sequence[SpooledFile], refused: dict[str, ProbeRefused]
    ) -> tuple[dict[str, str], dict[WorkerHandle, Successor]]:
        """Starts beside each worker's process one that loads more of the model's layers, since new probes read deeper ones, and has it load
        all probes.
        """
        left = [*too_deep]
        while left:
            held = _once([*self._served_files(), *accepted, *left])
            starting = [asyncio.ensure_future(worker.start_successor(held)) for worker in self._workers]
            outcomes = await asyncio.gather(*starting, return_exceptions=True)
            failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
            successors = {worker: one for worker, one in zip(self._workers, outcomes, strict=True) if isinstance(one, Successor)}
            if not failures:
                found = {sha256: key for one in successors.values() for sha256, key in one.ready.keys.items()}
                for file in left:
                    del refused[file.file]
                return keys | {file.sha256: found[file.sha256] for file in left}, successors
            for successor in successors.values():
                await successor.process.stop()
            error = failures[0]
            if not isinstance(error, CoreError):
                raise error
            if isinstance(error, ProbeRefused) and error.file in {file.file for file in left}:
                refused[error.file] = error
                left = [file for file in left if file.file != error.file]
                continue
            for file in left:
                layers = refused[file.file]
                problem = f"{layers.found}, and a deeper model could not be loaded beside the running one: {error}"
                refused[file.file] = ProbeRefused(file.file, "inputs", problem, "room for both, or a restart of the server")
            left = []
        return keys, {}

    # ----------------------------------------------------------------------------------------------------------------- what is served

    def _served_files(self) -> list[SpooledFile]:
        """Returns the probe files that worker processes must hold: those of current and retired probes (whose files are gone), and of
        probes that requests under way may still use.
        """
        return [*self._files.values(), *self._retirement.sources.values(), *self._leaving.values()]

    def _forget_files(self) -> None:
        """Frees the stored content of probe files that are not served any more, and that no worker process which is starting may still
        read.
        """
        loading = [file for worker in self._workers for file in worker.loading]
        self._spool.keep_only({file.sha256 for file in [*self._served_files(), *loading]})

    def _show(self, current: Collection[str]) -> None:
        """Changes which probes requests may name: the current ones, and by their versions the retired ones (whose files are gone)."""
        retired = self._retirement.keys
        described = next((worker.info for worker in self._workers if worker.info is not None), None)
        if described is not None:
            self.info = described.of_probes({*current, *retired}, retired)
            self._pinned.remember(self.info.probes)
            self._on_change()

    def _tell_workers(self, files: tuple[SpooledFile, ...]) -> None:
        for worker in self._workers:
            worker.spec = replace(worker.spec, probes=files)

    async def _settle(self) -> None:
        """Makes worker processes drop the probes that requests may not name any more and that no request under way uses."""
        async with self._changing:
            done = [key for key in self._leaving if not self._retirement.in_use(key)]
            for key in done:
                del self._leaving[key]
            held = _once(self._served_files())
            self._tell_workers(held)
            served = {file.sha256 for file in held}
            self._keys = {sha256: key for sha256, key in self._keys.items() if sha256 in served}
            for worker in self._workers:
                try:
                    if worker.up and set(worker.keys) != served:
                        await worker.hold(held)
                except CoreError as error:  # A process that is started again holds only what it is told to.
                    logger.warning("probes not dropped yet", device=worker.spec.device, problem=str(error))
            self._forget_files()
        if done:
            logger.info("probes dropped", probes=done)

    async def _expire(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._retirement.seconds_left()):
                    await self._something_retired.wait()
            except TimeoutError:
                expired = self._retirement.take_expired()
                if expired:
                    self._leaving |= expired
                    self._show([self._keys[file.sha256] for file in self._files.values()])
                    await self._settle()
            self._something_retired.clear()

    async def _watch(self, seconds: float) -> None:
        """Reloads the probe files when they have changed and have then stayed as they are for ``seconds`` seconds."""
        before: Mapping[str, Stamp] | None = None
        while True:
            await asyncio.sleep(seconds)
            try:
                now = await asyncio.to_thread(self._folder.stamps)
            except StartupError as error:
                if before is not None:
                    logger.error("probes cannot be watched", problem=str(error))
                before = None
                continue
            if now == before and now != self._stamps and self.info is not None:
                with suppress(CoreError):  # It is logged, and tried again after the next look.
                    await self.reload("watch")
            before = now

    def _report(self, added: Iterable[str], retired: Iterable[str], dropped: Iterable[str]) -> ReloadedProbes:
        current = [] if self.info is None else [probe.key for probe in self.info.probes if probe.key not in self.info.retired]
        return ReloadedProbes(tuple(added), tuple(retired), tuple(dropped), tuple(current), self._retirement.keys, (), 0.0)

    # ------------------------------------------------------------------------------------------------------------------------- workers

    async def _until_all_up(self) -> None:
        """Waits until every worker process is up and awake; raises ``WorkerUnavailable`` if one cannot start."""
        for worker in self._workers:
            await worker.until_back()

    async def _each(self, workers: Sequence[WorkerHandle], work: Callable[[WorkerHandle], Coroutine[Any, Any, Result]]) -> list[Result]:
        """Calls ``work`` for several worker processes at once, waits for all of the calls, and returns their results or raises the first
        error.
        """
        outcomes = await asyncio.gather(*(work(worker) for worker in workers), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]

    def _start(self, coroutine: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _once(files: Iterable[SpooledFile]) -> tuple[SpooledFile, ...]:
    """Returns the given probe files, but of several files with the same content only the first."""
    return tuple({file.sha256: file for file in reversed(list(files))}.values())[::-1]


def _other_content(file: str, key: str) -> ProbeRefused:
    found = f"{key} with other content than this server has served under that name and version"
    return ProbeRefused(file, "version", found, "a version of its own for each content")


def _folder_refusal(settings: ServerSettings, error: StartupError) -> ProbeRefused:
    found = str(error)
    for path in settings.probes:
        found = found.replace(path, Path(path).name)
    return ProbeRefused(settings.probes[0], "probes", found, "directories that can be read")


def _shown(refusal: ProbeRefused) -> RefusedProbeFile:
    """Returns the refusal of a probe file, for clients: without the paths of directories, which concern the operator alone."""
    directory = f"{Path(refusal.file).parent}/"
    found, expected = (text.replace(directory, "") for text in (refusal.found, refusal.expected))
    return RefusedProbeFile(Path(refusal.file).name, refusal.field, found, expected)
