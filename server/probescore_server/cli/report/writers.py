"""Writes scored completions in the order of the input: as lines of JSON, as rollouts on the terminal, or as an HTML page."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import typer
from numpy.typing import NDArray

from probescore import (
    Completion,
    CompletionScores,
    CompletionStatus,
    ProbeInfo,
    ProbeScores,
    ScoringInfo,
    StreamedCompletion,
)
from probescore.types import FROZEN, score_keys
from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.visible import visible_json
from probescore_server.cli.report.page import write_page
from probescore_server.cli.report.terminal import RolloutPrinter
from probescore_server.cli.report.views import RolloutView, rollout_views, series_of
from probescore_server.cli.rollout_lines import Label, LabelledGroup


class ScoredCompletion:
    """One completion that was scored, with its place in the input and the label that the input gives to the completion."""

    def __init__(self, groups: Sequence[LabelledGroup], streamed: StreamedCompletion) -> None:
        self.group, self.index = streamed.group_index, streamed.completion_index
        self.of_group = len(groups[self.group].completions)
        completion = groups[self.group].completions[self.index]
        self.completion = completion if isinstance(completion, Completion) else Completion(completion)
        self.label: Label = groups[self.group].labels[self.index]
        self.scores: CompletionScores = streamed.scores
        self.info: ScoringInfo = streamed.info

    def shown(self, loaded: Sequence[ProbeInfo]) -> list[RolloutView]:
        """Returns views, which are objects ready for display, of a scored completion and its follow-ups (token ids appended to the
        completion).
        """
        title = f"group {self.group + 1}" + (f", completion {self.index + 1}" if self.of_group > 1 else "")
        label = "" if self.label is None else self.label if isinstance(self.label, str) else json.dumps(self.label)
        return rollout_views(title, self.completion, self.scores, series_of(self.info.probes, loaded, self.info.readings), label)


class ResultWriter(Protocol):
    """Interface (Protocol) of a writer of scored completions, such as the writer of JSON lines."""

    def add(self, scored: ScoredCompletion) -> None:
        """Writes one scored completion, or keeps it until ``close`` is called. The caller gives completions in the order of the input."""

    def close(self) -> None:
        """Completes the writer's output; called once, after the last scored completion."""


class InOrderWriter:
    """Writer that receives scored completions in any order, and passes each on to other writers, in the order of the input, as soon as all
    completions before it have arrived.

    If some completions never arrive (because scoring was interrupted), the completions after them are passed on at the end.

    Attributes:
        outputs: the writers that receive the results.
        received: number of results that have arrived.
        views: number of completions and follow-ups (token ids appended to a completion) that were passed on.
        unscored: number of the passed-on completions and follow-ups that have no scores on some reading.
    """

    def __init__(self, groups: Sequence[LabelledGroup], outputs: list[ResultWriter]) -> None:
        self.outputs = outputs
        self._groups = groups
        self._places = [(group, index) for group, entry in enumerate(groups) for index in range(len(entry.completions))]
        self._next = 0
        self._waiting: dict[tuple[int, int], ScoredCompletion] = {}
        self.received = self.views = self.unscored = 0

    def add(self, streamed: StreamedCompletion) -> None:
        """Receives one scored completion, in any order, and passes on to other writers each completion before which none of the input is
        missing.
        """
        scored = ScoredCompletion(self._groups, streamed)
        self.received += 1
        self._waiting[scored.group, scored.index] = scored
        while self._next < len(self._places) and (ready := self._waiting.pop(self._places[self._next], None)) is not None:
            self._next += 1
            self._hand_on(ready)

    def close(self) -> None:
        """Passes on to the output writers the completions that were held back because an earlier completion of the input never arrived, and
        closes these writers.
        """
        for place in sorted(self._waiting):
            self._hand_on(self._waiting[place])
        self._waiting.clear()
        for output in self.outputs:
            output.close()

    def _hand_on(self, scored: ScoredCompletion) -> None:
        answers = list(_with_follow_ups(scored.scores))
        self.views += len(answers)
        self.unscored += sum(not _is_scored(answer) for answer in answers)
        for output in self.outputs:
            output.add(scored)


def _with_follow_ups(scored: CompletionScores) -> list[CompletionScores]:
    return [scored, *(inner for follow_up in scored.follow_ups for inner in _with_follow_ups(follow_up))]


class JsonLinesWriter:
    """Writer that prints each scored completion as one line of JSON as soon as the completion arrives; a score that is NaN is ``null``."""

    def add(self, scored: ScoredCompletion) -> None:
        """Prints one scored completion as a line of JSON."""
        content = {"group": scored.group, "completion": scored.index, "label": scored.label} | _as_json(scored.scores, scored.info)
        # in other encodings than UTF, JSON writes text in ASCII escapes
        can_say = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
        typer.echo(visible_json(json.dumps(content, ensure_ascii=not can_say, allow_nan=False)))

    def close(self) -> None:
        """Does nothing at the end of the output, since the writer has printed every line already."""


