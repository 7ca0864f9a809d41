"""Defines the description of a reading: whose activations the probes read, those of the frozen model or of other weights beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

FROZEN = "frozen"
"""Name of the reading that is always there: the frozen model's own activations."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ReadingKind(str, Enum):
    """Enumeration of the kinds of weights that a reading has: the frozen model's, those with an adapter, or those of a whole checkpoint."""

    FROZEN = "frozen"
    ADAPTER = "adapter"
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Reading:
    """Description of a reading: the weights whose activations the same probes read.

    What it says of probes is true of those that were served when the description was made.

    Attributes:
        name: the name by which a request asks for the reading.
        id: digest ``"sha256:…"`` of the frozen model's fingerprint and of everything that was read to make this reading; for ``frozen`` the
            fingerprint. Two readings of one id give the same scores.
        kind: the kind of weights.
        step: label that the caller gave, such as the training step; ``None`` = none.
        model_fingerprint: fingerprint of the model whose files hold the weights: the frozen model's, or for a checkpoint its own.
        golden_verified: whether the probes' golden scores hold for this reading: it changes nothing that a probe sees.
        changed_layers: 0-based indices of the decoder blocks with changed weights, as far as some probe reads them or a later block.
        unseen_tensors: number of tensors that no probe can see, such as those of later blocks and of the head.
    """

    name: str
    id: str
    kind: ReadingKind
    step: int | None
    model_fingerprint: str
    golden_verified: bool
    changed_layers: tuple[int, ...] = ()
    unseen_tensors: int = 0


@dataclass(frozen=True)
class LoadedReading:
    """Result of ``load_reading``.

    Attributes:
        reading: the reading that the name now means.
        replaced: the reading that the name meant before; ``None`` = none.
        golden_drift: a dictionary, keyed by the probe's ``name@version``, of the largest difference between scores of the probe's golden
            rollouts on this reading and the golden scores, in standard deviations of these. It tells how far the weights have moved, and
            is no fault.
        device_bytes: bytes of memory on the device that only this reading's weights use.
    """

    reading: Reading
    replaced: Reading | None = None
    golden_drift: Mapping[str, float] = field(default_factory=dict)
    device_bytes: int = 0


def name_problem(name: object) -> str:
    """Returns what keeps a value from being the name of a reading; empty if nothing does."""
    if isinstance(name, str) and _NAME.fullmatch(name):
        return ""
    return f"{str(name)[:100]!r}: a reading's name is 1 to 64 of A–Z, a–z, 0–9, '.', '_' and '-', and begins with a letter or digit"
