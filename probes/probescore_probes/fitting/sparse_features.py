"""Fits a probe that is one feature of a sparse autoencoder: the feature that tells the labels best, or one that is named.

The autoencoder is a folder of SAELens, and stays as it is. What is fitted is which feature is read, whether a rollout is judged by the mean
or by the maximum of the feature over its tokens, and the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from probescore_audit import auroc
from probescore_probes.exporting import ProbeFunction
from probescore_probes.importing.imported import ImportOptions
from probescore_probes.importing.sae_lens import is_sae, read_sae
from probescore_probes.importing.source import ProbeSource, whole_number
from probescore_probes.reference import ReferenceModel

SAE_FEATURE = "sae-feature"
POOLS = ("mean", "max")
"""Reductions of a feature over a rollout's tokens that are tried."""
MAX_BYTES = 4 << 30
"""Limits the bytes of pooled features that fitting holds in memory, as float32."""
_SHORTLIST = 64
"""Number of features, those whose means differ most between the classes, of which the AUROC is computed."""
_BATCH = 16

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SparseFeatures:
    """The features of a sparse autoencoder that may be chosen.

    Attributes:
        source: the folder of SAELens.
        tap: name of the tap (place in the model) that the autoencoder reads.
        features: indices of the features, ``(F,)``.
        asked: facts about the model that the autoencoder is read with.
    """

    source: ProbeSource
    tap: str
    features: tuple[int, ...]
    asked: ImportOptions

    @classmethod
    def read(cls, folder: Path | str, feature: int | None, reference: ReferenceModel) -> SparseFeatures:
        """Reads a folder of SAELens.

        Args:
            folder: the folder, with ``cfg.json`` and ``sae_weights.safetensors``.
            feature: index of the feature to use; ``None`` = any may be chosen.
            reference: the model that the autoencoder was trained on.

        Raises:
            ValueError: the folder holds no autoencoder for this model, or there is no such feature.
        """
        try:
            source = ProbeSource(folder)
            if not is_sae(source):
                raise ValueError(f"{str(folder)!r}: give a folder of SAELens, with cfg.json and sae_weights.safetensors")
            if feature is None:
                config = source.config("cfg.json")
                features = tuple(range(whole_number(config, "d_sae", "cfg.json")))
            else:
                features = (feature,)
            model = reference.reference
            layer_norms = any(isinstance(module, torch.nn.LayerNorm) for module in reference.model.modules())
            asked = ImportOptions(model.hidden_size, model.num_hidden_layers, layer_norms)
            found = read_sae(source, _with(asked, features))
        except ValueError as error:
            raise ValueError(f"sae: {error}") from None
        return cls(source, str(found.taps[0]), features, asked)

    def function(self, features: Sequence[int]) -> ProbeFunction:
        """Returns the function that computes some features of the sparse autoencoder for each token, ``(tokens, features)``."""
        return read_sae(self.source, _with(self.asked, tuple(features))).function

    @cached_property
    def _every(self) -> ProbeFunction:
        return self.function(self.features)

    def pooled(self, rows: Sequence[NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Computes the features of rollouts, ``(n, F)``, a dictionary keyed by the reduction over tokens.

        Args:
            rows: activations of each rollout at ``tap``, ``(tokens, width)``.

        Raises:
            ValueError: the features do not fit in memory; the message says what to do.
        """
        count = len(self.features)
        if (needed := 4 * len(POOLS) * len(rows) * count) > MAX_BYTES:
            raise ValueError(
                f"feature: {len(rows):,} rollouts × {count:,} features × {len(POOLS)} reductions take {needed / 1e9:.1f} GB, and choosing "
                f"a feature holds at most {MAX_BYTES / 1e9:.1f} GB; name the feature, or give fewer rollouts"
            )
        found = {pool: np.empty((len(rows), count), np.float32) for pool in POOLS}
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            values = self._every.score({self.tap: np.concatenate(batch)})
            for index, of_one in enumerate(np.split(values, np.cumsum([len(each) for each in batch])[:-1]), start):
                found["mean"][index], found["max"][index] = of_one.mean(axis=0, dtype=np.float64), of_one.max(axis=0)
        return found


def choose_feature(
    pooled: dict[str, NDArray[np.float32]], positive: NDArray[np.bool_], weights: NDArray[np.float64]
) -> tuple[str, int, float]:
    """Chooses the reduction and the column of the feature with the highest AUROC; a feature that fires on negatives is not turned round.

    Args:
        pooled: features of rollouts, ``(n, F)``, a dictionary keyed by the reduction.
        positive: labels, ``(n,)`` bool, of both classes.
        weights: how many times each rollout counts, ``(n,)``.

    Returns:
        The reduction, the column, and their AUROC.
    """
    best = (POOLS[0], 0, -1.0)
    for pool, rows in pooled.items():
        exact = rows.astype(np.float64) if rows.shape[1] <= _SHORTLIST else rows
        above, below = (np.average(exact[side], axis=0, weights=weights[side]) for side in (positive, ~positive))
        apart = (above - below) / (exact.std(axis=0) + 1e-12)
        for column in np.argsort(-apart, kind="stable")[:_SHORTLIST]:
            if (found := auroc(rows[:, column], positive, weights)) > best[2]:
                best = (pool, int(column), found)
    return best


def _with(asked: ImportOptions, features: tuple[int, ...]) -> ImportOptions:
    return ImportOptions(asked.hidden_size, asked.num_hidden_layers, asked.layer_norms, features=features)
