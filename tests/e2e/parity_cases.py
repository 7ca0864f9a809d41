"""What parity is measured on: the rollouts, the probes, and the scores that plain Hugging Face and plain numpy give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from parity_models import BOS, HIDDEN, LAYERS, VOCAB_SIZE
from parity_probes import KINDS, LINEAR, MULTI_TAP, Array, Kind
from parity_reference import Reference
from transformers import AutoTokenizer

from probescore import tokenizer_fingerprint
from probescore.types import Completion, CompletionScores, Hook, OutputPer, RolloutGroup, ScoreResult, ScoreUnit
from probescore_server.probes.format.fingerprints import model_fingerprint
from probescore_server.probes.format.manifest import Golden, GoldenCase, Manifest, ModelReference, Output, TapInput
from probescore_server.probes.format.probe_file import UNSEALED, write_probe_file

_random = np.random.default_rng(7)


def _ids(length: int) -> list[int]:
    return [int(token) for token in _random.integers(4, VOCAB_SIZE, length)]


_PROMPT = [BOS, *_ids(21)]
_ANSWER = _ids(24)
GROUPS = [
    RolloutGroup(
        _PROMPT,
        [
            _ids(1),
            Completion(_ids(9), follow_ups=(Completion(_ids(5), follow_ups=(Completion(_ids(3)),)), Completion(_ids(4)))),
            _ANSWER,
            _ANSWER,
            _ids(40),
        ],
    ),
    RolloutGroup(_PROMPT, [_ids(13)]),
    RolloutGroup([BOS], [_ids(30)]),
    RolloutGroup([*_PROMPT[:10], *_ids(20)], [_ids(12), _ids(33)]),
    RolloutGroup([BOS, *_ids(2)], [_ids(3), _ids(6)]),
]
"""Shared prompts and prefixes, identical completions, nested follow-ups, rollouts within every model's window and far beyond it."""

_GOLDEN = [([BOS, *_ids(9)], _ids(30))]
_GOLDEN_TO_POOL = [([BOS, *_ids(5)], _ids(10)) for _ in range(8)]


@dataclass(frozen=True, eq=False)
class Probe:
    """A probe of some kind at some taps."""

    kind: Kind
    taps: tuple[str, ...]

    @property
    def name(self) -> str:
        return "-".join((self.kind.name, *self.taps))

    @property
    def compared(self) -> int:
        """How many of its labels are compared."""
        return self.kind.compared or self.kind.labels


MIDDLE = 2
EVERY_HOOK = (
    f"resid_pre.{MIDDLE}",
    f"resid_post.{MIDDLE - 1}",
    f"resid_post.{LAYERS - 1}",
    f"attn_out.{MIDDLE}",
    f"mlp_out.{MIDDLE}",
    "final_norm",
)
EVERY_TAP = [
    *(f"{hook}.{layer}" for hook in Hook if hook.has_layer for layer in range(LAYERS)),
    *(str(hook) for hook in Hook if not hook.has_layer),
]


def all_probes() -> list[Probe]:
    """Every kind at every hook, and a linear probe at every tap that depends on the context (the first MLP need not: GPT-NeoX)."""
    probes = [Probe(kind, (tap,) if kind is not MULTI_TAP else (tap, "attn_out.1")) for kind in KINDS for tap in EVERY_HOOK]
    return probes + [Probe(LINEAR, (tap,)) for tap in EVERY_TAP if tap not in (*EVERY_HOOK, "resid_pre.0", "mlp_out.0")]


def shallow_probes() -> list[Probe]:
    """Probes that need the first two blocks only."""
    return [Probe(LINEAR, (tap,)) for tap in ("resid_pre.1", "resid_post.1", "attn_out.1", "mlp_out.1")]


@dataclass(frozen=True)
class Shift:
    """A way to be off by one: rows of the next or previous position, block, or with one BOS too many or too few."""

    position: int = 0
    layer: int = 0
    bos: int = 0

    def tap(self, tap: str) -> str:
        """The tap that is read instead of ``tap``; there may be none of that name."""
        deepest = f"resid_post.{LAYERS - 1}"
        # the usual confusion: the last of Hugging Face's hidden states is after the norm
        if (tap, self.layer) in ((deepest, 1), ("final_norm", -1)):
            return "final_norm" if tap == deepest else deepest
        hook, _, layer = tap.partition(".")
        return f"{hook}.{int(layer or LAYERS) + self.layer}" if self.layer else tap

    def applies_to(self, probe: Probe) -> bool:
        """Whether there is something to read instead."""
        return all(self.tap(tap) in EVERY_TAP for tap in probe.taps)

    def prefix(self, prefix: Sequence[int]) -> list[int]:
        return {-1: list(prefix[1:]), 0: list(prefix), 1: [BOS, *prefix]}[self.bos]


AS_PROMISED = Shift()
SHIFTS = {
    "next block": Shift(layer=1),
    "previous block": Shift(layer=-1),
    "next position": Shift(position=1),
    "previous position": Shift(position=-1),
    "doubled BOS": Shift(bos=1),
    "missing BOS": Shift(bos=-1),
}


