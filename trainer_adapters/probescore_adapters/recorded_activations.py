"""Reads pooled activations of labelled rollouts and of anchors from the server, for the record of the training run, from which the audit
finds out whether a fresh probe would still see the behaviour.

Like scoring, reading is a generator: it yields each request to the server, and is sent the answer.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from probescore import AsyncProbeClient, CompletionActivations, ProbeClient, ReadOptions, RolloutGroup, ServerInfo
from probescore.errors import DeadlineExceededError
from probescore.types import FROZEN
from probescore_adapters.record_options import PooledActivations
from probescore_adapters.rollouts import GroupedRollouts, Rollout
from probescore_adapters.signals import MaskKind
from probescore_audit.record import ActivationRow

_LONGEST_WAIT = 64  # steps
_LEAST_SECONDS = 0.001


@dataclass(frozen=True, eq=False)
class TextToRead:
    """Value object with a rollout or an anchor (a text with a known label that is scored again and again) whose activations are recorded.

    Attributes:
        step: training step.
        name: name of the rollout or the anchor.
        is_anchor: whether it is an anchor.
        rollout: prompt and completion.
        reading_ids: a dictionary, keyed by name, of the ids of the readings (whose activations the probes read) that gave its scores; empty
            text for the frozen model.
    """

    step: int
    name: str
    is_anchor: bool
    rollout: Rollout
    reading_ids: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class ActivationsRequest:
    """Request for pooled activations of rollouts on one reading; the reply is a list with those of each completion.

    Attributes:
        groups: the rollouts.
        options: the tap (place in the model) and the pooling.
        reading: name of the reading.
        model_fingerprint: fingerprint of the frozen model that the server must have.
        run_id: name of the run in the server's logs.
        seconds: seconds that the whole request may take.
    """

    groups: Sequence[RolloutGroup]
    options: PooledActivations
    reading: str
    model_fingerprint: str
    run_id: str
    seconds: float

    def answers(self, client: ProbeClient) -> list[CompletionActivations]:
        """Reads the activations.

        Raises:
            ProbescoreError: they cannot be read, or not in time.
        """
        until = time.monotonic() + self.seconds
        found = []
        for each in client.activations(self.groups, self.options.tap, timeout=self.seconds, **self._options):
            found.append(each)
            self._check_time(until)
        return found

    async def answers_async(self, client: AsyncProbeClient) -> list[CompletionActivations]:
        """Reads the activations from an event loop; the errors are those of ``answers``."""
        until = time.monotonic() + self.seconds
        found = []
        async for each in client.activations(self.groups, self.options.tap, timeout=self.seconds, **self._options):
            found.append(each)
            self._check_time(until)
        return found

    @property
    def _options(self) -> ReadOptions:
        # the record keeps bfloat16, so that no more is sent
        options: ReadOptions = {
            "pool": self.options.pool,
            "dtype": "bfloat16",
            "expected_model_fingerprint": self.model_fingerprint,
            "run_id": self.run_id,
        }
        if self.reading != FROZEN:  # which a server of any version reads
            options["reading"] = self.reading
        return options

    def _check_time(self, until: float) -> None:
        if time.monotonic() > until:
            problem = f"activations took longer than the {self.seconds:.3g} seconds that are left of record.activations.seconds"
            raise DeadlineExceededError(problem, "DEADLINE_EXCEEDED")


class ActivationReader:
    """Reader of the activations that one process of a training run records. After a failure it waits for some steps before it reads again,
    longer after each further one, so that what cannot be read costs training little.

    Args:
        options: what is read.
        run_id: name of the run in the server's logs.
    """

    def __init__(self, options: PooledActivations, run_id: str) -> None:
        self.options = options
        self._run_id = run_id
        self._failures = 0
        self._next_step = 0
        self._is_checked = False

    def check_once(self, server: ServerInfo, option: str = "record.activations") -> None:
        """Checks, the first time, that a server gives the activations; it may be started anew with other settings later.

        Args:
            server: description of the server.
            option: what the user calls the option that asks for them, for the error message.

        Raises:
            ValueError: it does not.
        """
        if self._is_checked:
            return
        self._is_checked = True
        tap = self.options.tap
        if tap not in server.activation_taps:
            given = f"it gives those at {', '.join(server.activation_taps)[:500]}" if server.activation_taps else "it gives none"
            raise ValueError(
                f"{option}: the server gives no activations at {tap!r}, {given}; start it with --allow-activations {tap}, or "
                "leave the option out"
            )

    def is_due(self, step: int) -> bool:
        """Returns whether activations are read at a training step."""
        return step >= self._next_step or step < self._next_step - _LONGEST_WAIT  # training may have gone back

    def note_failure(self, step: int) -> None:
        """Notes that activations could not be read at a training step."""
        self._next_step = step + min(2**self._failures, _LONGEST_WAIT)
        self._failures += 1

    def note_success(self) -> None:
        """Notes that activations could be read."""
        self._failures = 0

    def read(
        self, texts: Sequence[TextToRead], model_fingerprint: str, rows: list[ActivationRow]
    ) -> Generator[ActivationsRequest, list[CompletionActivations], None]:
        """Generator that reads the activations of rollouts and anchors (texts with a known label that are scored again and again) on every
        reading that has scored them: yields each request to the server, and is sent the answer. A text without activations has no row, such
        as one of which no token counts, and so has one on a reading that was replaced since it scored the text.

        Args:
            texts: the rollouts and anchors.
            model_fingerprint: fingerprint of the frozen model that has scored them.
            rows: list to which the rows for the record are added, those of each reading as soon as it was read.

        Raises:
            ProbescoreError: the activations cannot be read, or not in time.
        """
        until = time.monotonic() + self.options.seconds
        for reading in dict.fromkeys(name for text in texts for name in text.reading_ids):
            asked = [text for text in texts if reading in text.reading_ids]
            grouped = GroupedRollouts.of([text.rollout for text in asked], range(len(asked)), {MaskKind.GIVEN: ""})
            seconds = max(until - time.monotonic(), _LEAST_SECONDS)
            found = yield ActivationsRequest(grouped.groups, self.options, reading, model_fingerprint, self._run_id, seconds)
            for each in found:
                rows += self._row(asked[grouped.sent[each.group_index][each.completion_index][0]], reading, each)

    def _row(self, text: TextToRead, reading: str, found: CompletionActivations) -> Iterator[ActivationRow]:
        version = "" if found.reading is None or reading == FROZEN else found.reading.id
        pooled = found.pooled.get(self.options.tap)
        if version == text.reading_ids[reading] and pooled is not None and np.isfinite(pooled[0, 0]).all():
            yield ActivationRow.of(
                pooled[0, 0],
                step=text.step,
                reading=reading,
                rollout=None if text.is_anchor else text.name,
                anchor=text.name if text.is_anchor else None,
                tap=self.options.tap,
                pool=self.options.pool,
                reading_id=version or None,
            )
