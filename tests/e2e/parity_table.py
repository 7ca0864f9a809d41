"""The table of families in docs/reference/parity.md: what an engine serves of each, held against plain Hugging Face.

``make parity`` runs this.

Each family is a tiny model with random weights. Served means that an engine loads it with a linear probe at every tap that it does not
refuse, each with golden scores from plain Hugging Face, and scores all rollouts as plain Hugging Face does.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import varlen_reference
from config_sweep import unnoticed_settings
from parity_cases import GROUPS, Author, Probe, answered, expected, in_deviations
from parity_families import FAMILIES, Family, write_family
from parity_models import LAYERS
from parity_probes import LINEAR
from transformers import AutoModel

from probescore.types import Tap
from probescore_probes.reference import reference_activations
from probescore_server import Engine
from probescore_server.backbone.model_loading import Decoder, load_decoder
from probescore_server.backbone.packed.support import packed_refusal
from probescore_server.backbone.selection import choose_backbone
from probescore_server.backbone.taps import TapReader
from probescore_server.errors import ModelRefused

DOCS = Path(__file__).parents[2] / "docs/reference/parity.md"
BOUND = 1e-4
_STREAM = tuple(Tap(hook, layer) for hook in ("resid_pre", "resid_post") for layer in range(LAYERS))
_ADDED = tuple(Tap(hook, layer) for layer in range(LAYERS) for hook in ("attn_out", "mlp_out"))
_FINAL_NORM = Tap("final_norm")
_HEADER = "| family | `model_type` | served | hooks | cache | packable | largest difference |\n|---|---|---|---|---|---|---|"
_BEGIN, _END = "<!-- written by make parity -->\n", "<!-- end of what make parity writes -->\n"


@dataclass(frozen=True)
class Row:
    """What was found of one family.

    Attributes:
        refusal: why the model is not served; empty if it is.
        refused: which hooks are not served, of which blocks, and why; as they are written in the table.
        keeps_key_values: whether prompts stay in the key-value cache between calls.
        not_packed: why the packed path does not take it; empty if it does.
        difference: largest, as a multiple of the standard deviation of plain Hugging Face's scores.
    """

    family: Family
    refusal: str = ""
    refused: tuple[tuple[str, str], ...] = ()
    keeps_key_values: bool = False
    not_packed: str = ""
    difference: float = 0.0

    def __str__(self) -> str:
        return f"| {self.facts} | {'' if self.refusal else f'{self.difference:.1e}'} |"

    @property
    def facts(self) -> str:
        """The cells that do not depend on rounding."""
        hooks = "all" if not self.refused else "all but " + ", ".join(hook for hook, _ in self.refused)
        cells = ["yes", hooks, "yes" if self.keeps_key_values else "no", "no" if self.not_packed else "yes"]
        if self.refusal:
            cells = ["**no**", "", "", ""]
        return " | ".join([self.family.name, f"`{self.family.architecture}`", *cells])


class PlainHuggingFace:
    """A whole model as transformers loads it, read at the taps that are asked for; in place of ``parity_reference.Reference``."""

    def __init__(self, directory: Path, taps: Sequence[Tap]) -> None:
        self._model = AutoModel.from_pretrained(directory).eval()
        self._taps = taps
        self._read: dict[tuple[int, ...], dict[str, Any]] = {}

    def activations(self, token_ids: Sequence[int]) -> dict[str, Any]:
        """By name of a tap ``(T, hidden_size)`` float32."""
        key = tuple(token_ids)
        if key not in self._read:
            self._read[key] = {str(tap): rows for tap, rows in reference_activations(self._model, np.array(key), self._taps).items()}
        return self._read[key]


def measure(family: Family) -> Row:
    """Writes a model of the family and finds out."""
    with tempfile.TemporaryDirectory() as directory:
        model = write_family(Path(directory, "model"), family)
        try:
            Engine.load(str(model))
            decoder = load_decoder(model, num_layers=LAYERS)
            used = load_decoder(model, num_layers=LAYERS)
            backbone, _ = choose_backbone(used, TapReader(used, []))
        except ModelRefused as refusal:
            return Row(family, refusal=str(refusal))
        refused = dict(_refused_taps(decoder))
        taps = [tap for tap in (*_STREAM, *_ADDED, _FINAL_NORM) if tap not in refused]
        author = Author(model, PlainHuggingFace(model, taps))  # type: ignore[arg-type]
        probes = [Probe(LINEAR, (str(tap),)) for tap in taps]
        engine = Engine.load(str(model), [author.write(Path(directory), probe) for probe in probes])
        result = engine.score(GROUPS, token_scores="all")
        differences = [in_deviations(answered(result, probe), expected(author.reference, probe)) for probe in probes]
        return Row(
            family,
            refused=_by_reason(refused),
            keeps_key_values=bool(getattr(backbone, "keeps_key_values", False)),
            not_packed=_not_packed(decoder),
            difference=max(differences),
        )


def _refused_taps(decoder: Decoder) -> Iterator[tuple[Tap, str]]:
    for tap in (*_STREAM, *_ADDED, _FINAL_NORM):
        try:
            TapReader(decoder, [tap])
        except ModelRefused as refusal:
            yield tap, str(refusal)


def _by_reason(refused: dict[Tap, str]) -> tuple[tuple[str, str], ...]:
    """Each hook with the blocks that it is refused of, and the first reason."""
    layers: dict[str, list[int | None]] = {}
    for tap in refused:
        layers.setdefault(tap.hook, []).append(tap.layer)
    named = []
    for hook, of_hook in layers.items():
        reason = refused[Tap(hook, of_hook[0])]
        every = of_hook == [None] or len(of_hook) == LAYERS
        named.append((f"`{hook}`" if every else f"`{hook}` of {_parts(reason)}", reason))
    return tuple(named)


def _parts(reason: str) -> str:
    """What the blocks that have no attention or no MLP are made of, for people."""
    found = re.search(r"its parts: (.*?)\)", reason)
    parts = [part for part in (found[1].split(", ") if found else []) if "norm" not in part and part not in ("feed_forward", "mlp")]
    return f"`{parts[0]}` blocks" if parts else "some blocks"


def _not_packed(decoder: Decoder) -> str:
    refusal = packed_refusal(decoder)
    if refusal is None:
        backbone, reason = choose_backbone(decoder, TapReader(decoder, []), varlen_reference.varlen_attn)
        refusal = None if backbone.name == "packed" else reason
    return refusal or ""


def table(rows: Sequence[Row]) -> str:
    """The part of docs/reference/parity.md that this writes."""
    served = [row for row in rows if not row.refusal]
    whole = sum(not row.refused for row in served)
    counts = (
        f"{len(rows)} families: {len(served)} served, {whole} of them at every hook; {sum(row.keeps_key_values for row in served)} keep "
        f"prompts in the cache, {sum(not row.not_packed for row in served)} can run packed. Largest difference "
        f"{max((row.difference for row in served), default=0):.1e}."
    )
    lines = [counts, "", _HEADER, *map(str, rows), ""]
    reasons = [("Not served", [(row.family.name, row.refusal) for row in rows if row.refusal])]
    reasons.append(("Hooks not served", [(row.family.name, reason) for row in served for _, reason in row.refused[:1]]))
    reasons.append(("Not packed", [(row.family.name, row.not_packed) for row in served if row.not_packed]))
    for title, entries in reasons:
        lines += [f"### {title}", "", *(f"- {name}: {_plain(reason)}" for name, reason in entries), ""]
    return "\n".join(lines)


def _plain(reason: str) -> str:
    """On one line, without what differs from run to run."""
    first = " ".join(reason.split())
    first = re.sub(r"(a )?relative error (of )?[0-9.e+-]+\b", "a large relative error", first)
    return re.sub(r" of type <class '[^']+'>\.", " of another type", first)


def documented() -> str:
    """What docs/reference/parity.md has of it."""
    return DOCS.read_text(encoding="utf-8").partition(_BEGIN)[2].partition(_END)[0]


def _write(text: str) -> None:
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(_BEGIN)
    DOCS.write_text(before + _BEGIN + text + _END + rest.partition(_END)[2], encoding="utf-8")


def main() -> int:
    """Runs every family; fails where one is further off than the bound, or has a setting that its fingerprint does not tell of."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="only these, and docs/reference/parity.md stays as it is")
    parser.add_argument("--without-settings", action="store_true", help="do not change each setting of each config")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    rows, faults = [], []
    for name in arguments.families or FAMILIES:
        row = measure(FAMILIES[name])
        rows.append(row)
        found = [] if row.difference <= BOUND else [f"{name}: off by {row.difference:.1e}"]
        if not arguments.without_settings and not row.refusal:
            with tempfile.TemporaryDirectory() as directory:
                unnoticed = unnoticed_settings(write_family(Path(directory), FAMILIES[name]))
            found += [f"{name}: the fingerprint does not tell of {setting} = {value}" for setting, value in unnoticed.items()]
        print(row, row.refusal, *found, flush=True)
        faults += found
    text = table(rows)
    print("", text.partition("\n")[0], *faults, sep="\n")
    if not arguments.families:
        _write(text)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
