"""Defines the rows of a training run's record, and their form as lines of JSON.

A line is a JSON object with the field ``kind``. Fields without a value are left out. A reader ignores fields and kinds that it does not
know, so that fields can be added under one schema version; a version that is higher than its own it refuses.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Union

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probescore.types.shown import shown_table, shown_text, shown_tokens
from probescore_audit.record import bfloat16

SCHEMA_VERSION = 1
WITHDRAWN = "withdrawn"
"""Label of a row that only retracts another, so that the rollout is as if it had not been labelled."""
Scores = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Scores by the key of the probe, the name of the reading, and the reduction; best as logits, since probabilities near 0 and 1 tie."""


@dataclass(frozen=True, kw_only=True)
class RecordedProbe:
    """Description of a probe whose scores the record of a training run has.

    Attributes:
        key: ``name@version``.
        graph_sha256: digest of the probe's ONNX graph.
        manifest_sha256: digest of the probe's manifest (the description in its file), calibrations included.
        role: what its scores are for: ``"reward"``, ``"monitor"``, ``"held_out"`` (the trainer never sees them) or ``"refit"``.
        thresholds: for each reduction that has one, the threshold at or above which a rollout counts as flagged; under
            ``reading/reduction`` the one for a reading (whose activations the probe read) that has another.
    """

    key: str
    graph_sha256: str = ""
    manifest_sha256: str = ""
    role: str = "reward"
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def thresholds_on(self, reading: str) -> dict[str, float]:
        """Returns the thresholds of a probe's scores on a reading (whose activations the probe read), by reduction."""
        own = {name.partition("/")[2]: value for name, value in self.thresholds.items() if name.startswith(f"{reading}/")}
        return {name: value for name, value in self.thresholds.items() if "/" not in name} | own


@dataclass(frozen=True, kw_only=True)
class RunHeader:
    """Description of a training run, as one of its processes knows it; the first line of the process's file in the run's record. A later
    line takes its place if the description changes, such as by a new version of a probe.

    Attributes:
        run_id: the run's name.
        planned_steps: number of training steps that the run is planned for.
        model_fingerprint: fingerprint of the frozen model.
        tokenizer_fingerprint: fingerprint of the model's tokenizer.
        probes: the probes whose scores are recorded.
        labels_per_step: number of labels that are planned for each step; 0 = none.
        alpha: largest chance that any alarm of the run is false.
        rank: number of the process among those of the run.
        world_size: number of the run's processes.
        launch: name of the launch of the training that the process belongs to, equal for all its processes; empty if unknown.
        started: time at which the process began to write, in seconds since 1970.
        schema_version: version of the record's format.
    """

    kind: ClassVar[str] = "header"
    run_id: str
    planned_steps: int
    model_fingerprint: str = ""
    tokenizer_fingerprint: str = ""
    probes: Sequence[RecordedProbe] = ()
    labels_per_step: int = 0
    alpha: float = 0.05
    rank: int = 0
    world_size: int = 1
    launch: str = ""
    started: float = field(default_factory=time.time)
    schema_version: int = SCHEMA_VERSION

    def anew(self) -> RunHeader:
        """Returns the header of a further file of the same training run, such as one of labels, that is begun now."""
        return replace(self, started=time.time())


