"""Implements ``fit_probe``, which fits a probe to labelled rollouts, writes its file, and measures it for a report by serving that file."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version as installed_version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from probescore_audit import CalibratedThreshold, Estimate, calibrate, calibration_error, grouped_auroc, grouped_rate, roc_curve
from probescore_audit.grouped import CalibrationBin
from probescore_probes.fitting.activation_pass import FINAL_NORM, ActivationTable, read_activations, read_tokens
from probescore_probes.fitting.baselines import bag_of_words, oriented, paired_accuracy, random_directions, shuffled_labels
from probescore_probes.fitting.cross_validation import (
    Candidate,
    CurvePoint,
    Labels,
    Nested,
    Selection,
    held_out_auroc,
    held_out_scores,
    learning_curve,
    nested,
    select,
)
from probescore_probes.fitting.judgement import Evidence, SliceResult, Verdict, Warning, verdict_of, warnings_of
from probescore_probes.fitting.kinds import KINDS, fit_kind, pools_of
from probescore_probes.fitting.labelled_rollouts import CALIBRATION, OOD, TEST, TRAIN, Example, LabelledRollout, facts, tokenised
from probescore_probes.fitting.linear_kinds import DIFFERENCE_OF_MEANS, LINEAR_KINDS, LOGISTIC
from probescore_probes.fitting.robustness import MOST, Condition, conditions, measure
from probescore_probes.fitting.serving import (
    Agreement,
    add_judgement,
    agreement,
    as_probability,
    serve,
    served_scores,
    token_scores,
    write,
    write_without_bos_check,
)
from probescore_probes.fitting.splits import Split, shared_texts, split
from probescore_probes.fitting.token_kinds import TOKEN_KINDS, check_bytes
from probescore_probes.reference import ReferenceModel
from probescore_server.engine.engine import Engine
from probescore_server.probes.format.manifest import Training
from probescore_server.probes.format.probe_file import ProbeFile, read_probe_file

POOLS = ("mean", "last")
WRONG_SHOWN = 4
"""Number of misjudged rollouts of each class that a report shows."""

Report = Callable[[str], None]
Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Options of fitting a probe.

    Attributes:
        kind: one of ``KINDS``.
        taps: names of taps (places in the model), or patterns of names.
        pools: names of the poolings to try: ``mean``, ``last``.
        false_positive_rate: false-positive rate that the threshold is set for.
        dtype, device, revision, trust_remote_code: how the model is loaded and run.
        name, version, label, description: entries of the probe file.
        other_dtype: a second dtype in which the probe is served and compared; empty = none.
        seed: seed of splits, folds and the bootstrap.
    """

    name: str
    version: str = "1"
    label: str = "positive"
    description: str = ""
    kind: str = LOGISTIC
    taps: tuple[str, ...] = ("resid_post.*",)
    pools: tuple[str, ...] = POOLS
    false_positive_rate: float = 0.05
    dtype: str = "float32"
    device: str = "cpu"
    revision: str = ""
    trust_remote_code: bool = False
    other_dtype: str = "bfloat16"
    seed: int = 0


@dataclass(frozen=True, eq=False)
class WrongRollout:
    """A test rollout that the probe misjudges, with the scores of its tokens if the probe scores tokens."""

    where: str
    positive: bool
    score: float
    prompt: tuple[str, ...]
    tokens: tuple[str, ...]
    token_scores: tuple[float, ...] | None


