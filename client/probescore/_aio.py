"""Defines ``AsyncProbeClient``, the client for programs with one or several event loops."""

from __future__ import annotations

import asyncio
import functools
import os
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar, cast

import grpc
import grpc.aio

from probescore import _process_forks
from probescore._activation_calls import BYTES_PER_CALL, ReadChunk, ReadOptions, ReadPlan, read_template
from probescore._client import (
    DEFAULT_TIMEOUT_SECONDS,
    BaseClient,
    ClientSettings,
    Stub,
    checked_timeout,
    read,
    score_request,
    score_result,
    stream_template,
)
from probescore._every_server import (
    LEAST_SECONDS,
    Outcome,
    Plan,
    agreement_plan,
    load_plan,
    load_request,
    method_of,
    outcome_of,
    readings_off,
    readings_plan,
    unload_plan,
    unload_request,
)
from probescore._every_server import (
    Request as EachRequest,
)
from probescore._group_sources import async_source_of
from probescore._options import ScoreOptions
from probescore._retries import Attempts, retry_async
from probescore._status import FailedCall
from probescore._streaming import Arrival, ScoreChunk, StreamSchedule, StreamWindow
from probescore.errors import ProbescoreError
from probescore.types import (
    CompletionActivations,
    LoadedReading,
    ProbeInfo,
    Reading,
    ReloadedProbes,
    RolloutGroup,
    ScoreResult,
    ServerInfo,
    StreamedCompletion,
    Tap,
    Transfer,
)
from probescore.v1 import activations_pb2, admin_pb2, probes_pb2, scoring_pb2
from probescore.wire import probes_from_proto, reloaded_from_proto, server_info_from_proto, transfers_from_proto

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from probescore.v1.activations_pb2_grpc import ActivationServiceAsyncStub
    from probescore.v1.admin_pb2_grpc import ProbeAdminServiceAsyncStub
    from probescore.v1.scoring_pb2_grpc import ScoringServiceAsyncStub

    class AsyncStub(ScoringServiceAsyncStub, ActivationServiceAsyncStub, ProbeAdminServiceAsyncStub):
        """gRPC stub with the methods of all services (scoring, activations, administration) on an asynchronous channel of ``grpc.aio``."""


Request = TypeVar("Request")
Response = TypeVar("Response")
Result = TypeVar("Result")


_clients: weakref.WeakSet[AsyncProbeClient] = weakref.WeakSet()
_forked_while_open = False


def _forget_closed_loops() -> None:
    # gRPC's polling thread ends with the last channel; a fork that catches it at work leaves gRPC unusable in the child
    for client in list(_clients):
        client._forget_closed_loops()


def _after_fork_in_child() -> None:
    global _forked_while_open
    _forked_while_open = _forked_while_open or any(client._channels for client in _clients)


