"""Defines the exceptions that a method of a client can raise.

    ProbescoreError
    ├── InvalidRequestError       the request violates the contract or a limit; ``field`` names the place (also a ``ValueError``)
    ├── MismatchError             the server has another model, tokenizer or version of a reading than the one expected
    ├── MessageTooLargeError      a request or a response has too many bytes; send fewer rollouts per RPC
    ├── OutOfMemoryError          one rollout alone needs more memory than the server's device has; send shorter ones
    ├── AuthenticationError       the server cannot identify the caller, or does not permit the RPC
    ├── DeadlineExceededError     the RPC's ``timeout`` passed (also a ``TimeoutError``)
    ├── TransientError            a later try may succeed
    │   ├── OverloadedError       too many tokens wait in the server already
    │   └── UnavailableError      there is no connection, or the server is starting or shutting down, or its worker process crashed
    └── ServerError               the server failed, does not offer the method or feature, or sent an invalid response

The client retries an RPC by itself after a ``TransientError``, for as long as the client's ``restart_budget`` and the RPC's deadline allow.
All these exceptions can be pickled.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FieldViolation:
    """Value object with one fault in a request: ``field`` is the path of the faulty field, such as ``groups[2].completions[0].mask``, and
    ``problem`` describes the fault.
    """

    field: str
    problem: str


class ProbescoreError(Exception):
    """Base class of all exceptions that a client raises when an RPC fails.

    Attributes:
        message: description of the failure, for people.
        code: name of the gRPC status code, such as ``"UNAVAILABLE"``.
        reason: stable identifier of the failure for programs, such as ``"QUEUE_FULL"``; empty if the server sent none.
        violations: the faulty fields of the request.
        retry_seconds: seconds that the server asks the client to wait before the next attempt; ``None`` if the server does not ask.
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
        """Returns the path of the first faulty field that an error names in a request, such as ``groups[2].prompt``; empty if the error
        names no field.
        """
        return self.violations[0].field if self.violations else ""

    def __str__(self) -> str:
        return self.message


class InvalidRequestError(ProbescoreError, ValueError):
    """Exception raised when a request violates the protobuf contract or a limit, so that a retry would fail too; ``violations`` names the
    faulty fields.
    """


class MismatchError(ProbescoreError):
    """Exception raised when the server runs another model or tokenizer than the one that the request expects, or has another version of a
    reading (whose activations the probes read), or when several servers have different versions.
    """


class MessageTooLargeError(ProbescoreError):
    """Exception raised when a request or a response has more bytes than allowed. Fewer rollouts per RPC, or ``score_stream``, help."""


class OutOfMemoryError(ProbescoreError):
    """Exception raised when one rollout alone needs more memory than the server's device (such as ``cuda:0``) has. A retry would fail too;
    the message states the rollout's number of tokens.
    """


class AuthenticationError(ProbescoreError):
    """Exception raised when the server cannot identify the caller, or does not permit the caller to make the RPC."""


class DeadlineExceededError(ProbescoreError, TimeoutError):
    """Exception raised when the RPC's ``timeout`` passed before the response arrived."""


class TransientError(ProbescoreError):
    """Exception raised when an RPC failed for a reason that may be temporary, so that a later attempt may succeed."""


class OverloadedError(TransientError):
    """Exception raised when too many tokens already wait in the server; a later attempt may succeed."""


class UnavailableError(TransientError):
    """Exception raised when there is no connection, or when the server is starting, is shutting down, or has lost a worker process to a
    crash; a later attempt may succeed.
    """


class ServerError(ProbescoreError):
    """Exception raised when the server failed, does not offer the requested method or feature, is not in a state to do what is asked, or
    sent a response that violates the protobuf contract.
    """
