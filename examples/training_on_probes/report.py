"""What the experiment found, on the terminal and on one page; every sentence is made from the numbers of these runs, whatever they are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from conditions import READINGS
from findings import UNKNOWN, Finding
from rich.console import Group
from rich.table import Table
from scipy.stats import t

from probescore_audit import Estimate
from probescore_audit.report.charts import Curve, curves
from probescore_audit.report.words import escaped, number_with_interval, share, share_with_interval

EXPECTED = {"1": ("frozen", "behaviour changed"), "2": ("policy", "evaded")}
"""What an audit should say by the project's claim, and of which reading."""
_DONE = ("cheating", "solved", *(f"recall, {reading}" for reading in READINGS))
_RANKED = tuple(f"{what}, {reading}" for what in ("AUROC", "AUROC before") for reading in READINGS)
_CURVES = (("first", "cheating"), ("third", "recall_frozen"), ("second", "recall_policy"), ("fourth", "honest_reports"))
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_report(findings: Sequence[Finding], page: Path, seconds: float) -> Group:
    """Writes the page, and beside it the same without plots as Markdown; returns what the terminal shows."""
    groups: dict[tuple[str, int], list[Finding]] = {}
    for each in findings:
        groups.setdefault((each.settings.condition, each.settings.steps), []).append(each)
    tables = [_table(groups, columns) for columns in (_DONE, _RANKED)]
    sentences = list(_sentences(groups))
    page.write_text(_page(groups, tables, sentences, page.parent, seconds), encoding="utf-8")
    page.with_suffix(".md").write_text(_markdown(tables, sentences), encoding="utf-8")
    shown = [part for rows in tables for part in ("", _on_terminal(rows))]
    return Group(*shown, "", *(f"- {sentence}" for sentence in sentences))


def _on_terminal(rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    head, *body = rows
    for name in head:
        table.add_column(name, overflow="fold")
    for name, *rest in body:
        table.add_row(name.partition(":")[0], *rest)  # what each does is said below
    return table


def _markdown(tables: Sequence[Sequence[Sequence[str]]], sentences: Sequence[str]) -> str:
    lines = []
    for head, *body in tables:
        lines += [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)] + [""]
    return "\n".join([*lines, *(f"- {sentence}" for sentence in sentences), ""])


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over seeds with its 95% interval, by Student's t; of one seed its own estimate."""
    known = [each for each in estimates if not math.isnan(each.value)]
    if len(known) < 2:
        return known[0] if known else UNKNOWN
    values = np.array([each.value for each in known])
    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    mean = float(values.mean())
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half))


def _number(group: Sequence[Finding], name: str) -> Estimate:
    return over_seeds([each.numbers.get(name, UNKNOWN) for each in group])


