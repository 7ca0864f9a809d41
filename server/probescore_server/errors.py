"""The core's errors.

    CoreError
    ├── InvalidRequest        a request that no retry can save: names the field, the value and the limit
    │   └── LimitExceeded     it asks for more than a limit that ``GetServerInfo`` tells
    ├── Mismatch              the client expects another model or tokenizer than the one that runs here
    ├── QueueFull             too many tokens wait already; try again later
    ├── ServerBusy            too many calls, or too many bytes of them, are under way; try again later
    ├── WorkerUnavailable     no worker can take or finish this now; try again later
    │   └── WorkerLost        a worker was lost with this, and it may be why
    ├── WorkerLostTwice       a worker was lost with this twice, the second time with nothing else; it is not tried a third time
    ├── OutOfMemory           one rollout alone needs more memory than the device has; no retry can save it
    ├── DeadlineExpired       the caller's deadline passed before the work was done
    ├── InternalFault         a fault of ours; clients see an incident number, the log has the rest
    └── StartupError          the server cannot start as configured
        ├── ModelRefused      the model cannot be loaded, or not served right
        └── ProbeRefused      a probe file that is not what it says, or not for this model: names file, field, found, expected

``reason`` is stable and travels to clients as ``google.rpc.ErrorInfo.reason``. Messages of everything but ``StartupError`` reach clients,
so they carry no path and no traceback.
"""

from __future__ import annotations

import secrets


class CoreError(Exception):
    """Root of the core's errors."""

    reason = "INTERNAL"


class InvalidRequest(CoreError):
    """A request that no retry can save.

    Args:
        field: path of the field at fault, as in the proto: ``groups[2].completions[0].mask``.
        problem: what is wrong with it, with the value and the limit.
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
    """A request that asks for more than a limit that ``GetServerInfo`` tells.

    Args:
        field: as of ``InvalidRequest``.
        value: what was asked for, at least.
        unit: what is counted: ``spans``.
        limit: the limit's name, as in ``Limits`` and the settings.
        maximum: its value.
        remedy: what the caller can do.
    """

    reason = "LIMIT_EXCEEDED"

    def __init__(self, field: str, value: int, unit: str, limit: str, maximum: int, remedy: str, reason: str = reason) -> None:
        super().__init__(field, f"{value} {unit}; the limit {limit} is {maximum}: {remedy}", reason)
        self.args = (field, value, unit, limit, maximum, remedy, reason)  # what a pickle makes it of
        self.value = value
        self.limit = limit
        self.maximum = maximum


class Mismatch(CoreError):
    """The client expects another model or tokenizer than the one that runs here."""

    reason = "MISMATCH"

    def __init__(self, field: str, found: str, expected: str) -> None:
        super().__init__(field, found, expected)
        self.field = field
        self.found = found
        self.expected = expected

    def __str__(self) -> str:
        return f"{self.field}: the server runs {self.found}, the request expects {self.expected}"


class QueueFull(CoreError):
    """Too many tokens wait already; a later try may succeed."""

    reason = "QUEUE_FULL"

    def __init__(self, queued_tokens: int, max_queue_tokens: int, retry_seconds: float) -> None:
        super().__init__(queued_tokens, max_queue_tokens, retry_seconds)
        self.queued_tokens = queued_tokens
        self.max_queue_tokens = max_queue_tokens
        self.retry_seconds = retry_seconds

    def __str__(self) -> str:
        return f"{self.queued_tokens} tokens are waiting; the limit is {self.max_queue_tokens}"


class ServerBusy(CoreError):
    """Too much is under way in the server; a later try may succeed.

    Args:
        value: what there would be with this call.
        unit: what is counted: ``calls``.
        limit: the limit's name, as in ``Limits`` and the settings.
        maximum: its value.
        retry_seconds: when to come back.
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
    """No worker can take or finish this now; a later try may succeed."""

    reason = "WORKER_UNAVAILABLE"

    def __init__(self, problem: str, retry_seconds: float) -> None:
        super().__init__(problem, retry_seconds)
        self.problem = problem
        self.retry_seconds = retry_seconds

    def __str__(self) -> str:
        return self.problem


class WorkerLost(WorkerUnavailable):
    """A worker was lost with what it did, and not by somebody's will: what it did may be why.

    Args:
        reason_lost: one word: ``silent``, ``overdue``, ``device``, ``crash`` or ``memory``.
        problem: what was wrong with it.
        retry_seconds: until it may be back.
        doing: the step that it was at, such as ``probe loop@1``; empty if that is not known.
        order: number of the batch, or of the texts, that took too long or was all that it had; 0 = it could be any.
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
    """A worker was lost with this twice, the second time with nothing else. It is not tried a third time.

    Args:
        field: path of what did it, as in the proto: ``groups[2].completions[0]``.
        doing: the step at which it happened, such as ``probe loop@1``; empty if that is not known.
        problem: what was wrong with the worker.
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
    """The memory of the device was too short for ``tokens`` at a time; a client hears of it if they are those of a single rollout."""

    reason = "OUT_OF_MEMORY"

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.tokens = tokens

    def __str__(self) -> str:
        return f"a rollout of {self.tokens} tokens, with its prompt and follow-ups, does not fit into the memory of the server's device"


class DeadlineExpired(CoreError):
    """The caller's deadline passed before the work was done."""

    reason = "DEADLINE_EXPIRED"


class InternalFault(CoreError):
    """A fault of ours. ``incident`` is the number under which the log has what happened; nothing else of it reaches a client."""

    reason = "INTERNAL"

    def __init__(self, incident: str) -> None:
        super().__init__(incident)
        self.incident = incident

    @classmethod
    def new(cls) -> InternalFault:
        """With an incident number of its own, to be logged beside what happened."""
        return cls(secrets.token_hex(6))

    def __str__(self) -> str:
        return f"internal error; the server's log has it as incident {self.incident}"


class StartupError(CoreError):
    """The server cannot start as configured. Its message is for the operator and may name paths."""

    reason = "STARTUP"


class ModelRefused(StartupError):
    """The model cannot be loaded, or cannot be served right."""

    reason = "MODEL_REFUSED"


class ProbeRefused(StartupError):
    """A probe file that is not what it says it is, or not for this model.

    Args:
        file: name of the file, as the operator gave it.
        field: what was checked: a field of the manifest (``model.fingerprint``), or ``file``, ``graph``, ``golden``.
        found: what is there.
        expected: what should be.
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
