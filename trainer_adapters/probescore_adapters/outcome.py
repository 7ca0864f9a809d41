"""Computes rewards from the scores of probes: applies every signal (rule from probe scores to rewards) and the guard rails (limits on the
effect of signals), and computes the metrics. This module does no input or output.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Union

import numpy as np
from numpy.typing import NDArray

from probescore.types import Reading
from probescore_adapters.errors import SignalError, Unscorable
from probescore_adapters.guard_rails import RAILS, GuardRails, penalty_margin, screen
from probescore_adapters.signal_values import BatchSignals, MaskedTokens, SignalValues
from probescore_adapters.signals import BoundSignal, Floats, Mode, ProbeSignal

OnUnscorable = Union[Literal["worst", "raise"], float]

PREFIX = "probescore"
_SIGNAL_KEYS = ("mean", "p10", "p50", "p90", "flagged", "screened", "reward", "penalty_margin", "outside_calibration")
_ROLLOUT_SIGNAL_KEYS = ("mean", "flagged", "reward", "outside_calibration")
_READING_KEYS = ("reading_step", "reading_missing")
_LEAST_SPREAD = 1e-4
"""Added to a group's standard deviation, as GRPO does: differences that are rounding errors must not become standard deviations."""
_BATCH_KEYS = ("seconds", "failures", "unscorable", "tokens", "inexact_ids")


@dataclass(frozen=True, eq=False)
class Outcome:
    """Result of applying all signals (rules from probe scores to rewards) to a batch of ``n`` rollouts.

    Attributes:
        rewards: ``(n,)`` float64: ``task_rewards * factors + terms``, lowered for flagged rollouts that a guard rail (limit on the effect
            of signals) has kept.
        terms: ``(n,)``, the sum of the numbers that reward and penalty signals add.
        factors: ``(n,)``, the number by which gate signals, relative ones too, multiply the task's reward, if that reward is above 0.
        removed: ``(n,)`` booleans, true = the rollout must not be trained on.
        dense: for each rollout ``(T,)``, the number to add to each token's reward; ``None`` without a dense signal.
        unscorable: ``(n,)`` booleans, true = at least one signal has no score for the rollout.
        flagged: a dictionary keyed by the signal's name, of ``(n,)`` booleans: whether the score reaches the signal's threshold.
        values: a dictionary keyed by the signal's name, of ``(n,)`` probe scores; NaN for an unscorable rollout.
        metrics: a dictionary keyed by the metric's name, always with the same keys for the same signals; NaN for a metric without data.
        outside_calibration: a dictionary keyed by the signal's name, of ``(n,)`` booleans: whether the rollout is unlike those that the
            signal's threshold was found on, so that the threshold is not known to hold for it. False where nobody knows.
        readings: a dictionary, keyed by name, of the readings (whose activations the probes read) that scored the batch, each with the id
            and the step of its one version; empty if only the frozen model was read.
        missing_readings: a dictionary, keyed by the name of a reading that the server did not have, of the reason. The ``values`` of its
            signals are NaN, never those of another reading.
        drift: a dictionary keyed by the name of each ``monitor`` signal on another reading than the frozen one, of ``(n,)`` differences:
            the signal's score minus the score of the same probe on the frozen model; NaN where one of the two is missing.
    """

    rewards: Floats
    terms: Floats
    factors: Floats
    removed: NDArray[np.bool_]
    dense: tuple[Floats, ...] | None
    unscorable: NDArray[np.bool_]
    flagged: Mapping[str, NDArray[np.bool_]]
    values: Mapping[str, Floats]
    metrics: Mapping[str, float]
    outside_calibration: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    readings: Mapping[str, Reading] = field(default_factory=dict)
    missing_readings: Mapping[str, str] = field(default_factory=dict)
    drift: Mapping[str, Floats] = field(default_factory=dict)

    @property
    def rollout_metrics(self) -> dict[str, float]:
        """Returns those metrics of a batch that are meaningful for a single rollout, for trainers that score one rollout at a time."""
        keys = [f"{PREFIX}/{name}/{key}" for name in self.values for key in (*_ROLLOUT_SIGNAL_KEYS, "drift", *_READING_KEYS)]
        keys += [f"{PREFIX}/{key}" for key in (*_BATCH_KEYS, "guard/clipped")]
        # drift and what is said of a reading: only signals on other readings than the frozen one have them
        return {key: self.metrics[key] for key in keys if key in self.metrics}


