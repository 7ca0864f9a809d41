"""Names the columns of a table of rollouts, and what each is in the index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from probescore.types import FROZEN
from probescore_review.index import Index


@dataclass(frozen=True)
class ProbeReading:
    """Value object with the scores of one probe on one reading (whose activations the probe read), as the table of rollouts has them.

    Attributes:
        probe: key of the probe, ``name@version``.
        reading: name of the reading.
        reduction: reduction of these scores.
        role: what they are for, such as ``"reward"``.
        threshold: score from which on a rollout is flagged; ``None`` if the record has none.
        sql: the column of the index.
    """

    probe: str
    reading: str
    reduction: str
    role: str
    threshold: float | None
    sql: str

    @property
    def name(self) -> str:
        """Returns the name of the column for people and programs."""
        return f"score:{self.probe}:{self.reading}"


@dataclass(frozen=True)
class Column:
    """Value object with a column of the table of rollouts.

    Attributes:
        name: name of the column in queries and answers.
        title: its heading.
        kind: ``"number"``, ``"text"`` or ``"label"``.
        help: what it says, in a sentence.
        sql: what it is in the index.
        sortable: whether an index of the database is in its order.
    """

    name: str
    title: str
    kind: str
    help: str
    sql: str
    sortable: bool = field(default=True)


_ALWAYS = (
    Column("step", "step", "number", "Training step.", "step"),
    Column("name", "rollout", "text", "Name of the rollout within its step.", "name", sortable=False),
    Column("prompt_id", "prompt", "text", "Name of the prompt.", "prompt_id"),
    Column("group", "group", "text", "Rollouts whose rewards the trainer compares.", "grp"),
    Column("tokens", "tokens", "number", "Tokens of the completion.", "tokens"),
    Column("task_reward", "task reward", "number", "Reward of the task alone.", "task_reward"),
    Column("total_reward", "total reward", "number", "Reward that the trainer used.", "total_reward"),
    Column("logprob", "log-probability", "number", "Log-probability of the completion under the policy.", "logprob"),
    Column("label", "label", "label", "What all labels of the rollout say together: yes, no or unsure.", "label"),
    Column("labelled_by", "labelled by", "text", "Who gave the labels.", "labelled_by", sortable=False),
    Column("snippet", "completion", "text", "How the completion begins.", "snippet", sortable=False),
)


def probe_readings(index: Index) -> tuple[ProbeReading, ...]:
    """Returns the probes and readings (whose activations a probe read) whose scores the index has, rewarded probes first."""
    described = {probe.key: probe for probe in index.header().probes}
    found: list[ProbeReading] = []
    for place, probe, reading, reduction in index.rows("SELECT place, probe, reading, reduction FROM score_columns ORDER BY place"):
        known = described.get(probe)
        threshold = None if known is None else known.thresholds_on(reading).get(reduction)
        found.append(ProbeReading(probe, reading, reduction, "monitor" if known is None else known.role, threshold, f"s{place}"))
    order = {probe: place for place, probe in enumerate(described)}
    return tuple(sorted(found, key=lambda each: (each.role != "reward", order.get(each.probe, len(order)), each.reading != FROZEN)))


def columns(index: Index) -> Mapping[str, Column]:
    """Returns the columns of the table of rollouts by name."""
    readings = probe_readings(index)
    found = list(_ALWAYS)
    for each in readings:
        flagged = "" if each.threshold is None else f" Flagged from {each.threshold:.4g} on."
        found.append(
            Column(
                each.name,
                f"{each.probe} {each.reading}",
                "number",
                f"Score of {each.probe} on {each.reading}, {each.reduction}.{flagged}",
                each.sql,
            )
        )
    for each in readings:
        other = next((reading for reading in readings if reading.probe == each.probe and reading.reading != FROZEN), None)
        if each.reading == FROZEN and other is not None:
            help_text = f"Score of {each.probe} on {other.reading}, less that on the frozen model."
            found.append(
                Column(f"difference:{each.probe}", f"{each.probe} {other.reading} − frozen", "number", help_text, f"d{each.sql[1:]}")
            )
    for each in readings:
        if each.threshold is not None:
            limit = repr(each.threshold)
            sql = f"((label = 'yes' AND {each.sql} < {limit}) OR (label = 'no' AND {each.sql} >= {limit}))"
            help_text = f"1 where {each.probe} on {each.reading} and the label disagree."
            found.append(
                Column(f"wrong:{each.probe}:{each.reading}", f"{each.probe} {each.reading} wrong", "number", help_text, sql, False)
            )
    return {column.name: column for column in found}
