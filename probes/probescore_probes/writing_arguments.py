"""Checks the arguments of ``write_probe``, which writes a probe file, before anything is computed: first each argument alone, then pairs
that may conflict.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from probescore.types import ScoreUnit, Tap
from probescore_audit import Auroc, CalibratedThreshold
from probescore_probes import arguments
from probescore_probes.exporting import ProbeFunction
from probescore_probes.reference import ReferenceModel
from probescore_server.probes.format.graph import CU_SEQLENS, POSITIONS, GraphInputs
from probescore_server.probes.format.manifest import CalibrationRecord, Context, Evaluation, FollowUp, Tolerance, Training

_Given = Any  # whatever an author hands over
_Record = TypeVar("_Record", CalibrationRecord, Evaluation)

_NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
_VERSION = r"[0-9A-Za-z][0-9A-Za-z._+-]{0,31}"
_EXACT = (torch.float32, torch.float64)


def place(path: _Given) -> Path:
    """Returns an argument as a path to which a file can be written.

    Raises:
        TypeError: the value is not a path.
        ValueError: the path is a directory, or its parent directory does not exist or is not writable by this user.
    """
    if not isinstance(path, (str, Path)):
        raise TypeError(f"path: {arguments.kind_of(path)} ({arguments.shown(path)}); give the path of the file to write, as text or Path")
    try:
        is_directory, folder = Path(path).is_dir(), Path(path).parent
        in_directory = folder.is_dir()
    except OSError as error:  # the name is too long
        why = error.strerror or type(error).__name__
        raise ValueError(f"path: {arguments.shown(str(path))} cannot be a file ({why}); give a plain, shorter name") from None
    if "\0" in str(path):
        raise ValueError(f"path: {str(path)!r} has a NUL in it; give a plain name")
    if not str(path) or is_directory:
        what = "a directory" if str(path) else "empty"
        raise ValueError(f"path: {str(path)!r} is {what}; give the path of the file to write, such as 'probe.onnx'")
    if not in_directory:
        raise ValueError(f"path: {str(path)!r} lies in {str(folder)!r}, which is no directory; make it first")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"path: {str(path)!r} lies in {str(folder)!r}, where this user cannot write; give another place")
    return Path(path)


def check_names(name: _Given, version: _Given, **texts: _Given) -> None:
    """Checks the name and the version of a probe, and its texts for people, such as its description.

    Raises:
        TypeError: an argument is not text.
        ValueError: the name or the version has characters that a manifest does not allow.
    """
    lowered = name.lower() if isinstance(name, str) else ""
    such_as = f", such as {lowered!r}" if lowered != name and _matches(_NAME, lowered) else ""
    arguments.named(name, "name", _NAME, f"1 to 64 of a-z, 0-9, '.', '_' and '-', a letter or digit first{such_as}")
    arguments.named(
        version, "version", _VERSION, "1 to 32 letters, digits, '.', '_', '+' and '-' as text, a letter or digit first, such as '1'"
    )
    for argument, value in texts.items():
        arguments.text(value, argument)


def check_reference(reference: _Given) -> None:
    """Checks that a value is a reference model that is exact enough for golden scores (those of the author's code).

    Raises:
        TypeError: the value is not a ``ReferenceModel``.
        ValueError: the model is not in float32 or float64.
    """
    arguments.of_kind(reference, "reference", ReferenceModel, "give ReferenceModel.load(…) of the model that the probe was fitted on")
    if reference.model.dtype not in _EXACT:
        raise ValueError(
            f"reference: loaded in {str(reference.model.dtype).removeprefix('torch.')}, whose rounding golden vectors would hold; "
            "load it for writing with ReferenceModel.load(…, dtype=torch.float32)"
        )


def read_taps(taps: _Given, reference: ReferenceModel) -> tuple[Tap, ...]:
    """Returns the taps (points in the model) at which a probe reads activations.

    Raises:
        TypeError: the value is not a list of taps.
        ValueError: the model has no such tap, or a tap is given twice.
    """
    read = arguments.taps(taps, reference.reference.num_hidden_layers)
    for index, tap in enumerate(read):
        if tap in read[:index]:
            raise ValueError(f"taps[{index}]: {tap} for the second time; give each tap once")
    return tuple(read)


def read_probe(probe: _Given, taps: Sequence[Tap], reference: ReferenceModel, labels: Sequence[str], context: Context) -> ProbeFunction:
    """Returns the probe after a check that its input width fits the taps (points in the model) and its scores fit the labels.

    The returned probe also checks the number of scores whenever it scores a golden rollout (stored with the scores of the author's code).

    Raises:
        TypeError: the value is not a ``ProbeFunction``.
        ValueError: the probe takes rows of another width than the taps have, or gives another number of scores than there are labels.
    """
    makers = {torch.nn.Module: "torch_probe(module, unit=…)", np.ndarray: "linear_probe(weight)", torch.Tensor: "linear_probe(weight)"}
    if not isinstance(probe, ProbeFunction):
        maker = next((made for kind, made in makers.items() if isinstance(probe, kind)), None)
        maker = maker or ("sklearn_probe(estimator)" if hasattr(probe, "fit") else "linear_probe, torch_probe, sklearn_probe or onnx_probe")
        raise TypeError(f"probe: {arguments.kind_of(probe)} ({arguments.shown(probe)}); give what {maker} returns")
    width = reference.reference.hidden_size * len(taps)
    if probe.width not in (None, width):
        rows = f"{', '.join(map(str, taps))} of this model: {width}"
        raise ValueError(
            f"probe: a mismatch of widths: it takes rows of {probe.width} numbers, and those of {rows}; "
            "give the taps that it was fitted on, or the model"
        )
    if probe.columns is not None:
        _check_columns(probe.columns, labels)
    about = probe.classes[-(probe.columns or 0) :]
    for index, (label, known) in enumerate(zip(labels, about, strict=False)):
        if label != known and label in probe.classes:
            raise ValueError(f"labels[{index}]: {label!r} is another class than that of this column, {known!r}; give labels={list(about)}")

    def score(inputs: GraphInputs) -> NDArray[Any]:
        rows = next(len(array) for name, array in inputs.items() if name not in (CU_SEQLENS, POSITIONS))
        try:
            given = probe.score(inputs)
        except Exception as error:  # raised by the author's code
            shapes = ", ".join(f"{name} {array.shape}" for name, array in inputs.items())
            raise ValueError(
                f"probe: its code failed ({type(error).__name__}) on a golden rollout: {shapes}; it must take these"
            ) from error
        scores = arguments.real(given, "probe: what its code gives", "scores (tokens, labels)")
        wanted = "one row in all" if context.kind == "rollout" else "one row for each"
        if scores.ndim not in (1, 2) or len(scores) != (1 if context.kind == "rollout" else rows):
            raise ValueError(f"probe: its code gave scores {scores.shape} for {rows} tokens; give {wanted}, (rows, labels)")
        _check_columns(1 if scores.ndim == 1 else scores.shape[1], labels)
        return scores

    return replace(probe, score=score)


def _check_columns(columns: int, labels: Sequence[str]) -> None:
    if columns != len(labels):
        names = "1 name" if len(labels) == 1 else f"{len(labels)} names"
        each = "1 score" if columns == 1 else f"{columns} scores"
        raise ValueError(
            f"labels: {names} ({', '.join(map(repr, labels))}), and the probe gives {each} each time; give labels=[…] with {columns}"
        )


def read_labels(labels: _Given) -> tuple[str, ...]:
    """Returns a probe's labels, which are the names of its score columns.

    Raises:
        TypeError: the value is not a list of texts.
        ValueError: there are no names, or two names are the same.
    """
    named = arguments.sequence(labels, "labels", "names", f'["{labels}"]' if isinstance(labels, str) else '["cheating"]')
    if not named:
        raise ValueError('labels: none; give a name for each column of scores, such as ["cheating"]')
    for index, label in enumerate(named):
        arguments.text(label, f"labels[{index}]")
        if label in named[:index]:
            raise ValueError(f"labels[{index}]: {label!r} for the second time; give names that differ")
    return tuple(named)


def read_golden(golden: _Given, reference: ReferenceModel) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Returns the golden rollouts (stored with the scores of the author's code), at least one, as ``(prompt_ids, completion_ids)``.

    Raises:
        TypeError: a rollout is not a pair of token ids.
        ValueError: there are no rollouts, an id is not one of the model's text tokens, or a completion is empty.
    """
    read = list(arguments.rollouts(golden, "golden", reference.vocabulary))
    if not read:
        raise ValueError("golden: no rollouts; give a few real ones of ten to fifty tokens, [(prompt_ids, completion_ids), …]")
    return read


def check_parts(
    context: _Given,
    follow_up: _Given,
    training: _Given,
    tolerance: _Given,
    reference: ReferenceModel,
) -> None:
    """Checks that the parts of a probe's manifest (description in its file) that its author gives have the right types and fit the
    reference model.

    Raises:
        TypeError: a part has the wrong type.
        ValueError: an id of the follow-up, the tokens appended to a completion, is not one of the model's text tokens.
    """
    arguments.of_kind(context, "context", Context, 'give Context(kind="pointwise" | "causal" | "rollout", …)')
    for value, argument, kind in (
        (follow_up, "follow_up", FollowUp),
        (training, "training", Training),
        (tolerance, "tolerance", Tolerance),
    ):
        if value is not None:
            arguments.of_kind(value, argument, kind, f"give {kind.__name__}(…) or None")
    if follow_up is not None:
        arguments.token_ids(follow_up.token_ids, "follow_up.token_ids", reference.vocabulary)


def read_calibrations(calibrations: _Given, labels: Sequence[str]) -> tuple[CalibrationRecord, ...]:
    """Returns a probe's thresholds in the form that the manifest (description) in its file stores, each for one label or for all labels.

    Raises:
        TypeError: an entry is not a threshold.
        ValueError: a threshold's label is not one of the labels.
    """
    records = []
    for index, given in enumerate(arguments.sequence(calibrations, "calibrations", "records", "[calibrate(…)]")):
        name = f"calibrations[{index}]"
        arguments.of_kind(given, name, (CalibratedThreshold, CalibrationRecord), "give what calibrate(…) returns")
        record = given if isinstance(given, CalibrationRecord) else _recorded(given, name, CalibrationRecord)
        if record.label and record.label not in labels:
            raise ValueError(f"{name}.label: {record.label!r}; give one of the labels {', '.join(map(repr, labels))}")
        records.append(record)
    return tuple(records)


def read_evaluations(evaluations: _Given) -> tuple[Evaluation, ...]:
    """Returns measured qualities of a probe, such as an AUROC, in the form that the manifest (description) in its file stores.

    Raises:
        TypeError: an entry is not a measured quality.
    """
    records = []
    for index, given in enumerate(arguments.sequence(evaluations, "evaluations", "records", "[evaluate_auroc(…)]")):
        name = f"evaluations[{index}]"
        arguments.of_kind(given, name, (Auroc, Evaluation), "give what evaluate_auroc(…) returns")
        records.append(given if isinstance(given, Evaluation) else _recorded(given, name, Evaluation, metric="auroc"))
    return tuple(records)


def _recorded(estimate: Auroc | CalibratedThreshold, argument: str, kind: type[_Record], **known: _Given) -> _Record:
    """Converts an AUROC or a threshold that was estimated from labelled rollouts to the part of a probe's manifest (description in its
    file) whose fields have the same names as those of the estimate.

    Raises:
        ValueError: the manifest cannot hold one of the values; the error names the value.
    """
    try:
        return kind(**known, **{field.name: getattr(estimate, field.name) for field in fields(estimate)})
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None


def read_unit(reduce_on: _Given, probe: ProbeFunction) -> ScoreUnit:
    """Returns the unit of the scores that a server sends for a probe: the given unit, or the probe's own unit if none is given.

    Raises:
        ValueError: scores in the given unit cannot be computed from the probe's scores. Only probabilities can, from logits.
    """
    if reduce_on is None:
        return probe.unit
    unit = arguments.unit(reduce_on, "reduce_on")
    if unit is not probe.unit and (probe.unit, unit) != (ScoreUnit.LOGIT, ScoreUnit.PROBABILITY):
        raise ValueError(f"reduce_on: {unit.value!r} cannot be computed from a probe that gives {probe.unit.value!r}; leave it out")
    return unit


def read_reduction(reduction: _Given, context: Context) -> str | None:
    """Returns a probe's default reduction (from token scores to one score of a rollout) as text; ``None`` for a probe that pools by itself.

    Raises:
        ValueError: there is no reduction of that name, or a reduction is given for a probe that pools by itself.
    """
    if context.kind == "rollout":
        if reduction is not None:
            raise ValueError(f"reduction: {arguments.shown(reduction)} for a probe that pools by itself; leave it out")
        return None
    return "mean" if reduction is None else arguments.reduction(reduction, "reduction")


def _matches(pattern: str, written: str) -> bool:
    try:
        arguments.named(written, "", pattern, "")
    except ValueError:
        return False
    return True