@dataclass(frozen=True, eq=False)
class FitResult:
    """The result of fitting a probe: its file, and every number of the report. Scores are those that an engine serves from the file.

    Attributes:
        file: the probe file that was written.
        curves: AUROC by tap (place in the model) and pooling, for the kind by which the tap was chosen and for the difference of means.
        kinds: AUROC over held-out groups of each kind of probe at the chosen tap; of kinds fitted on tokens, only if one of them was asked
            for.
        nested: result of nested cross-validation; for a kind fitted on tokens, at the tap that all examples together chose.
        thresholds: the threshold for all data, and one for each slice (part of the data) with enough negatives; empty if there are too few
            negatives.
        roc: false- and true-positive rates on test rollouts.
        test_scores, test_positive: scores and labels of the test rollouts, ``(tests,)``.
        calibration: expected calibration error and its bins; ``None`` for scores that are no probabilities.
    """

    file: ProbeFile
    options: FitOptions
    model: str
    evidence: Evidence
    warnings: tuple[Warning, ...]
    verdict: Verdict
    data: dict[str, object]
    selection: Selection
    nested: Nested
    curves: Mapping[str, tuple[CurvePoint, ...]]
    kinds: Mapping[str, Estimate]
    learning: tuple[tuple[int, Estimate], ...]
    agreement: Agreement
    thresholds: Mapping[str, CalibratedThreshold]
    roc: tuple[NDArray[np.float64], NDArray[np.float64]]
    test_scores: NDArray[np.float64]
    test_positive: NDArray[np.bool_]
    calibration: tuple[float, tuple[CalibrationBin, ...]] | None
    wrong: tuple[WrongRollout, ...]
    provenance: dict[str, str]


