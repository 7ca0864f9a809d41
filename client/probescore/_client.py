"""Defines the parts common to ``ProbeClient`` and ``AsyncProbeClient``: settings, building of requests and reading of responses. Nothing in
this module waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import grpc

from probescore._answers import AnswerCheck
from probescore._channel import DEFAULT_ADDRESS, Addresses, channel_options
from probescore._every_server import RoundTimes
from probescore._options import ScoreOptions, request_options
from probescore._retries import Attempts
from probescore._status import FailedCall, error_from_call, invalid_request, malformed_answer
from probescore.errors import DeadlineExceededError, ProbescoreError, ServerError, UnavailableError
from probescore.types import FROZEN, Reading, RolloutGroup, ScoreResult
from probescore.v1 import scoring_pb2
from probescore.v1.activations_pb2_grpc import ActivationServiceStub
from probescore.v1.admin_pb2_grpc import ProbeAdminServiceStub
from probescore.v1.scoring_pb2_grpc import ScoringServiceStub
from probescore.wire import MessageError, options_to_proto, request_to_proto, result_from_proto
from probescore.wire.contract import JOB_KEY

DEFAULT_TIMEOUT_SECONDS = 300.0
DEFAULT_RESTART_BUDGET_SECONDS = 120.0

Response = TypeVar("Response")
Answer = TypeVar("Answer")


class Stub(ScoringServiceStub, ActivationServiceStub, ProbeAdminServiceStub):
    """gRPC stub with the methods of all services (scoring, activations, administration) on a synchronous channel of ``grpc``."""

    def __init__(self, channel: grpc.Channel | grpc.aio.Channel) -> None:
        ScoringServiceStub.__init__(self, channel)
        ActivationServiceStub.__init__(self, channel)
        ProbeAdminServiceStub.__init__(self, channel)


@dataclass(frozen=True)
class ClientSettings:
    """Value object with the arguments that a client was made with; a pickled client consists of these settings only."""

    addresses: Addresses
    timeout: float
    restart_budget: float
    metadata: tuple[tuple[str, str], ...]
    credentials: grpc.ChannelCredentials | None = None


class BaseClient:
    """Base class of the synchronous and the asynchronous client.

    gRPC channels are made when they are first needed. A channel belongs to one process (and, in the asynchronous client, to one event
    loop), so that a client can be made anywhere, pickled, and used after a fork.
    """

    def __init__(
        self,
        address: str | Sequence[str] = DEFAULT_ADDRESS,
        *,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        restart_budget: float = DEFAULT_RESTART_BUDGET_SECONDS,
        job: str = "",
        metadata: Mapping[str, str] | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        if not 0 <= restart_budget < math.inf:
            raise ValueError(f"restart_budget must be a number of seconds, got {restart_budget}")
        pairs = tuple((metadata or {}).items()) + (((JOB_KEY, job),) if job else ())
        self._begin(ClientSettings(Addresses.of(address), checked_timeout(timeout), restart_budget, pairs, credentials))

    def _begin(self, settings: ClientSettings) -> None:
        self._settings = settings
        self._closed = False
        self._loaded: dict[str, tuple[str, str]] = {}
        """Maps the name of each reading that this client has loaded to the reading's id and path."""
        self._agreed: dict[str, str] = {}
        """Maps the name of each reading to the id that all servers were last found to have."""

    def __getstate__(self) -> ClientSettings:
        if self._settings.credentials is not None:
            raise TypeError("a client with credentials cannot be pickled: make it in the process that uses it")
        return self._settings

    def __setstate__(self, settings: ClientSettings) -> None:
        self._begin(settings)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._settings.addresses.written)})"

    def _attempts(self, timeout: float | None) -> Attempts:
        seconds = self._settings.timeout if timeout is None else checked_timeout(timeout)
        return Attempts(seconds, self._settings.restart_budget)

    def _target(self) -> str:
        """Returns the gRPC target to open a channel with. Raises ``UnavailableError`` for a host name that cannot be looked up now; a retry
        is useful, since the name may resolve again after a restart of the server.
        """
        try:
            return self._settings.addresses.target()
        except OSError as error:
            raise self._unresolved(error) from None

    def _unresolved(self, error: OSError) -> UnavailableError:
        addresses = ", ".join(self._settings.addresses.written)
        return UnavailableError(f"no such host among {addresses}: {error.strerror}", "UNAVAILABLE")

    def _channel_options(self, target: str) -> list[tuple[str, str | int]]:
        addresses = self._settings.addresses
        options = channel_options(self._settings.restart_budget, target)
        if addresses.one_of:  # a proxy that the name does not go through has no part in its addresses either
            options = [(key, 0 if key == "grpc.enable_http_proxy" else value) for key, value in options]
        return options + ([("grpc.default_authority", addresses.authority)] if addresses.authority else [])

    def _servers(self) -> tuple[ClientSettings, ...]:
        """Returns the settings of a client for each server that this client's addresses mean; may look host names up. Raises
        ``UnavailableError`` as ``_target`` does, and ``ValueError`` if the servers cannot be told.
        """
        try:
            parts = self._settings.addresses.each()
        except OSError as error:
            raise self._unresolved(error) from None
        return tuple(replace(self._settings, addresses=part) for part in parts)

    def _has_not_agreed(self, readings: Sequence[Reading]) -> list[str]:
        """Returns the names of those readings in an answer of whose version it is not known that all servers have it."""
        return [each.name for each in readings if each.name != FROZEN and self._agreed.get(each.name) != each.id]

    def _error(self, failed: FailedCall) -> ProbescoreError:
        """Returns the exception that tells why an RPC failed; raises ``RuntimeError`` if the RPC failed because the client was closed
        meanwhile.
        """
        self._check_open()
        error = error_from_call(failed)
        proxy = self._settings.addresses.proxy
        if proxy is None or error.reason or not isinstance(error, (UnavailableError, DeadlineExceededError)):
            return error
        through = (
            f"connections to {self._settings.addresses.written[0]} go through the proxy {proxy.location} of the environment variable "
            f"{proxy.variable}; if they should not, unset it or add the host to no_proxy"
        )
        return type(error)(f"{error}; {through}", error.code, error.reason, error.violations, error.retry_seconds)

    @contextmanager
    def _administration(self) -> Iterator[None]:
        """Context manager around an RPC that changes a server's state, such as ``sleep``. Raises an error if the client has several
        servers; if the server refuses the RPC, the error names the server setting that allows such RPCs.
        """
        if len(self._settings.addresses.written) > 1:
            raise ValueError(f"{self} has several servers, and a call goes to one of them: make a client for each")
        try:
            yield
        except ServerError as error:
            if error.code != grpc.StatusCode.UNIMPLEMENTED.name:
                raise
            raise ServerError(
                "the server does not take sleep, wake and reload: its setting admin is off", error.code, "ADMIN_OFF"
            ) from None

    def _round_times(self, timeout: float | None) -> RoundTimes:
        seconds = self._settings.timeout if timeout is None else checked_timeout(timeout)
        return RoundTimes(seconds, self._settings.restart_budget)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the client is closed")


