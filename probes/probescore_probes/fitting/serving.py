"""Writes a fitted probe to its file and serves that file with an engine, so that reported numbers are those of the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from probescore.types import CompletionStatus, ScoreUnit
from probescore_audit import Estimate
from probescore_probes.exporting import ProbeFunction
from probescore_probes.fitting.labelled_rollouts import Example
from probescore_probes.reference import ReferenceModel
from probescore_probes.serve_check import BOUND
from probescore_probes.writing import write_probe
from probescore_server.engine.engine import Engine
from probescore_server.errors import ProbeRefused
from probescore_server.probes.format.manifest import CalibrationRecord, Context, Evaluation, Golden, Training
from probescore_server.probes.format.probe_file import ProbeFile, read_probe_file, write_probe_file
from probescore_server.probes.loading.golden_check import SAME_SCORE

GoldenIds = tuple[NDArray[np.int32], NDArray[np.int32]]

GOLDEN, GOLDEN_TRIED = 4, 12
"""Number of golden rollouts; of a probe that pools, which has one score each, they are chosen among more."""
_CLEARLY_APART = 0.1
"""Difference between scores of neighbouring places, in standard deviations, that a coarse dtype shows."""
_LONGEST_GOLDEN = 512
MOST_ALONE = 100
"""Limits how many rollouts are served one at a time."""


@dataclass(frozen=True, eq=False)
class FittedProbe:
    """A fitted probe, with the settings that its file needs so that served scores equal fitted scores.

    Attributes:
        kind: name of the kind of probe.
        taps: names of the taps (places in the model), in the order in which the function takes their activations.
        reduction: the only reduction that the file allows; ``None`` for a probe that pools by itself.
        function: the probe's code and its ONNX graph.
        method: description of the kind of probe, for people.
    """

    kind: str
    taps: tuple[str, ...]
    reduction: str | None
    function: ProbeFunction
    method: str

    @property
    def context(self) -> Context:
        """Returns the context (what a score depends on) that a probe file states: each token alone if a reduction is fixed, else the whole
        rollout.
        """
        return Context(kind="rollout") if self.reduction is None else Context()


@dataclass(frozen=True, eq=False)
class ServedProbe:
    """A probe file that an engine serves, with the scores that it serves.

    Attributes:
        engine: the engine, with this one probe.
        file: path of the probe file.
        scores: served scores of all examples, ``(n,)``.
    """

    engine: Engine
    file: Path
    scores: NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """The differences between the scores that an engine serves and those that were fitted.

    Attributes:
        largest, median: largest and median |fitted − served|, divided by the standard deviation of the fitted scores.
        bound: limit on the largest difference.
        rollouts: number of rollouts that were compared.
    """

    largest: float
    median: float
    bound: float
    rollouts: int


@dataclass(frozen=True)
class BatchRounding:
    """The differences between the scores of rollouts that are served one at a time and in one call, which rounding alone causes.

    Attributes:
        largest, p99, median: of the differences, divided by the standard deviation of the scores.
        rollouts: number of rollouts that were served one at a time.
    """

    largest: float
    p99: float
    median: float
    rollouts: int


def write(
    path: Path,
    probe: FittedProbe,
    reference: ReferenceModel,
    golden: Sequence[Example],
    *,
    name: str,
    version: str,
    label: str,
    expects_bos: bool | None,
    training: Training,
    description: str = "",
) -> ProbeFile:
    """Writes a probe file without thresholds, with golden vectors of held-out rollouts. Raises the errors of ``write_probe``."""

    def written(place: Path, rollouts: Sequence[GoldenIds]) -> ProbeFile:
        return write_probe(
            place,
            probe.function,
            reference,
            name=name,
            version=version,
            taps=probe.taps,
            golden=rollouts,
            labels=[label],
            context=probe.context,
            reduction=probe.reduction,
            expects_bos=expects_bos,
            training=training,
            description=description,
        )

    if probe.reduction is not None:
        return written(path, _golden(golden, GOLDEN))
    candidates = _golden(golden, GOLDEN_TRIED)
    telling = _telling(written(path.with_name("tried.onnx"), candidates).manifest.golden)
    return written(path, [candidates[index] for index in telling[:GOLDEN]])


def serve(model: str | Path, file: Path, *, dtype: str, device: str, revision: str = "", trust_remote_code: bool = False) -> Engine:
    """Returns an engine that serves a single probe file.

    The engine keeps no keys and values for later: those of the golden rollouts were computed in batches of other sizes, and in half
    precision the scores of rollouts that begin alike would depend on them.
    """
    return Engine.load(
        str(model), [file], dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code, max_kv_cache_bytes=0
    )


def served_scores(engine: Engine, examples: Sequence[Example]) -> NDArray[np.float64]:
    """Returns the scores that an engine from ``serve`` gives to examples, ``(n,)``.

    Raises:
        ValueError: an example cannot be scored; the message names its line.
    """
    key = engine.info.probes[0].name
    found = np.empty(len(examples))
    result = engine.score([example.rollout() for example in examples])
    for index, (example, group) in enumerate(zip(examples, result.groups, strict=True)):
        scored = group.completions[0]
        if scored.status is not CompletionStatus.OK:
            raise ValueError(f"{example.where}: cannot be served: {scored.status_message}")
        value = scored.scores[key].at(0 if example.passage is None else 1, 0, 0)
        found[index] = np.nan if value is None else value
    return found


def batch_rounding(engine: Engine, examples: Sequence[Example], scores: NDArray[np.float64]) -> BatchRounding:
    """Serves at most ``MOST_ALONE`` examples one at a time, and compares their scores with those ``(n,)`` that the engine gives them all in
    one call.
    """
    some = np.unique(np.linspace(0, len(examples) - 1, min(MOST_ALONE, len(examples))).round().astype(int))
    alone = np.array([served_scores(engine, [examples[index]])[0] for index in some])
    apart = np.abs(alone - scores[some]) / (float(scores.std()) or 1.0)
    return BatchRounding(float(apart.max()), float(np.quantile(apart, 0.99)), float(np.median(apart)), len(some))


def token_scores(engine: Engine, example: Example) -> tuple[list[str], NDArray[np.float32] | None]:
    """Returns the tokens of an example's completion as text, with their scores ``(T,)``, or ``None`` if the probe does not score tokens."""
    result = engine.score([example.rollout()], token_scores="all", return_token_texts=True)
    scored = result.groups[0].completions[0]
    of_probe = scored.scores[engine.info.probes[0].name].tokens
    per_token = None if of_probe is None or len(of_probe) != len(example.completion_ids) else of_probe[:, 0]
    return list(scored.completion_texts or ()), per_token


