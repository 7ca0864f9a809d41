"""Defines what a call can raise.

    ProbescoreError
    ├── InvalidRequestError       the request breaks the contract or a limit; ``field`` says where (also a ``ValueError``)
    ├── MismatchError             the server runs another model or tokenizer than the one expected
    ├── MessageTooLargeError      a request or an answer is above the limit of bytes; send fewer rollouts a call
    ├── OutOfMemoryError          one rollout alone needs more memory than the server's device has; send shorter ones
    ├── AuthenticationError       the server does not know who calls, or does not allow it
    ├── DeadlineExceededError     the call's ``timeout`` passed (also a ``TimeoutError``)
    ├── TransientError            a later try may succeed
    │   ├── OverloadedError       too many tokens wait in the server already
    │   └── UnavailableError      no connection, or a server that is starting, draining or has lost its worker
    └── ServerError               the server failed, does not offer what was asked, or answered what the contract does not allow

The client tries again by itself after a ``TransientError``, for as long as its ``restart_budget`` and the call's deadline allow.
All of these can be pickled.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FieldViolation:
    """Describes one thing that is wrong with a request: ``field`` is its path, such as ``groups[2].completions[0].mask``, ``problem`` says
    what.
    """

    field: str
    problem: str


class ProbescoreError(Exception):
    """Is the root of all errors that a client's call raises.

    Attributes:
        message: for people.
        code: name of the gRPC status, such as ``"UNAVAILABLE"``.
        reason: stable word for programs, such as ``"QUEUE_FULL"``; empty if the server gave none.
        violations: the fields at fault.
        retry_seconds: how long the server asks to wait before the next try, if it does.
    """

    def __init__(
        self,
        message: str,
        code: str = "UNKNOWN",
        reason: str = "",
        violations: tuple[FieldViolation, ...] = (),
        retry_seconds: float | None = None,
    ) -> None:
        super().__init__(message, code, reason, violations, retry_seconds)
        self.message = message
        self.code = code
        self.reason = reason
        self.violations = violations
        self.retry_seconds = retry_seconds

    @property
    def field(self) -> str:
        """Returns the path of the first field at fault; empty if none was named."""
        return self.violations[0].field if self.violations else ""

    def __str__(self) -> str:
        return self.message


class InvalidRequestError(ProbescoreError, ValueError):
    """Says that a request breaks the contract or a limit, so that no retry can save it; ``violations`` names the fields at fault."""


class MismatchError(ProbescoreError):
    """Says that the server runs another model or tokenizer than the one the request expects."""


class MessageTooLargeError(ProbescoreError):
    """Says that a request or an answer is above the limit of bytes. Fewer rollouts a call, or ``score_stream``, help."""


class OutOfMemoryError(ProbescoreError):
    """Says that one rollout alone needs more memory than the server's device has. No retry can save it; the message names its tokens."""


class AuthenticationError(ProbescoreError):
    """Says that the server does not know who calls, or does not allow it."""


class DeadlineExceededError(ProbescoreError, TimeoutError):
    """Says that the call's ``timeout`` passed before the answer came."""


class TransientError(ProbescoreError):
    """Says that a call failed for a reason that may pass, so that a later try may succeed."""


class OverloadedError(TransientError):
    """Says that the server has too much to do already: a later try may succeed."""


class UnavailableError(TransientError):
    """Says that there is no connection, or that the server is starting, draining or has lost its worker: a later try may succeed."""


class ServerError(ProbescoreError):
    """Says that the server failed, does not offer what was asked, or gave an answer that breaks the contract."""
