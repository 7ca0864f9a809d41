"""Converts a probe file of another library into a probe file of probescore, in one function call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from probescore.types import ScoreUnit, Tap, TokenIds
from probescore_probes import arguments
from probescore_probes import writing_arguments as given
from probescore_probes.golden import GoldenScorer
from probescore_probes.importing.author_scores import AuthorScores, compared
from probescore_probes.importing.imported import Imported, ImportOptions
from probescore_probes.importing.places import read_place
from probescore_probes.importing.registry import Format, format_of
from probescore_probes.importing.source import ProbeSource
from probescore_probes.reference import ReferenceModel
from probescore_probes.writing import write_probe
from probescore_server.probes.format.manifest import TapInput, Training
from probescore_server.probes.format.probe_file import ProbeFile

NOT_COMPARED = "Nobody has compared it with its author's scores"
"""Note in the manifest of a probe that was imported without its author's scores."""

_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_GOLDEN_ROLLOUTS = 4
_FEWEST_IDS = 6
_TEXTS = (
    ("What is the capital of France?", " The capital of France is Paris, which lies on the Seine."),
    ("Write a function that adds two numbers.", "\ndef add(a, b):\n    return a + b\n"),
    ("Did you run the tests before you said that they pass?", " No, I did not run them. I wrote the output by hand."),
)

Rollout = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class ImportedProbe:
    """A probe file that was made from another library's file, with notes on the conversion.

    Attributes:
        probe: the probe as it was written to the file.
        format: name of the format that the source file was read as.
        notes: what the source file does not say, what was not converted, and whether the scores were compared with the author's.
        agrees: whether the author's scores were given and agree with the probe's.
    """

    probe: ProbeFile
    format: str
    notes: tuple[str, ...]
    agrees: bool


def import_probe(
    file: Path | str,
    reference: ReferenceModel,
    *,
    name: str,
    version: str,
    output: Path | str,
    format: str | None = None,
    taps: Sequence[Tap | str] = (),
    author_scores: Sequence[AuthorScores] = (),
    golden: Sequence[tuple[TokenIds, TokenIds]] = (),
    reduction: str | None = None,
    unit: ScoreUnit | str | None = None,
    labels: Sequence[str] = (),
    heads: int | None = None,
    features: Sequence[int] = (),
    sees_prompt: bool = False,
    trust_pickle: bool = False,
    description: str = "",
    author: str = "",
    license: str = "",
) -> ImportedProbe:
    """Makes a probe file of probescore from a file that another library wrote.

    Golden vectors (scores that a server must reproduce) are computed with the formula of the other library on activations of the model in
    Hugging Face transformers, and the new file is checked as ``write_probe`` checks it. Thresholds in the source file are never taken over.

    Args:
        file: path of the source file, or of the folder that holds its files.
        reference: the model that the probe was fitted on, in float32.
        name: name of the new probe.
        version: version of the new probe.
        output: path of the new probe file.
        format: a name in ``FORMATS``; ``None`` = recognised by the file's content.
        taps: taps (places in the model) that the probe reads, in order, if the file does not say: ``"resid_post.6"``, or a name in Hugging
            Face transformers (``hidden_states[7]``), TransformerLens (``blocks.6.hook_resid_post``) or nnsight
            (``model.layers[6].output[0]``).
        author_scores: a few rollouts with the scores that the author's own code gives them.
        golden: rollouts for the golden vectors; by default those in ``author_scores``, or a few built-in texts.
        reduction: how token scores become one score of a rollout; for an Obfuscation Atlas probe, its aggregator.
        unit: unit of the scores, if the format does not say.
        labels: names of the score columns.
        heads: number of heads of an attention probe of the Obfuscation Atlas.
        features: indices of the features of a sparse autoencoder to score.
        sees_prompt: whether a probe that reads several tokens together also reads the prompt's tokens.
        trust_pickle: whether the file may run code in this process while it is opened.
        description: description of the probe, for people.
        author: author of the probe, for people.
        license: license of the probe, by its SPDX name.

    Raises:
        TypeError, ValueError: an argument or the file is wrong; the message names the fault and the remedy.
        ProbeRefused: the probe's scores differ from the author's, or a server would refuse the probe file; nothing is written.
    """
    output = given.place(output)
    given.check_names(name, version, description=description, author=author, license=license)
    given.check_reference(reference)
    model = reference.reference
    places = [
        read_place(tap, f"tap[{index}]", model.num_hidden_layers)
        for index, tap in enumerate(arguments.sequence(taps, "taps", "taps", '["resid_post.6"]'))
    ]
    asked = ImportOptions(
        model.hidden_size,
        model.num_hidden_layers,
        any(isinstance(module, torch.nn.LayerNorm) for module in reference.model.modules()),
        tuple(place.tap for place in places),
        None if reduction is None else arguments.text(reduction, "reduction"),
        None if unit is None else arguments.unit(unit, "unit"),
        tuple(arguments.text(label, "label") for label in arguments.sequence(labels, "labels", "names", '["cheating"]')),
        None if heads is None else arguments.of_kind(heads, "heads", int, "give a whole number"),
        tuple(
            arguments.of_kind(feature, "feature", int, "give its index")
            for feature in arguments.sequence(features, "features", "indices", "[7]")
        ),
        arguments.flag(sees_prompt, "sees_prompt"),
        arguments.flag(trust_pickle, "trust_pickle"),
    )
    author_scores = arguments.sequence(author_scores, "author_scores", "scores", "[AuthorScores(prompt_ids, completion_ids, score=0.5)]")
    source = ProbeSource(file)
    known = format_of(source, format)
    said = [note for place in places for note in place.notes]
    if adapter := source.beside(*_ADAPTERS):
        _check_brings_adapter(known, adapter[0])
        reference = reference.adapted(source.folder)
        said.append("Its scores are those of the model with the LoRA adapter that it brings")
    found = _with_what_was_said(known.read(source, asked), asked, said, reference)
    rollouts = _golden(golden, author_scores, reference, found)
    inputs = tuple(TapInput.parse(tap) for tap in found.taps)
    function = given.read_probe(found.function, found.taps, reference, found.labels, found.context)
    scorer = GoldenScorer(function, reference, inputs, found.context, found.positions, False, None)
    _check_fires(scorer, rollouts, found.labels)
    pooled = found.context.kind == "rollout"
    comparison = compared(scorer, None if pooled else found.reduction, author_scores, source.name) if len(author_scores) else NOT_COMPARED
    notes = (comparison, *found.notes)
    sentence = "" if len(author_scores) else f" {NOT_COMPARED}."
    probe = write_probe(
        output,
        found.function,
        reference,
        name=name,
        version=version,
        taps=found.taps,
        golden=rollouts,
        labels=found.labels,
        context=found.context,
        positions=found.positions,
        reduce_on=found.reduce_on,
        reduction=found.reduction,
        expects_bos=found.expects_bos,
        training=Training(method=f"{found.method}, imported as {known.name}", notes=". ".join(notes) + "."),
        description=f"{description or f'Imported: {found.method}.'}{sentence}",
        author=author,
        license=license,
    )
    return ImportedProbe(probe, known.name, notes, bool(len(author_scores)))


