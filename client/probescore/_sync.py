"""Defines ``ProbeClient``, the client for programs without an event loop, with any number of threads."""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections.abc import AsyncIterable, Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar, cast

import grpc

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
from probescore._group_sources import source_of
from probescore._options import ScoreOptions
from probescore._retries import Attempts, retry
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

Request = TypeVar("Request")
Response = TypeVar("Response")
Result = TypeVar("Result")


class ProbeClient(BaseClient):
    """Client that scores rollouts over gRPC, without an event loop.

    ::

        with ProbeClient("localhost:50051") as client:
            result = client.score([RolloutGroup(prompt_ids, [completion_ids])])
            print(result.values("cheating"))

    Any number of threads may share one client. The client can be pickled. It can also be used after the process has forked, with one
    exception: gRPC does not survive a fork that happens while another thread is in an RPC. RPCs in the child process then raise
    ``RuntimeError``.

    Args:
        address: ``"host:port"``, ``"dns:///host:port"``, ``"unix:/path"``, or a list of several ``"host:port"``, used in turn.
        timeout: seconds for an RPC, retries included, unless the method is called with another timeout.
        restart_budget: seconds, within ``timeout``, for which an RPC is retried while the server cannot be reached or is overloaded.
        job: name of the training run; the server divides its time between training runs, so that all ranks of one run share one part.
        metadata: gRPC metadata sent with every RPC, e.g. ``{"authorization": "Bearer …"}``.
        credentials: for TLS, e.g. ``grpc.ssl_channel_credentials(...)``; default: an unencrypted connection.

    Every method raises a subclass of ``ProbescoreError`` when an RPC fails; ``probescore.errors`` shows the class hierarchy.
    """

    def _begin(self, settings: ClientSettings) -> None:
        super()._begin(settings)
        self._channels: dict[int, tuple[grpc.Channel, Stub]] = {}
        self._pauses: set[threading.Event] = set()
        self._parts: set[ProbeClient] = set()

    def score(self, groups: Sequence[RolloutGroup], *, timeout: float | None = None, **options: Unpack[ScoreOptions]) -> ScoreResult:
        """Scores every completion of every rollout group in one RPC; ``options`` are the keyword arguments that ``ScoreOptions``
        documents.
        """
        request, attempts = score_request(groups, options), self._attempts(timeout)
        result = score_result(self._call(lambda stub: stub.Score, request, attempts), request)
        self._agree(result.info.readings, attempts)
        return result

    def score_stream(
        self,
        groups: Iterable[RolloutGroup] | AsyncIterable[RolloutGroup],
        *,
        timeout: float | None = None,
        window: StreamWindow | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Iterator[StreamedCompletion]:
        """Scores any number of rollout groups with several RPCs at a time, and yields the scores of each completion once, in the order in
        which they are ready.

        After a lost connection only the completions whose scores are still missing are sent again. An exception raised by the iterable
        ``groups`` is raised to the caller once the scores of all groups read before the exception have been yielded.

        Args:
            groups: an iterable or asynchronous iterable of rollout groups. The iterable may be endless, and may wait for the scores of
                earlier groups; it is read no further ahead than ``window`` allows. A list or tuple is read in place, and any other iterable
                in a thread of its own; in that thread an asynchronous iterable has an event loop of its own. A generator is closed when the
                stream ends.
            timeout: seconds for each RPC.
            window: limits on the groups, tokens and RPCs that are under way at a time.
            options: keyword arguments that ``ScoreOptions`` documents.
        """
        self._check_open()
        window = window or StreamWindow()
        return _Stream(self, stream_template(options), timeout, window).completions(groups)

    def activations(
        self,
        groups: Iterable[RolloutGroup],
        taps: str | Tap | Sequence[str | Tap],
        *,
        timeout: float | None = None,
        bytes_per_call: int = BYTES_PER_CALL,
        **options: Unpack[ReadOptions],
    ) -> Iterator[CompletionActivations]:
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

    def _activations(
        self,
        groups: Iterable[RolloutGroup],
        template: activations_pb2.ReadActivationsRequest,
        timeout: float | None,
        bytes_per_call: int,
    ) -> Iterator[CompletionActivations]:
        plan = ReadPlan(template, self.get_server_info(timeout=timeout), bytes_per_call)
        for chunk in plan.chunks(groups):
            attempts = self._attempts(timeout)
            retry(functools.partial(self._read, chunk, attempts), attempts, self._wait)
            yield from chunk.results()

    def _read(self, chunk: ReadChunk, attempts: Attempts, seconds: float) -> None:
        try:
            with _process_forks.call_under_way():
                call = self._stub().ReadActivations(chunk.request(), timeout=seconds, metadata=self._settings.metadata)
                try:
                    for message in call:
                        chunk.accept(message)
                        attempts.progressed()
                finally:
                    call.cancel()  # if the answer was refused, so that the server stops
            chunk.check_complete()
            return
        except grpc.RpcError as failed:
            if not chunk.missing:
                return
            error = chunk.relocated(self._error(cast("FailedCall", failed)))
        except ValueError:
            self._check_open()  # another thread may just have closed the channel
            raise
        raise error

    def get_server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Returns a description of the server: its model, fingerprints, limits, workers and probes."""
        return self._server_info(self._attempts(timeout))

    def list_probes(self, *, timeout: float | None = None) -> tuple[ProbeInfo, ...]:
        """Returns the probes that the server has loaded, sorted by name and version."""
        return read(probes_from_proto, self._call(lambda stub: stub.ListProbes, probes_pb2.ListProbesRequest(), self._attempts(timeout)))

    def wait_until_ready(self, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> ServerInfo:
        """Waits until the server is ready to score, and returns a description of the server.

        Raises:
            TransientError, DeadlineExceededError: the server was not ready within ``timeout`` seconds.
        """
        return self._server_info(Attempts(checked_timeout(timeout), restart_budget=timeout))

    def sleep(self, *, timeout: float | None = None) -> tuple[Transfer, ...]:
        """Makes the server free its devices' memory until ``wake`` is called; returns, once the memory is free, the amount of memory that
        each device (such as ``cuda:0``) has freed.

        Scoring RPCs wait meanwhile, within their deadlines. A server that sleeps already is left as it is. The server's setting ``admin``
        must be on, and the client must have the address of one server: with a ``"dns:///…"`` name that resolves to several servers, an
        arbitrary one of them is put to sleep.
        """
        with self._administration():
            answer = self._call(lambda stub: stub.Sleep, admin_pb2.SleepRequest(), self._attempts(timeout))
        return transfers_from_proto(answer.transfers)

    def wake(self, *, timeout: float | None = None) -> tuple[Transfer, ...]:
        """Wakes a server whose devices' memory ``sleep`` has freed; returns, once the server can score, the amount of memory that each
        device (such as ``cuda:0``) has allocated again.

        Raises:
            UnavailableError: a device did not have enough free memory for the weights within the time that the client may wait.
        """
        with self._administration():
            answer = self._call(lambda stub: stub.Wake, admin_pb2.WakeRequest(), self._attempts(timeout))
        return transfers_from_proto(answer.transfers)

    def reload_probes(self, *, timeout: float | None = None) -> ReloadedProbes:
        """Makes the server load new probe files and drop probes whose files are gone; returns, once the server has done so, which probes
        have changed and which files the server refused.

        New files are checked while the server scores, and a file that fails a check leaves the server's probes as they are. RPCs that are
        under way finish with the probes that they began with. The server's setting ``admin`` must be on, and the client must have the
        address of one server.
        """
        with self._administration():
            answer = self._call(lambda stub: stub.Reload, admin_pb2.ReloadRequest(), self._attempts(timeout))
        return reloaded_from_proto(answer)

    def load_reading(
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
        loaded = self._on_each(lambda servers: load_plan(servers, request, self._loaded), timeout)
        self._loaded[name] = (loaded.reading.id, request.path)
        return loaded

    def unload_reading(self, name: str, *, timeout: float | None = None) -> Reading:
        """Makes the name of a reading mean nothing any more on every server of this client, and returns what it meant. The memory is freed
        once the calls that began before have ended.

        Raises:
            InvalidRequestError: no server has a reading of this name, or it is ``frozen``.
        """
        request = unload_request(name)
        return self._on_each(lambda servers: unload_plan(servers, request), timeout)

    def readings(self, *, timeout: float | None = None) -> tuple[Reading, ...]:
        """Returns the readings that ``score`` can be asked for, ``frozen`` first; empty if the servers offer no others.

        Raises:
            MismatchError: the client has several servers, and they do not have the same versions.
        """
        return self._on_each(readings_plan, timeout)

    @contextmanager
    def awake(self, *, timeout: float | None = None) -> Iterator[None]:
        """Wakes the server at the start of a ``with`` block, and puts the server to sleep (frees its devices' memory) at the end of the
        block, also after an error.
        """
        self.wake(timeout=timeout)
        try:
            yield
        finally:
            self.sleep(timeout=timeout)

    def close(self) -> None:
        """Closes the connection, and ends RPCs that are under way with a ``RuntimeError``. The client cannot be used afterwards."""
        self._closed = True
        for pause in list(self._pauses):
            pause.set()
        for part in list(self._parts):
            part.close()
        opened = self._channels.pop(os.getpid(), None)
        if opened is not None:
            opened[0].close()
            _process_forks.channel_ended()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _stub(self) -> Stub:
        self._check_open()
        _process_forks.check_usable()
        pid = os.getpid()
        if pid not in self._channels:
            target, credentials = self._target(), self._settings.credentials
            options = self._channel_options(target)
            channel = grpc.secure_channel(target, credentials, options) if credentials else grpc.insecure_channel(target, options)
            # no lock, which a fork could leave locked: of two threads the first one's channel stays
            kept, stub = self._channels.setdefault(pid, (channel, Stub(channel)))
            if kept is not channel:
                channel.close()
            return stub
        return self._channels[pid][1]

    def _call(
        self,
        method: Callable[[Stub], grpc.UnaryUnaryMultiCallable[Request, Response]],
        request: Request,
        attempts: Attempts,
    ) -> Response:
        def attempt(seconds: float) -> Response:
            try:
                with _process_forks.call_under_way():
                    return method(self._stub())(request, timeout=seconds, metadata=self._settings.metadata)
            except grpc.RpcError as failed:
                error = self._error(cast("FailedCall", failed))
            except ValueError:
                self._check_open()  # another thread may just have closed the channel
                raise
            raise error

        return retry(attempt, attempts, self._wait)

    def _wait(self, seconds: float, pause: threading.Event | None = None) -> None:
        """Waits until the given seconds have passed, the client is closed or the given ``threading.Event`` is set."""
        pause = pause or threading.Event()
        self._pauses.add(pause)
        try:
            if not self._closed:
                pause.wait(seconds)
        finally:
            self._pauses.discard(pause)

    def _on_each(self, planned: Callable[[Sequence[str]], Plan[Result]], timeout: float | None) -> Result:
        """Carries out a plan of RPCs that every server of this client must get, and returns its result."""
        self._check_open()
        times, every = self._round_times(timeout), self._servers()
        clients = {each.addresses.written[0]: self if len(every) == 1 else _client_with(each) for each in every}
        plan = planned(tuple(clients))
        with ThreadPoolExecutor(len(clients), "probescore-servers") as threads, self._open_parts(clients.values()):
            run = map if len(clients) == 1 else threads.map
            try:
                asked = next(plan)
                while True:
                    calls = [
                        functools.partial(clients[server]._outcome, request, times.attempts(asked))
                        for server, request in asked.requests.items()
                    ]
                    asked = plan.send(dict(zip(asked.requests, run(_called, calls), strict=True)))
            except StopIteration as ended:
                return cast("Result", ended.value)

    @contextmanager
    def _open_parts(self, clients: Collection[ProbeClient]) -> Iterator[None]:
        """Context manager that closes clients of one server each at its end, or when this client is closed."""
        parts = {client for client in clients if client is not self}
        self._parts |= parts
        try:
            yield
        finally:
            self._parts -= parts
            for part in parts:
                part.close()

    def _outcome(self, request: EachRequest, attempts: Attempts) -> Outcome:
        try:
            return outcome_of(request, self._call(lambda stub: getattr(stub, method_of(request)), request, attempts))
        except ProbescoreError as error:
            return readings_off(error)

    def _agree(self, readings: Sequence[Reading], attempts: Attempts) -> None:
        """Waits until all servers of this client have one version of each reading in an answer, as they do once it is replaced on all.

        Raises:
            UnavailableError: they have different versions, so that the scores of one call could not be compared with another's.
        """
        names = self._has_not_agreed(readings)
        if not names or len(self._servers()) == 1:
            self._agreed.update({each.name: each.id for each in readings if each.name in names})
            return

        def ask(seconds: float) -> dict[str, str]:
            return self._on_each(lambda servers: agreement_plan(servers, names), max(seconds, LEAST_SECONDS))

        self._agreed.update(retry(ask, attempts, self._wait))

    def _server_info(self, attempts: Attempts) -> ServerInfo:
        return read(server_info_from_proto, self._call(lambda stub: stub.GetServerInfo, scoring_pb2.GetServerInfoRequest(), attempts))


def _called(call: Callable[[], Outcome]) -> Outcome:
    return call()


def _client_with(settings: ClientSettings) -> ProbeClient:
    client = ProbeClient.__new__(ProbeClient)
    client._begin(settings)
    return client


class _Stream:
    """One run of the synchronous client's method ``score_stream``, which scores a stream of rollouts, with a thread for each RPC, so that
    an RPC's deadline does not depend on how fast the caller reads results.
    """

    def __init__(self, client: ProbeClient, template: scoring_pb2.ScoreRequest, timeout: float | None, window: StreamWindow) -> None:
        self._client = client
        self._template = template
        self._timeout = timeout
        self._window = window
        self._arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._calls: dict[ScoreChunk, grpc.Call] = {}
        self._stopped = threading.Event()
        self._pause = threading.Event()

    def completions(self, groups: Iterable[RolloutGroup] | AsyncIterable[RolloutGroup]) -> Iterator[StreamedCompletion]:
        schedule = StreamSchedule(self._window, len(self._template.readings))
        source = source_of(groups, self._arrivals.put)
        with ThreadPoolExecutor(self._window.calls_in_flight, "probescore-stream") as threads:
            try:
                while not schedule.finished:
                    while (chunk := schedule.next_chunk()) is not None:
                        threads.submit(self._run, chunk)
                    if schedule.wants_group():
                        source.ask()
                    try:
                        arrival = self._arrivals.get(timeout=schedule.patience)
                    except queue.Empty:
                        schedule.kept_waiting()
                    else:
                        yield from schedule.accept(arrival)
                if schedule.failure is not None:
                    raise schedule.failure
            finally:
                self._stopped.set()
                self._pause.set()
                for call in list(self._calls.values()):
                    call.cancel()
                source.stop()

    def _run(self, chunk: ScoreChunk) -> None:
        try:
            attempts = self._client._attempts(self._timeout)
            retry(
                lambda seconds: self._attempt(chunk, attempts, seconds), attempts, lambda seconds: self._client._wait(seconds, self._pause)
            )
            self._arrivals.put(chunk)
        except Exception as failed:  # whatever it is, the reader must hear of it instead of waiting
            self._arrivals.put(failed)

    def _attempt(self, chunk: ScoreChunk, attempts: Attempts, seconds: float) -> None:
        if self._stopped.is_set():
            return
        try:
            with _process_forks.call_under_way():
                stub, request = self._client._stub(), chunk.request(self._template)
                call = stub.ScoreStream(request, timeout=seconds, metadata=self._client._settings.metadata)
                self._calls[chunk] = call
                if self._stopped.is_set():  # the reader could not see the call yet when it stopped
                    call.cancel()
                for message in call:
                    self._arrivals.put(chunk.accept(message))
                    attempts.progressed()
            chunk.check_complete()
            return
        except grpc.RpcError as failed:
            if self._stopped.is_set() or not chunk.missing:
                return
            error = chunk.relocated(self._client._error(cast("FailedCall", failed)))
        except ValueError:
            self._client._check_open()  # another thread may just have closed the channel
            raise
        finally:
            self._calls.pop(chunk, None)
        raise error
