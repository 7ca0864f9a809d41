"""Decides what becomes of a training run whose policy could not be loaded as a reading (weights that the probes read)."""

from __future__ import annotations

import logging
import os

from probescore import LoadedReading, ProbescoreError
from probescore_adapters.scorer import ProbeScorer
from probescore_adapters.signals import Mode

# the standard library's: a trainer's process has its own way of showing logs
logger = logging.getLogger("probescore_adapters")


class PolicyReading:
    """The reading (weights that the probes read) of a policy that is trained, as one process of the run knows it.

    If loading fails, ``on_failure`` of the scorer's policy decides: with a number the run goes on with a warning, and the reading stays
    what it was; else the error ends the run. Once a load has succeeded, a run whose signals (rules from probe scores to rewards) on the
    reading are all monitors goes on in any case, since these change no reward.

    Args:
        scorer: the scorer whose signals read the policy; its servers load the weights.
        name: name of the reading.

    Raises:
        ValueError: no signal of the scorer has the reading.
    """

    def __init__(self, scorer: ProbeScorer, name: str) -> None:
        readers = [signal for signal in scorer.signals if signal.reading == name]
        if not readers:
            known = ", ".join(dict.fromkeys(repr(signal.reading) for signal in scorer.signals))
            raise ValueError(f"name: no signal of the scorer reads {name!r}, they read {known}: give a signal reading={name!r}")
        self.name = name
        self._scorer = scorer
        self._goes_on_at_first = not isinstance(scorer.policy.on_failure, str)
        self._goes_on_later = self._goes_on_at_first or all(signal.mode is Mode.MONITOR for signal in readers)
        self._has_loaded = False

    def load(self, path: str | os.PathLike[str], step: int) -> LoadedReading:
        """Has the servers load the policy's weights of a step from a directory.

        Raises:
            ProbescoreError: loading failed; ``settle`` says what becomes of the run.
        """
        loaded = self._scorer.load_reading(self.name, path, step)
        drifts = ", ".join(f"{probe} {drift:.3g}" for probe, drift in loaded.golden_drift.items()) or "of no probe"
        logger.info("the reading %r is the policy of step %d, %s; golden drift: %s", self.name, step, loaded.reading.id, drifts)
        return loaded

    def settle(self, error: Exception | None) -> None:
        """Raises the error by which saving or loading the policy has failed, or logs a warning if the run goes on; ``None`` = it has
        succeeded. Every process of the run calls this, so that all go on or none.
        """
        if error is None:
            self._has_loaded = True
            return
        goes_on = self._goes_on_later if self._has_loaded else self._goes_on_at_first
        if not goes_on or not isinstance(error, (ProbescoreError, OSError)):
            raise error
        logger.warning("the reading %r stays what it was, since the policy could not be saved or loaded: %s", self.name, error)