@dataclass(eq=False)
class _OutcomeSums:
    """Mutable sums to which each signal (rule from probe scores to rewards) adds its effect on a batch of ``n`` rollouts; each array is
    ``(n,)``.
    """

    terms: Floats
    factors: Floats
    flagged_by_screens: NDArray[np.bool_]
    lowered: NDArray[np.bool_]
    unscorable: NDArray[np.bool_]
    dense: list[Floats] | None = None
    flagged: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    outside_calibration: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    drift: dict[str, Floats] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def combine(
    batch: BatchSignals,
    *,
    groups: Sequence[Hashable],
    lengths: Sequence[int | None],
    task_rewards: Floats | None = None,
    rails: GuardRails | None = None,
    on_unscorable: OnUnscorable = "worst",
) -> Outcome:
    """Applies every signal (rule from probe scores to rewards) to the probes' scores of a batch, and the guard rails (limits on the effect
    of signals) to the result.

    With ``on_unscorable="worst"`` an unscorable rollout (one without a score) gets the lowest number that each signal can give, never more
    than the same rollout would get if it were scored. A screen does not remove an unscorable rollout, since removal would spare the rollout
    a bad reward; the rollout gets the lowest reward of the batch.

    Args:
        batch: scores of all signals' probes for ``n`` rollouts.
        groups: ``n`` keys, equal within a group.
        lengths: number of tokens of each completion; ``None`` where unknown.
        task_rewards: ``(n,)``, the rewards without probes; ``None`` if the trainer itself adds them.
        rails: the guard rails; ``None`` = the default ones.
        on_unscorable: ``"worst"``, ``"raise"``, or a number that replaces the sum that the signals would add to an unscorable rollout's
            reward.

    Raises:
        Unscorable: a rollout is unscorable, and ``on_unscorable`` is ``"raise"``.
        SignalError: a signal acts on task rewards, and none are given; or a signal is dense, and a completion's length is unknown.
        ValueError: ``task_rewards`` is not ``n`` finite numbers.
    """
    rails, count = rails or GuardRails(), len(groups)
    if task_rewards is not None and (task_rewards.shape != (count,) or not np.isfinite(task_rewards).all()):
        raise ValueError(f"task_rewards must be {count} finite numbers")
    sums = _OutcomeSums(np.zeros(count), np.ones(count), np.zeros(count, np.bool_), np.zeros(count, np.bool_), np.zeros(count, np.bool_))
    sums.metrics.update(empty_metrics([signal_values.bound.signal for signal_values in batch.signals]))
    for signal_values in batch.signals:
        _apply(signal_values, sums, groups, lengths, task_rewards, rails)
        _describe_reading(signal_values, sums, batch)
    if on_unscorable == "raise" and sums.unscorable.any():
        index = int(np.flatnonzero(sums.unscorable)[0])
        raise Unscorable(f"rollout {index}: {batch.problems.get(index, 'no token of it counts, or a transform gave no number')}")
    if on_unscorable not in ("worst", "raise"):
        sums.terms[sums.unscorable], sums.factors[sums.unscorable], sums.lowered[sums.unscorable] = float(on_unscorable), 1.0, False
        sums.flagged_by_screens &= ~sums.unscorable
    # what a screen cannot read is not removed; what it flags is, whatever another signal cannot read of it
    screened = screen(sums.flagged_by_screens & ~sums.lowered, groups, rails)
    _count(sums, screened.acted)
    for signal_values in batch.signals:
        if signal_values.bound.signal.mode is Mode.SCREEN:
            key = f"{PREFIX}/{signal_values.bound.signal.name}/screened"
            sums.metrics[key] = _mean(sums.flagged[signal_values.bound.signal.name] & screened.removed)
    rewards = sums.terms if task_rewards is None else np.where(task_rewards > 0, task_rewards * sums.factors, task_rewards) + sums.terms
    lowered = sums.lowered | screened.lowered
    if lowered.any():
        rewards = np.where(lowered, rewards.min(), rewards)
    sums.metrics[f"{PREFIX}/unscorable"] = _mean(sums.unscorable)
    sums.metrics[f"{PREFIX}/failures"] = 0.0
    sums.metrics[f"{PREFIX}/inexact_ids"] = _mean(batch.inexact_ids)
    usage = batch.usage
    sums.metrics[f"{PREFIX}/tokens"] = float(usage.tokens)
    return Outcome(
        rewards=rewards,
        terms=sums.terms,
        factors=sums.factors,
        removed=screened.removed,
        dense=None if sums.dense is None else tuple(sums.dense),
        unscorable=sums.unscorable,
        flagged=sums.flagged,
        values={signal_values.bound.signal.name: signal_values.values for signal_values in batch.signals},
        metrics=sums.metrics,
        outside_calibration=sums.outside_calibration,
        readings=batch.readings,
        missing_readings=batch.missing,
        drift=sums.drift,
    )