def checked_timeout(timeout: float) -> float:
    """Returns a timeout in seconds, and raises ``ValueError`` for a timeout that would leave an RPC without a deadline."""
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout must be a number of seconds above 0, got {timeout}: every call has a deadline")
    return timeout


def score_request(groups: Sequence[RolloutGroup], options: ScoreOptions) -> scoring_pb2.ScoreRequest:
    """Returns the request message of the RPC ``Score``; raises ``InvalidRequestError`` for a value that cannot be sent."""
    try:
        return request_to_proto(groups, request_options(**options))
    except MessageError as error:
        raise invalid_request(error) from None


def stream_template(options: ScoreOptions) -> scoring_pb2.ScoreRequest:
    """Returns a request message with the options that all requests of one call of the client's method ``score_stream`` share; raises
    ``InvalidRequestError`` for a value that cannot be sent.
    """
    try:
        return options_to_proto(request_options(**options))
    except MessageError as error:
        raise invalid_request(error) from None


def read(convert: Callable[[Response], Answer], message: Response) -> Answer:
    """Converts a server's response message to a value object of this package; raises ``ServerError`` if the message violates the protobuf
    contract.
    """
    try:
        return convert(message)
    except MessageError as error:
        raise malformed_answer(error) from None


def score_result(message: scoring_pb2.ScoreResponse, request: scoring_pb2.ScoreRequest) -> ScoreResult:
    """Returns the scores in a server's response to the message ``request`` of the RPC ``Score``, after checking that the response matches
    the request.

    Raises:
        ServerError: the response violates the protobuf contract, or does not match ``request``.
        MismatchError: the server's model or tokenizer is not the one that the request expects.
    """
    result = read(result_from_proto, message)
    read(AnswerCheck(request).check_result, result)
    return result
