"""Writes the record of a training run from within its trainer: the rollouts that a ``ProbeScorer`` scores, with their scores and rewards,
and labels of some of them.

The record never changes a reward. What ``probescore audit`` makes of it is in ``docs/how-to/audit-a-run.md``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from probescore import Chat, Text
from probescore.reductions import Reduction
from probescore.types import FROZEN, OutputPer, TokenIds
from probescore_adapters.anchors import read_anchors
from probescore_adapters.checker_labels import labels_by_checker
from probescore_adapters.errors import SignalError
from probescore_adapters.job import process_from_environment
from probescore_adapters.outcome import Outcome
from probescore_adapters.record_options import PooledActivations, RecordOptions
from probescore_adapters.recorded_activations import ActivationReader, ActivationsRequest, TextToRead
from probescore_adapters.rollouts import Rollout
from probescore_adapters.signal_values import BatchSignals, FurtherScores, ServerFacts
from probescore_adapters.signals import BoundSignal, Floats, Mode, ProbeSignal
from probescore_adapters.step_plans import PlannedRollout, RecordedRollout, StepPlans
from probescore_audit.record import (
    ActivationRow,
    AnchorRow,
    LabelRow,
    PlanRow,
    RecordedProbe,
    RecordWriter,
    ReferenceRow,
    RolloutRow,
    RunHeader,
    recorded_run_ids,
)

# the standard library's: a trainer's process has its own way of showing logs
logger = logging.getLogger("probescore_adapters")

PLANNED_STEPS = 1000
"""Number of steps that a run of unknown length counts as planned for; alarms watch for changes that begin within these."""
_MAX = Reduction.parse("max")
_BEFORE = sys.maxsize  # in place of a step, for rollouts before training
_OF_ROLLOUT = "rollout"  # in place of a reduction, for a probe that scores rollouts


@dataclass(frozen=True)
class _Column:
    """Value object with a probe whose scores the record of a training run has, under a key of its own, and a signal (rule from probe scores
    to rewards) that reads it.
    """

    key: str
    bound: BoundSignal
    reductions: tuple[Reduction, ...]


class RunRecorder:
    """Writer of the rollouts that one process of a training run scores. Its file is made when the first batch is recorded.

    A recorder can be pickled, and used after a fork and from several threads; each process has a file of its own.

    Args:
        options: what is recorded, and where.
        signals: the signals (rules from probe scores to rewards) whose scores are recorded.
        run_id: name of the run, unless the options give one.

    Attributes:
        anchors: texts with a known label that are scored again and again.

    Raises:
        SignalError: a probe that is to be held out is read by no signal, or by one that changes rewards.
        OSError: the folder cannot be made, or the file of anchors cannot be read.
        ValueError: the folder has the record of another run, or the file of anchors has something else.
    """

    def __init__(self, options: RecordOptions, signals: Sequence[ProbeSignal], run_id: str = "") -> None:
        self.options = options
        for name in options.held_out:
            readers = [signal for signal in signals if signal.probe == name]
            if not readers or any(signal.mode is not Mode.MONITOR for signal in readers):
                problem = f"{name!r} is held out (record.held_out), so that signals of the mode monitor must read it, and no others"
                raise SignalError("probe", problem)
        self._folder = Path(options.directory)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._run_id = options.run_id or run_id or self._folder.absolute().name
        if others := recorded_run_ids(self._folder) - {self._run_id}:
            problem = f"{self._folder.name} has the record of the run {min(others)!r}, and this run is {self._run_id!r}"
            raise ValueError(f"record: {problem}; give each run a folder of its own, or its record the same run_id")
        self._process = process_from_environment()
        self.anchors = () if options.anchors is None else read_anchors(options.anchors)
        self._planned_steps = options.planned_steps
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._writer: RecordWriter | None = None
        self._header: RunHeader | None = None
        self._probes: dict[str, RecordedProbe] = {}
        self._counted = 0  # rollouts, where nobody says which step they are of
        self._in_step: dict[int, int] = {}  # number of rollouts of each of the last steps
        self._last_step = -1
        self._rewinds = 0
        self._anchored: int | None = None
        self._warned: set[str] = set()
        activations = self.options.activations
        self._activations = ActivationReader(activations, self._run_id) if isinstance(activations, PooledActivations) else None
        self._to_read: list[TextToRead] = []
        plans = self.options.checker is not None or self._activations is not None
        self._plans = StepPlans(self.options, self._run_id, self._process) if plans else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("options", "anchors", "_folder", "_run_id", "_process", "_planned_steps")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_anew()

    @property
    def further(self) -> FurtherScores:
        """Returns what the server is asked for beyond what the signals (rules from probe scores to rewards) need."""
        return FurtherScores((_MAX,), tokens=self.options.token_scores, texts=self.options.texts)

    def plan_steps(self, steps: int) -> None:
        """Takes over the number of training steps that a trainer says the run has, unless the user has given one."""
        if self.options.planned_steps is None and steps > 0:
            self._planned_steps = steps

    def score_for_all_ranks(self) -> None:
        """Says that this process scores the rollouts of all ranks, so that it is the only one that writes."""
        self._process = replace(self._process, rank=0, world_size=1)
        self._begin_anew()

    def record(
        self,
        rollouts: Sequence[Rollout],
        batch: BatchSignals | None,
        outcome: Outcome,
        *,
        server: ServerFacts | None,
        task_rewards: Floats | None,
        step: int | None,
    ) -> int:
        """Writes a batch of rollouts into the record of the training run, and returns the training step that it is of.

        Args:
            rollouts: the ``n`` rollouts, checked.
            batch: their scores; ``None`` if the server gave none.
            outcome: their rewards.
            server: description of the server; ``None`` if it has never answered.
            task_rewards: ``(n,)``, the rewards without probes; ``None`` if the trainer itself adds them.
            step: the training step.

        Raises:
            ValueError: nobody knows the training step.
            OSError: the record cannot be written, and ``on_error`` is ``"raise"``.
        """
        if os.getpid() != self._pid:
            self._begin_anew()
        with self._lock:
            at = self._step(step, len(rollouts))
            try:
                columns = [] if batch is None else _columns(batch)
                probes = [] if server is None else [self._described(column, columns, server) for column in columns]
                self._note_step(at)
                writer = self._writer_for(probes, server)
                names = [f"{writer.name[:8]}.{number}" for number in self._numbers(at, len(rollouts))]
                rows = list(self._rows(rollouts, names, batch, outcome, columns, task_rewards, at))
                writer.append(rows)
                if self._plans is not None:
                    ids = {} if batch is None else _reading_ids(batch)
                    recorded = [RecordedRollout(rollout, row, ids) for rollout, row in zip(rollouts, rows)]  # noqa: B905 - Python 3.10
                    self._record_plan(writer, self._plans.after(at, recorded))
            except Exception as error:  # whatever it is, training goes on
                if self.options.on_error == "raise":
                    raise
                logger.error("step %d: %d rollouts are not in the record: %s", at, len(rollouts), error)
            return at

    def anchors_are_due(self, step: int) -> bool:
        """Returns whether this process has to score the anchors (texts with a known label) at a training step: at the first that it
        records, and at every step whose number says so, once.
        """
        with self._lock:
            is_due = self._anchored is None or (step != self._anchored and step % self.options.anchors_every == 0)
            if not self.anchors or self._process.rank != 0 or not is_due:
                return False
            self._anchored = step
            return True

    def record_anchors(self, batch: BatchSignals, step: int) -> None:
        """Writes the scores of the anchors (texts with a known label) into the record of the training run.

        Args:
            batch: the scores, in the order of the anchors.
            step: the training step.
        """
        columns = _columns(batch)
        scored = [(anchor, _scores(batch, index, columns)) for index, anchor in enumerate(self.anchors)]
        if missing := [anchor.name for anchor, scores in scored if not scores]:
            logger.warning("step %d: %d of %d anchors have no scores, such as %s", step, len(missing), len(scored), missing[0])
        rows = [
            AnchorRow(
                step=step,
                anchor=anchor.name,
                positive=anchor.positive,
                scores=scores,
                text_sha256=anchor.text_sha256,
                reading_ids={name: reading.id for name, reading in batch.readings.items() if name != FROZEN} or None,
            )
            for anchor, scores in scored
            if scores
        ]
        with self._lock:
            if self._writer is None:
                return
            self._writer.append(rows)
            if self._activations is not None:
                ids = _reading_ids(batch)
                self._to_read += [TextToRead(step, anchor.name, True, anchor.rollout, ids) for anchor, scores in scored if scores]

    def read_activations(self, step: int, server: ServerFacts | None) -> Generator[ActivationsRequest, Any, None]:
        """Generator that records activations of the rollouts that were chosen to be labelled, and of the anchors (texts with a known label)
        that were scored, since it was called last: yields each request to the server, and is sent the answer. If that fails, training goes
        on unless the record's options say otherwise.
        """
        with self._lock:
            texts, self._to_read, writer = self._to_read, [], self._writer
        if self._activations is None or server is None or not self._activations.is_due(step):
            return
        rows: list[ActivationRow] = []
        problem: Exception | None = None
        try:
            self._activations.check_once(server.info)
            yield from self._activations.read(texts, server.info.model.fingerprint, rows)
        except Exception as error:  # whatever it is: no reward depends on it
            problem = error
        with self._lock:
            if writer is not None and self._writer is writer:  # else training has gone back meanwhile, and these rollouts do not count
                writer.append(rows)
        if problem is None:
            if texts:
                self._activations.note_success()
            if len(rows) < sum(len(text.reading_ids) for text in texts):
                self._warn_once(
                    "record.activations: those of some rollouts are not in the record, since none of their tokens counts, or their reading "
                    "was replaced before the plan of the step was made (batches_per_step)"
                )
        elif self.options.on_error == "raise":
            raise problem
        else:
            self._activations.note_failure(step)
            said = f"the activations of some steps, from step {step} on, are not in the record: {problem}"
            self._log_once(logging.ERROR, said, f"{type(problem).__name__} {getattr(problem, 'reason', '')}")

    def record_reference(
        self, rollouts: Sequence[Rollout], batch: BatchSignals, positive: Sequence[bool], *, server: ServerFacts, random: bool
    ) -> None:
        """Writes labelled rollouts of the model before training into the record, with which the audit compares the run.

        Args:
            rollouts: the ``n`` rollouts, checked.
            batch: their scores.
            positive: whether each of them has the behaviour.
            server: description of the server.
            random: whether they were drawn at random.

        Raises:
            OSError: the record cannot be written.
        """
        if os.getpid() != self._pid:
            self._begin_anew()
        with self._lock:
            columns = _columns(batch)
            writer = self._writer_for([self._described(column, columns, server) for column in columns], server)
            writer.append(
                ReferenceRow(
                    rollout=rollout.name or f"{writer.name[:8]}.{number}",
                    positive=bool(label),
                    random=random,
                    scores=_scores(batch, index, columns),
                )
                for index, (number, rollout, label) in enumerate(zip(self._numbers(_BEFORE, len(rollouts)), rollouts, positive))  # noqa: B905
            )

    def close(self) -> None:
        """Closes this process's file of the record. A batch that is recorded later goes into another one."""
        if os.getpid() != self._pid:
            return  # the file is that of the process that this one was forked from
        with self._lock:
            if self._writer is not None:
                if self._plans is not None:
                    self._record_plan(self._writer, self._plans.of_what_is_left())
                self._writer.close()
                self._writer = self._header = None
                self._to_read = []

    def _step(self, given: int | None, rollouts: int) -> int:
        if given is not None:
            return int(given)
        if self.options.rollouts_per_step is None:
            raise ValueError(
                "step: the record needs the training step of each rollout; give step=…, or RecordOptions(rollouts_per_step=…) to count them"
            )
        step = self._counted // self.options.rollouts_per_step
        self._counted += rollouts
        return step

    def _numbers(self, step: int, count: int) -> range:
        first = self._in_step.get(step, 0)
        oldest = self._last_step - self.options.late_steps
        self._in_step = {each: number for each, number in self._in_step.items() if each >= oldest} | {step: first + count}
        return range(first, first + count)

    def _note_step(self, step: int) -> None:
        """Begins a new file if training has gone back to an earlier step, since what comes now takes the place of what was there."""
        if step < self._last_step - self.options.late_steps:
            logger.info("step %d: training goes on from here, and the record's rollouts of later steps count no more", step)
            self.close()
            self._rewinds += 1
            self._last_step = -1
        self._last_step = max(self._last_step, step)
        if step >= (planned := self._planned_steps or PLANNED_STEPS):
            self._warn_once(
                f"record: the run is planned for {planned} steps and has more, and the audit's monitors do not watch for changes that "
                "begin so late; give RecordOptions(planned_steps=…)"
            )

    def _writer_for(self, probes: Sequence[RecordedProbe], server: ServerFacts | None) -> RecordWriter:
        """Returns the writer of this process's file, whose header describes these probes."""
        self._probes.update({probe.key: probe for probe in probes})
        header = RunHeader(
            run_id=self._run_id,
            planned_steps=self._planned_steps or PLANNED_STEPS,
            model_fingerprint="" if server is None else server.info.model.fingerprint,
            tokenizer_fingerprint="" if server is None else server.info.tokenizer_fingerprint,
            probes=tuple(self._probes.values()),
            labels_per_step=0 if self._plans is None else self.options.labels_per_step,
            alpha=self.options.alpha,
            rank=self._process.rank,
            world_size=self._process.world_size,
            launch=f"{self._process.launch}+{self._rewinds}" if self._process.launch and self._rewinds else self._process.launch,
        )
        if self._writer is None:
            keeps = self.options.texts or self.options.ids
            self._writer = RecordWriter(
                self._folder, header, on_error=self.options.on_error, keep_texts=keeps, kept_steps=self.options.kept_steps
            )
        elif self._header is not None and replace(header, started=self._header.started) != self._header:
            self._writer.append([header])
        self._header = header
        if self._plans is not None:
            self._plans.probes = header.probes
        return self._writer

    def _record_plan(self, writer: RecordWriter, planned: Sequence[PlannedRollout]) -> None:
        """Writes labels of the rollouts that are chosen to be labelled, or the choice itself if labels come later."""
        rows: list[LabelRow] | list[PlanRow]
        if self.options.checker is not None:
            rows = labels_by_checker(self.options.checker, planned, on_error=self.options.on_error)
        else:
            rows = [
                PlanRow(
                    step=each.recorded.row.step,
                    rollout=each.recorded.row.rollout,
                    probe=each.probe,
                    reading=each.reading,
                    stratum=each.stratum,
                    inclusion=each.inclusion,
                    floor=each.floor,
                )
                for each in planned
            ]
        writer.append(rows)
        if self._activations is not None:
            chosen = [each.recorded for each in planned]
            self._to_read += [TextToRead(each.row.step, each.row.rollout, False, each.rollout, each.reading_ids) for each in chosen]

    def _warn_once(self, problem: str) -> None:
        self._log_once(logging.WARNING, problem, problem)

    def _log_once(self, level: int, problem: str, kind: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.log(level, "%s", problem)

    def _described(self, column: _Column, columns: Sequence[_Column], server: ServerFacts) -> RecordedProbe:
        """Returns the description of a probe for the record's header, with the thresholds of all signals (rules from probe scores to
        rewards) that read it.
        """
        readers = [each.bound for each in columns if each.key == column.key]
        thresholds: dict[str, float] = {}
        for bound in sorted(readers, key=lambda each: each.signal.reading != FROZEN):
            name = _name(bound.reduction)
            if not np.isnan(bound.threshold):
                first = thresholds.setdefault(name, bound.threshold)
                if first != bound.threshold:
                    thresholds[f"{bound.signal.reading}/{name}"] = bound.threshold
        loaded = next((probe for probe in server.probes if probe.key == column.bound.probe), None)
        if loaded is not None and loaded.output_per is OutputPer.TOKEN and _name(_MAX) not in thresholds:
            calibrated = BoundSignal.to(replace(_plain(column.bound.signal), reduction=_MAX), loaded).threshold
            if not np.isnan(calibrated):
                thresholds[_name(_MAX)] = calibrated
        if not thresholds:
            self._warn_once(f"record: {column.key} has no threshold, and cannot be audited; give its signal one, or calibrate the probe")
        if all(bound.signal.probe in self.options.held_out for bound in readers):
            role = "held_out"
        else:
            role = "monitor" if all(bound.signal.mode is Mode.MONITOR for bound in readers) else "reward"
        pin = column.bound.pin
        return RecordedProbe(
            key=column.key, graph_sha256=pin.graph_sha256, manifest_sha256=pin.manifest_sha256, role=role, thresholds=thresholds
        )

    def _rows(
        self,
        rollouts: Sequence[Rollout],
        names: Sequence[str],
        batch: BatchSignals | None,
        outcome: Outcome,
        columns: Sequence[_Column],
        task_rewards: Floats | None,
        step: int,
    ) -> Iterator[RolloutRow]:
        readings = {} if batch is None else batch.readings
        steps = {name: reading.step for name, reading in readings.items() if name != FROZEN and reading.step is not None}
        for index, rollout in enumerate(rollouts):
            yield RolloutRow(
                step=step,
                rollout=rollout.name or names[index],
                prompt=_digest(rollout.prompt)[:16],
                group=None if rollout.group is None else str(rollout.group),
                scores={} if batch is None else _scores(batch, index, columns),
                reading_steps=steps or None,
                tokens=None if isinstance(rollout.completion, str) else len(rollout.completion),
                task_reward=None if task_rewards is None else float(task_rewards[index]),
                total_reward=None if task_rewards is None else float(outcome.rewards[index]),
                policy_logprob=rollout.logprob if rollout.logprob is not None and np.isfinite(rollout.logprob) else None,
                text_sha256=f"sha256:{_digest(rollout.prompt, rollout.completion)}",
                decisions=_decisions(outcome, index) or None,
                **self._kept(rollout, batch, index, columns),
            )

    def _kept(self, rollout: Rollout, batch: BatchSignals | None, index: int, columns: Sequence[_Column]) -> dict[str, Any]:
        """Returns the fields of a rollout's row that are recorded only if they are asked for: texts, token ids and the scores of tokens."""
        kept: dict[str, Any] = {}
        if self.options.ids:
            kept |= {
                field: ids.tolist()
                for field, ids in (("prompt_ids", rollout.prompt), ("completion_ids", rollout.completion))
                if isinstance(ids, np.ndarray)
            }
        if batch is None or not columns:
            return kept
        if self.options.token_scores:
            kept["token_scores"] = _token_scores(batch, index, columns)
        if self.options.texts:
            answer = batch.answers.of_rollout(index, columns[0].bound.signal.mask)  # type: ignore[arg-type] # parsed when it was made
            if answer is not None and answer.completion_texts is not None:
                kept |= self._texts("".join(answer.prompt_texts or ()), answer.completion_texts)
        return kept

    def _texts(self, prompt: str, pieces: Sequence[str]) -> dict[str, Any]:
        """Returns the texts of a rollout as they are kept, none of them if the user's function fails. The texts of single tokens are kept
        only if together they are the redacted text: a name of several tokens shows in none of them alone.
        """
        redact = self.options.redact or (lambda text: text)
        try:
            kept: dict[str, Any] = {"prompt_text": redact(prompt), "completion_text": redact("".join(pieces))}
            redacted = [redact(piece) for piece in pieces]
            return kept | ({"completion_pieces": redacted} if "".join(redacted) == kept["completion_text"] else {})
        except Exception as error:
            if self.options.on_error == "raise":
                raise
            self._warn_once(f"record.redact: it failed ({error!r}), and the texts of such rollouts are not kept")
            return {}


def _reading_ids(batch: BatchSignals) -> dict[str, str]:
    """Returns the ids of the readings (whose activations the probes read) that gave the scores of a batch, by name; empty text for the
    frozen model.
    """
    return {name: "" if name == FROZEN else batch.readings[name].id for name in batch.answers.readings}


def _decisions(outcome: Outcome, index: int) -> dict[str, dict[str, Any]]:
    """Returns what the stages of each cascade said of a rollout, keyed by the signal (rule from probe scores to rewards)."""
    decisions = {name: decisions[index] for name, decisions in outcome.decisions.items()}
    return {name: dict(vars(decision)) for name, decision in decisions.items() if decision is not None}


def _columns(batch: BatchSignals) -> list[_Column]:
    """Returns the probes of some signals (rules from probe scores to rewards), one column for each signal, with the keys under which their
    scores are recorded.

    Signals of one probe share a key. A label that is not the probe's first has a key of its own, and so have signals that count other
    tokens than the signal before, since their scores are others.
    """
    columns: list[_Column] = []
    masks: dict[str, object] = {}
    for values in batch.signals:
        bound = values.bound
        key = f"{bound.probe}/{bound.signal.label}" if bound.label else bound.probe
        if masks.setdefault(key, bound.signal.mask) != bound.signal.mask:
            key = f"{key}/{bound.signal.name}"
        columns.append(_Column(key, bound, () if bound.reduction is None else (bound.reduction, _MAX)))
    return columns


def _scores(batch: BatchSignals, index: int, columns: Sequence[_Column]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns the scores of a rollout, keyed by probe, reading (whose activations the probe read) and reduction; those that are missing are
    left out.
    """
    answers = batch.answers
    found: dict[str, dict[str, dict[str, float]]] = {}
    for column in columns:
        for reading in answers.readings:
            scores = answers.of_probe(index, column.bound, reading)
            if scores is None:
                continue
            for reduction in column.reductions or (None,):
                place = 0 if reduction is None else answers.reductions.index(reduction)
                value = scores.at(0, place, column.bound.label)
                if value is not None:
                    found.setdefault(column.key, {}).setdefault(reading, {})[_name(reduction)] = value
    return found


def _token_scores(batch: BatchSignals, index: int, columns: Sequence[_Column]) -> dict[str, dict[str, list[float]]]:
    """Returns the scores of a rollout's tokens, keyed by probe and reading (whose activations the probe read)."""
    found: dict[str, dict[str, list[float]]] = {}
    for column in columns:
        for reading in batch.answers.readings:
            scores = batch.answers.of_probe(index, column.bound, reading)
            if scores is not None and scores.tokens is not None:
                found.setdefault(column.key, {})[reading] = scores.tokens[:, column.bound.label].astype(np.float64).round(4).tolist()
    return found


def _plain(signal: ProbeSignal) -> ProbeSignal:
    """Returns a signal (rule from probe scores to rewards) that only reads the same probe and label of the frozen model."""
    return ProbeSignal(signal.probe, mode=Mode.MONITOR, label=signal.label)


def _name(reduction: Reduction | None) -> str:
    return _OF_ROLLOUT if reduction is None else str(reduction)


def _digest(*parts: TokenIds | str | Text | Chat) -> str:
    """Returns the SHA-256 digest, in hexadecimal digits, of token ids, texts and conversations, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Chat):
            data = json.dumps([[message.role, message.content] for message in part.messages]).encode()
        elif isinstance(part, (str, Text)):
            data = (part if isinstance(part, str) else part.text).encode("utf-8", "surrogatepass")
        else:
            data = np.asarray(part, "<i8").tobytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
