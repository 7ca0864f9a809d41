"""What the adapters raise beside the client's errors."""

from __future__ import annotations


class SignalError(ValueError):
    """A ``ProbeSignal`` that cannot mean anything, or not with the probes that are loaded.

    Attributes:
        field: of ``ProbeSignal``.
        signal: its name, where it is known.
    """

    def __init__(self, field: str, problem: str, signal: str = "") -> None:
        super().__init__(field, problem, signal)
        self.field = field
        self.problem = problem
        self.signal = signal

    def __str__(self) -> str:
        return f"signal {self.signal!r}: {self.field}: {self.problem}" if self.signal else f"{self.field}: {self.problem}"


class Unscorable(ValueError):
    """A rollout cannot be scored, and ``on_unscorable`` is ``"raise"``."""


class ProbeReplaced(SignalError):
    """A probe is no longer the one that a running scorer started with, and ``on_replaced`` is ``"raise"``.

    Its graph, its calibration or its version is another, so that numbers before and after would mean different things.
    """
