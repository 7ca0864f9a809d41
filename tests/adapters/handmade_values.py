"""Signal values made by hand: what the core computes with, without a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from probescore import Calibration, OutputPer, ProbeInfo, Reduction, ScoreUnit
from probescore_adapters.outcome import Outcome, combine
from probescore_adapters.signal_values import BatchSignals, MaskedTokens, SignalValues
from probescore_adapters.signals import BoundSignal, Mode, ProbeSignal


def probe_info(
    name: str = "cheating",
    *,
    version: str = "1",
    unit: ScoreUnit = ScoreUnit.LOGIT,
    thresholds: Sequence[float] = (),
    labels: tuple[str, ...] = ("",),
    output_per: OutputPer = OutputPer.TOKEN,
) -> ProbeInfo:
    mean = Reduction.parse("mean")
    return ProbeInfo(
        name=name,
        version=version,
        description="",
        graph_sha256="",
        manifest_sha256="",
        taps=(),
        unit=unit,
        output_per=output_per,
        labels=labels,
        default_reduction=mean if output_per is OutputPer.TOKEN else None,
        calibrations=tuple(Calibration(threshold, 0.05, 0.0, 0.1, 100, "honest", mean) for threshold in thresholds),
        accepted_mismatches=(),
        manifest_json="{}",
    )


def signal_values(
    signal: ProbeSignal,
    values: Sequence[float] | Sequence[Sequence[float]],
    unit: ScoreUnit = ScoreUnit.LOGIT,
    reports: Sequence[float] | None = None,
) -> SignalValues:
    """Of the signal's probe: a number for each rollout; for a dense one the numbers of its tokens, none if it is unscorable."""
    bound = BoundSignal.bind(signal, (probe_info(signal.probe, unit=unit),))
    if signal.mode is not Mode.DENSE:
        return SignalValues(bound, np.array(values, np.float64), reports=None if reports is None else np.array(reports, np.float64))
    tokens = tuple(MaskedTokens(np.array(one, np.float64), np.ones(len(one), np.bool_)) for one in values)  # type: ignore[arg-type]
    return SignalValues(bound, np.array([one.mean for one in tokens]), tokens)


def combined(*signals: SignalValues, groups: Sequence[Any] | None = None, tasks: Sequence[float] | None = None, **options: Any) -> Outcome:
    count = len(signals[0].values)
    lengths: list[int | None] = [None] * count
    for one in signals:
        if one.tokens is not None:
            lengths = [max(len(tokens.scores), 1) for tokens in one.tokens]
    return combine(
        BatchSignals(tuple(signals), inexact_ids=np.zeros(count, np.bool_)),
        groups=list(range(count)) if groups is None else groups,
        lengths=options.pop("lengths", lengths),
        task_rewards=None if tasks is None else np.array(tasks, np.float64),
        **options,
    )
