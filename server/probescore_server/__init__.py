"""Serves a frozen language model and its probes (small classifiers over the model's activations) over gRPC, to score reinforcement-learning
rollouts.

``from probescore_server import Engine`` scores rollouts in the same way inside a program's own process, without a server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probescore_server.engine.engine import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> type[Engine]:
    # The engine is not imported with the package, since the server's front process does without torch.
    if name == "Engine":
        from probescore_server.engine.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