def substitute(signals: Sequence[ProbeSignal], term: float, lengths: Sequence[int | None], task_rewards: Floats | None) -> Outcome:
    """Returns the rewards and metrics of a batch for which the server gave no probe scores: the fixed number ``term`` is added to each
    rollout's task reward, and no signal (rule from probe scores to rewards) is applied.
    """
    count = len(lengths)
    terms, nobody = np.full(count, float(term)), np.zeros(count, np.bool_)
    is_dense = any(signal.mode is Mode.DENSE for signal in signals)
    return Outcome(
        rewards=terms if task_rewards is None else task_rewards + terms,
        terms=terms,
        factors=np.ones(count),
        removed=nobody,
        dense=tuple(np.zeros(length or 0) for length in lengths) if is_dense else None,
        unscorable=~nobody,
        flagged={signal.name: nobody for signal in signals},
        values={signal.name: np.full(count, math.nan) for signal in signals},
        metrics={**empty_metrics(signals), f"{PREFIX}/failures": 1.0, f"{PREFIX}/unscorable": 1.0},
        outside_calibration={signal.name: nobody for signal in signals},
        drift={signal.name: np.full(count, math.nan) for signal in signals if signal.logs_drift},
    )


def empty_metrics(signals: Sequence[ProbeSignal]) -> dict[str, float]:
    """Returns the metrics of a batch without probe scores, for some signals (rules from probe scores to rewards): a dictionary keyed by
    metric whose values are NaN, or 0 for how often guard rails (limits on the effect of signals) acted.
    """
    metrics = {f"{PREFIX}/{signal.name}/{key}": math.nan for signal in signals for key in _keys(signal)}
    metrics.update({f"{PREFIX}/{key}": math.nan for key in _BATCH_KEYS})
    metrics.update({f"{PREFIX}/guard/{rail}": 0.0 for rail in RAILS})
    return metrics


def _keys(signal: ProbeSignal) -> tuple[str, ...]:
    of_reading = _READING_KEYS if signal.reads_other_weights else ()
    return (*_SIGNAL_KEYS, *(("drift",) if signal.logs_drift else ()), *of_reading)


def _describe_reading(signal_values: SignalValues, sums: _OutcomeSums, batch: BatchSignals) -> None:
    """Records which version of another reading than the frozen one gave a signal's scores, and how far they are from the frozen model's."""
    signal = signal_values.bound.signal
    if not signal.reads_other_weights:
        return
    prefix = f"{PREFIX}/{signal.name}"
    reading = batch.readings.get(signal.reading)
    sums.metrics[f"{prefix}/reading_missing"] = float(signal.reading in batch.missing)
    sums.metrics[f"{prefix}/reading_step"] = math.nan if reading is None or reading.step is None else float(reading.step)
    if signal_values.on_frozen is not None:
        drift = signal_values.values - signal_values.on_frozen
        known = np.isfinite(drift)
        sums.drift[signal.name] = np.where(known, drift, math.nan)
        if known.any():
            sums.metrics[f"{prefix}/drift"] = float(drift[known].mean())


