"""Plans, without any input or output, RPCs that every server of a client must get, such as those that load a reading: the same version on
all servers, or on none.

A plan is a generator: it yields rounds of requests, is sent the outcome of each request, and returns the result. The synchronous and the
asynchronous client carry the rounds out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, Union

import grpc

from probescore._retries import Attempts
from probescore._status import invalid_request, malformed_answer
from probescore.errors import DeadlineExceededError, MismatchError, ProbescoreError, ServerError, TransientError, UnavailableError
from probescore.types import FROZEN, LoadedReading, Reading, ServerInfo
from probescore.types.readings import name_problem
from probescore.v1 import admin_pb2, scoring_pb2
from probescore.wire import MessageError, loaded_reading_from_proto, reading_from_proto, server_info_from_proto
from probescore.wire.requests import checked_integer, checked_string

Result = TypeVar("Result")

Request = Union[admin_pb2.LoadReadingRequest, admin_pb2.UnloadReadingRequest, scoring_pb2.GetServerInfoRequest]

Answer = Union[admin_pb2.LoadReadingResponse, admin_pb2.UnloadReadingResponse, scoring_pb2.GetServerInfoResponse]

Outcome = Union[LoadedReading, Reading, ServerInfo, ProbescoreError]
"""What became of a request: what the server answered, or the exception that tells why the RPC failed."""

_GONE = {"UNKNOWN_READING", "READING_LOST"}
"""Reasons of failures that say that a name means no reading already."""
_IN_USE = "READING_IN_USE"
"""Reason of the failure that says that calls under way were waited for in vain, before anything was changed."""
LEAST_SECONDS = 0.001
"""Seconds that an RPC has at least, when the time of its plan is over."""
UNDO_BUDGET_SECONDS = 10.0
"""Seconds for which an RPC that undoes another one is retried; what has failed has been retried already."""


@dataclass(frozen=True)
class Round:
    """Requests that are sent to several servers at the same time.

    Attributes:
        requests: a dictionary from the servers' addresses to the requests.
        undoes: whether the requests undo earlier ones; then they have time of their own.
        is_tried_once: whether a request that fails is not sent again.
    """

    requests: Mapping[str, Request]
    undoes: bool = False
    is_tried_once: bool = False


Plan = Generator[Round, Mapping[str, Outcome], Result]


class RoundTimes:
    """Times within which the rounds of one plan are carried out.

    Args:
        timeout: seconds for all rounds that ask for what the caller wants, and once more for those that undo it.
        restart_budget: seconds for which an RPC is retried.
    """

    def __init__(self, timeout: float, restart_budget: float) -> None:
        self._timeout = timeout
        self._restart_budget = restart_budget
        self._ends: dict[bool, float] = {}

    def attempts(self, asked: Round) -> Attempts:
        """Returns a new record of the attempts of one RPC of a round that begins now."""
        now = time.monotonic()
        end = self._ends.setdefault(asked.undoes, now + self._timeout)
        budget = min(self._restart_budget, UNDO_BUDGET_SECONDS) if asked.undoes else self._restart_budget
        if asked.is_tried_once:
            budget = 0.0
        return Attempts(max(end - now, LEAST_SECONDS), budget)


def method_of(request: Request) -> str:
    """Returns the name of the RPC that takes a request."""
    return str(request.DESCRIPTOR.name).removesuffix("Request")


def outcome_of(request: Request, answer: Answer) -> Outcome:
    """Converts the response to a request; raises ``ServerError`` if the response violates the protobuf contract or does not match."""
    try:
        if isinstance(answer, scoring_pb2.GetServerInfoResponse):
            return server_info_from_proto(answer)
        if isinstance(answer, admin_pb2.UnloadReadingResponse):
            return reading_from_proto(answer.removed, "removed")
        loaded = loaded_reading_from_proto(answer)
        if isinstance(request, admin_pb2.LoadReadingRequest):
            _check_loaded(request, loaded.reading)
        return loaded
    except MessageError as error:
        raise malformed_answer(error) from None


def _check_loaded(request: admin_pb2.LoadReadingRequest, reading: Reading) -> None:
    if reading.name != request.name:
        raise MessageError("reading.name", f"is {reading.name[:100]!r}; {request.name!r} was loaded")
    if not reading.id:
        raise MessageError("reading.id", "is empty: nobody could say which version was loaded")
    if request.expected_id and reading.id != request.expected_id:
        raise MessageError("reading.id", f"is {reading.id[:100]}; {request.expected_id} was expected")


# --------------------------------------------------------------------------------------------------------------------- requests


def load_request(
    name: str, path: str | os.PathLike[str], step: int | None, expected_id: str | None, *, in_place: bool
) -> admin_pb2.LoadReadingRequest:
    """Returns the request of the RPC ``LoadReading``; raises ``InvalidRequestError`` for a value that cannot be sent."""
    try:
        text = checked_string(os.fspath(path) if isinstance(path, os.PathLike) else path, "path")
        if not text:
            raise MessageError("path", "is empty; the directory of an adapter or checkpoint is needed")
        return admin_pb2.LoadReadingRequest(
            name=_loadable_name(name),
            path=text,
            step=None if step is None else checked_integer(step, "step", 0, 2**63 - 1),
            expected_id=checked_string(expected_id or "", "expected_id"),
            in_place=in_place,
        )
    except MessageError as error:
        raise invalid_request(error) from None


def unload_request(name: str) -> admin_pb2.UnloadReadingRequest:
    """Returns the request of the RPC ``UnloadReading``; raises ``InvalidRequestError`` for a name that no reading can have."""
    try:
        return admin_pb2.UnloadReadingRequest(name=_loadable_name(name))
    except MessageError as error:
        raise invalid_request(error) from None


def _loadable_name(name: str) -> str:
    problem = name_problem(name) or (f"{FROZEN!r} is the frozen model itself, which is always there" if name == FROZEN else "")
    if problem:
        raise MessageError("name", problem)
    return name


# ------------------------------------------------------------------------------------------------------------------------ plans


def load_plan(servers: Sequence[str], request: admin_pb2.LoadReadingRequest, known: Mapping[str, tuple[str, str]]) -> Plan[LoadedReading]:
    """Plans to load a reading on all servers. If a server fails, or has read other files than another one, loading is undone on all.

    Args:
        servers: addresses of the servers.
        request: the request that each server gets.
        known: a dictionary from the names of readings to the id and the path of what was loaded under the name before.

    Raises:
        ProbescoreError: the first server's failure; of several servers, the message says what the name means on each of them now.
    """
    if len(servers) == 1:
        outcomes = yield Round({servers[0]: request})
        return _expect(outcomes[servers[0]], LoadedReading)
    told = yield Round({server: scoring_pb2.GetServerInfoRequest() for server in servers})
    before = {server: _meaning(request.name, _expect(told[server], ServerInfo)) for server in servers}
    outcomes = yield Round(dict.fromkeys(servers, request))
    failure = _failure_to_load(outcomes)
    if failure is None:
        return _together([_expect(outcome, LoadedReading) for outcome in outcomes.values()])
    undone = yield from _undone(request, before, outcomes, known.get(request.name))
    message = f"{failure}; reading {request.name!r} is loaded on all {len(servers)} servers or on none, so now {undone}"
    raise type(failure)(message, failure.code, failure.reason, failure.violations, failure.retry_seconds)


def unload_plan(servers: Sequence[str], request: admin_pb2.UnloadReadingRequest) -> Plan[Reading]:
    """Plans to unload a reading from all servers. Servers that do not have the reading count as done if another one has it.

    Raises:
        ProbescoreError: the first server's failure; of several servers, the message says on which the reading is unloaded.
    """
    outcomes = yield Round(dict.fromkeys(servers, request))
    removed = [outcome for outcome in outcomes.values() if isinstance(outcome, Reading)]
    errors = {server: outcome for server, outcome in outcomes.items() if isinstance(outcome, ProbescoreError)}
    failures = {server: error for server, error in errors.items() if error.reason not in _GONE}
    if removed and not failures:
        return removed[0]
    server, error = next(iter((failures or errors).items()))
    if len(servers) == 1 or not failures:
        raise error
    done = ", ".join(each for each in servers if each not in failures) or "none"
    message = f"{server}: {error}; reading {request.name!r} is unloaded on: {done}; unload it again for the others"
    raise type(error)(message, error.code, error.reason, error.violations, error.retry_seconds)


def readings_plan(servers: Sequence[str]) -> Plan[tuple[Reading, ...]]:
    """Plans to ask all servers which readings they have.

    Raises:
        MismatchError: they do not have the same versions.
    """
    outcomes = yield Round({server: scoring_pb2.GetServerInfoRequest() for server in servers})
    described = {server: _expect(outcome, ServerInfo).readings for server, outcome in outcomes.items()}
    problem = _difference({server: {each.name: each.id for each in readings} for server, readings in described.items()})
    if problem:
        raise MismatchError(problem, "FAILED_PRECONDITION", "READING_DIFFERS")
    return described[servers[0]]


def agreement_plan(servers: Sequence[str], names: Sequence[str]) -> Plan[dict[str, str]]:
    """Plans to ask all servers which versions the given readings have, and returns the ids by name. Servers that cannot be reached are left
    out, since they score nothing.

    Raises:
        UnavailableError: the servers have different versions, as they do for a moment while a reading is replaced.
    """
    outcomes = yield Round({server: scoring_pb2.GetServerInfoRequest() for server in servers}, is_tried_once=True)
    ids: dict[str, dict[str, str]] = {}
    for server, outcome in outcomes.items():
        if not isinstance(outcome, TransientError):
            readings = _expect(outcome, ServerInfo).readings
            ids[server] = {each.name: each.id for each in readings if each.name in names}
    problem = _difference(ids)
    if problem:
        raise UnavailableError(problem, "UNAVAILABLE", "READING_DIFFERS")
    return next(iter(ids.values()), {})


# ---------------------------------------------------------------------------------------------------------------------- undoing


def _undone(
    request: admin_pb2.LoadReadingRequest,
    before: Mapping[str, Reading | None],
    outcomes: Mapping[str, Outcome],
    known: tuple[str, str] | None,
) -> Generator[Round, Mapping[str, Outcome], str]:
    """Lets a name mean again what it meant on each server, or nothing where that cannot be, and returns what it means now, for people."""
    now: dict[str, str] = {}
    undo: dict[str, Request] = {}
    for server, outcome in outcomes.items():
        was = before[server]
        if not _may_have_changed(request, was, outcome):
            now[server] = _told(was)
            continue
        path = _path_of(was, request, outcome, known)
        undo[server] = (
            admin_pb2.UnloadReadingRequest(name=request.name)
            if was is None or path is None
            else admin_pb2.LoadReadingRequest(name=request.name, path=path, step=was.step, expected_id=was.id, in_place=request.in_place)
        )
    for _ in range(2):
        if not undo:
            break
        answers = yield Round(undo, undoes=True)
        again: dict[str, Request] = {}
        for server, answer in answers.items():
            was, is_load = before[server], isinstance(undo[server], admin_pb2.LoadReadingRequest)
            if isinstance(answer, ProbescoreError) and answer.reason not in _GONE:
                now[server] = f"unknown, since it could not be undone: {answer}"
                if is_load:
                    again[server] = admin_pb2.UnloadReadingRequest(name=request.name)
            elif is_load:
                now[server] = _told(was)
            else:
                now[server] = "nothing" if was is None else f"nothing, since the files of {was.id[:19]}… could not be loaded again"
        undo = again
    for server, outcome in outcomes.items():
        if isinstance(outcome, DeadlineExceededError):
            now[server] += ", unless loading goes on there and ends later"
    return "it means " + "; ".join(f"on {server} {now[server]}" for server in outcomes)


def _may_have_changed(request: admin_pb2.LoadReadingRequest, was: Reading | None, outcome: Outcome) -> bool:
    if isinstance(outcome, LoadedReading):
        return was is None or (was.id, was.step) != (outcome.reading.id, outcome.reading.step)
    if isinstance(outcome, DeadlineExceededError) or (isinstance(outcome, TransientError) and not outcome.reason):
        return True  # the request may have arrived, and only its answer been lost
    return request.in_place and was is not None and not (isinstance(outcome, ProbescoreError) and outcome.reason == _IN_USE)


def _path_of(was: Reading | None, request: admin_pb2.LoadReadingRequest, outcome: Outcome, known: tuple[str, str] | None) -> str | None:
    """Returns the path of what a name meant, or ``None`` if it is not known: only what this client has loaded itself is."""
    if was is None:
        return None
    if isinstance(outcome, LoadedReading) and outcome.reading.id == was.id:
        return request.path
    return known[1] if known is not None and known[0] == was.id else None


def _told(reading: Reading | None) -> str:
    if reading is None:
        return "nothing"
    return f"what it meant before, {reading.id[:19]}…" + (f" of step {reading.step}" if reading.step is not None else "")


# ----------------------------------------------------------------------------------------------------------------- of outcomes


def _expect(outcome: Outcome, kind: type[Result]) -> Result:
    if isinstance(outcome, ProbescoreError):
        raise outcome
    if not isinstance(outcome, kind):
        raise TypeError(f"expected {kind.__name__}, got {type(outcome).__name__}")
    return outcome


def _meaning(name: str, server: ServerInfo) -> Reading | None:
    return next((reading for reading in server.readings if reading.name == name), None)


def _failure_to_load(outcomes: Mapping[str, Outcome]) -> ProbescoreError | None:
    for server, outcome in outcomes.items():
        if isinstance(outcome, ProbescoreError):
            return type(outcome)(f"{server}: {outcome}", outcome.code, outcome.reason, outcome.violations, outcome.retry_seconds)
    ids = {server: outcome.reading.id for server, outcome in outcomes.items() if isinstance(outcome, LoadedReading)}
    if len(set(ids.values())) > 1:
        told = "; ".join(f"{server}: {reading_id[:100]}" for server, reading_id in ids.items())
        problem = f"the servers have read different files, or do not have the same frozen model: {told}"
        return MismatchError(problem, "FAILED_PRECONDITION", "READING_DIFFERS")
    return None


def _together(loaded: Sequence[LoadedReading]) -> LoadedReading:
    drift: dict[str, float] = {}
    for each in loaded:
        for probe, moved in each.golden_drift.items():
            drift[probe] = max(moved, drift.get(probe, 0.0))
    return LoadedReading(
        reading=loaded[0].reading,
        replaced=next((each.replaced for each in loaded if each.replaced is not None), None),
        golden_drift=drift,
        device_bytes=max(each.device_bytes for each in loaded),
    )


def _difference(ids: Mapping[str, Mapping[str, str]]) -> str:
    """Returns in what the readings of several servers, as ids by name, differ, for people; empty if they are the same."""
    names = dict.fromkeys(name for of_server in ids.values() for name in of_server)
    for name in names:
        if len({of_server.get(name) for of_server in ids.values()}) > 1:
            told = "; ".join(f"{server}: {of_server.get(name, 'none')[:100]}" for server, of_server in ids.items())
            return (
                f"the servers do not have the same version of reading {name!r}; load it through a client with all their addresses: {told}"
            )
    return ""


def readings_off(error: ProbescoreError) -> ProbescoreError:
    """Returns the exception for a server that does not take the RPCs of readings; any other exception unchanged."""
    if not isinstance(error, ServerError) or error.code != grpc.StatusCode.UNIMPLEMENTED.name or error.reason:
        return error
    problem = "the server takes no readings: its setting admin or readings_root is off, or it is of an earlier version"
    return ServerError(problem, error.code, "READINGS_OFF")
