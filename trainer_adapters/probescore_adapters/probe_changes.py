"""Describes in words how the server's probes differ from those that a running scorer started with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from probescore import InvalidRequestError
from probescore_adapters.errors import ProbeReplaced
from probescore_adapters.signal_values import ServerFacts
from probescore_adapters.signals import BoundSignal

_REMEDY = "start the run anew, serve what it began with, or let it follow: Policy(on_replaced='follow')"


def describe_replacement(signals: Sequence[BoundSignal], now: ServerFacts, error: ProbeReplaced | InvalidRequestError) -> ProbeReplaced:
    """Returns the exception that names the probe that has been replaced since the run began, and the differences.

    Args:
        signals: the signals, bound to the probes with which the run began.
        now: the server's current description of its model and probes.
        error: the error by which the replacement was noticed.
    """
    loaded = {probe.key: probe for probe in now.probes}
    for bound in signals:
        found = loaded.get(bound.probe)
        if found is None:
            problem = f"{bound.probe} is no longer loaded; the server has {', '.join(loaded) or 'none'}: {_REMEDY}"
            return ProbeReplaced("probe", problem, bound.signal.name)
        changes = [
            f"its {part} was {before} and is {after}"
            for part, before, after in zip(("graph", "manifest"), bound.digests, (found.graph_sha256, found.manifest_sha256))  # noqa: B905
            if before != after
        ]
        if changes:
            rebound = BoundSignal.bind(replace(bound.signal, probe=bound.probe), now.probes)
            if rebound.threshold != bound.threshold and not (math.isnan(rebound.threshold) and math.isnan(bound.threshold)):
                changes.append(f"its threshold was {bound.threshold:g} and is {rebound.threshold:g}")
            problem = f"{bound.probe} was replaced while the run goes on: {'; '.join(changes)}: {_REMEDY}"
            return ProbeReplaced("probe", problem, bound.signal.name)
    return error if isinstance(error, ProbeReplaced) else ProbeReplaced("probe", str(error))
