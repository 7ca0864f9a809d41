"""Defines the errors with which the server's core refuses or fails a request, or refuses to start.

    CoreError
    ├── InvalidRequest        the request is invalid and no retry can succeed; names the field, the value and the limit
    │   └── LimitExceeded     the request asks for more than a limit that ``GetServerInfo`` tells
    ├── Mismatch              the client expects another model or tokenizer than the one that this server runs
    ├── QueueFull             too many tokens wait already; a later try may succeed
    ├── ServerBusy            too many calls, or too many bytes of their requests, are under way; a later try may succeed
    ├── WorkerUnavailable     no worker process can take or finish the work now; a later try may succeed
    │   └── WorkerLost        a worker process was lost, and the work that it had may be the cause
    ├── WorkerLostTwice       worker processes were lost with the same rollout or text twice, the second time with nothing else
    ├── OutOfMemory           one rollout alone needs more memory than the device has; no retry can succeed
    ├── DeadlineExpired       the caller's deadline passed before the work was done
    ├── InternalFault         the server has a bug; clients see an incident number, and the log has the details
    └── StartupError          the server cannot start as configured
        ├── ModelRefused      the model cannot be loaded, or would not be served correctly
        └── ProbeRefused      a probe file is damaged or was made for another model; names file, field, found, expected

Each error's ``reason`` is stable and travels to clients as ``google.rpc.ErrorInfo.reason``. The messages of all errors but
``StartupError`` reach clients, so that they carry no path and no traceback.
"""

from __future__ import annotations

import secrets


class CoreError(Exception):
    """Is the base class of all errors with which the server's core refuses or fails something.

    The class attribute ``reason`` is a stable word in upper case, such as ``QUEUE_FULL``, which clients receive.
    """

    reason = "INTERNAL"


class InvalidRequest(CoreError):
    """Says that a request is invalid, so that the same request can never succeed.

    Args:
        field: path in the request message of the field at fault, such as ``groups[2].completions[0].mask``.
        problem: what is wrong with the field, with its value and the limit.
        reason: a stable word in upper case, which clients receive.
    """

    reason = "INVALID_REQUEST"

    def __init__(self, field: str, problem: str, reason: str = reason) -> None:
        super().__init__(field, problem, reason)
        self.field = field
        self.problem = problem
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


class LimitExceeded(InvalidRequest):
    """Says that a request asks for more than one of the server's limits, which the RPC ``GetServerInfo`` tells, allows.

    Args:
        field: path in the request message of the field at fault, such as ``groups[0].completions[1].spans``.
        value: the amount that was asked for; the true amount may be larger where counting stopped early.
        unit: what is counted, such as ``spans``.
        limit: the limit's name, as in the server's settings.
        maximum: the limit's value.
        remedy: what the caller can do instead.
        reason: a stable word in upper case, which clients receive.
    """

    reason = "LIMIT_EXCEEDED"

    def __init__(self, field: str, value: int, unit: str, limit: str, maximum: int, remedy: str, reason: str = reason) -> None:
        super().__init__(field, f"{value} {unit}; the limit {limit} is {maximum}: {remedy}", reason)
        self.args = (field, value, unit, limit, maximum, remedy, reason)  # A pickle calls the class with these.
        self.value = value
        self.limit = limit
        self.maximum = maximum


class Mismatch(CoreError):
    """Says that the client expects another model or tokenizer than the one that this server runs.

    Args:
        field: the field of the request that states the expectation, such as ``expected_model_fingerprint``.
        found: the fingerprint of what the server runs.
        expected: the fingerprint that the client expects.
    """

    reason = "MISMATCH"

    def __init__(self, field: str, found: str, expected: str) -> None:
        super().__init__(field, found, expected)
        self.field = field
        self.found = found
        self.expected = expected

    def __str__(self) -> str:
        return f"{self.field}: the server runs {self.found}, the request expects {self.expected}"


class QueueFull(CoreError):
    """Says that too many tokens wait in the server's queue already to take a call; a later try may succeed.

    Args:
        queued_tokens: the number of tokens that wait.
        max_queue_tokens: the most tokens that may wait, as in the settings.
        retry_seconds: seconds after which the caller should try again.
    """

    reason = "QUEUE_FULL"

    def __init__(self, queued_tokens: int, max_queue_tokens: int, retry_seconds: float) -> None:
        super().__init__(queued_tokens, max_queue_tokens, retry_seconds)
        self.queued_tokens = queued_tokens
        self.max_queue_tokens = max_queue_tokens
        self.retry_seconds = retry_seconds

    def __str__(self) -> str:
        return f"{self.queued_tokens} tokens are waiting; the limit is {self.max_queue_tokens}"


