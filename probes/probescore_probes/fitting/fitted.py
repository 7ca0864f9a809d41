"""Fits a probe: reads activations with the engine that will serve it, chooses layer, pooling and strength by cross-validation, and fits
with this choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from probescore.types import Hook
from probescore_probes.fitting.activation_pass import FINAL_NORM, ActivationTable, read_activations, read_as_served, read_tokens
from probescore_probes.fitting.comparisons import Comparisons
from probescore_probes.fitting.cross_validation import Candidate, Nested, Selection
from probescore_probes.fitting.fitting_data import FittingData, prepared
from probescore_probes.fitting.kinds import Fit, fit_kind, pools_of, taps_of_tokens
from probescore_probes.fitting.labelled_rollouts import TRAIN, LabelledRollout
from probescore_probes.fitting.options import FitOptions
from probescore_probes.fitting.serving import FittedProbe
from probescore_probes.fitting.sparse_features import SparseFeatures
from probescore_probes.fitting.token_kinds import check_bytes
from probescore_probes.reference import ReferenceModel
from probescore_server.engine.engine import Engine

EXACT = ("float32",)
"""Dtypes in which a score hardly depends on what else is in its batch."""

Report = Callable[[str], None]

_COMPUTED = {str(hook): place for place, hook in enumerate((Hook.RESID_PRE, Hook.ATTN_OUT, Hook.MLP_OUT, Hook.RESID_POST, Hook.FINAL_NORM))}
"""Place of each hook in the order in which a block computes them."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """A probe that was fitted, with what it was fitted on and how it was chosen.

    Attributes:
        reference: the whole model in plain Hugging Face, for golden vectors.
        data: all examples.
        table: their activations and log-probabilities, as the engine reads them in the dtype in which the probe is served.
        comparisons: the results of cross-validation.
        selection: the tap (place in the model), pooling and strength that were chosen, and the results that they were chosen from.
        nested: result of nested cross-validation.
        fit: the probe, fitted on all training examples.
    """

    reference: ReferenceModel
    data: FittingData
    table: ActivationTable
    comparisons: Comparisons
    selection: Selection
    nested: Nested
    fit: Fit

    @property
    def candidate(self) -> Candidate:
        """Returns the tap (place in the model), pooling and strength that cross-validation chose for a fitted probe."""
        return self.selection.chosen

    @property
    def probe(self) -> FittedProbe:
        """Returns the scoring function of a fitted probe, which is written into its file."""
        return self.fit.probe()

    @property
    def scores(self) -> NDArray[np.float64]:
        """Returns the fitted scores of all examples, ``(n,)``."""
        return self.fit.score(np.arange(len(self.data.examples)))


def fit_rollouts(
    rollouts: Sequence[LabelledRollout],
    out_of_distribution: Sequence[LabelledRollout],
    model: str | Path,
    options: FitOptions,
    report: Report,
) -> Fitted:
    """Fits a probe to labelled rollouts, without writing it.

    The arguments and errors are those of ``fit_probe``.
    """
    report("loading the whole model")
    reference = ReferenceModel.load(model, revision=options.revision, device=options.device, trust_remote_code=options.trust_remote_code)
    autoencoder = None if options.autoencoder is None else SparseFeatures.read(options.autoencoder, options.feature, reference)
    wanted = options.taps if autoencoder is None else (autoencoder.tap,)
    engine = Engine.load(
        str(model),
        taps=[*wanted, FINAL_NORM],
        revision=options.revision,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )
    report("tokenising")
    data = prepared(rollouts, out_of_distribution, engine, options.seed)
    taps, pools = _taps(engine, wanted), pools_of(options.kind, options.pools)
    report(f"reading {len(data.examples)} examples at {len(taps)} taps")
    table = read_activations(engine, reference, data.examples, taps, tuple(dict.fromkeys([*pools, "mean"])))
    report(f"choosing among {len(taps)} taps × {len(pools)} poolings, nested cross-validation")
    comparisons = Comparisons(options, table, data)
    selection = comparisons.selection()
    if needed := taps_of_tokens(options.kind, taps, selection.chosen):
        report(f"reading every token at {', '.join(needed)}")
        check_bytes(int(sum(example.selected.sum() for example in data.examples)), len(needed), reference.reference.hidden_size)
        tokens = read_tokens(engine, data.examples, needed)
        table = replace(table, tokens=tokens) if autoencoder is None else replace(table, features=autoencoder.pooled(tokens[needed[0]]))
        comparisons = Comparisons(options, table, data)
    judged = comparisons.nested()
    report(f"fitting {options.kind} at {selection.chosen.tap}")
    fit = fit_kind(options.kind, table, data.labels, data.splits[TRAIN], selection.chosen, options.seed, autoencoder)
    if options.dtype not in EXACT:
        table = read_as_served(engine, data.examples, table, fit.probe().taps)
        fit = fit_kind(options.kind, table, data.labels, data.splits[TRAIN], selection.chosen, options.seed, autoencoder)
    _check_varies(fit.score(data.splits[TRAIN]), selection.chosen.tap)
    return Fitted(reference, data, table, comparisons, selection, judged, fit)


def _check_varies(scores: NDArray[np.float64], tap: str) -> None:
    if not np.ptp(scores.astype(np.float32)) > 0:
        raise ValueError(
            f"label: the fitted probe gives each of {len(scores)} training examples the score {scores[0]:.3g}: at {tap} their activations "
            "are equal, or stand as often beside either label; give rollouts that differ, or another tap"
        )


def _taps(engine: Engine, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the taps (places in the model) that match the given names or patterns, in the order in which the model computes them."""
    found = engine.resolve_reads(list(patterns), "mean").taps
    deepest = engine.info.model.num_hidden_layers
    return tuple(str(tap) for tap in sorted(found, key=lambda tap: (deepest if tap.layer is None else tap.layer, _COMPUTED[str(tap.hook)])))