def agreement(fitted: NDArray[np.float64], served: NDArray[np.float64], dtype: str, file: ProbeFile) -> Agreement:
    """Compares served scores with fitted scores of the same rollouts.

    Raises:
        ProbeRefused: the scores differ by more than the bound of ``dtype``, so that the file computes another function than was fitted.
    """
    spread = float(fitted.std()) or 1.0
    apart = np.abs(fitted - served) / spread
    bound = max(BOUND[dtype], file.manifest.golden.tolerance.float32 if dtype == "float32" else 0.0)
    found = Agreement(float(apart.max()), float(np.median(apart)), bound, len(apart))
    if not found.largest <= bound:
        raise ProbeRefused(
            str(file.manifest.key),
            "reduction",
            f"served scores up to {found.largest:.3g} (median {found.median:.3g}) × the standard deviation of the fitted ones from these",
            f"at most {bound:g} × in {dtype}; the file serves another function than was fitted, or rounds it by more than that: "
            "fit with --dtype float32, or on longer completions",
        )
    return found


def add_judgement(
    draft: Path,
    thresholds: Sequence[CalibrationRecord],
    quality: Estimate,
    *,
    dataset: str,
    dataset_sha256: str,
    counts: tuple[int, int],
    target: Path,
) -> ProbeFile:
    """Adds thresholds and measured quality to a draft of a probe file and writes the result to the file's final path.

    The ONNX graph and the golden vectors stay equal byte for byte.

    Raises:
        ProbeRefused: a file at the path must not be replaced.
    """
    file = read_probe_file(draft)
    positives, negatives = counts
    manifest = file.manifest.model_copy(
        update={
            "calibrations": tuple(thresholds),
            "evaluations": (
                Evaluation(
                    metric="auroc",
                    value=quality.value,
                    low=quality.low,
                    high=quality.high,
                    dataset=dataset,
                    dataset_sha256=dataset_sha256,
                    positives=positives,
                    negatives=negatives,
                ),
            ),
        }
    )
    return write_probe_file(target, onnx.load_model_from_string(file.graph), manifest, adapter=file.adapter, replace=False)