class ServerBusy(CoreError):
    """Says that too many calls, or too many bytes of their requests, are under way in the server; a later try may succeed.

    Args:
        value: the number of calls, or of bytes, that would be under way with this call.
        unit: what is counted, such as ``calls``.
        limit: the limit's name, as in the server's settings.
        maximum: the limit's value.
        retry_seconds: seconds after which the caller should try again.
    """

    reason = "BUSY"

    def __init__(self, value: int, unit: str, limit: str, maximum: int, retry_seconds: float) -> None:
        super().__init__(value, unit, limit, maximum, retry_seconds)
        self.value = value
        self.unit = unit
        self.limit = limit
        self.maximum = maximum
        self.retry_seconds = retry_seconds

    def __str__(self) -> str:
        return f"{self.value} {self.unit} would be under way; the limit {self.limit} is {self.maximum}"


class WorkerUnavailable(CoreError):
    """Says that no worker process can take or finish the work now; a later try may succeed.

    Args:
        problem: why no worker process can.
        retry_seconds: seconds after which the caller should try again.
    """

    reason = "WORKER_UNAVAILABLE"

    def __init__(self, problem: str, retry_seconds: float) -> None:
        super().__init__(problem, retry_seconds)
        self.problem = problem
        self.retry_seconds = retry_seconds

    def __str__(self) -> str:
        return self.problem


class WorkerLost(WorkerUnavailable):
    """Says that a worker process was lost although nobody ended it on purpose, so that the work that it had may be the cause.

    Args:
        reason_lost: one word for the cause: ``silent``, ``overdue``, ``device``, ``crash`` or ``memory``.
        problem: what was wrong with the worker process.
        retry_seconds: seconds after which the worker may be running again.
        doing: the step that the worker computed, such as ``probe loop@1``; empty if that is not known.
        order: the number of the batch, or of the request's texts, that took too long or was the only work; 0 = any of its work may be
            the cause.
    """

    def __init__(self, reason_lost: str, problem: str, retry_seconds: float, doing: str = "", order: int = 0) -> None:
        super().__init__(problem, retry_seconds)
        self.args = (reason_lost, problem, retry_seconds, doing, order)
        self.reason_lost = reason_lost
        self.doing = doing
        self.order = order

    def __str__(self) -> str:
        return f"the worker was lost and is being restarted: {self.problem}"


class WorkerLostTwice(CoreError):
    """Says that a worker process was lost twice while it worked on the same rollout or text, the second time on nothing else.

    That rollout or text is then refused instead of being tried a third time.

    Args:
        field: path in the request message of the rollout or text, such as ``groups[2].completions[0]``.
        doing: the step at which the worker was lost, such as ``probe loop@1``; empty if that is not known.
        problem: what was wrong with the worker process.
    """

    reason = "WORKER_LOST_TWICE"

    def __init__(self, field: str, doing: str, problem: str) -> None:
        super().__init__(field, doing, problem)
        self.field = field
        self.doing = doing
        self.problem = problem

    def __str__(self) -> str:
        culprit = f"{self.field} with {self.doing}" if self.doing else self.field
        return f"{culprit}: a worker was lost with it twice, the second time with nothing else: {self.problem}; it is not tried again"


class OutOfMemory(CoreError):
    """Says that the device's memory was too short to compute ``tokens`` tokens at a time.

    A client receives this error only if a single rollout does not fit; larger batches are split by the server.
    """

    reason = "OUT_OF_MEMORY"

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.tokens = tokens

    def __str__(self) -> str:
        return f"a rollout of {self.tokens} tokens, with its prompt and follow-ups, does not fit into the memory of the server's device"


class DeadlineExpired(CoreError):
    """Says that the deadline of the caller's RPC passed before its work was done."""

    reason = "DEADLINE_EXPIRED"


class InternalFault(CoreError):
    """Says that the server failed because of a bug.

    ``incident`` is the number, in hexadecimal digits, under which the server's log has the details; clients receive nothing else.
    """

    reason = "INTERNAL"

    def __init__(self, incident: str) -> None:
        super().__init__(incident)
        self.incident = incident

    @classmethod
    def new(cls) -> InternalFault:
        """Returns an ``InternalFault`` with a new random incident number, which the caller logs with the details of what happened."""
        return cls(secrets.token_hex(6))

    def __str__(self) -> str:
        return f"internal error; the server's log has it as incident {self.incident}"


class StartupError(CoreError):
    """Says that the server cannot start as configured. The message is for the operator and may name paths."""

    reason = "STARTUP"


class ModelRefused(StartupError):
    """Says that the language model cannot be loaded, or that the server would not serve it correctly."""

    reason = "MODEL_REFUSED"


class ProbeRefused(StartupError):
    """Says that a probe file is refused: its content contradicts its manifest, or it was made for another model.

    Args:
        file: the name of the file, as the operator gave it.
        field: what was checked: a field of the manifest such as ``model.fingerprint``, or ``file``, ``graph`` or ``golden``.
        found: the value that was found.
        expected: the value that was expected.
    """

    reason = "PROBE_REFUSED"

    def __init__(self, file: str, field: str, found: str, expected: str) -> None:
        super().__init__(file, field, found, expected)
        self.file = file
        self.field = field
        self.found = found
        self.expected = expected

    def __str__(self) -> str:
        return f"{self.file}: {self.field}: found {self.found}, expected {self.expected}"
