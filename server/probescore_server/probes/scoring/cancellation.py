"""Tracks which rollouts of a batch a client still waits for; this is asked between the steps of the work and while a graph runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import TracebackType

import onnxruntime as ort

POLL_SECONDS = 0.02


class ComputationCancelled(Exception):
    """Reports that a computation was given up because no client waits for its result any more."""


class WantedRollouts:
    """Tells which rollouts of a batch a client still waits for.

    Args:
        is_cancelled: returns whether the rollout of an index was cancelled; it is not asked again once it returned true.

    Attributes:
        cancelled: indices of the rollouts that were found cancelled; results that only they need may be missing.
    """

    def __init__(self, is_cancelled: Callable[[int], bool]) -> None:
        self.cancelled: set[int] = set()
        self._is_cancelled = is_cancelled

    def any(self, rollouts: Collection[int]) -> bool:
        """Returns whether a client still waits for one of these rollouts, given by index in the batch."""
        self.cancelled.update(index for index in rollouts if index not in self.cancelled and self._is_cancelled(index))
        return not self.cancelled.issuperset(rollouts)

    def check(self, rollout: int) -> None:
        """Raises ``ComputationCancelled`` if no client waits for this rollout, given by index in the batch, any more."""
        if not self.any((rollout,)):
            raise ComputationCancelled


class GraphCanceller:
    """Ends the running graph once no client waits for its scores: a context manager with a thread that checks regularly.

    onnxruntime checks for the end between two operators, also within loops: a single operator is never interrupted.
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
        """Yields run options for one run of a graph whose scores only these rollouts need, given by index in the batch.

        Raises:
            ComputationCancelled: no client waited for these rollouts any more, before the graph ran or while it did.
        """
        if not self._wanted.any(rollouts):
            raise ComputationCancelled
        options = ort.RunOptions()
        options.log_severity_level = 4  # a requested end is no error
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