_process_forks.before_fork(_forget_closed_loops)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class AsyncProbeClient(BaseClient):
    """Client that scores rollouts over gRPC from an event loop.

    ::

        async with AsyncProbeClient("localhost:50051") as client:
            result = await client.score([RolloutGroup(prompt_ids, [completion_ids])])
            print(result.values("cheating"))

    The client may be made outside an event loop and used in several event loops, one after the other or in different threads. The client
    can be pickled. It can also be used after the process has forked, with one exception: gRPC does not survive a fork that happens while an
    event loop with an open client is alive, or while another thread is in a function call of a ``ProbeClient``. RPCs in the child process
    then raise ``RuntimeError``. The arguments are those of ``ProbeClient``, the client without an event loop.

    Every method raises a subclass of ``ProbescoreError`` when an RPC fails; ``probescore.errors`` shows the class hierarchy.
    """

    def _begin(self, settings: ClientSettings) -> None:
        super()._begin(settings)
        _clients.add(self)
        self._channels: dict[asyncio.AbstractEventLoop, tuple[grpc.aio.Channel, AsyncStub]] = {}
        self._pauses: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    async def score(self, groups: Sequence[RolloutGroup], *, timeout: float | None = None, **options: Unpack[ScoreOptions]) -> ScoreResult:
        """Scores every completion of every rollout group in one RPC; ``options`` are the keyword arguments that ``ScoreOptions``
        documents.
        """
        request, attempts = score_request(groups, options), self._attempts(timeout)
        result = score_result(await self._call(lambda stub: stub.Score, request, attempts), request)
        await self._agree(result.info.readings, attempts)
        return result

    def score_stream(
        self,
        groups: Iterable[RolloutGroup] | AsyncIterable[RolloutGroup],
        *,
        timeout: float | None = None,
        window: StreamWindow | None = None,
        **options: Unpack[ScoreOptions],
    ) -> AsyncIterator[StreamedCompletion]:
        """Scores any number of rollout groups with several RPCs at a time, and yields the scores of each completion once, in the order in
        which they are ready.

        After a lost connection only the completions whose scores are still missing are sent again. An exception raised by the iterable
        ``groups`` is raised to the caller once the scores of all groups read before the exception have been yielded.

        Args:
            groups: an iterable or asynchronous iterable of rollout groups. The iterable may be endless, and may wait for the scores of
                earlier groups; it is read no further ahead than ``window`` allows. A list or tuple is read in place, an asynchronous
                iterable in a task of its own, any other iterable in a thread of its own. A generator is closed when the stream ends.
            timeout: seconds for each RPC.
            window: limits on the groups, tokens and RPCs that are under way at a time.
            options: keyword arguments that ``ScoreOptions`` documents.
        """
        self._check_open()
        window = window or StreamWindow()
        return _AsyncStream(self, stream_template(options), timeout, window).completions(groups)

    def activations(
        self,
        groups: Iterable[RolloutGroup],
        taps: str | Tap | Sequence[str | Tap],
        *,
        timeout: float | None = None,
        bytes_per_call: int = BYTES_PER_CALL,
        **options: Unpack[ReadOptions],
    ) -> AsyncIterator[CompletionActivations]:
        """Reads activations of every completion of any number of rollout groups, and yields them in order. The server's setting
        ``allow_activations`` must name the taps (places in the model) that are read.

        The groups are sent in several RPCs, one after the other, and the activations from one RPC are held in memory until they have been
        yielded. After a lost connection only the completions whose activations are still missing are sent again.

        Args:
            groups: an iterable of rollout groups, read ahead by no more than the content of one RPC.
            taps: names of taps, such as ``"resid_post.6"``, or patterns of names with shell wildcards, such as ``"resid_post.*"``.
            timeout: seconds for each RPC.
            bytes_per_call: limit on the bytes of activations in the response to one RPC; a single completion may have more, up to the
                server's own limit.
            options: keyword arguments that ``ReadOptions`` documents.

        Returns:
            The activations, with arrays of float32 whatever format they were sent in.
        """
        self._check_open()
        return self._activations(groups, read_template(taps, options), timeout, bytes_per_call)

    async def _activations(
        self,
        groups: Iterable[RolloutGroup],
        template: activations_pb2.ReadActivationsRequest,
        timeout: float | None,
        bytes_per_call: int,
    ) -> AsyncIterator[CompletionActivations]:
        plan = ReadPlan(template, await self.get_server_info(timeout=timeout), bytes_per_call)
        for chunk in plan.chunks(groups):
            attempts = self._attempts(timeout)
            await retry_async(functools.partial(self._read, chunk, attempts), attempts, self._wait)
            for completion in chunk.results():
                yield completion

    async def _read(self, chunk: ReadChunk, attempts: Attempts, seconds: float) -> None:
        stub = await self._stub()
        call = stub.ReadActivations(chunk.request(), timeout=seconds, metadata=self._settings.metadata)
        try:
            async for message in call:
                chunk.accept(message)
                attempts.progressed()
            chunk.check_complete()
            return
        except grpc.aio.AioRpcError as failed:
            if not chunk.missing:
                return
            error = chunk.relocated(self._error(cast("FailedCall", failed)))
        finally:
            call.cancel()  # if the answer was refused, so that the server stops
        raise error

    async def get_server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Returns a description of the server: its model, fingerprints, limits, workers and probes."""
        return await self._server_info(self._attempts(timeout))

    async def list_probes(self, *, timeout: float | None = None) -> tuple[ProbeInfo, ...]:
        """Returns the probes that the server has loaded, sorted by name and version."""
        answer = await self._call(lambda stub: stub.ListProbes, probes_pb2.ListProbesRequest(), self._attempts(timeout))
        return read(probes_from_proto, answer)

    async def wait_until_ready(self, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> ServerInfo:
        """Waits until the server is ready to score, and returns a description of the server.

        Raises:
            TransientError, DeadlineExceededError: the server was not ready within ``timeout`` seconds.
        """
        return await self._server_info(Attempts(checked_timeout(timeout), restart_budget=timeout))

    async def sleep(self, *, timeout: float | None = None) -> tuple[Transfer, ...]:
        """Makes the server free its devices' memory until ``wake`` is called; returns, once the memory is free, the amount of memory that
        each device (such as ``cuda:0``) has freed.

        Scoring RPCs wait meanwhile, within their deadlines. A server that sleeps already is left as it is. The server's setting ``admin``
        must be on, and the client must have the address of one server: with a ``"dns:///…"`` name that resolves to several servers, an
        arbitrary one of them is put to sleep.
        """
        with self._administration():
            answer = await self._call(lambda stub: stub.Sleep, admin_pb2.SleepRequest(), self._attempts(timeout))
        return transfers_from_proto(answer.transfers)

    async def wake(self, *, timeout: float | None = None) -> tuple[Transfer, ...]:
        """Wakes a server whose devices' memory ``sleep`` has freed; returns, once the server can score, the amount of memory that each
        device (such as ``cuda:0``) has allocated again.

        Raises:
            UnavailableError: a device did not have enough free memory for the weights within the time that the client may wait.
        """
        with self._administration():
            answer = await self._call(lambda stub: stub.Wake, admin_pb2.WakeRequest(), self._attempts(timeout))
        return transfers_from_proto(answer.transfers)

    async def reload_probes(self, *, timeout: float | None = None) -> ReloadedProbes:
        """Makes the server load new probe files and drop probes whose files are gone; returns, once the server has done so, which probes
        have changed and which files the server refused.

        New files are checked while the server scores, and a file that fails a check leaves the server's probes as they are. RPCs that are
        under way finish with the probes that they began with. The server's setting ``admin`` must be on, and the client must have the
        address of one server.
        """
        with self._administration():
            answer = await self._call(lambda stub: stub.Reload, admin_pb2.ReloadRequest(), self._attempts(timeout))
        return reloaded_from_proto(answer)

    async def load_reading(
        self,
        name: str,
        path: str | os.PathLike[str],
        step: int | None = None,
        expected_id: str | None = None,
        in_place: bool = False,
        *,
        timeout: float | None = None,
    ) -> LoadedReading:
        """Makes every server of this client load a LoRA adapter, or a checkpoint of the whole model, beside its frozen model, so that
        ``score`` can be asked for the reading ``name``; returns once the name means it on all servers.

        The servers score meanwhile, and calls that are under way finish with the version that they began with. If the address of the client
        is a host name, or a list of addresses, the reading is loaded on every server behind it, and is the same version on all of them. If
        one of them fails, loading is undone on all: the name means again what it meant before if this client has loaded that itself and its
        files are still there, and otherwise nothing; the error says which. Files that are still being written are waited for within
        ``timeout``; undoing may take as long again. A call that is given up before it returns has asked all the same. The servers' settings
        ``admin`` and ``readings_root`` must be set.

        Args:
            name: the name by which ``score`` asks for the reading: 1 to 64 of A–Z, a–z, 0–9, '.', '_' and '-', beginning with a letter or
                digit, and not ``frozen``. A reading of this name is replaced.
            path: directory that the adapter or checkpoint was saved to, on storage that the servers see: absolute, or relative to their
                ``readings_root``.
            step: label to tell versions apart, such as the training step.
            expected_id: id of the only version that may be loaded, such as the one that another server has loaded; ``None`` = any.
            in_place: whether the version that the name means is freed first, so that there is never room needed for both. Calls that name
                the reading wait meanwhile. If calls under way that read the version do not end within the servers' ``drain_seconds``, the
                name means what it meant; if loading fails, it means nothing.
            timeout: seconds for the whole method.

        Returns:
            The reading, what it replaced, and how far it moves the scores of each probe's golden rollouts: with several servers the
            largest distance, and the largest amount of memory.

        Raises:
            InvalidRequestError: an argument is wrong, or the files would not be computed correctly.
            MismatchError: the files are not ``expected_id``, or several servers have read different files.
            UnavailableError: the files are still being written, or a server cannot be reached.
            ServerError: a server takes no readings, or sleeps, or calls under way hold the version to be replaced, or too many earlier
                ones.
        """
        request = load_request(name, path, step, expected_id, in_place=in_place)
        loaded = await self._on_each(lambda servers: load_plan(servers, request, self._loaded), timeout)
        self._loaded[name] = (loaded.reading.id, request.path)
        return loaded

    async def unload_reading(self, name: str, *, timeout: float | None = None) -> Reading:
        """Makes the name of a reading mean nothing any more on every server of this client, and returns what it meant. The memory is freed
        once the calls that began before have ended.

        Raises:
            InvalidRequestError: no server has a reading of this name, or it is ``frozen``.
        """
        request = unload_request(name)
        return await self._on_each(lambda servers: unload_plan(servers, request), timeout)

    async def readings(self, *, timeout: float | None = None) -> tuple[Reading, ...]:
        """Returns the readings that ``score`` can be asked for, ``frozen`` first; empty if the servers offer no others.

        Raises:
            MismatchError: the client has several servers, and they do not have the same versions.
        """
        return await self._on_each(readings_plan, timeout)

    @asynccontextmanager
    async def awake(self, *, timeout: float | None = None) -> AsyncIterator[None]:
        """Wakes the server at the start of an ``async with`` block, and puts the server to sleep (frees its devices' memory) at the end of
        the block, also after an error.
        """
        await self.wake(timeout=timeout)
        try:
            yield
        finally:
            await self.sleep(timeout=timeout)

    async def close(self) -> None:
        """Closes the client's connection in the current event loop, and ends the client's pauses between attempts of an RPC with a
        ``RuntimeError``. The client cannot be used afterwards.
        """
        self._closed = True
        for loop, pause in list(self._pauses):
            if not loop.is_closed():
                loop.call_soon_threadsafe(pause.set)
        opened = self._channels.pop(asyncio.get_running_loop(), None)
        if opened is not None:
            await opened[0].close()
            _process_forks.channel_ended()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self.close()

    async def _stub(self) -> AsyncStub:
        self._check_open()
        _process_forks.check_usable()
        if _forked_while_open:
            raise RuntimeError(
                "this process was forked while an AsyncProbeClient was open in a living event loop, which gRPC does not survive: "
                "start the process by spawn, or use ProbeClient"
            )
        loop = asyncio.get_running_loop()
        if loop not in self._channels:
            target = await asyncio.to_thread(self._target)  # may look host names up
            if loop not in self._channels:
                self._forget_closed_loops()
                self._channels[loop] = self._open(target)
        return self._channels[loop][1]

    def _open(self, target: str) -> tuple[grpc.aio.Channel, AsyncStub]:
        options, credentials = self._channel_options(target), self._settings.credentials
        channel = grpc.aio.secure_channel(target, credentials, options) if credentials else grpc.aio.insecure_channel(target, options)
        return channel, cast("AsyncStub", Stub(channel))

    def _forget_closed_loops(self) -> None:
        """Drops the client's gRPC channels of event loops that are closed; programs that call ``asyncio.run`` for each batch leave one
        channel behind per batch.
        """
        for loop in list(self._channels):
            if loop.is_closed() and self._channels.pop(loop, None) is not None:
                _process_forks.channel_ended()

    async def _call(
        self,
        method: Callable[[AsyncStub], grpc.aio.UnaryUnaryMultiCallable[Request, Response]],
        request: Request,
        attempts: Attempts,
    ) -> Response:
        async def attempt(seconds: float) -> Response:
            try:
                return await method(await self._stub())(request, timeout=seconds, metadata=self._settings.metadata)
            except grpc.aio.AioRpcError as failed:
                error = self._error(cast("FailedCall", failed))
            raise error

        return await retry_async(attempt, attempts, self._wait)

    async def _wait(self, seconds: float) -> None:
        """Waits until the given seconds have passed or the client is closed."""
        pause = (asyncio.get_running_loop(), asyncio.Event())
        self._pauses.add(pause)
        try:
            if not self._closed:
                await asyncio.wait_for(pause[1].wait(), seconds)
        except asyncio.TimeoutError:
            pass
        finally:
            self._pauses.discard(pause)

    async def _on_each(self, planned: Callable[[Sequence[str]], Plan[Result]], timeout: float | None) -> Result:
        """Carries out a plan of RPCs that every server of this client must get, and returns its result."""
        self._check_open()
        times, every = self._round_times(timeout), await asyncio.to_thread(self._servers)
        clients = {each.addresses.written[0]: self if len(every) == 1 else _client_with(each) for each in every}
        plan = planned(tuple(clients))
        async with self._open_parts(clients.values()):
            try:
                asked = next(plan)
                while True:
                    answers = await asyncio.gather(
                        *(clients[server]._outcome(request, times.attempts(asked)) for server, request in asked.requests.items())
                    )
                    asked = plan.send(dict(zip(asked.requests, answers, strict=True)))
            except StopIteration as ended:
                return cast("Result", ended.value)

    @asynccontextmanager
    async def _open_parts(self, clients: Collection[AsyncProbeClient]) -> AsyncIterator[None]:
        """Context manager that closes clients of one server each at its end."""
        try:
            yield
        finally:
            for client in clients:
                if client is not self:
                    await client.close()

    async def _outcome(self, request: EachRequest, attempts: Attempts) -> Outcome:
        try:
            return outcome_of(request, await self._call(lambda stub: getattr(stub, method_of(request)), request, attempts))
        except ProbescoreError as error:
            return readings_off(error)

    async def _agree(self, readings: Sequence[Reading], attempts: Attempts) -> None:
        """Waits until all servers of this client have one version of each reading in an answer, as they do once it is replaced on all.

        Raises:
            UnavailableError: they have different versions, so that the scores of one call could not be compared with another's.
        """
        names = self._has_not_agreed(readings)
        if not names or len(await asyncio.to_thread(self._servers)) == 1:
            self._agreed.update({each.name: each.id for each in readings if each.name in names})
            return

        async def ask(seconds: float) -> dict[str, str]:
            return await self._on_each(lambda servers: agreement_plan(servers, names), max(seconds, LEAST_SECONDS))

        self._agreed.update(await retry_async(ask, attempts, self._wait))

    async def _server_info(self, attempts: Attempts) -> ServerInfo:
        answer = await self._call(lambda stub: stub.GetServerInfo, scoring_pb2.GetServerInfoRequest(), attempts)
        return read(server_info_from_proto, answer)


def _client_with(settings: ClientSettings) -> AsyncProbeClient:
    client = AsyncProbeClient.__new__(AsyncProbeClient)
    client._begin(settings)
    return client


class _AsyncStream:
    """One run of the asynchronous client's method ``score_stream``, which scores a stream of rollouts, with a task for each RPC, so that an
    RPC's deadline does not depend on how fast the caller reads results.
    """

    def __init__(self, client: AsyncProbeClient, template: scoring_pb2.ScoreRequest, timeout: float | None, window: StreamWindow) -> None:
        self._client = client
        self._template = template
        self._timeout = timeout
        self._window = window

    async def completions(self, groups: Iterable[RolloutGroup] | AsyncIterable[RolloutGroup]) -> AsyncIterator[StreamedCompletion]:
        schedule = StreamSchedule(self._window, len(self._template.readings))
        arrivals: asyncio.Queue[Arrival] = asyncio.Queue()
        source = async_source_of(groups, arrivals.put_nowait)
        tasks: set[asyncio.Task[None]] = set()
        try:
            while not schedule.finished:
                while (chunk := schedule.next_chunk()) is not None:
                    tasks.add(task := asyncio.create_task(self._run(chunk, arrivals)))
                    task.add_done_callback(tasks.discard)
                if schedule.wants_group():
                    source.ask()
                try:
                    arrival = await asyncio.wait_for(arrivals.get(), schedule.patience)
                except asyncio.TimeoutError:
                    schedule.kept_waiting()
                else:
                    for completion in schedule.accept(arrival):
                        yield completion
            if schedule.failure is not None:
                raise schedule.failure
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await source.stop()

    async def _run(self, chunk: ScoreChunk, arrivals: asyncio.Queue[Arrival]) -> None:
        try:
            attempts = self._client._attempts(self._timeout)
            await retry_async(lambda seconds: self._attempt(chunk, attempts, seconds, arrivals), attempts, self._client._wait)
            arrivals.put_nowait(chunk)
        except Exception as failed:  # whatever it is, the reader must hear of it instead of waiting
            arrivals.put_nowait(failed)

    async def _attempt(self, chunk: ScoreChunk, attempts: Attempts, seconds: float, arrivals: asyncio.Queue[Arrival]) -> None:
        try:
            stub, request = await self._client._stub(), chunk.request(self._template)
            call = stub.ScoreStream(request, timeout=seconds, metadata=self._client._settings.metadata)
            async for message in call:
                arrivals.put_nowait(chunk.accept(message))
                attempts.progressed()
            chunk.check_complete()
            return
        except grpc.aio.AioRpcError as failed:
            if not chunk.missing:
                return
            error = chunk.relocated(self._client._error(cast("FailedCall", failed)))
        raise error