def _apply(
    signal_values: SignalValues,
    sums: _OutcomeSums,
    groups: Sequence[Hashable],
    lengths: Sequence[int | None],
    task_rewards: Floats | None,
    rails: GuardRails,
) -> None:
    bound, signal, values = signal_values.bound, signal_values.bound.signal, signal_values.values
    prefix = f"{PREFIX}/{signal.name}"
    scored = np.isfinite(values)
    flagged = np.zeros(len(values), np.bool_)
    flagged[scored] = bound.flags(values[scored])
    sums.flagged[signal.name] = flagged
    sums.metrics.update(_distribution(prefix, values[scored]))
    if not math.isnan(bound.threshold):
        sums.metrics[f"{prefix}/flagged"] = _mean(flagged)
    outside = np.array([bool(unmet) for unmet in signal_values.unmet or [()] * len(values)], np.bool_)
    sums.outside_calibration[signal.name] = outside
    if signal_values.unmet is not None and scored.any():
        sums.metrics[f"{prefix}/outside_calibration"] = _mean(outside[scored])
    sums.metrics[f"{prefix}/screened"] = 0.0
    sums.metrics[f"{prefix}/reward"] = 0.0
    if signal.mode is Mode.DENSE:
        _apply_dense(signal_values, sums, lengths, rails)
        return
    transformed = np.full(len(values), math.nan)
    transformed[scored] = bound.transformed(values[scored])
    scored &= np.isfinite(transformed)
    mode = Mode(signal.mode)
    if mode is not Mode.MONITOR:
        sums.unscorable |= ~scored
    if mode is Mode.AGREEMENT:
        transformed = _agreement(transformed, signal_values.reports)
    if mode in (Mode.REWARD, Mode.PENALTY, Mode.AGREEMENT):
        terms = _terms(bound, transformed, scored, sums, rails)
        sums.terms += terms
        sums.metrics[f"{prefix}/reward"] = _mean(terms)
        if mode is Mode.PENALTY and task_rewards is not None and rails.check_penalty and not math.isnan(bound.threshold):
            margin = penalty_margin(flagged, -terms, task_rewards)
            sums.metrics[f"{prefix}/penalty_margin"] = margin
            _count(sums, {"penalty_too_small": int(margin <= 0)})
    elif mode in (Mode.GATE, Mode.RELATIVE_GATE):
        if task_rewards is None:
            raise SignalError("mode", "a gate multiplies task rewards, and this adapter is not given them", signal.name)
        amounts = transformed if mode is Mode.GATE else _standardized(transformed, scored, groups, signal)
        factors = np.where(scored, np.clip(1 - signal.weight * np.nan_to_num(amounts), 0.0, 1.0), 0.0)
        sums.factors *= factors
        sums.metrics[f"{prefix}/reward"] = _mean(np.where(task_rewards > 0, task_rewards * (factors - 1), 0.0))
    elif mode is Mode.SCREEN:
        sums.flagged_by_screens |= flagged
        sums.lowered |= ~scored


def _agreement(likely: Floats, reports: Floats | None) -> Floats:
    """Returns how far what rollouts report of themselves agrees with a probe, each ``(n,)``: ``likely`` in [0, 1] where the report is 1,
    ``1 - likely`` where it is 0, and 0 where there is no report.
    """
    said = np.full(len(likely), math.nan) if reports is None else reports
    return np.where(np.isnan(said), 0.0, said * likely + (1 - said) * (1 - likely))


