"""Defines the exceptions that the server's core (the code without gRPC) raises when it refuses or fails a request, or cannot start.

    CoreError
    ├── InvalidRequest        the request is invalid and no retry can succeed; the message names the field, the value and the limit
    │   ├── LimitExceeded     the request exceeds a limit that ``GetServerInfo`` returns
    │   └── ReadingRefused    an adapter or checkpoint is damaged, of a kind that is not computed, or of another model
    ├── Mismatch              the client expects another model or tokenizer than the one that this server runs
    ├── FailedPrecondition    the server is not in a state in which it can do what is asked; something else must be done first
    ├── QueueFull             too many tokens wait already; a later try may succeed
    ├── ServerBusy            the server works on too many RPCs, or bytes of requests; a later try may succeed
    ├── WorkerUnavailable     no worker process can take or finish the work now; a later try may succeed
    │   └── WorkerLost        a worker process crashed or got stuck; its work may be the cause
    ├── ReadingIncomplete     an adapter or checkpoint is still being written; a later try may succeed
    ├── WorkerLostTwice       two worker processes died computing the same rollout or text, the second nothing else
    ├── OutOfMemory           one rollout alone needs more memory than the device has; no retry can succeed
    ├── DeadlineExpired       the caller's deadline passed before the work was done
    ├── InternalFault         the server has a bug; clients see an incident number, and the log has the details
    └── StartupError          the server cannot start as configured
        ├── ModelRefused      the model cannot be loaded, or would not be served correctly
        └── ProbeRefused      a probe file is damaged or was made for another model

Each error's ``reason`` is stable and travels to clients as ``google.rpc.ErrorInfo.reason``. The messages of all errors but ``StartupError``
reach clients, and therefore contain no path and no traceback.
"""

from __future__ import annotations

import secrets


class CoreError(Exception):
    """Base class of all exceptions that the server's core raises when it refuses or fails a request, or cannot start.

    The class attribute ``reason`` is a stable word in upper case, such as ``QUEUE_FULL``, which clients receive.
    """

    reason = "INTERNAL"


class InvalidRequest(CoreError):
    """Exception raised when a request is invalid, so that the same request can never succeed.

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
    """Exception raised when a request exceeds one of the server's limits, which clients can read with the RPC ``GetServerInfo``.

    Args:
        field: path in the request message of the field at fault, such as ``groups[0].completions[1].spans``.
        value: the amount that the request asks for; the true amount may be larger, since counting may stop above the limit.
        unit: the unit of ``value``, such as ``spans``.
        limit: the limit's name, as in the server's settings.
        maximum: the limit's value.
        remedy: the action that the caller can take instead.
        reason: a stable word in upper case, which clients receive.
    """

    reason = "LIMIT_EXCEEDED"

    def __init__(self, field: str, value: int, unit: str, limit: str, maximum: int, remedy: str, reason: str = reason) -> None:
        super().__init__(field, f"{value} {unit}; the limit {limit} is {maximum}: {remedy}", reason)
        self.args = (field, value, unit, limit, maximum, remedy, reason)  # A pickle calls the class with these.
        self.value = value
        self.limit = limit
        self.maximum = maximum


class ReadingRefused(InvalidRequest):
    """Exception raised when an adapter or a checkpoint cannot be read beside the frozen model, or would not be computed correctly.

    Args:
        field: what is at fault: a file with a setting or tensor of it, such as ``adapter_config.json: peft_type``, or ``path``.
        problem: what is wrong, with the value found and what would be right.
        reason: a stable word in upper case, which clients receive.
    """

    reason = "READING_REFUSED"

    def __init__(self, field: str, problem: str, reason: str = reason) -> None:
        super().__init__(field, problem, reason)


class Mismatch(CoreError):
    """Exception raised when the client expects another model or tokenizer than the one that this server runs.

    Args:
        field: the field of the request that states the expectation, such as ``expected_model_fingerprint``.
        found: the fingerprint of the model or tokenizer that the server runs.
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


class FailedPrecondition(CoreError):
    """Exception raised when the server is not in a state in which it can do what is asked, and will not be before something else is done.

    Args:
        problem: the state of the server, and what must be done first, as a text for people.
        reason: a stable word in upper case, such as ``ASLEEP``, which clients receive.
    """

    reason = "FAILED_PRECONDITION"

    def __init__(self, problem: str, reason: str) -> None:
        super().__init__(problem, reason)
        self.problem = problem
        self.reason = reason

    def __str__(self) -> str:
        return self.problem


