"""``ProbeClient``: for programs without an event loop, and for any number of threads."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar, Union, cast

import grpc

from probescore._client import (
    DEFAULT_TIMEOUT_SECONDS,
    BaseClient,
    Settings,
    Stub,
    checked_timeout,
    read,
    score_request,
    score_result,
    stream_template,
)
from probescore._messages import probes_from_proto, server_info_from_proto, transfers_from_proto
from probescore._options import ScoreOptions
from probescore._retries import Attempts
from probescore._status import FailedCall, error_from_call
from probescore._streaming import Chunk, StreamWindow, chunks
from probescore.errors import ProbescoreError, UnavailableError
from probescore.types import ProbeInfo, RolloutGroup, ScoreResult, ServerInfo, StreamedCompletion, Transfer
from probescore.v1 import admin_pb2, probes_pb2, scoring_pb2

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

Request = TypeVar("Request")
Response = TypeVar("Response")


class ProbeClient(BaseClient):
    """Scores rollouts over gRPC.

    ::

        with ProbeClient("localhost:50051") as client:
            result = client.score([RolloutGroup(prompt_ids, [completion_ids])])
            print(result.values("cheating"))

    Any number of threads may share one client. It can be pickled, and used after a fork.

    Args:
        address: ``"host:port"``, ``"dns:///host:port"``, ``"unix:/path"``, or several ``"host:port"``, taken in turn.
        timeout: seconds for a call, retries included, unless the call says otherwise.
        restart_budget: seconds for which a call goes on trying while the server cannot be reached or is overloaded; within ``timeout``.
        job: names the training run, so that its ranks count as one when the server shares its time out.
        metadata: sent with every call, e.g. ``{"authorization": "Bearer …"}``.
        credentials: for TLS, e.g. ``grpc.ssl_channel_credentials(...)``; default: an unencrypted connection.

    Every method raises ``ProbescoreError``; ``probescore.errors`` has the tree.
    """

    def _begin(self, settings: Settings) -> None:
        super()._begin(settings)
        self._channels: dict[int, tuple[grpc.Channel, Stub]] = {}

    def score(self, groups: Sequence[RolloutGroup], *, timeout: float | None = None, **options: Unpack[ScoreOptions]) -> ScoreResult:
        """Scores every completion of every group in one call. ``ScoreOptions`` says what the options are."""
        request = score_request(groups, options)
        return score_result(self._call(lambda stub: stub.Score, request, self._attempts(timeout)), request)

    def score_stream(
        self,
        groups: Iterable[RolloutGroup],
        *,
        timeout: float | None = None,
        window: StreamWindow | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Iterator[StreamedCompletion]:
        """Scores any number of groups, several calls at a time, and yields each completion once, as it finishes, in any order.

        After a lost connection only what is still missing is asked for again.

        Args:
            groups: may be endless; read no further ahead than ``window`` says.
            timeout: seconds for each of the calls.
            window: how much is under way at a time.
            options: see ``ScoreOptions``.
        """
        self._check_open()
        window = window or StreamWindow()
        return _Stream(self, stream_template(options), timeout, window).completions(groups)

    def get_server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Says what runs at the address."""
        return self._server_info(self._attempts(timeout))

    def list_probes(self, *, timeout: float | None = None) -> tuple[ProbeInfo, ...]:
        """Lists the loaded probes, sorted by name and version."""
        return read(probes_from_proto, self._call(lambda stub: stub.ListProbes, probes_pb2.ListProbesRequest(), self._attempts(timeout)))

    def wait_until_ready(self, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> ServerInfo:
        """Waits until the server is ready to score, and says what runs there.

        Raises:
            TransientError, DeadlineExceededError: it was not within ``timeout`` seconds.
        """
        return self._server_info(Attempts(checked_timeout(timeout), restart_budget=timeout))

    def sleep(self, *, timeout: float | None = None) -> tuple[Transfer, ...]:
        """Makes the server give its devices' memory back until ``wake``, and returns when it has: what each device moved.

        Calls to score wait meanwhile, within their deadlines. A server that sleeps is left as it is. Needs the server's setting ``admin``,
        and a client of one server; ``"dns:///…"`` of several reaches any of them.
        """
        with self._administration():
            answer = self._call(lambda stub: stub.Sleep, admin_pb2.SleepRequest(), self._attempts(timeout))
        return transfers_from_proto(answer.transfers)

    def wake(self, *, timeout: float | None = None) -> tuple[Transfer, ...]:
        """Ends what ``sleep`` began, and returns when the server can score: what each device moved.

        Raises:
            UnavailableError: a device had no room for the weights for as long as the client may wait.
        """
        with self._administration():
            answer = self._call(lambda stub: stub.Wake, admin_pb2.WakeRequest(), self._attempts(timeout))
        return transfers_from_proto(answer.transfers)

    @contextmanager
    def awake(self, *, timeout: float | None = None) -> Iterator[None]:
        """Wakes the server for the length of a ``with`` block, and puts it to sleep at its end, also after an error."""
        self.wake(timeout=timeout)
        try:
            yield
        finally:
            self.sleep(timeout=timeout)

    def close(self) -> None:
        """Ends the connection. The client cannot be used afterwards."""
        self._closed = True
        opened = self._channels.pop(os.getpid(), None)
        if opened is not None:
            opened[0].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _stub(self) -> Stub:
        self._check_open()
        pid = os.getpid()
        if pid not in self._channels:
            target, options, credentials = self._target(), self._channel_options(), self._settings.credentials
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
        while True:
            error: ProbescoreError
            try:
                return method(self._stub())(request, timeout=attempts.seconds_left(), metadata=self._settings.metadata)
            except grpc.RpcError as failed:
                error = error_from_call(cast("FailedCall", failed))
            except UnavailableError as unresolved:
                error = unresolved
            time.sleep(attempts.pause(error))

    def _server_info(self, attempts: Attempts) -> ServerInfo:
        return read(server_info_from_proto, self._call(lambda stub: stub.GetServerInfo, scoring_pb2.GetServerInfoRequest(), attempts))


Arrival = Union[list[StreamedCompletion], Chunk, Exception]
"""What the call for a chunk hands over: some answers, the chunk itself when it is done, or why it failed."""


class _Stream:
    """One ``score_stream``: a thread for each call, so that its deadline does not depend on how fast the answers are read."""

    def __init__(self, client: ProbeClient, template: scoring_pb2.ScoreRequest, timeout: float | None, window: StreamWindow) -> None:
        self._client = client
        self._template = template
        self._timeout = timeout
        self._window = window
        self._arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._calls: dict[Chunk, grpc.Call] = {}
        self._stopped = threading.Event()

    def completions(self, groups: Iterable[RolloutGroup]) -> Iterator[StreamedCompletion]:
        to_send = chunks(groups, self._window)
        under_way = 0
        with ThreadPoolExecutor(self._window.calls_in_flight, "probescore-stream") as threads:
            try:
                while True:
                    while under_way < self._window.calls_in_flight and (chunk := next(to_send, None)) is not None:
                        threads.submit(self._run, chunk)
                        under_way += 1
                    if not under_way:
                        return
                    arrival = self._arrivals.get()
                    if isinstance(arrival, Chunk):
                        under_way -= 1
                    elif isinstance(arrival, Exception):
                        raise arrival
                    else:
                        yield from arrival
            finally:
                self._stopped.set()
                for call in list(self._calls.values()):
                    call.cancel()

    def _run(self, chunk: Chunk) -> None:
        try:
            attempts = self._client._attempts(self._timeout)
            while chunk.missing and not self._stopped.is_set():
                error = self._attempt(chunk, attempts)
                if error is not None and chunk.missing:
                    self._stopped.wait(attempts.pause(error))
            self._arrivals.put(chunk)
        except Exception as failed:  # whatever it is, the reader must hear of it instead of waiting
            self._arrivals.put(failed)

    def _attempt(self, chunk: Chunk, attempts: Attempts) -> ProbescoreError | None:
        try:
            stub, request = self._client._stub(), chunk.request(self._template)
            call = stub.ScoreStream(request, timeout=attempts.seconds_left(), metadata=self._client._settings.metadata)
            self._calls[chunk] = call
            if self._stopped.is_set():  # by a reader that could not see the call yet
                call.cancel()
            for message in call:
                self._arrivals.put(chunk.accept(message))
                attempts.progressed()
            chunk.check_complete()
        except grpc.RpcError as failed:
            return chunk.relocated(error_from_call(cast("FailedCall", failed)))
        except UnavailableError as unresolved:
            return unresolved
        finally:
            self._calls.pop(chunk, None)
        return None
