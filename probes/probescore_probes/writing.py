"""Writes a fitted probe as a checked probe file, in one call."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import structlog
from onnx.inliner import inline_local_functions

from probescore.reductions import Reduction
from probescore.types import OutputPer, ScoreUnit, Tap, TokenIds
from probescore_audit import Auroc, CalibratedThreshold
from probescore_probes import arguments
from probescore_probes import writing_arguments as given
from probescore_probes.exporting import ProbeFunction
from probescore_probes.golden import GoldenRollout, GoldenScorer, check_graph_computes, neighbours
from probescore_probes.reference import ReferenceModel
from probescore_probes.serve_check import CheckedRollouts, ServeCheck, engine_of, read_serve_check, served_reduction
from probescore_server.errors import ProbeRefused
from probescore_server.probes.format.graph import IR_VERSIONS, GraphSignature, check_graph, check_signature, subgraphs
from probescore_server.probes.format.manifest import (
    AdapterReference,
    CalibrationRecord,
    Context,
    Evaluation,
    FollowUp,
    Golden,
    Manifest,
    Output,
    TapInput,
    Tolerance,
    Training,
)
from probescore_server.probes.format.probe_file import UNSEALED, ProbeFile, adapter_digest, check_golden, write_probe_file
from probescore_server.probes.loading.deviations import largest_deviation

_POINTWISE = Context()

TIMES_ROUNDING = 4.0
"""Factor between the rounding error measured in the reference model's scores and the tolerance for a server's scores.

