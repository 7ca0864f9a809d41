"""Defines what a ``ProbeScorer`` writes into the record of a training run."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Union

from probescore_adapters.rollouts import Rollout

Checker = Callable[[Rollout], Union[bool, str, None]]
"""Function that says whether a rollout has the behaviour: ``True``, ``False``, or ``"unsure"``."""


@dataclass(frozen=True)
class PooledActivations:
    """What a ``ProbeScorer`` records of activations: of the rollouts that are to be labelled, and of anchors whenever they are scored, on
    every reading (whose activations the probes read) of the signals. From these the audit fits fresh probes, and says whether one would
    still see the behaviour.

    Attributes:
        tap: where in the model they are read, such as ``"resid_post.14"``; the server's setting ``allow_activations`` must allow it.
        pool: how the activations of the tokens that count under a rollout's own mask are pooled: ``"mean"``, ``"last"`` or ``"max"`` of
            each feature.
        seconds: seconds that reading them may take after a batch; then nothing more is asked for, and an RPC under way has as long again.
            What takes longer is not recorded.

    Raises:
        ValueError: a field has none of the values above.
    """

    tap: str
    pool: str = "mean"
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if not isinstance(self.tap, str) or not self.tap or any(mark in self.tap for mark in "*?[, "):
            raise ValueError(f"record.activations.tap: expected the name of one tap, such as 'resid_post.14', got {self.tap!r:.80}")
        if self.pool not in ("mean", "last", "max"):
            raise ValueError(f"record.activations.pool: expected 'mean', 'last' or 'max', got {self.pool!r:.80}")
        seconds = self.seconds
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not math.isfinite(seconds) or seconds <= 0:
            raise ValueError(f"record.activations.seconds: expected seconds above 0, got {seconds!r:.80}")

    @classmethod
    def of(cls, given: str | Mapping[str, Any] | PooledActivations) -> PooledActivations:
        """Returns what is recorded of activations from what a user gives: the name of a tap, a dictionary of the fields, or the object."""
        if isinstance(given, cls):
            return given
        if isinstance(given, str):
            return cls(given)
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or "tap" not in given or (unknown := [name for name in given if name not in known]):
            problem = f"unknown {unknown[0]!r}" if isinstance(given, Mapping) and "tap" in given else f"got {given!r:.80}"
            raise ValueError(f"record.activations: expected the name of a tap, or a dictionary of {', '.join(known)}; {problem}")
        return cls(**given)


@dataclass(frozen=True)
class RecordOptions:
    """What a ``ProbeScorer`` writes into the record of a training run.

    Attributes:
        directory: folder of the record, which all processes of the run share; it is made if it does not exist.
        run_id: name of the run, equal for all its processes and whenever it is resumed; "" = that of the scorer, or else the folder's name.
        planned_steps: number of training steps that the run is planned for; ``None`` = as the trainer says, if its adapter knows.
        rollouts_per_step: number of rollouts that this process scores in a training step, for trainers that do not say which step a rollout
            is of: steps are then counted. ``None`` = the step is given with each batch.
        late_steps: number of training steps by which rollouts may come later than those of a newer step, as in asynchronous training. A
            rollout of an older step means that training has gone back to that step, and goes on from there.
        held_out: probes, as the signals name them, whose scores nothing in training depends on; their signals are of the mode ``monitor``.
        texts: whether prompts and completions are kept as text, and the text of each token; the server decodes them.
        ids: whether their token ids are kept.
        token_scores: whether the scores of each token are kept.
        kept_steps: number of the latest training steps whose texts, token ids and scores of tokens are kept; those of earlier ones are
            deleted as the run goes on. ``None`` = all.
        redact: function from a text to the text that is kept in its place, such as one without names; called for prompts, completions and
            the texts of tokens, which are kept only if together they are the redacted completion. Token ids cannot be kept beside it.
            ``None`` = texts are kept as they are.
        checker: function from a rollout to whether it has the behaviour (``True``, ``False``, or ``"unsure"``), which labels rollouts of
            each step as ``probescore labels plan`` would choose them. ``None`` = nothing is labelled here.
        labels_per_step: number of labels that the checker gives in a training step, or of rollouts whose activations are recorded for later
            labels, at least 4, all processes together.
        batches_per_step: number of batches that this process scores in a training step; the labels of a step are given when the last of
            them is recorded. 0 = when the next step begins, or the scorer is closed.
        anchors: file of anchors, which are texts with a known label, as ``probescore anchors make`` writes it; the first process scores
            them again and again, with the probes and readings of the signals. ``None`` = there are none.
        anchors_every: number of training steps from one scoring of the anchors to the next.
        activations: which pooled activations are recorded of the rollouts that are labelled, and of anchors: ``PooledActivations``, or the
            name of a tap (place in the model), such as ``"resid_post.14"``, for their mean. Without a checker the rollouts are those that
            ``probescore labels plan`` and ``labels judge`` then choose. ``None`` = none are recorded.
        alpha: largest chance that any alarm of the audit is false.
        on_error: what happens if the record cannot be written, such as on a full disk: ``"log"`` = an error is logged, rows are lost, and
            training goes on; ``"raise"`` = the error ends the run.

    Raises:
        ValueError: a field has none of the values above.
    """

    directory: Union[str, os.PathLike[str]]
    run_id: str = ""
    planned_steps: Union[int, None] = None
    rollouts_per_step: Union[int, None] = None
    late_steps: int = 0
    held_out: Collection[str] = ()
    texts: bool = False
    ids: bool = False
    token_scores: bool = False
    kept_steps: Union[int, None] = None
    redact: Union[Callable[[str], str], None] = None
    checker: Union[Checker, None] = None
    labels_per_step: int = 32
    batches_per_step: int = 1
    anchors: Union[str, os.PathLike[str], None] = None
    anchors_every: int = 20
    activations: Union[PooledActivations, str, Mapping[str, Any], None] = None
    alpha: float = 0.05
    on_error: Literal["log", "raise"] = "log"

    def __post_init__(self) -> None:
        if not isinstance(self.directory, (str, os.PathLike)) or not str(self.directory):
            raise ValueError(f"record.directory: expected the path of a folder, got {self.directory!r}")
        object.__setattr__(self, "directory", Path(self.directory))  # so that options of one folder are equal
        for field in ("planned_steps", "rollouts_per_step", "kept_steps"):
            value = getattr(self, field)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"record.{field}: expected a whole number of at least 1, got {value!r}")
        if isinstance(self.late_steps, bool) or not isinstance(self.late_steps, int) or self.late_steps < 0:
            raise ValueError(f"record.late_steps: expected a whole number of at least 0, got {self.late_steps!r}")
        for field, least in (("labels_per_step", 4), ("batches_per_step", 0), ("anchors_every", 1)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"record.{field}: expected a whole number of at least {least}, got {value!r}")
        if self.anchors is not None and not isinstance(self.anchors, (str, os.PathLike)):
            raise ValueError(f"record.anchors: expected the path of a file, got {self.anchors!r:.80}")
        if self.activations is not None:
            object.__setattr__(self, "activations", PooledActivations.of(self.activations))
        if self.checker is not None and not callable(self.checker):
            raise ValueError(f"record.checker: expected a function from a rollout to its label, got {self.checker!r}")
        if isinstance(self.held_out, str):
            raise ValueError(f"record.held_out: expected a list of probes, got {self.held_out!r}")
        for field in ("texts", "ids", "token_scores"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"record.{field}: expected True or False, got {getattr(self, field)!r}")
        if self.redact is not None and not callable(self.redact):
            raise ValueError(f"record.redact: expected a function from text to text, got {self.redact!r}")
        if self.redact is not None and self.ids:
            raise ValueError("record.ids: token ids can be decoded to the text as it was before record.redact; leave out ids or redact")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 < self.alpha < 1:
            raise ValueError(f"record.alpha: expected a chance in (0, 1), such as 0.05, got {self.alpha!r}")
        if self.on_error not in ("log", "raise"):
            raise ValueError(f"record.on_error: expected 'log' or 'raise', got {self.on_error!r}")

    @classmethod
    def of(cls, given: str | os.PathLike[str] | RecordOptions) -> RecordOptions:
        """Returns options of the record of a training run from what a user gives: a folder, or the options themselves."""
        return given if isinstance(given, cls) else cls(given)  # type: ignore[arg-type] # checked