def write_without_bos_check(draft: Path, target: Path) -> None:
    """Writes a copy of a draft of a probe file that accepts prompts with and without BOS, to measure scores of prompts that the draft
    refuses.
    """
    file = read_probe_file(draft)
    manifest = file.manifest.model_copy(update={"expects_bos": None})
    write_probe_file(target, onnx.load_model_from_string(file.graph), manifest, adapter=file.adapter)


def as_probability(scores: NDArray[np.float64], unit: ScoreUnit) -> NDArray[np.float64] | None:
    """Returns scores as probabilities; ``None`` if the unit of the scores does not convert to probabilities."""
    if unit is ScoreUnit.PROBABILITY:
        return scores
    return 1 / (1 + np.exp(-scores)) if unit is ScoreUnit.LOGIT else None


def _telling(golden: Golden) -> list[int]:
    """Returns the golden rollouts of a probe that pools which tell the place where it reads from its neighbours even in a coarse dtype.

    A rollout may have nearly the same score one token or block beside the right one, as where a probe attends to a single token. Such a
    difference, far below the rounding of a coarse dtype, proves nothing, and would let a server doubt the place. If fewer than two rollouts
    would be left, all are returned.
    """
    scale, kept = golden.score_rows[:, 0].std(), np.ones(len(golden.cases), bool)
    for neighbour in golden.neighbours:
        apart = np.abs(neighbour.difference_rows[:, 0]) / scale
        differing = apart > SAME_SCORE / 2  # the deviation of those that are kept may be smaller
        if differing.any() and np.sqrt(np.mean(apart[differing] ** 2)) < _CLEARLY_APART:
            kept &= ~differing
    return np.flatnonzero(kept if kept.sum() > 1 else ~np.zeros_like(kept)).tolist()


def _golden(examples: Sequence[Example], count: int) -> list[GoldenIds]:
    """Chooses ``count`` short rollouts of both classes, as far as there are so many, for golden vectors."""
    short = sorted(examples, key=lambda example: len(example.prompt_ids) + len(example.completion_ids))
    short = [example for example in short if len(example.prompt_ids) + len(example.completion_ids) <= _LONGEST_GOLDEN] or short[:count]
    middle = short[len(short) // 4 :] or short
    kinds = [[example for example in middle if example.positive is kind] for kind in (True, False)]
    chosen = [example for pair in zip(*kinds, strict=False) for example in pair][:count] or middle[:count]
    return [(example.prompt_ids, example.completion_ids) for example in chosen]


def replaced_ids(example: Example, prompt_ids: NDArray[np.int32], completion_ids: NDArray[np.int32] | None = None) -> Example:
    """Returns an example with another prompt and, if given, a completion with further tokens at its end, which count as well."""
    ids = example.completion_ids if completion_ids is None else completion_ids
    mask = example.mask
    if mask is not None and len(mask) < len(ids):
        mask = np.concatenate([mask, np.ones(len(ids) - len(mask), bool)])
    return replace(example, prompt_ids=prompt_ids, completion_ids=ids, mask=mask)
