"""Defines the descriptions of probes: where a probe reads activations, and in which unit, for which labels and with which thresholds it
scores.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from probescore.reductions import Reduction
from probescore.types.calibrations import Calibration, OutsideCalibration


class ScoreUnit(str, Enum):
    """Enumeration of the units of a probe's scores: logits, probabilities, or values of any other kind."""

    LOGIT = "logit"
    PROBABILITY = "probability"
    VALUE = "value"


class OutputPer(str, Enum):
    """Enumeration of the units of text that a probe scores: each token, or the rollout as a whole."""

    TOKEN = "token"
    ROLLOUT = "rollout"


class Hook(str, Enum):
    """Enumeration of the kinds of places in a language model at which a probe can read activations."""

    RESID_PRE = "resid_pre"
    RESID_POST = "resid_post"
    ATTN_OUT = "attn_out"
    MLP_OUT = "mlp_out"
    FINAL_NORM = "final_norm"

    def __str__(self) -> str:
        return self.value

    @property
    def has_layer(self) -> bool:
        """Returns whether each decoder block has a hook of this kind (a place at which a probe can read activations); if not, the whole
        model has a single hook of the kind.
        """
        return self is not Hook.FINAL_NORM


@dataclass(frozen=True)
class Tap:
    """Place in the model at which a probe reads activations: a hook (the kind of place) and a decoder block.

    ``hook`` is a ``Hook``, or the name of a hook that only a newer server knows; ``layer`` is the 0-based index of the decoder block
    (``None`` for ``final_norm``).

    ``str(tap)`` is the name of the probe graph's input for these activations: ``"resid_post.6"``, ``"final_norm"``.
    """

    hook: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.hook if self.layer is None else f"{self.hook}.{self.layer}"


@dataclass(frozen=True)
class ProbeInfo:
    """Description of a probe that a server has loaded.

    Attributes:
        name: the probe's name.
        version: the probe's version; a name and a version always identify the same bytes.
        description: what the probe detects, in its author's words.
        graph_sha256: digest of the probe's ONNX graph, which computes the scores.
        manifest_sha256: digest of the probe's manifest (its description as JSON) without the graph's digest; the manifest includes the
            calibrations.
        taps: places in the model at which the probe reads activations.
        unit: unit of the probe's scores.
        output_per: whether the probe scores tokens or rollouts.
        labels: names of the values per token or rollout, in order; a single value has one label.
        default_reduction: reduction of the per-token scores to one number, used unless a request asks for another one; ``None`` for a probe
            that scores rollouts.
        calibrations: the probe's calibrated thresholds.
        accepted_mismatches: failed checks of the probe that the server's operator chose to accept, such as ``"tokenizer_fingerprint"``.
        manifest_json: the probe's manifest as JSON, without the golden vectors (token ids with expected scores).
        retired: whether the probe's file is gone, so that the server scores with it for a while only in requests that name its version.
    """

    name: str
    version: str
    description: str
    graph_sha256: str
    manifest_sha256: str
    taps: tuple[Tap, ...]
    unit: ScoreUnit
    output_per: OutputPer
    labels: tuple[str, ...]
    default_reduction: Reduction | None
    calibrations: tuple[Calibration, ...]
    accepted_mismatches: tuple[str, ...]
    manifest_json: str
    retired: bool = False

    @property
    def key(self) -> str:
        """Returns the probe's name and version as ``name@version``, which identifies the probe."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class ScoredProbe:
    """Description of a probe that has scored the rollouts of a response.

    Attributes:
        name: the probe's name.
        version: the probe's version; a name and a version always identify the same bytes.
        graph_sha256: digest of the probe's ONNX graph, which computes the scores.
        manifest_sha256: digest of the probe's manifest (its description as JSON) without the graph's digest; the manifest includes the
            calibrations.
        unit: unit of the probe's scores.
        output_per: whether the probe scores tokens or rollouts.
        labels: names of the values per token or rollout, in order; a single value has one label.
        reductions: reductions from per-token scores to one number, in the order of ``ProbeScores.reduced``; empty for a probe that scores
            rollouts.
        follow_up_tokens: number of tokens that the probe itself appends to every completion (a follow-up) and scores instead of the
            completion; 0 = the probe scores the completion.
        accepted_mismatches: failed checks of the probe that the server's operator chose to accept, such as ``"tokenizer_fingerprint"``.
        reading: name of the model whose activations the probe has read; ``"frozen"`` = the server's own model.
        exclude_special_tokens: whether the tokenizer's special tokens do not count; the score of a selection that has only special tokens
            is then absent.
        outside_calibration: the completions that are unlike those on which a threshold of the probe was found, so that the threshold is not
            known to hold for them. Only thresholds for one of ``reductions`` are compared, and only if the manifest describes the rollouts
            on which they were found.
    """

    name: str
    version: str
    graph_sha256: str
    manifest_sha256: str
    unit: ScoreUnit
    output_per: OutputPer
    labels: tuple[str, ...]
    reductions: tuple[Reduction, ...]
    accepted_mismatches: tuple[str, ...] = ()
    reading: str = "frozen"
    follow_up_tokens: int = 0
    exclude_special_tokens: bool = False
    outside_calibration: tuple[OutsideCalibration, ...] = ()

    @property
    def key(self) -> str:
        """Returns the probe's name and version as ``name@version``, which identifies the probe."""
        return f"{self.name}@{self.version}"


def score_keys(probes: Sequence[ScoredProbe]) -> tuple[str, ...]:
    """Returns the keys of ``CompletionScores.scores``, the dictionary of one completion's scores, in the order of ``probes``.

    A probe's key is its name, or ``name@version`` where several versions of one name were applied.
    """
    names = Counter(probe.name for probe in probes)
    return tuple(probe.name if names[probe.name] == 1 else probe.key for probe in probes)


def named_probe(name: str, probes: Iterable[ProbeInfo]) -> ProbeInfo | None:
    """Returns the probe, among the probes that a server has loaded, that a given name means; ``None`` if the name means none of them.

    A name ``name@version`` means exactly that version. A bare name means the highest version (``version_order``) of the probe whose file
    has not been removed.
    """
    probes = tuple(probes)
    exact = next((probe for probe in probes if probe.key == name), None)
    current = (probe for probe in probes if probe.name == name and not probe.retired)
    return exact or max(current, key=lambda probe: version_order(probe.version), default=None)


def version_order(version: str) -> tuple[tuple[bool, int, str], ...]:
    """Returns a key by which version texts of probes are sorted in natural order: runs of digits compare as numbers, so that 10 comes after
    9 and 1.10 after 1.9. A number comes after any other text in its place, and a version after any version that is its beginning.
    """
    parts = re.findall(r"[0-9]+|[^0-9]+", version)
    keys = ((True, int(part), "") if part.isdecimal() else (False, 0, part) for part in parts)
    return (*keys, (False, -1, version))  # the text itself is last, so that 1 and 01 have an order too