A server may be 1.5 times as far from float64 as plain Hugging Face in float32, in the other direction; and the error is measured on only a
few golden rollouts (stored with the scores of the author's code).
"""

MAX_MEASURED_TOLERANCE = 1e-2
"""Limits the measured tolerance, in standard deviations; a reference model that needs a larger one is too inexact to check a server."""

logger = structlog.get_logger(__name__)


def write_probe(
    path: Path | str,
    probe: ProbeFunction,
    reference: ReferenceModel,
    *,
    name: str,
    version: str,
    taps: Sequence[Tap | str],
    golden: Sequence[tuple[TokenIds, TokenIds]],
    labels: Sequence[str] = ("score",),
    context: Context = _POINTWISE,
    positions: bool = False,
    reduce_on: ScoreUnit | str | None = None,
    reduction: Reduction | str | None = None,
    exclude_special_tokens: bool = False,
    expects_bos: bool | None = None,
    follow_up: FollowUp | None = None,
    calibrations: Sequence[CalibratedThreshold | CalibrationRecord] = (),
    evaluations: Sequence[Auroc | Evaluation] = (),
    training: Training | None = None,
    tolerance: Tolerance | None = None,
    serve_check: ServeCheck | None = None,
    adapter: Path | str | None = None,
    description: str = "",
    author: str = "",
    license: str = "",
) -> ProbeFile:
    """Writes a probe file with golden vectors (scores of the author's own code on activations of plain Hugging Face transformers, which a
    server must reproduce), and checks the file.

    Args:
        path: path of the file; an existing file there must be a probe file of another name or version, or identical to the new file.
        probe: the probe, from ``linear_probe``, ``torch_probe``, ``sklearn_probe`` or ``onnx_probe``.
        reference: the model that the probe was fitted on, loaded in float32.
        name: lower-case name of the probe; the same name and ``version`` must never be used for a file with other bytes.
        version: version of the probe, in any scheme of the author's.
        taps: points in the model at which the probe reads activations, in the order of the probe's inputs.
        golden: a few rollouts as ``(prompt_ids, completion_ids)``; among their scores there must be two different numbers.
        labels: names of the score's columns.
        context: tokens on which a score depends besides its own token; a probe that is not pointwise is given ``cu_seqlens``.
        positions: whether the probe is given each token's position in its rollout.
        reduce_on: unit of the scores that the server sends; by default the unit of the probe.
        reduction: default reduction, from token scores to one score of a rollout; if not given, the one that ``serve_check`` finds, else
            ``"mean"``; none for a probe that pools by itself.
        exclude_special_tokens: whether the special tokens of the reference's tokenizer are left out of reductions and pooling; the manifest
            lists the ids of these tokens, so that another tokenizer's padding token changes nothing.
        expects_bos: whether prompts start with BOS; ``None`` = not checked.
        follow_up: token ids that the server appends to each finished completion; the probe reads these tokens instead of the completion.
        calibrations: thresholds from ``probescore_audit.calibrate``, or the manifest's own records, such as those of another probe file.
        evaluations: measured qualities of the probe from ``probescore_audit.evaluate_auroc``, or the manifest's own records, which may be
            of any metric.
        training: method and data with which the probe was trained.
        tolerance: largest allowed differences of a server's scores from the golden scores; by default those of ``Tolerance``, and a larger
            one for float32 if a comparison with float64 shows that the reference model is less exact.
        serve_check: labelled rollouts with their fitted scores; the file is served, and must give these scores. This needs the extra
            ``server`` beside ``probes``.
        adapter: directory of a LoRA adapter that the probe brings, as PEFT saves it: the probe reads the model with the adapter, and its
            file is written beside the probe file; ``None`` = the one that ``reference`` has, if it has one.
        description: description of the behaviour that the probe detects, for people.
        author: the probe's author, for people.
        license: the probe's licence, for people, by its SPDX name.

    Returns:
        The probe file as it was written and checked.

    Raises:
        ProbeRefused: a server would refuse the file, its graph gives other scores than the author's code, the reference model's float32
            activations are too far from float64 for a check, the served scores of ``serve_check`` are not the fitted ones, or the file at
            ``path`` must not be replaced; nothing is written.
        TypeError: an argument has the wrong type; the error names the argument, its value and what to give instead.
        ValueError: an argument is wrong, contradicts another, or is a tap that does not exist; nothing is written.
    """
    path = given.place(path)
    given.check_names(name, version, description=description, author=author, license=license)
    given.check_reference(reference)
    if adapter is not None:
        reference = reference.adapted(adapter)
    brought = reference.adapter
    read = given.read_taps(taps, reference)
    labels = given.read_labels(labels)
    given.check_parts(context, follow_up, training, tolerance, reference)
    records, qualities = given.read_calibrations(calibrations, labels), given.read_evaluations(evaluations)
    positions = arguments.flag(positions, "positions")
    exclude_special_tokens = arguments.flag(exclude_special_tokens, "exclude_special_tokens")
    expects_bos = None if expects_bos is None else arguments.flag(expects_bos, "expects_bos")
    probe = given.read_probe(probe, read, reference, labels, context)
    chosen = reduction is not None
    reduce_on, reduction = given.read_unit(reduce_on, probe), given.read_reduction(reduction, context)
    golden = given.read_golden(golden, reference)
    checked = None if serve_check is None else read_serve_check(serve_check, reference)

    inputs = tuple(TapInput.parse(tap) for tap in read)
    scorer = GoldenScorer(probe, reference, inputs, context, positions, exclude_special_tokens, follow_up)
    rollouts = [scorer.score(prompt, completion) for prompt, completion in golden]
    manifest = Manifest(
        name=name,
        version=version,
        description=description,
        author=author,
        license=license,
        model=reference.reference,
        tokenizer_fingerprint=reference.tokenizer_fingerprint,
        expects_bos=expects_bos,
        inputs=inputs,
        cu_seqlens=context.kind != "pointwise",
        positions=positions,
        context=context,
        output=Output(unit=probe.unit, per=OutputPer.ROLLOUT if context.kind == "rollout" else OutputPer.TOKEN, labels=labels),
        reduce_on=reduce_on,
        reduction=reduction,
        exclude_special_tokens=exclude_special_tokens,
        special_token_ids=reference.special_token_ids if exclude_special_tokens else None,
        follow_up=follow_up,
        adapter=None if brought is None else AdapterReference(sha256=adapter_digest(brought.content), settings=dict(brought.settings)),
        calibrations=records,
        evaluations=qualities,
        training=training or Training(),
        golden=_golden(rollouts, tolerance or Tolerance()),
        graph_sha256=UNSEALED,
        manifest_sha256=UNSEALED,
    )
    graph = _checked_graph(manifest, probe, rollouts, str(path))
    if tolerance is None:
        measured = manifest.golden.model_copy(update={"tolerance": _measured_tolerance(scorer, manifest.golden, str(path))})
        manifest = manifest.model_copy(update={"golden": measured})
    if serve_check is not None and checked is not None:
        manifest = _as_fitted(graph, manifest, serve_check, checked, reference, chosen)
    return _written(path, graph, manifest, reference)


def _golden(rollouts: Sequence[GoldenRollout], tolerance: Tolerance) -> Golden:
    beside, left_out = neighbours(rollouts)
    return Golden(cases=tuple(rollout.golden for rollout in rollouts), tolerance=tolerance, neighbours=beside, left_out=left_out)


def _checked_graph(manifest: Manifest, probe: ProbeFunction, rollouts: Sequence[GoldenRollout], file: str) -> onnx.ModelProto:
    """Returns a probe's ONNX graph after all checks that a server makes of a probe file, and after a comparison of the graph's scores with
    those of the author's code.

    Raises:
        ProbeRefused: a server would refuse the file, or the graph gives other scores than the author's code.
    """
    graph = _bare(probe.export(GraphSignature.of(manifest)))
    check_golden(manifest, file)
    check_signature(graph, GraphSignature.of(manifest), file)
    check_graph(graph, file)
    check_graph_computes(graph, manifest, probe, rollouts, file)
    return graph


def _as_fitted(
    graph: onnx.ModelProto, manifest: Manifest, serve_check: ServeCheck, checked: CheckedRollouts, reference: ReferenceModel, chosen: bool
) -> Manifest:
    """Returns the manifest of a probe file with the reduction (from token scores to one score of a rollout) under which a served draft of
    the file gives the scores of the author's fit.

    Raises:
        ProbeRefused: the draft serves other scores than the author's fit gave.
    """
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "probe.onnx"
        written = write_probe_file(draft, graph, manifest, adapter=_content(reference))
        reduction = served_reduction(engine_of(serve_check, reference, draft), checked, written, chosen)
    return manifest.model_copy(update={"reduction": reduction})


def _content(reference: ReferenceModel) -> bytes | None:
    return None if reference.adapter is None else reference.adapter.content


def _written(path: Path, graph: onnx.ModelProto, manifest: Manifest, reference: ReferenceModel) -> ProbeFile:
    try:
        return write_probe_file(path, graph, manifest, adapter=_content(reference), replace=False)
    except OSError as error:
        raise ValueError(f"path: {str(path)!r} cannot be written ({error.strerror or type(error).__name__}); give another place") from None


def _measured_tolerance(scorer: GoldenScorer, golden: Golden, file: str) -> Tolerance:
    """Returns the default tolerance for golden scores (those of the author's code), with a larger tolerance in float32 if the reference
    model's own rounding is large.

    The rounding errors of a server may be as large as those of the reference model, and in the other direction.

    Raises:
        ProbeRefused: the reference model's rounding would need a larger tolerance than ``MAX_MEASURED_TOLERANCE``.
    """
    usual = Tolerance()
    try:
        exact = np.concatenate([scorer.exact_scores(case) for case in golden.cases])
    except Exception as error:  # whatever a model, a kernel or a device raises that has no float64
        logger.warning("the reference's own rounding was not measured: the model does not run in float64", problem=str(error)[:200])
        return usual
    rounding = largest_deviation(golden.score_rows, exact, golden.score_rows.std(axis=0))
    needed = TIMES_ROUNDING * rounding
    if needed <= usual.float32:
        return usual
    if not needed <= MAX_MEASURED_TOLERANCE:
        raise ProbeRefused(
            file,
            "golden",
            f"a reference model whose scores are up to {rounding:.2g} × their standard deviation from float64",
            f"at most {MAX_MEASURED_TOLERANCE / TIMES_ROUNDING:g} ×: load it in float32; or take other golden rollouts, if in one a "
            "router or a threshold is on the edge; or give a tolerance",
        )
    return Tolerance(float32=float(f"{needed:.2g}"))


def _bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a probe's ONNX graph in the form that a server takes.

    Functions are inlined, the IR version is one that every server reads, and doc strings and metadata are removed, since exporters write
    stack traces with paths of the author's files into them.
    """
    bare = inline_local_functions(model)
    bare.ir_version = min(bare.ir_version, IR_VERSIONS[-1])
    for graph in subgraphs(bare.graph):
        del graph.value_info[:]
        for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
            part.ClearField("doc_string")
            part.ClearField("metadata_props")
    return bare
