"""Defines the exceptions that the adapters raise in addition to the client's exceptions."""

from __future__ import annotations


class SignalError(ValueError):
    """Exception raised when the fields of a ``ProbeSignal`` (rule from probe scores to rewards) contradict each other, or do not fit the
    probes that the server has loaded.

    Attributes:
        field: name of the faulty field of ``ProbeSignal``.
        signal: name of the signal, if it is known.
    """

    def __init__(self, field: str, problem: str, signal: str = "") -> None:
        super().__init__(field, problem, signal)
        self.field = field
        self.problem = problem
        self.signal = signal

    def __str__(self) -> str:
        return f"signal {self.signal!r}: {self.field}: {self.problem}" if self.signal else f"{self.field}: {self.problem}"


class Unscorable(ValueError):
    """Exception raised when probes cannot score a rollout and the scorer's setting ``on_unscorable`` is ``"raise"``."""


class ProbeReplaced(SignalError):
    """Exception raised when the server no longer has the version of a probe that a scorer is pinned to (has read since its first use), or
    has other bytes under the probe's name and version.

    The probe's graph, calibration or version differs, so that scores before and after the probe's replacement are not comparable.
    """


class ReadingGone(SignalError):
    """Exception raised when a signal (a rule from probe scores to rewards) changes rewards by a probe's scores on a reading, such as the
    policy's own weights, and the server has no such reading, or has not one version of it.

    The scores on the frozen model never take the place of the scores on another reading.
    """