class TerminalWriter:
    """Writer that prints the first scored rollouts, up to a limit, on the terminal, and at the end how many more there are."""

    def __init__(self, loaded: Sequence[ProbeInfo], most: int) -> None:
        self._loaded = loaded
        self._most = most
        self._console = new_console()
        self._printer: RolloutPrinter | None = None
        self._views = 0

    def add(self, scored: ScoredCompletion) -> None:
        """Prints one scored completion with its follow-ups (token ids appended to the completion), as far as the limit on printed rollouts
        allows.
        """
        views = scored.shown(self._loaded)
        printer = self._printer = self._printer or RolloutPrinter(
            self._console, series_of(scored.info.probes, self._loaded, scored.info.readings)
        )
        for view in views[: max(0, self._most - self._views)]:
            printer.print(view, scale_of=views)
        self._views += len(views)

    def close(self) -> None:
        """Prints, at the end of the output, the legend of the colours and how many rollouts were not printed."""
        if self._printer is not None:
            self._printer.print_legend()
        if self._views > self._most:
            more = self._views - self._most
            self._console.print(f"… and {more} more: --show {self._views}, --html FILE or --json shows them")


class PageWriter:
    """Writer that collects all scored rollouts, and writes them to one HTML page at the end."""

    def __init__(self, path: Path, loaded: Sequence[ProbeInfo], total: int, *, quiet: bool) -> None:
        self._path = path
        self._loaded = loaded
        self._total = total
        self._quiet = quiet
        self._completions = 0
        self._views: list[RolloutView] = []
        self._info: ScoringInfo | None = None

    def add(self, scored: ScoredCompletion) -> None:
        """Stores one scored completion for the HTML page."""
        self._completions += 1
        self._views += scored.shown(self._loaded)
        self._info = self._info or scored.info

    def close(self) -> None:
        """Writes the HTML report of the scored rollouts to its file, unless not a single completion was scored."""
        if self._info is None:
            return
        title = f"{len(self._views)} scored rollouts"
        if self._completions < self._total:
            title += f", of {self._completions} completions out of {self._total}"
        write_page(self._path, self._views, series_of(self._info.probes, self._loaded, self._info.readings), self._info, title=title)
        if not self._quiet:
            new_console().print(f"wrote {self._path}", soft_wrap=True, markup=False)


def _is_scored(answer: CompletionScores) -> bool:
    """Returns whether a completion has scores on every reading that was asked for."""
    statuses = [answer.status, *(own.status for own in answer.readings.values())]
    return all(status is CompletionStatus.OK for status in statuses)


def _as_json(scored: CompletionScores, info: ScoringInfo) -> dict[str, Any]:
    return {
        "id": scored.id,
        "status": scored.status.value,
        "status_message": scored.status_message,
        "inexact_ids": scored.inexact_ids,
        "prompt_ids": None if scored.prompt_ids is None else scored.prompt_ids.tolist(),
        "completion_ids": None if scored.completion_ids is None else scored.completion_ids.tolist(),
        "completion_texts": scored.completion_texts,
        "scores": _scores_as_json(scored.scores, info),
        **({"readings": _readings_as_json(scored, info)} if info.readings else {}),
        "follow_ups": [_as_json(follow_up, info) for follow_up in scored.follow_ups],
    }


def _readings_as_json(scored: CompletionScores, info: ScoringInfo) -> dict[str, Any]:
    """Returns what was read, by name, and the scores on each reading but the frozen one, whose scores are the completion's own."""
    return {
        reading.name: {"id": reading.id, "kind": reading.kind.value, "step": reading.step}
        | (
            {}
            if reading.name == FROZEN
            else {
                "status": scored.readings[reading.name].status.value,
                "status_message": scored.readings[reading.name].status_message,
                "scores": _scores_as_json(scored.readings[reading.name].scores, info),
            }
        )
        for reading in info.readings
    }


def _scores_as_json(scores: Mapping[str, ProbeScores], info: ScoringInfo) -> dict[str, Any]:
    applied = dict(zip(score_keys(info.probes), info.probes, strict=True))
    return {
        key: {
            "version": applied[key].version,
            "unit": applied[key].unit.value,
            "labels": applied[key].labels,
            "reductions": [str(reduction) for reduction in applied[key].reductions],
            "reduced": _numbers(of_probe.reduced),
            "tokens": None if of_probe.tokens is None else _numbers(of_probe.tokens),
            "outside_calibration": [
                {"condition": each.condition, "reduction": str(each.reduction or ""), "label": each.label} for each in of_probe.unmet
            ],
        }
        for key, of_probe in scores.items()
    }


def _numbers(scores: NDArray[np.float32]) -> Any:  # noqa: ANN401 - the result is nested lists or one number
    """Converts scores to nested lists, with ``None`` for NaN, which JSON lacks, and with no more digits than float32 has."""
    if scores.ndim:
        return [_numbers(row) for row in scores]
    return None if np.isnan(scores) else float(str(scores))
