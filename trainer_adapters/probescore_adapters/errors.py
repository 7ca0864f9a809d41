"""Defines what the adapters raise beside the client's errors."""

from __future__ import annotations


class SignalError(ValueError):
    """Says that a ``ProbeSignal`` cannot mean anything, or does not go with the probes that are loaded.

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
    """Says that a rollout cannot be scored; it is raised where the policy's ``on_unscorable`` is ``"raise"``."""


class ProbeReplaced(SignalError):
    """Says that a probe is no longer the one that a running scorer started with; it is raised where the policy's ``on_replaced`` is
    ``"raise"``.

    Its graph, its calibration or its version is another, so that numbers before and after would mean different things.
    """
