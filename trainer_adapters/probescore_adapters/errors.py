"""Defines the exceptions that the adapters raise in addition to the client's exceptions."""

from __future__ import annotations


class SignalError(ValueError):
    """Exception raised when the fields of a ``ProbeSignal`` contradict each other, or do not fit the probes that the server has loaded.

    Attributes:
        field: name of the faulty field of ``ProbeSignal``.
        signal: name of the signal (rule from probe scores to rewards), if it is known.
    """

    def __init__(self, field: str, problem: str, signal: str = "") -> None:
        super().__init__(field, problem, signal)
        self.field = field
        self.problem = problem
        self.signal = signal

    def __str__(self) -> str:
        return f"signal {self.signal!r}: {self.field}: {self.problem}" if self.signal else f"{self.field}: {self.problem}"


class Unscorable(ValueError):
    """Exception raised when a rollout cannot be scored and the policy's ``on_unscorable`` is ``"raise"``."""


class ProbeReplaced(SignalError):
    """Exception raised when the server no longer has the version of a probe that a scorer is pinned to, or has other bytes under its name.

    The probe's graph, calibration or version differs, so that scores before and after the replacement are not comparable.
    """