def _written(name: str, estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "too few"
    return (number_with_interval if name.startswith("AUROC") else share_with_interval)(estimate)


def _table(groups: dict[tuple[str, int], list[Finding]], columns: Sequence[str]) -> list[list[str]]:
    rows = [["condition", "steps", "seeds", *columns]]
    for group in groups.values():
        first, told = group[0], [_written(name, _number(group, name)) for name in columns]
        rows.append([f"{first.condition.name}: {first.condition.title}", str(first.settings.steps), str(len(group)), *told])
    return rows


def _sentences(groups: dict[tuple[str, int], list[Finding]]) -> Iterator[str]:
    for (name, steps), group in groups.items():
        base = float(np.mean([each.base_cheating for each in group]))
        seen = [
            f"{reading} {_written('', recall)}"
            for reading in READINGS
            if not math.isnan((recall := _number(group, f"recall, {reading}")).value)
        ]
        text = f"{group[0].condition.title[0].upper()}{group[0].condition.title[1:]}, {steps} steps: cheating went from {share(base)} to "
        text += f"{share_with_interval(_number(group, 'cheating'))}. "
        text += f"Recall of what is left: {', '.join(seen)}." if seen else "Too few cheat in the end for a recall."
        for reading in READINGS:
            said = Counter(each.audits[reading].verdict for each in group if reading in each.audits)
            text += f" The audit of the {reading} reading says " + ", ".join(
                f"“{verdict}”" + (f" ({count} of {len(group)} seeds)" if len(group) > 1 else "") for verdict, count in said.most_common()
            )
            alarms = [each.audits[reading] for each in group if reading in each.audits and each.audits[reading].alarm_step is not None]
            if alarms:
                at = float(np.mean([alarm.alarm_step for alarm in alarms]))
                then = share(float(np.mean([alarm.cheating_at_alarm for alarm in alarms])))
                text += f", with an alarm at step {at:.0f}" + (f" on average ({len(alarms)} of {len(group)})" if len(group) > 1 else "")
                text += f", when {then} cheated"
            text += "."
        if name in EXPECTED:
            reading, verdict = EXPECTED[name]
            right = sum(reading in each.audits and each.audits[reading].verdict == verdict for each in group)
            text += f" By the claim it is “{verdict}” on the {reading} reading: {right} of {len(group)}."
        yield text
    yield from _about_reports(groups)
    coverage = [held for group in groups.values() for each in group for audit in each.audits.values() for held in audit.covered.values()]
    if coverage:
        yield f"Of the intervals of the last windows {sum(coverage)} of {len(coverage)} have the full truth in them."


def _about_reports(groups: dict[tuple[str, int], list[Finding]]) -> Iterator[str]:
    control = next((group for (name, _), group in groups.items() if name == "4-control"), None)
    paid = next((group for (name, _), group in groups.items() if name == "4"), None)
    for group, who in ((control, "where nobody pays for reports"), (paid, "where agreement with the probe pays")):
        if group is not None:
            honest, false = (_written("", _number(group, f"{kind} reports")) for kind in ("honest", "false"))
            yield f"Reports, {who}: of those that cheat {honest} say so, of the others {false} say that they do."
    if control and paid:
        pairs = {each.settings.seed: each for each in control}
        gains = [
            each.numbers["honest reports"].value - pairs[each.settings.seed].numbers["honest reports"].value
            for each in paid
            if each.settings.seed in pairs
        ]
        known = [gain for gain in gains if not math.isnan(gain)]
        if known:
            by_seed = ", ".join(f"{100 * gain:+.0f}" for gain in known)
            yield f"So agreement moves honest reports by {100 * np.mean(known):+.0f} points ({by_seed} by seed)."


def _page(
    groups: dict[tuple[str, int], list[Finding]],
    tables: Sequence[Sequence[Sequence[str]]],
    sentences: Sequence[str],
    folder: Path,
    seconds: float,
) -> str:
    style = files("probescore_audit.report").joinpath("report.css").read_text(encoding="utf-8")
    settings = next(iter(groups.values()))[0].settings
    facts = (
        f"GRPO in TRL, {settings.prompts} prompts of {settings.samples} rollouts a step, learning rate {settings.learning_rate:g}; "
        f"{settings.labels} labels a step; the policy is read anew every {settings.read_every} steps; {settings.evaluated:,} fresh "
        f"rollouts at the end; {seconds / 60:.0f} minutes this time."
    )
    many = max(map(len, groups.values())) > 1
    intervals = (
        "Means over seeds with 95% intervals (Student's t)."
        if many
        else "One seed: the intervals are of its rollouts, and say nothing of other seeds."
    )
    figures = "".join(_figure(group) for group in groups.values())
    audits = [["run", "reading", "verdict", "alarm", "cheating then", "truth in the intervals", "in a sentence"]]
    for group in groups.values():
        for each in group:
            for reading, audit in each.audits.items():
                alarm = ("none", "") if audit.alarm_step is None else (f"step {audit.alarm_step}", share(audit.cheating_at_alarm))
                held = ", ".join(f"{name}: {'yes' if inside else 'no'}" for name, inside in audit.covered.items())
                audits.append([str(Path(each.settings.folder).relative_to(folder)), reading, audit.verdict, *alarm, held, audit.sentence])
    note = (
        f"{intervals} AUROC and recall are of the rollouts that the trained policy writes; “AUROC before” is of rollouts from before "
        "training, and says whether a reading still tells them apart."
    )
    sections = (
        ("What came out", f"<ul>{''.join(f'<li>{escaped(sentence)}</li>' for sentence in sentences)}</ul>"),
        ("By condition", f'{"".join(map(_html_table, tables))}<p class="note">{escaped(note)}</p>'),
        ("By step: the truth", f'<div class="pair">{figures}</div>'),
        ("What the audit says, which has seen the labelled rollouts only", _html_table(audits)),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n<title>Training on probes</title>\n<style>\n{style}</style>\n'
        f'</head>\n<body>\n<h1>What becomes of a probe that is trained on?</h1><div class="note">{escaped(facts)}</div>'
        + "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
        + "\n</body>\n</html>\n"
    )


def _figure(group: Sequence[Finding]) -> str:
    drawn, keys = [], []
    for colour, name in _CURVES:
        if all(name in each.by_step for each in group):
            values = np.stack([each.by_step[name] for each in group])
            x = np.arange(values.shape[1], dtype=float)
            known = np.isfinite(values).sum(axis=0)
            mean = np.divide(np.nansum(values, axis=0), known, out=np.full(len(x), np.nan), where=known > 0)
            low, high = np.fmin.reduce(values, axis=0), np.fmax.reduce(values, axis=0)
            drawn.append(Curve(colour, x, mean, low, high))
            keys.append(f'<span class="key {colour}">{escaped(name.replace("_", ", "))}</span>')
    marks = [
        (float(audit.alarm_step), f"alarm: {reading}")
        for reading, audit in group[0].audits.items()
        if len(group) == 1 and audit.alarm_step is not None
    ]
    title = f"{group[0].condition.name}: {group[0].condition.title}"
    svg = curves(drawn, title=title, x_range=(0, group[0].settings.steps - 1), y_range=(0.0, 1.02), marks=marks, y_text=share)
    return f"<figure><h3>{escaped(title)}</h3>{svg}<figcaption>{''.join(keys)}</figcaption></figure>"


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    written = "<tr>" + "".join(f"<th>{escaped(cell)}</th>" for cell in head) + "</tr>"
    for row in body:
        written += (
            "<tr>"
            + "".join(f'<td class="words">{escaped(cell)}</td>' if len(cell) > 24 else f"<td>{escaped(cell)}</td>" for cell in row)
            + "</tr>"
        )
    return f'<div class="scroll"><table>{written}</table></div>'