@dataclass(frozen=True, kw_only=True)
class RolloutRow:
    """Row of a training run's record with one rollout.

    Attributes:
        step: training step.
        rollout: name of the rollout, unique within its step.
        prompt: name of the prompt, equal for rollouts of one prompt.
        group: key of the group whose rewards the trainer compares with each other, if it is not the prompt.
        scores: the probes' scores, keyed by probe, then by reading (which model's activations the probe read), then by reduction.
        reading_steps: training step of the weights of each other reading than the frozen model's, by name, where it is known: a policy is
            not loaded at every step.
        tokens: number of tokens of the completion.
        task_reward: reward of the task alone.
        total_reward: reward that the trainer used.
        policy_logprob: log-probability of the completion under the policy.
        text_sha256: digest of the rollout's text or token ids.
        prompt_text, completion_text: the texts, where the record keeps them.
        prompt_ids, completion_ids: the token ids, where the record keeps them.
        completion_pieces: the text of each token of the completion, where the record keeps texts.
        token_scores: the probes' scores of each token of the completion, keyed by probe, then by reading.
        follow_ups: what was appended to the finished completion and read as a fork of it, where it is recorded: ``text``, ``scores`` by
            probe, reading and reduction, and, with texts, ``pieces`` and ``token_scores``.
        decisions: what was said where a probe was unsure and a judge was to decide, keyed by the trainer's signal: ``probe``, whether the
            probe flags the rollout; ``verdict``, the judge's, empty if it gave none, with the ``reason``; ``flagged``, what the reward went
            by; ``labeller`` and ``labeller_version``, the judge. These verdicts are no labels, since nobody drew their rollouts at random.
    """

    kind: ClassVar[str] = "rollout"
    step: int
    rollout: str
    prompt: str
    scores: Scores
    group: str | None = None
    reading_steps: Mapping[str, int] | None = None
    tokens: int | None = None
    task_reward: float | None = None
    total_reward: float | None = None
    policy_logprob: float | None = None
    text_sha256: str | None = None
    prompt_text: str | None = None
    completion_text: str | None = None
    prompt_ids: Sequence[int] | None = None
    completion_ids: Sequence[int] | None = None
    completion_pieces: Sequence[str] | None = None
    token_scores: Mapping[str, Mapping[str, Sequence[float]]] | None = None
    follow_ups: Sequence[Mapping[str, Any]] | None = None
    decisions: Mapping[str, Mapping[str, Any]] | None = None

    def _repr_html_(self) -> str:
        """Returns what a notebook shows: the scores, and the texts with their tokens coloured by each probe, where the record has them."""
        scores = [
            (probe, reading, reduction, score)
            for probe, readings in self.scores.items()
            for reading, reductions in readings.items()
            for reduction, score in reductions.items()
        ]
        title = f"step {self.step}, rollout {self.rollout} of prompt {self.prompt}"
        parts = [shown_table(["probe", "reading", "reduction", "score"], scores, title)]
        if self.prompt_text is not None:
            parts.append(f'<pre style="white-space:pre-wrap;opacity:.7">{shown_text(self.prompt_text)}</pre>')
        of_tokens = [(probe, *each) for probe, readings in (self.token_scores or {}).items() for each in readings.items()]
        if self.completion_pieces is not None and of_tokens:
            for probe, reading, values in of_tokens:
                parts.append(f"<p>{shown_text(f'{probe} on {reading}')}</p>{shown_tokens(self.completion_pieces, values)}")
        elif self.completion_text is not None:
            parts.append(f'<pre style="white-space:pre-wrap">{shown_text(self.completion_text)}</pre>')
        return "".join(parts)


@dataclass(frozen=True, kw_only=True)
class DetailsRow:
    """Row of a training run's record with those fields of a rollout's row that are long, and may be deleted: its texts, token ids and
    scores of tokens. These rows are in files of their own.
    """

    kind: ClassVar[str] = "details"
    step: int
    rollout: str
    prompt_text: str | None = None
    completion_text: str | None = None
    prompt_ids: Sequence[int] | None = None
    completion_ids: Sequence[int] | None = None
    completion_pieces: Sequence[str] | None = None
    token_scores: Mapping[str, Mapping[str, Sequence[float]]] | None = None
    follow_ups: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class LabelRow:
    """Row of a training run's record with a judgement on one rollout. Rows are never overwritten; one that is wrong is retracted by a later
    one.

    Attributes:
        step: training step of the rollout.
        rollout: name of the rollout.
        label: ``"yes"`` (the behaviour is there), ``"no"`` or ``"unsure"``; ``"withdrawn"`` for a row that only says that the one that it
            retracts was given by mistake.
        text_sha256: digest of the rollout's text, as in its ``RolloutRow``. A label counts only for the rollout that has it: a run that is
            taken up again from an earlier step has other rollouts under the same names.
        source: what gave the label, such as ``"checker"``, ``"judge"`` or ``"person"``.
        labeller: who gave it: a person's name, or a judge's model.
        labeller_version: version of the labeller, such as that of the judge's prompt.
        inclusion: probability with which the rollout was chosen for labelling, in (0, 1]; ``None`` if it was not drawn at random, and
            estimates must leave it out.
        stratum: class of the rollout by score: ``"flagged"``, ``"near"`` or ``"rest"``.
        floor: whether the rollout was drawn at random from all rollouts of its step.
        second: whether this is a second judgement of a rollout.
        population: for a rollout that was chosen after the others of its step, since their labels did not suffice: the number of rollouts
            of the step in its stratum. All labels of this step and stratum then count equally, whatever ``inclusion`` they have.
        span: half-open range of tokens of the completion in which the behaviour is seen.
        spans: all such ranges, where there are several; ``span`` is then the first.
        note: the labeller's remark.
        given: time at which the label was given, in seconds since 1970.
        row: name of this row.
        retracts: name of the row that this one takes the place of.
    """

    kind: ClassVar[str] = "label"
    step: int
    rollout: str
    label: str
    source: str
    text_sha256: str | None = None
    labeller: str = ""
    labeller_version: str = ""
    inclusion: float | None = None
    stratum: str | None = None
    floor: bool = False
    second: bool = False
    population: int | None = None
    span: Sequence[int] | None = None
    spans: Sequence[Sequence[int]] | None = None
    note: str | None = None
    given: float | None = None
    row: str = ""
    retracts: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReferenceRow:
    """Row of a training run's record with the scores of a labelled rollout of the model before training, with which the run is compared.

    Attributes:
        rollout: name of the rollout, unique among these rows.
        positive: whether the rollout has the behaviour.
        random: whether the rollout was drawn at random, so that it counts for how frequent the behaviour was before training; false for
            rollouts that were chosen for their label or their score.
        scores: the probes' scores, keyed by probe, then by reading (which model's activations the probe read), then by reduction. Before
            training every reading is that of the frozen model, so that ``"frozen"`` is enough.
    """

    kind: ClassVar[str] = "reference"
    rollout: str
    positive: bool
    scores: Scores
    random: bool = False


