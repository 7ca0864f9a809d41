"""Decides which version of a probe a running scorer reads: the version that the scorer began with (is pinned to), or the version that the
probe's name means at the server now.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from probescore import ProbeInfo, ProbescoreError
from probescore_adapters.errors import ProbeReplaced
from probescore_adapters.signals import BoundSignal, PinnedProbe, ProbeSignal

_REMEDY = "start the run anew, serve what it began with, or let it follow: ProbeScorer(follow=True)"


Pins = Mapping[str, PinnedProbe]
"""The version of each probe that a scorer reads, keyed by the name that its signals give the probe."""


def pins_of(signals: Sequence[ProbeSignal], probes: Sequence[ProbeInfo]) -> dict[str, PinnedProbe]:
    """Returns the version of each probe that some signals (rules from probe scores to rewards) name: for a name without a version, the
    highest version that the server has now.

    Raises:
        SignalError: a probe is not loaded, or a signal does not fit its probe.
    """
    return {signal.probe: BoundSignal.bind(signal, tuple(probes)).pin for signal in signals}


def bound_to(signals: Sequence[ProbeSignal], pins: Pins, probes: Sequence[ProbeInfo]) -> list[BoundSignal]:
    """Returns signals (rules from probe scores to rewards), each with the version of its probe that a running scorer has read so far, as
    the server describes it now.

    Raises:
        ProbeReplaced: the server no longer has such a version, or has another probe under the same name and version.
        SignalError: a signal does not fit its probe.
    """
    loaded = {probe.key: probe for probe in probes}
    bound = []
    for signal in signals:
        pin = pins[signal.probe]
        probe = loaded.get(pin.probe)
        if probe is None:
            problem = f"{pin.probe} is no longer loaded; the server has {_keys(probes)}: {_REMEDY}"
            raise ProbeReplaced("probe", problem, signal.name)
        if changes := changes_between(pin, PinnedProbe.of(probe)):
            raise ProbeReplaced("probe", f"{pin.probe} was replaced while the run goes on: {'; '.join(changes)}: {_REMEDY}", signal.name)
        bound.append(BoundSignal.to(signal, probe))
    return bound


def replacement(bound: Sequence[BoundSignal], probes: Sequence[ProbeInfo], error: ProbescoreError | ProbeReplaced) -> ProbeReplaced:
    """Returns the exception which says which of the probes that a running scorer reads was replaced or removed on the server, and how the
    new one differs.

    Args:
        bound: the signals (rules from probe scores to rewards), with the probes as they were before.
        probes: the probes that the server has now.
        error: the error by which the replacement was noticed.
    """
    loaded = {probe.key: probe for probe in probes}
    for before in bound:
        name, probe = before.signal.name, loaded.get(before.probe)
        if probe is None:
            return ProbeReplaced("probe", f"{before.probe} is no longer loaded; the server has {_keys(probes)}: {_REMEDY}", name)
        if changes := changes_between(before.pin, PinnedProbe.of(probe)):
            changes += threshold_change(before, BoundSignal.to(before.signal, probe))
            return ProbeReplaced("probe", f"{before.probe} was replaced while the run goes on: {'; '.join(changes)}: {_REMEDY}", name)
    return error if isinstance(error, ProbeReplaced) else ProbeReplaced("probe", str(error))


def changes_between(before: PinnedProbe, after: PinnedProbe) -> list[str]:
    """Returns in words how the digests of a probe's graph and manifest (description in its file) differ from those of the probe that the
    server had before; empty if they are equal.
    """
    pairs = (("graph", before.graph_sha256, after.graph_sha256), ("manifest", before.manifest_sha256, after.manifest_sha256))
    return [f"its {part} was {was} and is {now}" for part, was, now in pairs if was != now]


def threshold_change(before: BoundSignal, after: BoundSignal) -> list[str]:
    """Returns in words how the threshold of a signal (rule from probe scores to rewards) differs from its threshold before the probe was
    replaced; empty if they are equal.
    """
    if after.threshold == before.threshold or (math.isnan(after.threshold) and math.isnan(before.threshold)):
        return []
    return [f"its threshold was {before.threshold:g} and is {after.threshold:g}"]


def state_of(pins: Pins) -> dict[str, Any]:
    """Returns the versions of probes that a scorer reads, with their digests, as plain values for JSON or a checkpoint."""
    return {"probes": {name: asdict(pin) for name, pin in pins.items()}}


def pins_from(state: Mapping[str, Any]) -> dict[str, PinnedProbe]:
    """Returns the versions of probes that a scorer reads, with their digests, from the plain values that ``state_of`` made of them.

    Raises:
        ValueError: ``state`` has another form.
    """
    try:
        pins = {str(name): PinnedProbe(**entry) for name, entry in state["probes"].items()}
        if all(isinstance(text, str) for pin in pins.values() for text in asdict(pin).values()):
            return pins
    except (KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"state: expected what ProbeScorer.state_dict() gave, got {state!r:.200}")


def _keys(probes: Sequence[ProbeInfo]) -> str:
    return ", ".join(probe.key for probe in probes) or "none"
