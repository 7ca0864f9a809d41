"""Writes a fitted probe to its file: first a draft, to be served and judged, then the file with thresholds and quality."""

from __future__ import annotations

from pathlib import Path

from probescore_audit import Estimate
from probescore_probes.fitting.fitted import Fitted
from probescore_probes.fitting.fitting_data import FittingData
from probescore_probes.fitting.labelled_rollouts import CALIBRATION, TEST, TRAIN, Example
from probescore_probes.fitting.options import FitOptions
from probescore_probes.fitting.serving import add_judgement, write
from probescore_probes.fitting.sparse_features import SAE_FEATURE
from probescore_server.probes.format.manifest import CalibrationRecord, Training
from probescore_server.probes.format.probe_file import ProbeFile


def write_draft(draft: Path, fitted: Fitted, options: FitOptions) -> ProbeFile:
    """Writes a fitted probe without thresholds, with golden vectors of rollouts that it was not fitted on.

    Raises:
        ProbeRefused: the errors of ``write_probe``.
    """
    data, probe, estimate = fitted.data, fitted.probe, fitted.nested.estimate
    held_out = _telling(fitted, options)
    return write(
        draft,
        probe,
        fitted.reference,
        [example for example in held_out if example.passage is None] or held_out,
        name=options.name,
        version=options.version,
        label=options.label,
        expects_bos=_expects_bos(fitted),
        training=Training(
            method=probe.method,
            dataset=f"{len(data.splits[TRAIN])} labelled examples in {data.splits.count_groups(TRAIN)} groups",
            dataset_sha256=data.digest,
            notes=f"nested cross-validation AUROC {estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]",
        ),
        description=options.description,
    )


def _telling(fitted: Fitted, options: FitOptions) -> list[Example]:
    """Returns the rollouts for calibration; of a sparse feature those on which it fires, since where it is 0 nothing is verified.

    Raises:
        ValueError: the feature fires on none of them.
    """
    indices = fitted.data.splits[CALIBRATION]
    if options.kind == SAE_FEATURE:
        firing = indices[fitted.scores[indices] > 0]
        if not len(firing):
            raise ValueError(f"feature: it fires on none of {len(indices)} rollouts for calibration; give another one, or more rollouts")
        indices = firing
    return [fitted.data.examples[index] for index in indices]


def finish(draft: Path, output: Path, data: FittingData, quality: Estimate, threshold: CalibrationRecord | None) -> ProbeFile:
    """Writes a draft to its final path, with its threshold and its AUROC on the test rollouts.

    Raises:
        ProbeRefused: ``output`` is a file that must not be replaced.
    """
    tested = data.splits[TEST]
    negatives = len(data.negatives(tested))
    return add_judgement(
        draft,
        [] if threshold is None else [threshold],
        quality,
        dataset="test rollouts, held out by groups, as served",
        dataset_sha256=data.digest,
        counts=(len(tested) - negatives, negatives),
        target=output,
    )


def _expects_bos(fitted: Fitted) -> bool | None:
    """Returns whether all prompts begin with BOS, or none does; ``None`` (not checked) if prompts differ or the tokenizer has no BOS."""
    begins = fitted.data.begins_with_bos
    if fitted.reference.tokenizer.bos_token_id is None or (begins.any() and not begins.all()):
        return None
    return bool(begins[0])