class QueueFull(CoreError):
    """Exception raised when so many tokens wait in the server's queue that an RPC's rollouts do not fit in; a later try may succeed.

    Args:
        queued_tokens: the number of tokens that wait.
        max_queue_tokens: the largest number of tokens that may wait, as in the settings.
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
    """Exception raised when the server works on too many RPCs, or on too many bytes of requests, at once; a later try may succeed.

    Args:
        value: the number of RPCs, or of bytes of their requests, that the server would be working on if it accepted this RPC.
        unit: the unit of ``value``, such as ``calls``.
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
    """Exception raised when no worker process can take or finish the work now; a later try may succeed.

    Args:
        problem: the reason why no worker process can do the work, as a text for people.
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
    """Exception raised when a worker process died unintentionally (it crashed, its device failed, or it was killed because it was stuck),
    so that the work that it had may be the cause.

    Args:
        reason_lost: one word for how the worker process died: ``silent``, ``overdue``, ``device``, ``crash`` or ``memory``.
        problem: the fault of the worker process, as a text for people.
        retry_seconds: seconds after which the worker may be running again.
        doing: the step that the worker computed, such as ``probe loop@1``; empty if the step is not known.
        order: the number of the batch, or of the texts of one request, that took too long or was the worker's only work; 0 = any of the
            worker's work may be the cause.
    """

    def __init__(self, reason_lost: str, problem: str, retry_seconds: float, doing: str = "", order: int = 0) -> None:
        super().__init__(problem, retry_seconds)
        self.args = (reason_lost, problem, retry_seconds, doing, order)
        self.reason_lost = reason_lost
        self.doing = doing
        self.order = order

    def __str__(self) -> str:
        return f"the worker was lost and is being restarted: {self.problem}"


class ReadingIncomplete(CoreError):
    """Exception raised when the files of an adapter or checkpoint are incomplete or change while they are read, as a trainer writes them
    still; a later try may succeed.

    Args:
        problem: which file is incomplete and how.
        retry_seconds: seconds after which the caller should try again.
    """

    reason = "READING_INCOMPLETE"

    def __init__(self, problem: str, retry_seconds: float = 1.0) -> None:
        super().__init__(problem, retry_seconds)
        self.problem = problem
        self.retry_seconds = retry_seconds

    def __str__(self) -> str:
        return self.problem


class WorkerLostTwice(CoreError):
    """Exception raised when two worker processes in turn died while working on the same rollout or text, the second on nothing else.

    That rollout or text is then refused instead of being tried a third time.

    Args:
        field: path in the request message of the rollout or text, such as ``groups[2].completions[0]``.
        doing: the step at which the worker died, such as ``probe loop@1``; empty if the step is not known.
        problem: the fault of the worker process, as a text for people.
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
    """Exception raised when the device has too little memory to compute ``tokens`` tokens at a time.

    A client receives this error only if a single rollout does not fit; larger batches are split by the server.
    """

    reason = "OUT_OF_MEMORY"

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.tokens = tokens

    def __str__(self) -> str:
        return f"a rollout of {self.tokens} tokens, with its prompt and follow-ups, does not fit into the memory of the server's device"


class DeadlineExpired(CoreError):
    """Exception raised when the deadline of the caller's RPC passed before its work was done."""

    reason = "DEADLINE_EXPIRED"


class InternalFault(CoreError):
    """Exception raised when the server failed because of a bug.

    ``incident`` is a number, in hexadecimal digits, under which the server's log has the details. Clients receive only this number.
    """

    reason = "INTERNAL"

    def __init__(self, incident: str) -> None:
        super().__init__(incident)
        self.incident = incident

    @classmethod
    def new(cls) -> InternalFault:
        """Returns an ``InternalFault`` with a new random incident number, under which the caller must log the details of the failure."""
        return cls(secrets.token_hex(6))

    def __str__(self) -> str:
        return f"internal error; the server's log has it as incident {self.incident}"


class StartupError(CoreError):
    """Exception raised when the server cannot start as configured. The message is for the operator and may name paths."""

    reason = "STARTUP"


class ModelRefused(StartupError):
    """Exception raised when the language model cannot be loaded, or when the server would not compute it correctly."""

    reason = "MODEL_REFUSED"


class ProbeRefused(StartupError):
    """Exception raised when a probe file is refused, because its content contradicts its manifest or it was made for another model.

    Args:
        file: the name of the file, as the operator gave it.
        field: the part that was checked: a field of the manifest such as ``model.fingerprint``, or ``file``, ``graph`` (the ONNX graph) or
            ``golden`` (the scores of the file's examples).
        found: the value that was found.
        expected: the value that was expected.
        needs_layers: number of blocks that the probe needs, if the file is refused only because fewer are loaded; otherwise 0.
    """

    reason = "PROBE_REFUSED"

    def __init__(self, file: str, field: str, found: str, expected: str, needs_layers: int = 0) -> None:
        super().__init__(file, field, found, expected, needs_layers)
        self.needs_layers = needs_layers
        self.file = file
        self.field = field
        self.found = found
        self.expected = expected

    def __str__(self) -> str:
        return f"{self.file}: {self.field}: found {self.found}, expected {self.expected}"