def _standardized(values: Floats, scored: NDArray[np.bool_], groups: Sequence[Hashable], signal: ProbeSignal) -> Floats:
    """Returns by how many standard deviations each number is above the mean of its group's scored rollouts, ``(n,)``; 0 for a rollout that
    has no other to be compared with.

    Raises:
        SignalError: no group has several rollouts, so that the signal would do nothing.
    """
    members: dict[Hashable, list[int]] = {}
    for index, key in enumerate(groups):
        members.setdefault(key, []).append(index)
    if members and all(len(group) == 1 for group in members.values()):
        problem = "relative_gate compares the rollouts of a group, and each group has one: take gate, or score whole groups at once"
        raise SignalError("mode", problem, signal.name)
    standardized = np.zeros(len(values))
    for group in members.values():
        compared = [index for index in group if scored[index]]
        if len(compared) > 1:
            of_group = values[compared]
            standardized[compared] = (of_group - of_group.mean()) / (of_group.std() + _LEAST_SPREAD)
    return standardized


def _terms(bound: BoundSignal, transformed: Floats, scored: NDArray[np.bool_], sums: _OutcomeSums, rails: GuardRails) -> Floats:
    """Returns the numbers that a signal (rule from probe scores to rewards) adds, clipped to a limit; where there is no score, the lowest
    number that the signal can add.
    """
    weight = -bound.signal.weight if bound.signal.mode is Mode.PENALTY else bound.signal.weight
    added = weight * np.where(scored, transformed, 0.0)
    terms = np.clip(added, -rails.clip, rails.clip)
    _count(sums, {"clipped": int((scored & (terms != added)).sum())})
    worst = max(min(weight * end for end in bound.bounds), -rails.clip)
    return np.where(scored, terms, worst)


def _apply_dense(signal_values: SignalValues, sums: _OutcomeSums, lengths: Sequence[int | None], rails: GuardRails) -> None:
    signal = signal_values.bound.signal
    if sums.dense is None:
        sums.dense = [np.zeros(_known(length, signal)) for length in lengths]
    means = []
    for index, tokens in enumerate(signal_values.tokens or ()):
        terms = _dense_terms(signal_values.bound, tokens, len(sums.dense[index]), sums, rails)
        if terms is None:
            sums.unscorable[index] = True
            terms = _terms(signal_values.bound, np.zeros(len(sums.dense[index])), np.zeros(len(sums.dense[index]), np.bool_), sums, rails)
        sums.dense[index] += terms
        means.append(terms.mean() if terms.size else 0.0)
    sums.metrics[f"{PREFIX}/{signal.name}/reward"] = _mean(np.array(means))


def _dense_terms(bound: BoundSignal, tokens: MaskedTokens, length: int, sums: _OutcomeSums, rails: GuardRails) -> Floats | None:
    """Returns the number that a dense signal (rule from probe scores to rewards) adds to each token of a completion, 0 for tokens that do
    not count; ``None`` if the completion is unscorable.
    """
    if len(tokens.scores) != length or not tokens.mask.any():
        return None
    transformed = np.full(length, math.nan)
    transformed[tokens.mask] = bound.transformed(tokens.scores[tokens.mask])
    scored = np.isfinite(transformed)
    return _terms(bound, transformed, scored, sums, rails) * tokens.mask if scored[tokens.mask].all() else None


def _known(length: int | None, signal: ProbeSignal) -> int:
    if length is None:
        raise SignalError("mode", "dense needs the completion's ids, and this adapter has text", signal.name)
    return length


def _distribution(prefix: str, values: Floats) -> dict[str, float]:
    if not values.size:
        return {}
    p10, p50, p90 = np.quantile(values, (0.1, 0.5, 0.9))
    return {f"{prefix}/mean": float(values.mean()), f"{prefix}/p10": float(p10), f"{prefix}/p50": float(p50), f"{prefix}/p90": float(p90)}


def _count(sums: _OutcomeSums, acted: Mapping[str, int]) -> None:
    for rail, times in acted.items():
        sums.metrics[f"{PREFIX}/guard/{rail}"] += float(times)


def _mean(values: NDArray[np.bool_] | Floats) -> float:
    return float(values.mean()) if values.size else 0.0
