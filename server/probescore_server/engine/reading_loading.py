"""Loads readings beside the frozen model while it scores: from the files to the moment at which a name means the new version."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from probescore.types import LoadedReading, Reading
from probescore_server.engine.reading_set import ReadingSet
from probescore_server.engine.served_probes import ServedProbes
from probescore_server.errors import ReadingRefused
from probescore_server.readings.version import FrozenModel, ReadingVersion, load_version, read_weights
from probescore_server.validation.options import check_reading_name


@dataclass(frozen=True, eq=False)
class ReadingLoader:
    """Loader of readings of one engine.

    Attributes:
        frozen: the model that the readings are made from; ``None`` = none can be made.
        readings: the readings that are loaded.
        served: function that returns the probes that are served now.
        golden_drift: function that returns how far a version moves the scores of each such probe's golden rollouts.
    """

    frozen: FrozenModel | None
    readings: ReadingSet
    served: Callable[[], ServedProbes]
    golden_drift: Callable[[ReadingVersion, ServedProbes], Mapping[str, float]]

    def load(self, name: str, path: str | Path, *, step: int | None, expected_id: str | None, in_place: bool) -> LoadedReading:
        """Reads files, makes a version of them, checks it, and lets a name mean it, with the arguments and errors of
        ``Engine.load_reading``.
        """
        check_reading_name(name, step)
        if self.frozen is None:
            problem = "beside this model no other reading is computed: it is spread over several devices, or its own code cannot be copied"
            raise ReadingRefused("path", problem)
        before: Reading | None = None  # what was replaced in place
        with ExitStack() as closed:
            if in_place:
                closed.enter_context(self.readings.closed(name))
                before = self.readings.drop(name, self.served().taps)
            read = read_weights(path, self.frozen)
            if expected_id is not None and read.id != expected_id:
                raise ReadingRefused("expected_id", f"the files are {read.id}, and {expected_id[:100]} is expected: they have changed")
            known = closed.enter_context(self.readings.kept(read.id))
            version = load_version(read, self.frozen) if known is None else known
            probes = self.served()
            drift = self.golden_drift(version, probes)
            size = sum(tensor.numel() * tensor.element_size() for tensor in version.tensors)
            replaced = self.readings.put(name, step, version, probes.taps)
            reading = version.described(name, step, probes.taps)
        return LoadedReading(reading, before if in_place else replaced, drift, size)
