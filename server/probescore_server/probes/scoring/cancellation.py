"""Tracks for which rollouts of a batch a client still waits, so that work for cancelled requests can be given up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import TracebackType

import onnxruntime as ort

POLL_SECONDS = 0.02


class ComputationCancelled(Exception):
    """Exception raised when the computation of scores is given up because no client waits for them any more."""


class WantedRollouts:
    """Record of the rollouts of a batch for which a client still waits; the code that scores the batch asks it between its steps and while
    a probe's graph runs.

    Args:
        is_cancelled: function that returns whether the rollout with a given index was cancelled; it is not called again for a rollout once
            it has returned true.

    Attributes:
        cancelled: indices of the rollouts that were found cancelled; results that only these rollouts need may be missing.
    """

    def __init__(self, is_cancelled: Callable[[int], bool]) -> None:
        self.cancelled: set[int] = set()
        self._is_cancelled = is_cancelled

    def any(self, rollouts: Collection[int]) -> bool:
        """Returns whether a client still waits for at least one of the given rollouts, each given by its index in the batch."""
        self.cancelled.update(index for index in rollouts if index not in self.cancelled and self._is_cancelled(index))
        return not self.cancelled.issuperset(rollouts)

    def check(self, rollout: int) -> None:
        """Raises ``ComputationCancelled`` if no client waits any more for a rollout, which is given by its index in the batch."""
        if not self.any((rollout,)):
            raise ComputationCancelled


class GraphCanceller:
    """Context manager with a thread that ends the running ONNX graph of a probe once no client waits for its scores.

    onnxruntime ends a run only between two operators, also within loops; a single operator is never interrupted.
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
        """Yields onnxruntime run options for one run of a probe's graph whose scores only the given rollouts, each given by its index in
        the batch, need.

        Raises:
            ComputationCancelled: no client waited for these rollouts any more, before the graph ran or while it ran.
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