@dataclass(frozen=True, kw_only=True)
class AnchorRow:
    """Row of a training run's record with the scores of an anchor, which is a text with a known label that is scored again and again during
    the run.

    Attributes:
        step: training step at which the anchor was scored.
        anchor: name of the text.
        positive: whether the text has the behaviour.
        scores: the probes' scores, keyed by probe, then by reading (which model's activations the probe read), then by reduction.
        text_sha256: digest of the text or token ids; an anchor whose text is another is another anchor.
        reading_ids: for each reading but the frozen model, the digest of the weights that were read; ``None`` if there is none.
    """

    kind: ClassVar[str] = "anchor"
    step: int
    anchor: str
    positive: bool
    scores: Scores
    text_sha256: str | None = None
    reading_ids: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class ActivationRow:
    """Row of a training run's record with the pooled activation of a rollout or of an anchor, from which the audit finds out whether a
    fresh probe would see the behaviour. A few hundred are enough: those of labelled rollouts, or of anchors.

    Attributes:
        step: training step of the rollout, or at which the anchor was scored.
        reading: whose activations these are: ``"frozen"``, or the policy's reading.
        values: the activation as text: bfloat16, little-endian, in base64.
        rollout: name of the rollout; ``None`` for an anchor.
        anchor: name of the anchor; ``None`` for a rollout.
        tap: where in the model it was read, such as ``"resid_post.14"``. Only activations of one tap and pooling are compared.
        pool: how the activations of the tokens were pooled, such as ``"mean"``; empty = unknown.
        reading_id: id of the version of the reading, ``"sha256:…"``; ``None`` for the frozen model, or if it is unknown.
    """

    kind: ClassVar[str] = "activation"
    step: int
    reading: str
    values: str
    rollout: str | None = None
    anchor: str | None = None
    tap: str = ""
    pool: str = ""
    reading_id: str | None = None

    @classmethod
    def of(
        cls,
        values: ArrayLike,
        *,
        step: int,
        reading: str,
        rollout: str | None = None,
        anchor: str | None = None,
        tap: str = "",
        pool: str = "",
        reading_id: str | None = None,
    ) -> ActivationRow:
        """Returns the row of a pooled activation, such as the mean over a completion's tokens, ``(d,)``.

        Raises:
            ValueError: a number is not finite, or it is not said of which rollout or anchor they are.
        """
        numbers = np.asarray(values, np.float32)
        if numbers.ndim != 1 or not np.isfinite(numbers).all():
            raise ValueError(f"values: an array of shape {numbers.shape}; give one number for each dimension, all finite")
        if (rollout is None) == (anchor is None):
            raise ValueError("rollout, anchor: give one of them, of which the activation is")
        return cls(
            step=step,
            reading=reading,
            values=bfloat16.to_text(numbers),
            rollout=rollout,
            anchor=anchor,
            tap=tap,
            pool=pool,
            reading_id=reading_id,
        )

    def vector(self) -> NDArray[np.float32]:
        """Returns the pooled activation, ``(d,)``."""
        return bfloat16.from_text(self.values)


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """Row of a training run's record with a rollout that was chosen to be labelled, written by a trainer that records more of the rollouts
    that a label is to come for, such as their activations. It makes the plan of its step: nothing else is to be chosen there later.

    Attributes:
        step: training step of the rollout.
        rollout: name of the rollout.
        probe: key of the probe by whose scores labels are shared out.
        reading: reading (whose activations the probe reads) of these scores.
        stratum: class of the rollout by score: ``"flagged"``, ``"near"`` or ``"rest"``.
        inclusion: probability with which the rollout was chosen, in (0, 1].
        floor: whether the rollout was drawn at random from all rollouts of its step.
    """

    kind: ClassVar[str] = "plan"
    step: int
    rollout: str
    probe: str
    reading: str
    stratum: str
    inclusion: float
    floor: bool = False


