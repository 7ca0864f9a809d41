"""From a fitted probe to a checked probe file, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx.inliner import inline_local_functions

from probescore.types import OutputPer, ScoreUnit, Tap, TokenIds
from probescore_server.probes.exporting import ProbeFunction
from probescore_server.probes.golden import GoldenScorer, check_graph_computes
from probescore_server.probes.graph import IR_VERSIONS, Signature, check_graph, check_signature, subgraphs
from probescore_server.probes.manifest import (
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
from probescore_server.probes.probe_file import UNSEALED, ProbeFile, check_golden, write_probe_file
from probescore_server.probes.reference import ReferenceModel

_POINTWISE = Context()


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
    reduce_on: ScoreUnit | None = None,
    reduction: str | None = None,
    exclude_special_tokens: bool = False,
    expects_bos: bool | None = None,
    follow_up: FollowUp | None = None,
    calibrations: Sequence[CalibrationRecord] = (),
    evaluations: Sequence[Evaluation] = (),
    training: Training | None = None,
    tolerance: Tolerance | None = None,
    description: str = "",
    author: str = "",
    license: str = "",
) -> ProbeFile:
    """Writes a probe file with golden vectors from plain Hugging Face and the author's own code, and checks the file.

    Args:
        path: where to write; replaced if it exists.
        probe: from ``linear_probe``, ``torch_probe``, ``sklearn_probe`` or ``onnx_probe``.
        reference: the model that the probe was fitted on, loaded in float32.
        name: lower-case name; with ``version`` it must never stand for other bytes.
        version: as the author counts.
        taps: where the probe reads, in the order that it takes them.
        golden: a few rollouts as ``(prompt_ids, completion_ids)``, together scored with at least two different numbers.
        labels: names of the score's columns.
        context: what a score depends on beside its own token; a probe that is not pointwise is given ``cu_seqlens``.
        positions: whether the probe is given each token's position in its rollout.
        reduce_on: unit of what the server sends; the probe's own unit by default.
        reduction: default reduction, ``"mean"`` unless said; none for a probe that pools by itself.
        exclude_special_tokens: leave the special tokens of the reference's tokenizer out of reductions and pooling; the manifest names
            their ids, so that another tokenizer's padding token changes nothing.
        expects_bos: whether prompts start with BOS; ``None`` = not checked.
        follow_up: tokens that the server appends to a completion; the probe reads those instead.
        calibrations: thresholds, from ``calibrate``.
        evaluations: qualities, from ``evaluate_auroc``.
        training: where the probe comes from.
        tolerance: how far a server's scores may be from the golden ones.
        description: for people.
        author: for people.
        license: for people, by its SPDX name.

    Raises:
        ProbeRefused: a server would refuse the file, or its graph does not compute what the author's code does; nothing is written.
        ValueError: an argument contradicts another, or a tap does not exist.
    """
    pools = context.kind == "rollout"
    inputs = tuple(TapInput.parse(tap) for tap in taps)
    scorer = GoldenScorer(probe, reference, tuple(entry.tap for entry in inputs), context, positions, exclude_special_tokens, follow_up)
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
        output=Output(unit=probe.unit, per=OutputPer.ROLLOUT if pools else OutputPer.TOKEN, labels=tuple(labels)),
        reduce_on=reduce_on or probe.unit,
        reduction=reduction if pools else reduction or "mean",
        exclude_special_tokens=exclude_special_tokens,
        special_token_ids=reference.special_token_ids if exclude_special_tokens else None,
        follow_up=follow_up,
        calibrations=tuple(calibrations),
        evaluations=tuple(evaluations),
        training=training or Training(),
        golden=Golden(cases=tuple(rollout.golden for rollout in rollouts), tolerance=tolerance or Tolerance()),
        graph_sha256=UNSEALED,
        manifest_sha256=UNSEALED,
    )
    graph = _bare(probe.export(Signature.of(manifest)))
    check_golden(manifest, str(path))
    check_signature(graph, Signature.of(manifest), str(path))
    check_graph(graph, str(path))
    check_graph_computes(graph, manifest, rollouts, str(path))
    return write_probe_file(path, graph, manifest)


def _bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """As a server takes it: functions inlined, an IR version that every server reads, no stack traces of the author's files.

    Exporters leave those, with paths, in doc strings and metadata.
    """
    bare = inline_local_functions(model)
    bare.ir_version = min(bare.ir_version, IR_VERSIONS[-1])
    for graph in subgraphs(bare.graph):
        del graph.value_info[:]
        for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
            part.ClearField("doc_string")
            part.ClearField("metadata_props")
    return bare
