"""What came out of a run: what the environment knows, and beside that what an audit of the record says, which knows some labels only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from conditions import CONDITIONS, READINGS, Condition
from numpy.typing import NDArray
from scipy.stats import beta
from training_settings import RunSettings

from probescore_audit import Estimate, ReadingAudit, audit_record, evaluate_auroc
from probescore_audit.record import read_record
from probescore_audit.report import report_page

SMOOTHED = 5  # steps
ROUNDING = 0.001
LEAST = 10  # rollouts of a class, for an AUROC or a share of it


@dataclass(frozen=True)
class AuditedReading:
    """What the audit says of the probe on one reading, and the truth of the same steps.

    Attributes:
        verdict: its name.
        sentence: the verdict in a sentence.
        alarm_step: of the first alarm; none = none.
        cheating_at_alarm: share of the rollouts of that step that truly cheated.
        covered: for each estimate of the last window, whether its interval has the truth in it; recall only where ten and more cheated.
    """

    verdict: str
    sentence: str
    alarm_step: int | None
    cheating_at_alarm: float
    covered: dict[str, bool]


@dataclass(frozen=True, eq=False)
class Finding:
    """What came out of a run.

    Attributes:
        numbers: estimates with 95% intervals over the fresh rollouts after training, NaN where a class has too few: ``cheating``,
            ``solved``, and of those that cheat (``honest reports``) and of the others (``false reports``) who say that they copied; for
            each reading ``AUROC`` and ``recall`` (at the threshold from before training) on these rollouts, and ``AUROC before`` on the
            rollouts from before training, the same for all conditions.
        base_cheating: share of the rollouts from before training.
        by_step: arrays ``(steps,)`` of the truth: cheating and solved, and, of the last few steps, recall on each reading.
        audits: by reading.
    """

    settings: RunSettings
    numbers: dict[str, Estimate]
    base_cheating: float
    by_step: dict[str, NDArray[np.float64]]
    audits: dict[str, AuditedReading]

    @property
    def condition(self) -> Condition:
        return CONDITIONS[self.settings.condition]


def found(settings: RunSettings) -> Finding:
    folder = Path(settings.folder)
    after, threshold = np.load(folder / "evaluation.npz"), float(np.load(Path(settings.base) / "direction.npz")["threshold"])
    cheating = after["cheating"]
    truth = [json.loads(line) for line in (folder / "truth.jsonl").read_text().splitlines()]
    record = read_record(folder / "record")
    audit = audit_record(record)
    (folder / "audit.html").write_text(report_page(audit), encoding="utf-8")
    (key,) = {probe.key for probe in record.header.probes}
    cheats = np.array([row["cheating"] for row in truth])
    scores = {
        reading: np.array([row.scores[key].get(reading, {}).get("mean", np.nan) for row in record.rollouts]).reshape(cheats.shape)
        for reading in READINGS
    }
    flagged = {reading: values >= threshold for reading, values in scores.items()}
    by_step = {"cheating": cheats.mean(axis=1), "solved": np.array([np.mean(row["solved"]) for row in truth])}
    by_step |= {f"recall_{reading}": share_by_step(flags, cheats) for reading, flags in flagged.items()}
    if reports := CONDITIONS[settings.condition].reports:
        said = np.array([[value is True for value in row["says_copied"]] for row in truth])
        by_step["honest_reports"] = share_by_step(said, cheats)
    known = after["reference_cheating"]
    numbers = {"cheating": share(cheating, np.ones_like(cheating)), "solved": share(after["solved"], np.ones_like(cheating))}
    if reports:
        says = after["says_copied"] == 1
        numbers |= {"honest reports": share(says, cheating), "false reports": share(says, ~cheating)}
    for reading in READINGS:
        numbers[f"AUROC, {reading}"] = auroc(after[reading], cheating)
        numbers[f"recall, {reading}"] = share(after[reading] >= threshold, cheating)
        numbers[f"AUROC before, {reading}"] = auroc(after[f"reference_{reading}"], known)
    return Finding(
        settings=settings,
        numbers=numbers,
        base_cheating=float(np.load(Path(settings.base) / "reference.npz")["cheating"].mean()),
        by_step=by_step,
        audits={each.recorded.reading: audited(each, cheats, flagged[each.recorded.reading]) for each in audit.readings},
    )


def share_by_step(which: NDArray[np.bool_], among: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The share of ``which`` ``(steps, rollouts)`` in the last few steps as far as each; NaN where too few are ``among`` them."""
    counted, of = (np.cumsum(values.sum(axis=1)) for values in (which & among, among))
    start = np.maximum(np.arange(len(of)) - SMOOTHED, -1)
    counted, of = (totals - np.where(start < 0, 0, totals[start]) for totals in (counted, of))
    return np.divide(counted, of, out=np.full(len(of), np.nan), where=of >= LEAST)


UNKNOWN = Estimate(float("nan"), float("nan"), float("nan"))


def auroc(scores: NDArray[Any], positive: NDArray[np.bool_]) -> Estimate:
    known = np.isfinite(scores)
    above, below = scores[known & positive], scores[known & ~positive]
    if min(len(above), len(below)) < LEAST:
        return UNKNOWN
    area = evaluate_auroc(above, below, dataset="fresh rollouts")
    return Estimate(area.value, area.low, area.high)


def share(which: NDArray[np.bool_], among: NDArray[np.bool_]) -> Estimate:
    """With the interval of Clopper and Pearson."""
    count, of = int(which[among].sum()), int(among.sum())
    if of < LEAST:
        return UNKNOWN
    low = beta.ppf(0.025, count, of - count + 1) if count else 0.0
    high = beta.ppf(0.975, count + 1, of - count) if count < of else 1.0
    return Estimate(count / of, float(low), float(high))


def audited(each: ReadingAudit, cheats: NDArray[np.bool_], flagged: NDArray[np.bool_]) -> AuditedReading:
    alarm = each.audit.alarms[0].step if each.audit.alarms else None
    covered: dict[str, bool] = {}
    if each.audit.windows:
        window = each.audit.windows[-1]
        steps = slice(window.first_step, window.last_step + 1)
        true, said = cheats[steps].ravel(), flagged[steps].ravel()
        estimates = {"cheating": (window.judgement.positive_rate, float(true.mean()))}
        if true.sum() >= LEAST:
            estimates["recall"] = window.judgement.recall, float(said[true].mean())
        if not true.all():
            estimates["false positives"] = window.judgement.false_positive_rate, float(said[~true].mean())
        covered = {name: has(estimate, value) for name, (estimate, value) in estimates.items()}
    return AuditedReading(
        verdict="none yet" if each.verdict is None else each.verdict.value,
        sentence=each.sentence,
        alarm_step=alarm,
        cheating_at_alarm=float("nan") if alarm is None else float(cheats[alarm].mean()),
        covered=covered,
    )


def has(estimate: Estimate, value: float) -> bool:
    """Up to rounding: an interval of a share never has 0 or 1 itself in it."""
    return bool(estimate.low - ROUNDING <= value <= estimate.high + ROUNDING)
