"""Which rollouts of a batch somebody still waits for: asked between the pieces of its work, and while a graph runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import TracebackType

import onnxruntime as ort

POLL_SECONDS = 0.02


class ComputationCancelled(Exception):
    """Nobody waits any more for what was being computed."""


class WantedRollouts:
    """The rollouts of a batch.

    Args:
        is_cancelled: asked for a rollout's index; once it said yes it is not asked again.

    Attributes:
        cancelled: those of which it said so: anything that only they need may be missing.
    """

    def __init__(self, is_cancelled: Callable[[int], bool]) -> None:
        self.cancelled: set[int] = set()
        self._is_cancelled = is_cancelled

    def any(self, rollouts: Collection[int]) -> bool:
        """Whether somebody waits for one of these."""
        self.cancelled.update(index for index in rollouts if index not in self.cancelled and self._is_cancelled(index))
        return not self.cancelled.issuperset(rollouts)

    def check(self, rollout: int) -> None:
        """Raises ``ComputationCancelled`` if nobody waits for this one."""
        if not self.any((rollout,)):
            raise ComputationCancelled


class GraphCanceller:
    """Ends the graph that runs once nobody waits for it: a context manager, within which a thread looks.

    onnxruntime looks between two operators, also within loops: a single one is never interrupted.
    """

    def __init__(self, wanted: WantedRollouts) -> None:
        self._wanted = wanted
        self._running: tuple[ort.RunOptions, Collection[int]] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> GraphCanceller:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    @contextmanager
    def over(self, rollouts: Collection[int]) -> Iterator[ort.RunOptions]:
        """Options for one run of a graph, which only these rollouts need.

        Raises:
            ComputationCancelled: nobody waits for them, before it ran or while it did.
        """
        if not self._wanted.any(rollouts):
            raise ComputationCancelled
        options = ort.RunOptions()
        options.log_severity_level = 4  # an end that is asked for is no error
        self._running = options, rollouts
        try:
            yield options
        except Exception:
            if options.terminate:
                raise ComputationCancelled from None
            raise
        finally:
            self._running = None

    def _look(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            running = self._running
            if running is not None and not self._wanted.any(running[1]):
                running[0].terminate = True