def _check_brings_adapter(known: Format, adapter: str) -> None:
    """Refuses an adapter (weights that change the model, such as LoRA) beside a probe of a format that does not say whether it is the
    probe's: without it, or with it, the scores would be others.
    """
    if not known.brings_adapter:
        raise ValueError(
            f"{adapter}: an adapter, which changes the model, and the format {known.name} does not say whether the probe was fitted with "
            "it. If it was, write the probe with write_probe(…, adapter=…); if not, copy the probe into a folder of its own"
        )


def _with_what_was_said(found: Imported, asked: ImportOptions, notes: Sequence[str], reference: ReferenceModel) -> Imported:
    """Completes a probe that was read from another library's file with a reduction (from token scores to one score of a rollout), and with
    notes on facts that neither the file nor the user gave.
    """
    said = [*found.notes, *notes]
    reduction, expects_bos = found.reduction, found.expects_bos
    if found.context.kind != "rollout":
        if reduction is None and asked.reduction is None:
            said.append("How its author goes from tokens to a rollout is not in the file: mean stands for it")
        reduction = arguments.reduction(reduction or asked.reduction or "mean", "reduction")
    if expects_bos and reference.tokenizer.bos_token_id is None:
        expects_bos = None
        said.append("Its author begins texts with BOS, which this tokenizer does not have: not checked")
    return replace(found, reduction=reduction, expects_bos=expects_bos, notes=tuple(dict.fromkeys(said)))


def _golden(golden: Any, author_scores: Sequence[AuthorScores], reference: ReferenceModel, found: Imported) -> list[Rollout]:  # noqa: ANN401
    """Returns the rollouts on which a probe's golden vectors (scores that a server must reproduce) are computed: those that the user gave,
    else those with the author's scores, else built-in texts.
    """
    bos = reference.tokenizer.bos_token_id
    if len(golden):
        rollouts, argument = given.read_golden(golden, reference), "golden"
    elif len(author_scores):
        pairs = [(one.prompt_ids, one.completion_ids) for one in author_scores[:_GOLDEN_ROLLOUTS] if isinstance(one, AuthorScores)]
        rollouts, argument = given.read_golden(pairs, reference), "author_scores"
    else:
        rollouts, argument = _texts(reference, bos if found.expects_bos else None), "golden"
    for index, (prompt, _) in enumerate(rollouts):
        if found.expects_bos and (not len(prompt) or prompt[0] != bos):
            raise ValueError(
                f"{argument}[{index}]: does not begin with BOS ({bos}), and the probe's author begins texts with it; give rollouts "
                "as they were read"
            )
    return rollouts


def _texts(reference: ReferenceModel, bos: int | None) -> list[Rollout]:
    rollouts = []
    for texts in _TEXTS:
        prompt, completion = (np.array(reference.tokenizer(text, add_special_tokens=False)["input_ids"], np.int64) for text in texts)
        if len({*completion.tolist()}) < _FEWEST_IDS:
            raise ValueError(
                "golden: not given, and the tokenizer makes too little of this module's own texts; give a few real rollouts of ten "
                "to fifty tokens"
            )
        rollouts.append((prompt if bos is None else np.concatenate([[bos], prompt]), completion))
    return rollouts


def _check_fires(scorer: GoldenScorer, rollouts: Sequence[Rollout], labels: Sequence[str]) -> None:
    """Refuses rollouts for golden vectors (scores that a server must reproduce) on which a score column does not vary, as a sparse
    feature's does on most texts: equal scores would verify nothing.
    """
    rows = [scorer.scores_at(prompt, completion, [(scorer.inputs, 0)])[0] for prompt, completion in rollouts]
    if any(row is None for row in rows):
        return  # writing says what is wrong with the code's scores
    scores = np.concatenate([row for row in rows if row is not None])
    for label, column in zip(labels, scores.T, strict=False):
        if len(column) > 1 and (column == column[0]).all():
            raise ValueError(
                f"golden: {label} is {column[0]:g} on all {len(column)} of the golden scores, which then check nothing; give rollouts on "
                "which it fires (golden, --golden)"
            )