def reference_scores(reference: Reference, probe: Probe, prefix: Sequence[int], own: Sequence[int], shift: Shift = AS_PROMISED) -> Array:
    """Scores of ``own`` read after ``prefix``: ``(len(own), labels)``, or ``(1, labels)`` of a probe that pools."""
    prefix = shift.prefix(prefix)
    activations = reference.activations([*prefix, *own])
    positions = np.arange(len(prefix) + len(own))
    read = (positions + shift.position).clip(0, len(positions) - 1)
    rows = [activations[shift.tap(tap)][read].astype(np.float64) for tap in probe.taps]
    first = 0 if probe.kind.context.sees_prompt else len(prefix)
    scores = probe.kind.plain(probe.kind.weights, [x[first:] for x in rows], positions[first:])
    return scores if probe.kind.per is OutputPer.ROLLOUT else scores[len(prefix) - first :]


def rollouts() -> Iterator[tuple[list[int], list[int]]]:
    """Each completion and follow-up of ``GROUPS``, depth first, with all that comes before it."""
    for group in GROUPS:
        for completion in group.completions:
            yield from _tree(_as_list(group.prompt), completion if isinstance(completion, Completion) else Completion(completion))


def _tree(prefix: list[int], completion: Completion) -> Iterator[tuple[list[int], list[int]]]:
    own = _as_list(completion.tokens)
    yield prefix, own
    for follow_up in completion.follow_ups:
        yield from _tree(prefix + own, follow_up)


def _as_list(tokens: object) -> list[int]:
    assert isinstance(tokens, list)
    return tokens


def served_scores(result: ScoreResult, probe: Probe) -> list[NDArray[np.float32]]:
    """What was answered for each of ``rollouts()``, in the same order."""

    def tree(scored: CompletionScores) -> Iterator[NDArray[np.float32]]:
        scores = scored[probe.name]
        if probe.kind.per is OutputPer.ROLLOUT:
            yield scores.reduced[0]
        else:
            assert scores.tokens is not None
            yield scores.tokens
        for follow_up in scored.follow_ups:
            yield from tree(follow_up)

    return [scores for group in result.groups for scored in group for scores in tree(scored)]


class Author:
    """Someone with a model who writes probe files for it, with golden vectors from plain Hugging Face."""

    def __init__(self, model: Path, reference: Reference | None = None) -> None:
        self.model = model
        self.reference = reference or Reference(model)
        self._model = ModelReference(id="tiny", fingerprint=model_fingerprint(model), hidden_size=HIDDEN, num_hidden_layers=LAYERS)
        self._tokenizer = tokenizer_fingerprint(AutoTokenizer.from_pretrained(model))

    def write(self, directory: Path, probe: Probe, *, meant: Probe | None = None, shift: Shift = AS_PROMISED, **manifest: Any) -> Path:
        """Write ``probe``.

        Args:
            meant: the probe that the golden vectors are of, where it is another one.
            shift: how the author's own code is off by one.
            manifest: fields that differ from the usual ones.
        """
        kind = probe.kind
        split = (tap.partition(".") for tap in probe.taps)
        inputs = tuple(TapInput.model_validate({"hook": hook, "layer": int(layer) if layer else None}) for hook, _, layer in split)
        fields: dict[str, Any] = {
            "name": probe.name,
            "version": "1",
            "model": self._model,
            "tokenizer_fingerprint": self._tokenizer,
            "inputs": inputs,
            "cu_seqlens": kind.context.kind != "pointwise",
            "positions": kind.positions,
            "context": kind.context,
            "output": Output(unit=ScoreUnit.VALUE, per=kind.per, labels=tuple(f"label-{i}" for i in range(kind.labels))),
            "reduce_on": ScoreUnit.VALUE,
            "reduction": None if kind.per is OutputPer.ROLLOUT else "mean",
            "golden": self.golden(meant or probe, shift=shift),
            "graph_sha256": UNSEALED,
            "manifest_sha256": UNSEALED,
        }
        path = directory / f"{probe.name}.onnx"
        write_probe_file(path, kind.graph(probe.taps), Manifest(**(fields | manifest)))
        return path

    def golden(self, probe: Probe, rollouts: Sequence[tuple[Sequence[int], Sequence[int]]] = (), shift: Shift = AS_PROMISED) -> Golden:
        """Scores of (prompt, completion) pairs by plain Hugging Face."""
        rollouts = rollouts or (_GOLDEN if probe.kind.per is OutputPer.TOKEN else _GOLDEN_TO_POOL)
        cases = []
        for prompt, completion in rollouts:
            scores = reference_scores(self.reference, probe, prompt, completion, shift)
            rows = tuple(map(tuple, scores.tolist()))
            cases.append(GoldenCase(prompt_ids=tuple(prompt), completion_ids=tuple(completion), scores=rows))
        return Golden(cases=tuple(cases))


def expected(reference: Reference, probe: Probe, shift: Shift = AS_PROMISED) -> Array:
    """The reference's scores of all rollouts, one below the other, ``(rows, compared labels)``."""
    scores = [reference_scores(reference, probe, prefix, own, shift) for prefix, own in rollouts()]
    return np.concatenate(scores)[:, : probe.compared]


def answered(result: ScoreResult, probe: Probe) -> NDArray[np.float32]:
    """What was served for all rollouts, in the same form."""
    return np.concatenate(served_scores(result, probe))[:, : probe.compared]


def in_deviations(found: Array, wanted: Array) -> float:
    """Largest difference as a multiple of the expected scores' standard deviation, over all labels."""
    return float((np.abs(found - wanted) / wanted.std(axis=0)).max())