@dataclass(frozen=True, kw_only=True)
class LabellerRow:
    """Row of a training run's record that says how a labeller judged rollouts whose label was known.

    Attributes:
        source: what gave the labels, such as ``"judge"`` or ``"person"``.
        labeller: who gave them: a person's name, or a judge's model.
        labeller_version: version of the labeller, such as that of the judge's prompt.
        negatives: number of rollouts without the behaviour that were shown.
        negatives_right: number of these that were labelled ``"no"``.
        positives: number of rollouts with the behaviour that were shown.
        positives_right: number of these that were labelled ``"yes"``.
    """

    kind: ClassVar[str] = "labeller"
    source: str
    labeller: str
    negatives: int
    negatives_right: int
    positives: int
    positives_right: int
    labeller_version: str = ""


Row = Union[RunHeader, RolloutRow, DetailsRow, LabelRow, ReferenceRow, AnchorRow, ActivationRow, PlanRow, LabellerRow]
KINDS: Mapping[str, type[Row]] = {
    kind.kind: kind for kind in (RunHeader, RolloutRow, DetailsRow, LabelRow, ReferenceRow, AnchorRow, ActivationRow, PlanRow, LabellerRow)
}
DETAILS = tuple(each.name for each in fields(DetailsRow) if each.name not in ("step", "rollout"))
TEXTS = ("prompt_text", "completion_text", "prompt_ids", "completion_ids", "completion_pieces", "follow_ups")

# Looked up once: a run has 100,000 rows and more.
_NAMES = {name: frozenset(each.name for each in fields(kind)) for name, kind in KINDS.items()}
_DEFAULTS = {name: tuple((each.name, each.default) for each in fields(kind)) for name, kind in KINDS.items()}


def to_line(row: Row) -> str:
    """Returns a row of a training run's record as one line of JSON, without the line's end.

    Raises:
        ValueError: a number is NaN or infinite, for which JSON has no form.
    """
    values = {name: value for name, default in _DEFAULTS[row.kind] if (value := getattr(row, name)) is not None and value != default}
    if isinstance(row, RunHeader):
        values |= {"schema_version": row.schema_version, "probes": [vars(probe) for probe in row.probes]}
    return json.dumps({"kind": row.kind, **values}, allow_nan=False, separators=(",", ":"), ensure_ascii=False, default=_as_python)


def from_object(values: Mapping[str, Any]) -> Row | None:
    """Returns the row of a training run's record that a parsed line of JSON contains; ``None`` if the row's kind is not known.

    Raises:
        TypeError: a field that the kind requires is missing.
    """
    kind = KINDS.get(values["kind"])
    if kind is None:
        return None
    names = _NAMES[kind.kind]
    known = {name: value for name, value in values.items() if name in names}
    if kind is RunHeader:
        names = frozenset(each.name for each in fields(RecordedProbe))
        known["probes"] = tuple(
            RecordedProbe(**{name: value for name, value in probe.items() if name in names}) for probe in known.get("probes", ())
        )
    return kind(**known)


def _as_python(value: object) -> object:
    """Returns a numpy number or array as a Python number or list, for JSON."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"a row holds a {type(value).__name__}; give numbers, text and lists")