def fit_probe(
    rollouts: Sequence[LabelledRollout],
    model: str | Path,
    output: Path,
    options: FitOptions,
    *,
    out_of_distribution: Sequence[LabelledRollout] = (),
    report: Report = lambda _step: None,
) -> FitResult:
    """Fits a probe, writes its file, serves it, and judges it.

    Args:
        rollouts: labelled rollouts.
        model: a directory with the model, or its id on the Hugging Face hub.
        output: path of the probe file; an existing file is replaced only if it is a probe file of another name or version.
        options: options of fitting.
        out_of_distribution: labelled rollouts of other data, evaluated by slice (part of the data).
        report: called with a line of text for people as each step begins.

    Raises:
        ValueError: the data or an option is wrong; the message names the line, or the option and what to give.
        ProbeRefused: the served probe is not the fitted one, or ``output`` is a file that must not be replaced.
        ModelRefused: there is no such model.
    """
    _check(options, output)
    report("loading the whole model")
    reference = ReferenceModel.load(model, revision=options.revision, device=options.device, trust_remote_code=options.trust_remote_code)
    engine = Engine.load(
        str(model),
        taps=[*options.taps, FINAL_NORM],
        revision=options.revision,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )
    report("tokenising")
    outside = [replace(rollout, split=OOD, slice=rollout.slice or "out of distribution") for rollout in out_of_distribution]
    examples = tokenised([*rollouts, *outside], engine)
    if not examples:
        raise ValueError("there are no labelled examples in the data")
    parts = split(examples, options.seed)
    labels = Labels(np.array([example.positive for example in examples]), parts.groups, np.array([example.weight for example in examples]))
    taps = _taps(engine, options.taps)
    pools = pools_of(options.kind, options.pools)
    report(f"reading {len(examples)} examples at {len(taps)} taps")
    table = read_activations(engine, reference, examples, taps, tuple(dict.fromkeys([*pools, "mean"])))
    fitting = _Fitting(options, table, labels, parts, pools)
    report(f"choosing among {len(taps)} taps × {len(pools)} poolings, nested cross-validation")
    selection = fitting.selection()
    candidate = selection.chosen
    if options.kind in TOKEN_KINDS:
        report(f"reading every token at {candidate.tap}")
        check_bytes(int(sum(example.selected.sum() for example in examples)), reference.reference.hidden_size)
        table = replace(table, tokens=tuple(read_tokens(engine, examples, candidate.tap)))
        fitting = _Fitting(options, table, labels, parts, pools)
    del engine
    judged = fitting.nested()
    report(f"fitting {options.kind} at {candidate.tap}")
    fit = fit_kind(options.kind, table, labels, parts[TRAIN], candidate, options.seed)

    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "probe.onnx"
        report("writing the file, with golden vectors from plain Hugging Face")
        digest = _digest(examples)
        bos = [bool(len(example.prompt_ids)) and example.prompt_ids[0] == reference.tokenizer.bos_token_id for example in examples]
        probe = fit.probe()
        write(
            draft,
            probe,
            reference,
            [examples[index] for index in parts[CALIBRATION] if examples[index].passage is None]
            or [examples[i] for i in parts[CALIBRATION]],
            name=options.name,
            version=options.version,
            label=options.label,
            expects_bos=_expects_bos(bos, reference),
            training=Training(
                method=probe.method,
                dataset=f"{len(parts[TRAIN])} labelled examples in {parts.count_groups(TRAIN)} groups",
                dataset_sha256=digest,
                notes=f"nested cross-validation AUROC {judged.estimate.value:.3f} [{judged.estimate.low:.3f}, {judged.estimate.high:.3f}]",
            ),
            description=options.description,
        )
        report(f"serving the file in {options.dtype}")
        served = serve(
            model, draft, dtype=options.dtype, device=options.device, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
        scores = served_scores(served, examples)
        agreed = agreement(fit.score(np.arange(len(examples))), scores, options.dtype, read_probe_file(draft))
        thresholds = _thresholds(examples, scores, parts, options, probe.reduction)
        threshold = thresholds[""].threshold if "" in thresholds else None
        report("changing test rollouts: text appended, prompt forms, dtype")
        changed = _conditions(served, model, draft, examples, parts, scores, threshold, options)
        wrong = _wrong(served, examples, parts[TEST], scores, threshold)
        report("comparing with baselines")
        test = _estimate(scores, labels, parts[TEST], options.seed)
        slices = _slices(examples, scores, labels, parts, threshold, options.seed)
        evidence = fitting.evidence(examples, selection, judged, test, slices, changed, np.array(bos), reference, scores, threshold)
        file = add_judgement(
            draft,
            [thresholds[""]] if "" in thresholds else [],
            test,
            dataset="test rollouts, held out by groups, as served",
            dataset_sha256=digest,
            counts=(int(labels.positive[parts[TEST]].sum()), int((~labels.positive[parts[TEST]]).sum())),
            target=output,
        )
    report("done")
    found = warnings_of(evidence)
    chances = as_probability(scores[parts[TEST]], file.manifest.output.unit)
    return FitResult(
        file=file,
        options=options,
        model=reference.reference.id,
        evidence=evidence,
        warnings=found,
        verdict=verdict_of(evidence, found),
        data={
            **facts(examples),
            "groups": evidence.groups,
            "groups_named": parts.named,
            "splits_given": parts.given,
            "splits": _counts(parts, labels),
        },
        selection=selection,
        nested=judged,
        curves={options.kind if options.kind in LINEAR_KINDS else LOGISTIC: selection.curve, DIFFERENCE_OF_MEANS: fitting.other_curve()},
        kinds=fitting.kinds(candidate),
        learning=tuple(fitting.learning(candidate)),
        agreement=agreed,
        thresholds=thresholds,
        roc=roc_curve(scores[parts[TEST]], labels.positive[parts[TEST]]),
        test_scores=scores[parts[TEST]],
        test_positive=labels.positive[parts[TEST]],
        calibration=None if chances is None else calibration_error(chances, labels.positive[parts[TEST]]),
        wrong=wrong,
        provenance={
            "probe": file.manifest.key,
            "graph": file.manifest.graph_sha256,
            "manifest": file.manifest.manifest_sha256,
            "model": reference.reference.fingerprint,
            "tokenizer": reference.tokenizer_fingerprint,
            "data": digest,
            "method": probe.method,
            "served in": options.dtype,
            "probescore": installed_version("probescore"),
            "seed": str(options.seed),
            "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
    )


class _Fitting:
    """Computes the results of fitting that need only the table of activations and no serving: the choice of tap (place in the model), and
    cross-validation.
    """

    def __init__(self, options: FitOptions, table: ActivationTable, labels: Labels, parts: Split, pools: tuple[str, ...]) -> None:
        self._options, self._table, self._labels, self._parts, self._pools = options, table, labels, parts, pools
        self._train = table.of(parts[TRAIN])
        self._train_labels = labels.of(parts[TRAIN])
        # Kinds that are not linear are fitted at the tap where logistic regression is best.
        self._choosing = options.kind if options.kind in LINEAR_KINDS else LOGISTIC

    def selection(self) -> Selection:
        return select(self._features(self._train, self._pools), self._train_labels, kind=self._choosing, seed=self._options.seed)

    def nested(self) -> Nested:
        def fit(fitted: Indices, candidate: Candidate) -> Callable[[Indices], NDArray[np.float64]]:
            return fit_kind(self._options.kind, self._train, self._train_labels, fitted, candidate, self._options.seed).score

        features = self._features(self._train, self._pools)
        return nested(features, self._train_labels, kind=self._choosing, seed=self._options.seed, fit=fit)

    def other_curve(self) -> tuple[CurvePoint, ...]:
        features = self._features(self._train, self._pools)
        return select(features, self._train_labels, kind=DIFFERENCE_OF_MEANS, seed=self._options.seed).curve

    def kinds(self, candidate: Candidate) -> dict[str, Estimate]:
        found = {}
        for kind in KINDS:
            if kind in TOKEN_KINDS and self._table.tokens is None:
                continue
            at = candidate if kind in LINEAR_KINDS else replace(candidate, pool="mean")

            def fit(fitted: Indices, kind: str = kind, at: Candidate = at) -> Callable[[Indices], NDArray[np.float64]]:
                return fit_kind(kind, self._train, self._train_labels, fitted, at, self._options.seed).score

            scores = held_out_scores(fit, self._train_labels, seed=self._options.seed)
            found[kind] = held_out_auroc(scores, self._train_labels, self._options.seed)
        return found

    def learning(self, candidate: Candidate) -> list[tuple[int, Estimate]]:
        rows = self._train.pooled[candidate.tap, candidate.pool]
        return learning_curve(rows, self._train_labels, candidate, self._choosing, seed=self._options.seed)

    def evidence(
        self,
        examples: Sequence[Example],
        selection: Selection,
        judged: Nested,
        test: Estimate,
        slices: Mapping[str, SliceResult],
        changed: tuple[Condition, ...],
        bos: NDArray[np.bool_],
        reference: ReferenceModel,
        scores: NDArray[np.float64],
        threshold: float | None,
    ) -> Evidence:
        options, labels, parts, candidate = self._options, self._labels, self._parts, selection.chosen
        inside = np.sort(np.concatenate([parts[TRAIN], parts[CALIBRATION], parts[TEST]]))
        some = labels.of(inside)
        text = {
            "bag of words of completions": bag_of_words(
                [examples[i].completion_ids[examples[i].selected] for i in inside], some, options.seed
            )
        }
        if any(len(examples[i].prompt_ids) for i in inside):
            text["bag of words of prompts"] = bag_of_words([examples[i].prompt_ids for i in inside], some, options.seed)
        lengths = np.array([float(example.selected.sum()) for example in examples])
        numbers = {
            "length": lengths,
            "−log P of the tokens": self._table.surprise,
            "−log P a token": self._table.surprise / np.maximum(self._table.predicted, 1),
        }
        rivals = {
            name: oriented(values, labels, parts[TRAIN], parts[TEST], options.seed)
            for name, values in numbers.items()
            if np.isfinite(values[parts[TEST]]).any() and np.isfinite(values[parts[TRAIN]]).any()
        }
        rows = self._table.pooled[candidate.tap, candidate.pool]
        rivals["best of 20 random directions"] = random_directions(rows, labels, parts[TRAIN], parts[TEST], options.seed)
        shuffled = shuffled_labels(
            self._train.pooled[candidate.tap, candidate.pool], self._train_labels, candidate, self._choosing, options.seed
        )
        accuracy, pairs = paired_accuracy(self._table.surprise[inside], [examples[i] for i in inside])
        sink = self._table.sink[candidate.tap][inside]
        read = np.isfinite(sink)
        shared = shared_texts(examples, parts.parts)
        negatives = parts[TEST][~labels.positive[parts[TEST]]]
        unknown = Estimate(float("nan"), float("nan"), float("nan"))
        return Evidence(
            test=test,
            nested=judged.estimate,
            in_sample=judged.in_sample,
            text=text,
            rivals=rivals,
            shuffled=shuffled,
            groups_named=parts.named or parts.given,
            shared_prompts=shared[0],
            shared_completions=shared[1],
            groups=len(np.unique(parts.groups[inside])),
            calibration_negatives=int((~labels.positive[parts[CALIBRATION]]).sum()),
            false_positive_rate=options.false_positive_rate,
            pooled_false_positives=unknown if threshold is None else grouped_rate(scores[negatives] >= threshold, parts.groups[negatives]),
            slices=slices,
            sink=float(np.median(sink[read])) if read.any() else float("nan"),
            sink_share=float(read.mean()),
            prompt_forms={form: sum(examples[i].form == form for i in inside) for form in sorted({examples[i].form for i in inside})},
            with_bos=int(bos[inside].sum()),
            without_bos=0 if reference.tokenizer.bos_token_id is None else int((~bos[inside]).sum()),
            tokenizer_adds_bos=_adds_bos(reference),
            conditions=changed,
            paired_accuracy=accuracy,
            pairs=pairs,
            layer=self._table.taps.index(candidate.tap),
            layers=len(self._table.taps),
        )

    @staticmethod
    def _features(table: ActivationTable, pools: tuple[str, ...]) -> dict[tuple[str, str], NDArray[np.float32]]:
        return {(tap, pool): table.pooled[tap, pool] for tap in table.taps for pool in pools}


def _check(options: FitOptions, output: Path) -> None:
    if options.kind not in KINDS:
        raise ValueError(f"kind: {options.kind!r}; give one of {', '.join(KINDS)}")
    for pool in options.pools:
        if pool not in POOLS:
            raise ValueError(f"pool: {pool!r}; give {' or '.join(POOLS)}")
    if not 0 < options.false_positive_rate < 1:
        raise ValueError(f"false_positive_rate: {options.false_positive_rate:g}; give a number between 0 and 1, such as 0.05")
    if not output.parent.is_dir():
        raise ValueError(f"output: there is no directory {str(output.parent)!r}; make it first")
    if output.exists():
        there = read_probe_file(output).manifest  # anything else is refused
        if (there.name, there.version) == (options.name, options.version):
            raise ValueError(
                f"output: {str(output)!r} holds {there.key} already, and a version never changes; give another version (--probe-version), "
                "or delete the file"
            )


def _taps(engine: Engine, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the taps (places in the model) that names such as ``resid_post.6``, or patterns of names, stand for, sorted by layer, then by
    hook.
    """
    found = engine.resolve_reads(list(patterns), "mean").taps
    deepest = engine.info.model.num_hidden_layers
    return tuple(str(tap) for tap in sorted(found, key=lambda tap: (deepest if tap.layer is None else tap.layer, str(tap.hook))))


def _expects_bos(bos: Sequence[bool], reference: ReferenceModel) -> bool | None:
    """Returns whether all prompts begin with BOS, or none does; ``None`` (not checked) if prompts differ or the tokenizer has no BOS."""
    if reference.tokenizer.bos_token_id is None or len(set(map(bool, bos))) > 1:
        return None
    return bool(bos[0])


def _adds_bos(reference: ReferenceModel) -> bool:
    bos = reference.tokenizer.bos_token_id
    return bos is not None and reference.tokenizer("a")["input_ids"][:1] == [bos]


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        line = [
            example.prompt_ids.tolist(),
            example.completion_ids.tolist(),
            example.selected.tolist(),
            bool(example.positive),
            example.split,
            example.slice,
        ]
        digest.update(json.dumps(line).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


def _counts(parts: Split, labels: Labels) -> dict[str, dict[str, int]]:
    return {
        name: {
            "positives": int(labels.positive[indices].sum()),
            "negatives": int((~labels.positive[indices]).sum()),
            "groups": parts.count_groups(name),
        }
        for name, indices in parts.parts.items()
        if len(indices)
    }


def _estimate(scores: NDArray[np.float64], labels: Labels, indices: Indices, seed: int) -> Estimate:
    some = labels.of(indices)
    return grouped_auroc(scores[indices], some.positive, some.groups, weights=some.weights, seed=seed)


def _thresholds(
    examples: Sequence[Example], scores: NDArray[np.float64], parts: Split, options: FitOptions, reduction: str | None
) -> dict[str, CalibratedThreshold]:
    """Computes the threshold for all data under ``""``, then one for each slice (part of the data), each only if there are enough
    negatives.

    Intervals come from a bootstrap that draws whole groups.
    """
    negatives = np.array([index for index in parts[CALIBRATION] if not examples[index].positive], np.int64)
    found = {}
    for name in ["", *sorted({examples[index].slice for index in negatives if examples[index].slice})]:
        some = np.array([index for index in negatives if not name or examples[index].slice == name], np.int64)
        if len(some) < 1 / options.false_positive_rate:
            continue
        whose = f" of slice {name}" if name else ""
        threshold = calibrate(
            scores[some],
            false_positive_rate=options.false_positive_rate,
            dataset=f"held-out negatives{whose}, as served in {options.dtype}",
            reduction=reduction,
            label=options.label,
        )
        grouped = grouped_rate(scores[some] >= threshold.threshold, parts.groups[some], seed=options.seed)
        found[name] = replace(
            threshold,
            false_positive_rate_low=min(threshold.false_positive_rate_low, grouped.low),
            false_positive_rate_high=max(threshold.false_positive_rate_high, grouped.high),
        )
    return found


def _slices(
    examples: Sequence[Example], scores: NDArray[np.float64], labels: Labels, parts: Split, threshold: float | None, seed: int
) -> dict[str, SliceResult]:
    """Computes the probe's quality on each slice (part of the data) of the test rollouts, then on each slice of the out-of-distribution
    rollouts.
    """
    found = {}
    for name, part in ((TEST, parts[TEST]), (OOD, parts[OOD])):
        for slice_name in sorted({examples[index].slice for index in part if examples[index].slice}):
            indices = np.array([index for index in part if examples[index].slice == slice_name], np.int64)
            negatives = indices[~labels.positive[indices]]
            rate = (
                Estimate(float("nan"), float("nan"), float("nan"))
                if threshold is None
                else grouped_rate(scores[negatives] >= threshold, parts.groups[negatives], seed=seed)
            )
            title = f"{slice_name} (out of distribution)" if name == OOD and slice_name != "out of distribution" else slice_name
            found[title] = SliceResult(
                _estimate(scores, labels, indices, seed), rate, len(indices) - len(negatives), len(negatives), name == OOD
            )
    return found


def _conditions(
    engine: Engine,
    model: str | Path,
    file: Path,
    examples: Sequence[Example],
    parts: Split,
    scores: NDArray[np.float64],
    threshold: float | None,
    options: FitOptions,
) -> tuple[Condition, ...]:
    tested = parts[TEST]
    if len(tested) > MOST:
        tested = np.sort(np.random.default_rng(options.seed).permutation(tested)[:MOST])
    some, groups = [examples[index] for index in tested], parts.groups[tested]
    unchecked = file.with_name("unchecked.onnx")
    write_without_bos_check(file, unchecked)
    of_unchecked = serve(
        model,
        unchecked,
        dtype=options.dtype,
        device=options.device,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    found = conditions(engine, of_unchecked, some, groups, threshold, scores[tested])
    del of_unchecked
    if options.other_dtype and options.other_dtype != options.dtype:
        other = serve(
            model,
            file,
            dtype=options.other_dtype,
            device=options.device,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
        )
        found.append(measure(f"served in {options.other_dtype}", served_scores(other, some), some, groups, threshold, scores[tested]))
    return tuple(found)


def _wrong(
    engine: Engine, examples: Sequence[Example], tested: Indices, scores: NDArray[np.float64], threshold: float | None
) -> tuple[WrongRollout, ...]:
    """Returns test rollouts that the probe misjudges most: the negatives with the highest scores and the positives with the lowest."""
    found = []
    middle = float(np.median(scores[tested])) if threshold is None else threshold
    for positive in (False, True):
        of_class = [index for index in tested if examples[index].positive is positive and bool(scores[index] < middle) is positive]
        for index in sorted(of_class, key=lambda index: scores[index], reverse=not positive)[:WRONG_SHOWN]:
            tokens, per_token = token_scores(engine, examples[index])
            found.append(
                WrongRollout(
                    examples[index].where,
                    positive,
                    float(scores[index]),
                    tuple(engine.decode_tokens(examples[index].prompt_ids)),
                    tuple(tokens),
                    None if per_token is None else tuple(float(value) for value in per_token),
                )
            )
    return tuple(found)
