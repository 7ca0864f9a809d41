"""Plans which rollouts of a recorded training run to label, and makes rows of the record from labels that were given."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from probescore_audit.further_labels import plan_further_labels
from probescore_audit.label_plan import Stratum, plan_labels
from probescore_audit.record import LabelRow, Record, RolloutRow, RolloutTable
from probescore_audit.recorded_run import FROZEN, RecordedRun, planned_by, read_run
from probescore_audit.run_audit import WINDOW_LABELS
from probescore_audit.run_labels import latest_window

_SAME_CHANCE = 1e-9
_SAID = {"yes": "yes", "no": "no", "unsure": "unsure", True: "yes", False: "no"}


@dataclass(frozen=True)
class PlannedLabel:
    """Value object with a rollout that is to be labelled.

    Attributes:
        step: training step of the rollout.
        rollout: name of the rollout.
        stratum: class of the rollout by score: ``"flagged"``, ``"near"`` or ``"rest"``.
        inclusion: probability with which the rollout was chosen, in (0, 1].
        floor: whether the rollout was drawn at random from all rollouts of its step.
        population: for a rollout that is chosen since the labels of its step did not suffice, the number of rollouts of the step in its
            stratum; ``None`` for others.
    """

    step: int
    rollout: str
    stratum: str
    inclusion: float
    floor: bool = False
    population: int | None = None


def label_design(record: Record, table: RolloutTable) -> RecordedRun | None:
    """Finds the probe and reading (whose activations the probe reads) by whose scores the labels of a training run were shared out;
    ``None`` if no labels name the strata (classes by score) of any. If few labels leave several possible, these are the scores by which
    labels are shared out by default, if they are among them.
    """
    designs = list(_possible_designs(record, table))
    usual = _usual_scores(record, table)
    return next((each for each in designs if (each.probe, each.reading) == usual), designs[0] if designs else None)


def _possible_designs(record: Record, table: RolloutTable) -> Iterator[RecordedRun]:
    for probe, reading in dict.fromkeys(key[:2] for key in table.scores):
        try:
            recorded = read_run(record, table, probe, reading=reading)
        except ValueError:
            continue
        if planned_by(record, recorded):
            yield recorded


def _usual_scores(record: Record, table: RolloutTable, probe: str = "") -> tuple[str, str] | None:
    """Returns the probe and reading (whose activations the probe reads) by whose scores labels are shared out by default: of the given
    probe, or of the first whose scores are rewarded, on the frozen model if it was read; ``None`` if the record names no probe.
    """
    rewarded = [each.key for each in record.header.probes if each.role == "reward"] or [each.key for each in record.header.probes]
    if not probe and not rewarded:
        return None
    chosen = probe or rewarded[0]
    readings = list(dict.fromkeys(key[1] for key in table.scores if key[0] == chosen))
    return chosen, FROZEN if FROZEN in readings or not readings else readings[0]


def plan_recorded(
    record: Record,
    labels: int,
    *,
    probe: str = "",
    reading: str = "",
    first_step: int = 0,
    last_step: int | None = None,
    complete: bool = False,
) -> tuple[PlannedLabel, ...]:
    """Plans which rollouts to label in those steps of a recorded training run that have no labels yet. The same record gives the same plan.

    Where the trainer chose rollouts as it recorded a step, since it recorded more of these (``PlanRow``), they are the plan of that step,
    however many labels are asked for.

    Args:
        record: the record of the run.
        labels: number of labels that a step may cost, at least 4.
        probe: key of the probe by whose scores labels are shared out; by default the one that the labels of the record, or the trainer's
            plan, were shared out by, else the first whose scores are rewarded.
        reading: reading (whose activations the probe reads) of these scores; by default as for ``probe``, else the frozen model.
        first_step: first step to plan for.
        last_step: last step to plan for, included; the last of the record by default.
        complete: whether to plan as well what is left of steps of which some rollouts are labelled, all of them by this very plan, as a
            labeller leaves it who was interrupted.

    Raises:
        ValueError: the record has no such scores, or an argument is out of its range.
    """
    recorded = _scores_to_plan_by(record, probe, reading)
    run = recorded.run
    known: dict[int, list[LabelRow]] = defaultdict(list)
    for label in record.labels:
        known[label.step].append(label)
    by_trainer: dict[int, list[PlannedLabel]] = defaultdict(list)
    for row in record.planned:
        by_trainer[row.step].append(PlannedLabel(row.step, row.rollout, row.stratum, row.inclusion, row.floor))
    planned: list[PlannedLabel] = []
    for step in np.unique(run.step).tolist():
        if (step in known and not complete) or step < first_step or (last_step is not None and step > last_step):
            continue
        of_step = by_trainer.get(step) or _plan_of_step(recorded, step, labels, record.header.run_id)
        planned += _left_of(of_step, known[step]) if step in known else of_step
    return tuple(planned)


def _plan_of_step(recorded: RecordedRun, step: int, labels: int, run_id: str) -> list[PlannedLabel]:
    run = recorded.run
    start, end = np.searchsorted(run.step, [step, step + 1])
    rng = np.random.default_rng([zlib.crc32(run_id.encode()), step])
    plan = plan_labels(run.scores[start:end], run.prompt[start:end], run.threshold, labels, rng=rng)
    return [
        PlannedLabel(step, recorded.rollouts[start + index].rollout, Stratum(kind).name.lower(), chance, floor)
        for index, kind, chance, floor in zip(
            plan.rollouts.tolist(), plan.stratum.tolist(), plan.inclusion.tolist(), plan.floor.tolist(), strict=True
        )
    ]


def _left_of(planned: list[PlannedLabel], labels: list[LabelRow]) -> list[PlannedLabel]:
    """Returns what is left of the plan of a step of which some rollouts have labels; nothing if these labels are not by this plan."""
    chances = {each.rollout: each.inclusion for each in planned}
    drawn = {label.rollout: label.inclusion for label in labels if label.inclusion is not None}
    if any(abs(chances.get(rollout, 0.0) - chance) > _SAME_CHANCE for rollout, chance in drawn.items()):
        return []
    return [each for each in planned if each.rollout not in drawn]


def unflagged_rollouts(record: Record) -> frozenset[tuple[int, str]]:
    """Returns step and name of those rollouts of a training run that some probe with a threshold does not flag, under some reading (whose
    activations the probe reads). One of these that is called positive by mistake looks like behaviour that the probe misses.
    """
    table = record.table()
    found: set[tuple[int, str]] = set()
    for probe, reading in dict.fromkeys(key[:2] for key in table.scores):
        try:
            recorded = read_run(record, table, probe, reading=reading)
        except ValueError:
            continue
        found.update((recorded.rollouts[index].step, recorded.rollouts[index].rollout) for index in np.flatnonzero(~recorded.run.flagged))
    return frozenset(found)


def plan_further(design: RecordedRun, more: int, window_labels: int = WINDOW_LABELS) -> tuple[PlannedLabel, ...]:
    """Plans which further rollouts to label in the last window of steps of a recorded training run, since its labels did not suffice.

    Args:
        design: the scores by which the labels of the run were shared out.
        more: number of further labels.
        window_labels: number of labels of a window, at least.

    Raises:
        ValueError: ``more`` is less than 1, or nothing is labelled yet.
    """
    run, labels = design.run, design.labels
    planned = len(labels.planned().rollout)
    if not planned:
        raise ValueError("more: nothing is labelled yet; plan labels for each step first")
    last_step = int(run.step[labels.rollout[-1]])
    window = latest_window(run, labels, last_step, min(window_labels, planned))
    first_step = last_step if window is None else window.first_step
    further = plan_further_labels(run, labels, first_step, last_step, more, rng=np.random.default_rng(len(labels.rollout)))
    return tuple(
        PlannedLabel(design.rollouts[index].step, design.rollouts[index].rollout, Stratum(kind).name.lower(), chance, population=population)
        for index, kind, chance, population in zip(
            further.rollouts.tolist(), further.stratum.tolist(), further.inclusion.tolist(), further.population.tolist(), strict=True
        )
    )


def label_rows(
    record: Record,
    answers: Iterable[Mapping[str, Any]],
    *,
    source: str,
    labeller: str = "",
    labeller_version: str = "",
    again: Literal["refuse", "second", "replace"] = "refuse",
) -> tuple[LabelRow, ...]:
    """Makes rows of a training run's record from labels; those without an answer are left out.

    Args:
        record: the record of the run.
        answers: a mapping for each label, with ``step``, ``rollout`` and ``label`` (``"yes"``, ``"no"``, ``"unsure"``, true or false; none
            = not labelled), and, as planned, ``inclusion``, ``stratum``, ``floor`` and ``population``; ``note`` and ``span`` may be there.
        source: what gave the labels, such as ``"checker"``, ``"judge"`` or ``"person"``.
        labeller: who gave them.
        labeller_version: version of the labeller.
        again: what is done with a label of a rollout that has one: ``"refuse"``, ``"second"`` = it is a second judgement, and the rollout
            counts as positive only if all judgements say so, or ``"replace"`` = it takes the place of those before.

    Raises:
        ValueError: a label is of no rollout of the record, or of another text under its name, is none of those above, has a probability
            out of range, or comes twice.
    """
    rollouts = {(row.step, row.rollout): row for row in record.rollouts}
    before: dict[tuple[int, str], list[LabelRow]] = defaultdict(list)
    for label in record.labels:
        before[label.step, label.rollout].append(label)
    rows: list[LabelRow] = []
    seen: set[tuple[int, str]] = set()
    for number, answer in enumerate(answers, 1):
        where = f"label {number}"
        if answer.get("label") is None:
            continue
        row = _rollout_of(answer, rollouts, where)
        key = (row.step, row.rollout)
        if key in seen:
            raise ValueError(f"{where}: rollout {row.rollout!r} of step {row.step} comes twice; give one label for each rollout")
        seen.add(key)
        if before[key] and again == "refuse":
            raise ValueError(
                f"{where}: rollout {row.rollout!r} of step {row.step} has a label; say whether this is a second judgement or replaces it"
            )
        if again == "second" and not before[key]:
            raise ValueError(f"{where}: rollout {row.rollout!r} of step {row.step} has no first judgement; give that first")
        rows += _rows_of(answer, row, before[key], where, source, labeller, labeller_version, again)
    return tuple(rows)


def _rows_of(
    answer: Mapping[str, Any], row: RolloutRow, before: list[LabelRow], where: str, source: str, labeller: str, version: str, again: str
) -> list[LabelRow]:
    said = answer["label"]
    if not isinstance(said, (str, bool)) or said not in _SAID:
        raise ValueError(f'{where}: {said!r}; give "yes", "no" or "unsure"')
    replaced = before if again == "replace" else []
    drawn = next((label for label in replaced if label.inclusion), None)
    inclusion = answer.get("inclusion", None if drawn is None else drawn.inclusion)
    if inclusion is not None and not (isinstance(inclusion, (int, float)) and 0 < inclusion <= 1):
        raise ValueError(f"{where}: inclusion {inclusion!r}; give the probability with which the rollout was chosen, in (0, 1]")
    stratum = answer.get("stratum", None if drawn is None else drawn.stratum)
    if stratum is not None and stratum not in {kind.name.lower() for kind in Stratum}:
        raise ValueError(f"{where}: stratum {stratum!r}; give flagged, near or rest, as it was planned")
    population = answer.get("population", None if drawn is None else drawn.population)
    if population is not None and (not isinstance(population, int) or population < 1):
        raise ValueError(f"{where}: population {population!r}; give the number of rollouts of the step in the stratum, as it was planned")
    first = LabelRow(
        step=row.step,
        rollout=row.rollout,
        label=_SAID[said],
        source=source,
        text_sha256=row.text_sha256,
        labeller=labeller,
        labeller_version=version,
        inclusion=None if again == "second" else inclusion,
        stratum=None if again == "second" else stratum,
        floor=again != "second" and bool(answer.get("floor", drawn is not None and drawn.floor)),
        second=again == "second",
        population=None if again == "second" else population,
        span=answer.get("span"),
        note=answer.get("note"),
        retracts=replaced[0].row if replaced else None,
    )
    # One row takes the place of one: further judgements are replaced by the same answer, which says nothing more.
    repeated = [
        LabelRow(step=row.step, rollout=row.rollout, label=_SAID[said], source=source, text_sha256=row.text_sha256, retracts=other.row)
        for other in replaced[1:]
    ]
    return [first, *repeated]


def _rollout_of(answer: Mapping[str, Any], rollouts: Mapping[tuple[int, str], RolloutRow], where: str) -> RolloutRow:
    step, name = answer.get("step"), answer.get("rollout")
    row = rollouts.get((step, name)) if isinstance(step, int) and isinstance(name, str) else None
    if row is None:
        raise ValueError(f"{where}: the record has no rollout {name!r} of step {step!r}; give step and rollout as they were planned")
    digest = answer.get("text_sha256")
    if digest is not None and digest != row.text_sha256:
        raise ValueError(f"{where}: rollout {name!r} of step {step} has another text by now; plan again, and label that")
    return row


def _scores_to_plan_by(record: Record, probe: str, reading: str) -> RecordedRun:
    table = record.table()
    design = label_design(record, table)
    if design is not None:
        for each in (design, *_possible_designs(record, table)):
            if probe in ("", each.probe) and reading in ("", each.reading):
                return each
        raise ValueError(
            f"the labels of this record are shared out by the scores of {design.probe}, {design.reading}; leave --probe and --reading out: "
            "estimates could not weigh labels that are shared out otherwise"
        )
    if record.planned:
        plan = record.planned[0]
        if probe not in ("", plan.probe) or reading not in ("", plan.reading):
            raise ValueError(
                f"the trainer has chosen rollouts by the scores of {plan.probe}, {plan.reading}, and recorded more of these; leave --probe "
                "and --reading out"
            )
        return read_run(record, table, plan.probe, reading=plan.reading)
    usual = _usual_scores(record, table, probe)
    if usual is None:
        raise ValueError("probe: the record names no probes; write them in its header")
    return read_run(record, table, usual[0], reading=reading or usual[1])
