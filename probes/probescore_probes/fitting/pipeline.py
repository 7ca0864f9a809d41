"""Implements ``fit_probe``, which fits a probe to labelled rollouts, writes its file, and measures it for a report by serving that file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version as installed_version
from pathlib import Path

from probescore_audit import calibration_error, roc_curve
from probescore_probes.fitting.drafts import finish, write_draft
from probescore_probes.fitting.evidence import evidence_of
from probescore_probes.fitting.fitted import Fitted, fit_rollouts
from probescore_probes.fitting.judgement import verdict_of, warnings_of
from probescore_probes.fitting.labelled_rollouts import TEST, LabelledRollout
from probescore_probes.fitting.options import FitOptions, check_options
from probescore_probes.fitting.results import FitResult
from probescore_probes.fitting.served_conditions import served_conditions
from probescore_probes.fitting.serving import ServedProbe, agreement, as_probability, batch_rounding, serve, served_scores
from probescore_probes.fitting.thresholds import recorded, thresholds_of
from probescore_probes.fitting.wrong_rollouts import wrong_rollouts
from probescore_server.probes.format.probe_file import ProbeFile

Report = Callable[[str], None]


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
    check_options(options, output)
    fitted = fit_rollouts(rollouts, out_of_distribution, model, options, report)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "probe.onnx"
        report("writing the file, with golden vectors from plain Hugging Face")
        written = write_draft(draft, fitted, options)
        report(f"serving the file in {options.dtype}")
        served = _served(model, draft, fitted, options)
        return _judged(model, output, fitted, written, served, options, report)


def _served(model: str | Path, draft: Path, fitted: Fitted, options: FitOptions) -> ServedProbe:
    engine = serve(
        model, draft, dtype=options.dtype, device=options.device, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    return ServedProbe(engine, draft, served_scores(engine, fitted.data.examples))


def _judged(
    model: str | Path, output: Path, fitted: Fitted, written: ProbeFile, served: ServedProbe, options: FitOptions, report: Report
) -> FitResult:
    """Judges a probe by what the engine serves from its draft, and writes the draft with its threshold and quality to ``output``."""
    data, candidate, comparisons = fitted.data, fitted.candidate, fitted.comparisons
    agreed = agreement(fitted.scores, served.scores, options.dtype, written)
    rounding = batch_rounding(served.engine, data.examples, served.scores)
    thresholds = thresholds_of(data, served.scores, options, written.manifest.reduction)
    usual = thresholds.get("")
    threshold = None if usual is None else usual.threshold
    report("changing test rollouts: text appended, prompt forms, dtype")
    conditions = served_conditions(model, served, data, threshold, options)
    wrong = wrong_rollouts(served, data, threshold)
    report("comparing with baselines")
    evidence = evidence_of(fitted, served.scores, threshold, conditions, rounding, options)
    warnings = warnings_of(evidence)
    scores, positive = served.scores[data.splits[TEST]], data.labels.positive[data.splits[TEST]]
    chances = as_probability(scores, written.manifest.output.unit)
    curves, kinds, learning = comparisons.curves(fitted.selection), comparisons.kinds(candidate), comparisons.learning(candidate)
    file = finish(served.file, output, data, evidence.test, None if usual is None else recorded(usual, data, served.engine, options.dtype))
    report("done")
    return FitResult(
        file=file,
        options=options,
        model=fitted.reference.reference.id,
        evidence=evidence,
        warnings=warnings,
        verdict=verdict_of(evidence, warnings),
        data=data.facts(),
        calibrated_on=_calibrated_on(file),
        selection=fitted.selection,
        nested=fitted.nested,
        curves=curves,
        kinds=kinds,
        learning=learning,
        agreement=agreed,
        batch_rounding=rounding,
        thresholds=thresholds,
        roc=roc_curve(scores, positive),
        test_scores=scores,
        test_positive=positive,
        calibration=None if chances is None else calibration_error(chances, positive),
        wrong=wrong,
        provenance=_provenance(file, fitted, options),
    )


def _calibrated_on(file: ProbeFile) -> dict[str, object]:
    conditions = [each.conditions.model_dump() for each in file.manifest.calibrations if each.conditions is not None]
    return conditions[0] if conditions else {}


def _provenance(file: ProbeFile, fitted: Fitted, options: FitOptions) -> dict[str, str]:
    return {
        "probe": file.manifest.key,
        "graph": file.manifest.graph_sha256,
        "manifest": file.manifest.manifest_sha256,
        "model": fitted.reference.reference.fingerprint,
        "tokenizer": fitted.reference.tokenizer_fingerprint,
        "data": fitted.data.digest,
        "method": fitted.probe.method,
        "served in": options.dtype,
        "probescore": installed_version("probescore"),
        "seed": str(options.seed),
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
